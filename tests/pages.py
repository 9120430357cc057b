"""What a Markdown page holds: its fences and their marks, its commands, its paths and links."""

import contextlib
import dataclasses
import re
import shlex

from conftest import ROOT

from vit_jax.__main__ import COMMANDS
from vit_jax.flags import make_parser
from vit_jax.training.config_file import load_config

DOCS = sorted((ROOT / "docs").rglob("*.md"))
_MARK = re.compile(r"<!-- needs: (.+) -->")
_COMMAND = re.compile(r"^[^#\n]*?\b(?:python -m vit_jax|vit-jax) ([a-z][^\n\";`]+)", re.M)


# Options that the launcher of a cluster has.
@dataclasses.dataclass(frozen=True)
class Fence:
    """A fenced piece of a page; `needs` is what its mark says that it needs, if there is one."""

    language: str
    text: str
    needs: str = ""


def fences(text):
    """Yields the fences of a page, in order."""
    before, inside = "", None
    for line in text.splitlines():
        if inside is None and line.startswith("```"):
            mark = _MARK.fullmatch(before)
            language, inside, needs = line[3:], [], mark[1] if mark else ""
        elif inside is not None and line == "```":
            yield Fence(language, "\n".join(inside), needs)
            inside = None
        elif inside is not None:
            inside.append(line)
        before = line
    assert inside is None, "a fence has no end"


def joined(text):
    """The text with lines that a backslash continues (in docstrings, two) as one."""
    return re.sub(r"\\{1,2}\n\s*", " ", text)


def commands(text):
    """The arguments of every `vit-jax` and `python -m vit_jax` in a text, also behind others."""
    return [shlex.split(command.split("#")[0]) for command in _COMMAND.findall(joined(text))]


def check_command(argv):
    """Parses a command, and loads its config with its overrides."""
    args, rest = make_parser(COMMANDS).parse_known_args(argv)
    assert all(flag.startswith("--config.") for flag in rest), argv
    if getattr(args, "config", None):
        # What a shell would fill in is not known here.
        with contextlib.chdir(ROOT):
            load_config(args.config, [flag for flag in rest if "$" not in flag])


def paths(text):
    """The files and folders of the repository that a page names in code."""
    return set(re.findall(r"`((?:vit_jax|configs|experiments|tests|docs)/[\w./]+)`", text))


def make_targets(text):
    return set(re.findall(r"(?:^|`|=\S+ )make ([a-z-]+)", text, re.M))


def links(text):
    """Yields the targets of links that are no addresses: a path, and what is behind its #."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(text):
    """What GitHub calls a page's headings: lower case, words and hyphens, hyphens for spaces."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
