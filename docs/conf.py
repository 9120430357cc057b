"""The documentation site: `make docs` builds it into build/site, without a network.

The sources are Markdown, readable where they are. The site has the repository's own folders, so
that a relative link leads to the same page in both.
"""

import json
import pathlib
import sys

from myst_parser.parsers.sphinx_ import MystParser
from sphinx.util.docutils import SphinxDirective

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "vit_jax"
author = copyright = "the vit_jax authors"
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/**/*.md",
    "experiments/README.md",
    "experiments/*/README.md",
    "experiments/notebooks/*.ipynb",
    "CONTRIBUTING.md",
]
exclude_patterns = [".*", "build", "runs", "tests", "vit_jax"]

extensions = ["myst_parser", "autoapi.extension", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["html_image"]
myst_heading_anchors = 3
highlight_language = "none"
smartquotes = False

# The docstrings are read, not imported: the site needs neither JAX nor the package.
autoapi_dirs = [str(ROOT / "vit_jax")]
autoapi_generate_api_docs = False
autoapi_python_class_content = "class"
autoapi_add_toctree_entry = False
add_module_names = False
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "vit_jax"
html_static_path = ["site"]
html_css_files = ["style.css"]
html_show_sphinx = False
html_copy_source = False
default_role = "code"  # what stands between single backticks in a docstring


class Api(SphinxDirective):
    """`{api} NAME ...`: the docstrings of public names, from the modules that they live in."""

    required_arguments, optional_arguments, final_argument_whitespace = 1, 0, True

    def run(self):
        import vit_jax

        found = []
        for name in self.arguments[0].split():
            path = f"{vit_jax._PUBLIC[name]}.{name}" if name in vit_jax._PUBLIC else name
            last = path.rpartition(".")[2]
            kind = "data" if last.isupper() else "class" if last[0].isupper() else "function"
            found.append(f".. autoapi{kind}:: {path}\n")
        return self.parse_text_to_nodes("\n".join(["```{eval-rst}", *found, "```"]))


class Commands(SphinxDirective):
    """`{commands}`: a section for each command, with a table of its flags."""

    def run(self):
        from vit_jax.__main__ import COMMANDS
        from vit_jax.flags import make_parser

        parser = make_parser(COMMANDS)
        (commands,) = (each for each in parser._actions if each.choices)
        lines = []
        for name, command in commands.choices.items():
            usage = command.format_usage().removeprefix("usage: ")
            usage = usage.replace("[-h] ", "").rstrip()
            lines += [f"## {name}", COMMANDS[name].__doc__, "```", usage, "```"]
            for group in command._action_groups:
                rows = [row(action) for action in group._group_actions if action.dest != "help"]
                if rows:
                    about = f"{group.title}: {group.description}" if group.description else ""
                    lines += [about, "", "| argument | what it is |\n|---|---|", *rows, ""]
            lines += [command.epilog or ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def row(action):
    """One flag's line of a table."""
    names = ", ".join(action.option_strings) or action.metavar or action.dest
    value = f" {action.metavar or action.dest.upper()}" if action.option_strings else ""
    text = (action.help or "").replace("%%", "%").replace("|", "\\|")
    return f"| `{names}{value}` | {text} |"


class Notebook(MystParser):
    """Reads a notebook as Markdown: its cells, and the outputs that are stored with them."""

    supported = ("notebook",)

    def parse(self, inputstring, document):
        super().parse("\n\n".join(map(cell_text, json.loads(inputstring)["cells"])), document)


def cell_text(cell):
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {})
        text = "".join(output.get("text") or data.get("text/plain", ()))
        if "image/png" in data:
            parts.append(f"![]({'data:image/png;base64,' + ''.join(data['image/png'].split())})")
        elif text.strip():
            parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts)


def setup(app):
    app.add_directive("api", Api)
    app.add_directive("commands", Commands)
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(Notebook)
    return {"parallel_read_safe": True}
