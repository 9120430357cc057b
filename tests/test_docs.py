"""What the README and docs/ say is true: commands and files exist, names are real, snippets run."""

import pathlib
import re

import pytest
from conftest import ROOT
from pages import DOCS, anchors, check_command, commands, links, make_targets, paths

import vit_jax

README = (ROOT / "README.md").read_text()
PAGES = {page.relative_to(ROOT): page.read_text() for page in (ROOT / "README.md", *DOCS)}
PAGES[pathlib.Path("CONTRIBUTING.md")] = (ROOT / "CONTRIBUTING.md").read_text()


def test_every_command_parses():
    configs = [path.read_text() for path in sorted((ROOT / "configs").glob("*.py"))]
    found = commands("\n".join([*PAGES.values(), *configs]))
    assert len(found) >= 40
    for argv in {tuple(argv): argv for argv in found}.values():
        check_command(argv)


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = make_targets("".join(PAGES.values()))
    assert {"train", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("name", sorted(paths("".join(PAGES.values()))))
def test_every_path_exists(name):
    assert (ROOT / name).exists()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page):
    for path, anchor in links(PAGES[page]):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor and target.exists():
            assert anchor in anchors(target.read_text()), f"{path}#{anchor}"


def test_every_function_of_the_papers_table_exists():
    table = (ROOT / "docs/explanation/paper.md").read_text()
    named, source = 0, ""
    for name in re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\|.*\|$", table, re.M))):
        if name.endswith(".py"):
            source = (ROOT / name).read_text()
        else:
            assert re.search(rf"(def|class) {name}\b|\b{name} = ", source), name
            named += 1
    assert named >= 15


def test_the_map_names_every_file():
    page = (ROOT / "docs/explanation/code.md").read_text()
    rooms = dict(re.findall(r"^### `vit_jax/([\w/]*?)/?`$(.*?)(?=^##)", page, re.M | re.S))
    for path in (ROOT / "vit_jax").glob("**/*.py"):
        room, name = path.relative_to(ROOT / "vit_jax").parent.as_posix(), path.name
        if name != "__init__.py" and room != "data/forms":
            assert f"| `{name}` |" in rooms[room.strip(".")], path


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs/reference/api.md").read_text()
    named = " ".join(re.findall(r"^```{api} (.+)$", page, re.M)).split()
    assert set(vit_jax.__all__) <= set(named)


def test_the_readme_is_short():
    """What it names, CI may run."""
    assert len(README.splitlines()) <= 150
    assert make_targets(README) >= {"train", "test", "test-extras", "test-parity", "docs"}


def test_the_notebook_snippet_runs(tiny_run, monkeypatch, tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    source = vit_jax.load(tiny_run[0])
    assert source.labels[3] == "3"
    runs = tmp_path / "runs"
    runs.mkdir()
    for name in re.findall(r'load\("runs/([\w]+)"\)', code):
        (runs / name).symlink_to(tiny_run[0])
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README", "exec"), {})
    assert pathlib.Path("runs").is_dir()
