"""Recipes: the config files that come with the package, which `--config=NAME` finds from anywhere.

They are `configs/` of the repository, and `vit_jax/configs/` of an installed package (see setup.py)
They are run as files and never imported as modules.
"""

import ast
import dataclasses
import functools
import importlib.util
import logging
import os
import shlex
import types
from pathlib import Path

from vit_jax.errors import UserError, nearest

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A config file that comes with the package.

    Attributes:
      name: what `--config=NAME` calls it.
      path: its file.
      summary: the first line of its docstring.
      argument: the first line of get_config's docstring: the form of ARGUMENT in NAME:ARGUMENT.
      default: the argument that it has without one.
    """

    name: str
    path: Path
    summary: str
    argument: str
    default: str


def run_file(path: str) -> types.ModuleType:
    """Runs a file of Python as it is now; returns it as a module.

    Python's own cache takes two versions of one second and one length for the same.
    """
    spec = importlib.util.spec_from_file_location("file", path)
    module = importlib.util.module_from_spec(spec)
    exec(spec.loader.source_to_code(spec.loader.get_data(path), path), module.__dict__)
    return module


def folder() -> Path:
    """Where the recipes are: in the package if it is installed, beside it in a checkout."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


@functools.cache
def recipes() -> dict[str, Recipe]:
    """All recipes by name, from their files' texts; nothing is run."""
    found = {}
    for path in sorted(folder().glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        for node in module.body:
            if isinstance(node, ast.FunctionDef) and node.name == "get_config":
                summary, argument = (_first_line(each) for each in (module, node))
                (default,) = map(ast.literal_eval, node.args.defaults)
                found[path.stem] = Recipe(path.stem, path, summary, argument, default)
    return found


def _first_line(node: ast.Module | ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]


def find(spec: str) -> tuple[str, str]:
    """Splits FILE.py[:ARGUMENT] or NAME[:ARGUMENT] into the path of a file and the argument.

    What ends in .py is a file, anything else the name of a recipe; if there is a file NAME.py in
    the current folder as well, a message says that it is not read.

    Raises:
      UserError: there is no such file or recipe.
    """
    name, _, argument = os.path.expanduser(spec).partition(":")
    if name.endswith(".py"):
        if os.path.isfile(name):
            return name, argument
        text, stem = f"there is no config file {name!r}", Path(name).stem
        if stem in recipes():
            flag = f"--config={stem}" + (f":{argument}" if argument else "")
            raise UserError(f"{text}; for the recipe of this name write {shlex.quote(flag)}")
        raise UserError(
            f"{text} (--config={spec}); expected FILE.py, or a recipe of `vit-jax configs`"
        )
    if name in recipes():
        path, here = recipes()[name].path, Path(f"{name}.py")
        if here.is_file() and not here.samefile(path):
            _mention(name, path, here)
        return str(path), argument
    if os.path.isfile(f"{name}.py"):
        raise UserError(f"there is no recipe {name!r}; for the file write --config={name}.py")
    if os.sep in name or os.path.exists(name) or not name:
        raise UserError(
            f"{name!r} is no config file (--config={spec}); expected FILE.py, or a recipe of "
            "`vit-jax configs`"
        )
    raise UserError(
        f"there is no recipe {name!r}; {nearest(name, recipes())} (`vit-jax configs` lists them; "
        "a file's name ends in .py)"
    )


@functools.cache
def _mention(name: str, path: Path, here: Path) -> None:
    logger.info(
        "config %s is the recipe %s; for %s in this folder write --config=%s",
        *(name, path, here, here),
    )


def listing() -> str:
    """The text of `vit-jax configs`: for each recipe its argument, with an example, and summary."""
    lines = []
    for name, recipe in recipes().items():
        lines.append(f"{name}:{recipe.argument}    such as {name}:{recipe.default}")
        lines.append(f"    {recipe.summary}")
    lines.append("")
    lines.append("vit-jax config NAME:ARGUMENT          shows the config")
    lines.append("vit-jax train --config=NAME:ARGUMENT --workdir=RUN")
    return "\n".join(lines)
