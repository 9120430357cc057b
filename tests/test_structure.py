"""The rules of the house: imports run downward, nothing heavy at import, no config field unread."""

import ast
import dataclasses
import pathlib
import subprocess
import sys
import typing

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "vit_jax"
BELOW = {
    "words": set(),
    "extras": set(),
    "errors": {"words", "extras"},
    "recipes": {"errors"},
    "writing": {"errors", "objects"},
    "distributed": {"errors"},
    "compiler": set(),
    "objects": {"errors", "extras"},
    "lease": {"errors", "objects"},
    "buckets": {"errors", "writing", "distributed", "lease", "objects"},
    "models": {"errors", "compiler"},
    "data": {"errors", "writing", "extras", "objects", "lease"},
    "checkpoints": {
        *("errors", "writing", "extras", "distributed", "buckets", "objects", "compiler"),
        *("models", "data"),
    },
    "training": {
        "errors",
        "writing",
        "extras",
        "recipes",
        "buckets",
        "distributed",
        "compiler",
        "models",
        "data",
        "checkpoints",
    },
    "analysis": {
        "errors",
        "writing",
        "extras",
        "distributed",
        "compiler",
        "models",
        "data",
        "checkpoints",
        "training",
    },
    "launch": {
        *("errors", "writing", "distributed", "buckets", "models", "data", "checkpoints"),
        *("training", "recipes"),
    },
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = [name.split(".") for name in imported(path)]
    for name in names:
        if name[0] == "vit_jax" and room in BELOW and len(name) > 1:
            assert name[1] in BELOW[room] | {room}, f"{path} imports {'.'.join(name)}"
        assert name[0] not in ("configs", "experiments", "tests"), f"{path} imports {name}"
        if room == "data":
            assert name[0] not in ("jax", "flax"), f"{path} imports jax"
        if name[0] == "orbax":
            assert path.name in ("store.py", "orbax_s3.py"), f"{path} imports orbax"


def test_configs_import_nothing_of_ours():
    for path in (ROOT / "configs").rglob("*.py"):
        assert not any(name.startswith("vit_jax") for name in imported(path)), path


def test_importing_the_package_starts_nothing():
    code = (
        "import sys, vit_jax; heavy = {'jax', 'grain', 'orbax', 'matplotlib', 'tensorflow'};"
        "heavy |= {'gcsfs', 's3fs'};"
        "loaded = {*heavy, 'flax'} & set(sys.modules); assert not loaded, loaded;"
        "assert {'create', 'load', 'ViT', 'ViTConfig', 'VARIANTS'} <= set(dir(vit_jax));"
        "vit_jax.create, vit_jax.ViT, vit_jax.ViTConfig, vit_jax.VARIANTS;"
        "from jax._src import xla_bridge;"
        "assert not xla_bridge._backends, 'a device was touched';"
        "heavy.remove('jax'); assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def sections(kind):
    """The config's dataclasses, the model's among them."""
    yield kind
    for hint in typing.get_type_hints(kind).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from sections(part)


def test_every_field_of_the_config_is_read_by_something():
    from vit_jax.models.config import ViTConfig
    from vit_jax.training.config import Config

    read = {
        node.attr
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # AXES and the checks of ranges read these by their names.
    by_name = {"data", "fsdp", "tensor"}
    for kind in {*sections(Config), ViTConfig}:
        for field in dataclasses.fields(kind):
            assert field.name in read | by_name, f"nothing reads {kind.__name__}.{field.name}"


def test_every_field_of_a_model_can_be_set_by_a_flag():
    from vit_jax.models.config import SECTIONS
    from vit_jax.training.config import MODEL_KEYS
    from vit_jax.training.config_file import load_config

    examples = {str: ("x", "x"), int: ("7", 7), float: ("0.5", 0.5), bool: ("true", True)}
    examples |= {tuple: ("(8, 8)", (8, 8)), tuple[str, ...]: ("a.*,b", ("a.*", "b"))}
    flat = {name: kind for name, kind in MODEL_KEYS.items() if name not in SECTIONS}
    flags = [f"--config.model.{name}={examples[kind][0]}" for name, kind in flat.items()]
    flags.append("--config.init_from=x")  # of which some are
    model = load_config(str(ROOT / "configs" / "digits.py"), flags).model
    assert model == {name: examples[kind][1] for name, kind in flat.items()}
