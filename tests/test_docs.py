"""What the README says is true: its commands exist, its names are real, its snippets run."""

import pathlib
import re
import shlex

import pytest
from conftest import ROOT

import vit_jax
from vit_jax.__main__ import make_parser
from vit_jax.training.config import load_config

README = (ROOT / "README.md").read_text()


def test_every_command_parses():
    configs = [path.read_text() for path in sorted((ROOT / "configs").glob("*.py"))]
    text = "\n".join([README, *configs]).replace("\\\\\n", " ").replace("\\\n", " ")
    commands = re.findall(r"^ *(?:\$ )?python -m vit_jax (.+)$", text, re.M)
    assert len(commands) >= 4
    for command in commands:
        args, rest = make_parser().parse_known_args(shlex.split(command.split("#")[0]))
        assert all(flag.startswith("--config.") for flag in rest), command
        if getattr(args, "config", None):
            load_config(str(ROOT / args.config), rest)


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\bmake ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"train", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`((?:vit_jax|configs|experiments|tests)/[\w./]+)`", README)))
)
def test_every_path_exists(name):
    assert (ROOT / name).exists()


def test_every_function_of_the_papers_table_exists():
    table = README.split("## From the paper to the code")[1]
    named, source = 0, ""
    for name in re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\|.*\|$", table, re.M))):
        if name.endswith(".py"):
            source = (ROOT / name).read_text()
        else:
            assert re.search(rf"(def|class) {name}\b|\b{name} = ", source), name
            named += 1
    assert named >= 15


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
