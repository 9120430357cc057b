"""What the keys of a config mean, from its dataclasses' docstrings, and what a config resolves to.

`vit-jax config` prints both; `python -m vit_jax.training.reference` docs/reference/config.md.
"""

import contextlib
import dataclasses
import inspect
import itertools
import os
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from vit_jax.checkpoints.card import OBJECTIVES
from vit_jax.data import config as data
from vit_jax.data import images, transforms
from vit_jax.data.forms.vtab import TASKS
from vit_jax.errors import UserError, nearest
from vit_jax.models import relative, rotary
from vit_jax.models.config import CHOICES, SECTIONS, ResNetConfig, ViTConfig
from vit_jax.models.posembed import NATIVE_METHODS, RESIZE_METHODS
from vit_jax.models.variants import variant_fields, variant_kind
from vit_jax.recipes import recipes
from vit_jax.training import distill, optim
from vit_jax.training.config import CHOSEN, MODEL_KEYS, SIDES, WINDOWS, Config, not_none
from vit_jax.training.config_file import apply, given_by_flags, run_config_file
from vit_jax.training.evaluation.evaluators import EVALUATORS, SEVERAL, Evaluator

# The values that texts may have, by the key or by the last part of it.
KNOWN = {
    **CHOICES,
    **rotary.CHOICES,
    **{f"model.relative_bias.{name}": choices for name, choices in relative.CHOICES.items()},
    **transforms.CHOICES,
    "jpeg": images.JPEG_MODES,
    "on_corrupt": data.ON_CORRUPT,
    "objective": tuple(OBJECTIVES),
    "precision": CHOICES["dtype"],
    "head": ("fresh", "keep"),
    "position_resize": RESIZE_METHODS,
    "native_resize": NATIVE_METHODS,
    "optim.name": optim.NAMES,
    "schedule": optim.SCHEDULES,
    "decayed": optim.DECAYED,
    "mu_dtype": optim.MU_DTYPES,
    "type": tuple(EVALUATORS),
    "several": SEVERAL,
    "windows": WINDOWS,
    "kind": distill.KINDS,
    "tasks": tuple(TASKS),
}
# Keys of the section `model` that have another default than the field, or are none.
_DEFAULTS = dict.fromkeys(
    ("width", "depth", "mlp_dim", "num_heads", "patch_size", "resnet", "resnet_width"),
    "the variant's",
)
_DEFAULTS |= {"num_classes": "the data's", "patch_outputs": "the objective's"}
_NO_FIELDS = dict.fromkeys(("variant", "head", "position_resize", *CHOSEN, "fresh"), "None")
_TYPES = {int: "whole number", float: "number", bool: "True or False", str: "text"}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A key of a config.

    Attributes:
      key: its name, such as "optim.lr"; the name of an evaluator is NAME.
      kind: what its values are.
      default: what it is if neither file nor flag says it; None if one of them must.
      meaning: what it does, as a sentence without a full stop.
      only: what alone has such a key, such as "ViT"; "" if nothing lacks it.
    """

    key: str
    kind: str
    default: str | None
    meaning: str
    only: str = ""

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it may have; () if there is no list of them."""
        return KNOWN.get(self.key, KNOWN.get(self.key.rpartition(".")[2], ()))


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a config: its name ("" is the config itself), what it is, and its own keys."""

    name: str
    meaning: str
    leaves: list[Leaf]


def meanings(kind: type) -> dict[str, str]:
    """The "Attributes:" in the docstrings of a class and its bases, name -> text."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        text = inspect.cleandoc(vars(each).get("__doc__") or "")
        block = re.search(r"^Attributes:\n((?:  .*\n?)+)", text, re.M)
        entries = re.findall(r"^  ([\w.]+): (.*(?:\n    .*)*)", block[1] if block else "", re.M)
        found |= {name: " ".join(texts.split()).removesuffix(".") for name, texts in entries}
    return found


def sections(kind: Any = Config, name: str = "", only: str = "") -> Iterator[Section]:
    """Every section of a config, with all its keys, in order; evaluators by type."""
    hints, texts = typing.get_type_hints(kind), meanings(kind)
    prefix = f"{name}.".lstrip(".")
    leaves, nested = [], []
    for field in dataclasses.fields(kind):
        key, inner = f"{prefix}{field.name}", not_none(hints[field.name])
        if not data.is_possible(key):
            continue
        if key == "model":
            nested.append(Section(key, texts[key], list(_model_leaves(texts))))
            for each, section in SECTIONS.items():
                nested += sections(section, f"model.{each}")
        elif inner == dict[str, Evaluator]:
            for type_name, evaluator in EVALUATORS.items():
                nested += sections(evaluator, f"{key}.NAME", f"type {type_name}")
        elif inner == dict[str, optim.Group]:
            nested += sections(optim.Group, f"{key}.NAME")
        elif dataclasses.is_dataclass(inner) and not only:
            nested += sections(inner, key)
        else:
            default = None if field.default is dataclasses.MISSING else str(field.default)
            kinds = _kind(inner)
            if inner != hints[field.name]:
                kinds = f"{kinds.replace(' or', ',')} or None"
            leaves.append(Leaf(key, kinds, default, texts[field.name], only))
    text = re.split(r"^(?:Attributes|Raises):", inspect.cleandoc(kind.__doc__), flags=re.M)[0]
    yield Section(name, text.strip(), leaves)
    yield from nested


def _kind(kind: Any) -> str:
    if kind is data.Split:
        return "section, with the keys of data.test"
    if typing.get_origin(kind) is tuple:
        first, *rest = typing.get_args(kind)
        return f"{_TYPES[first]}s" if rest == [Ellipsis] else f"{len(rest) + 1} {_TYPES[first]}s"
    return _TYPES[kind]


def _model_leaves(texts: dict[str, str]) -> Iterator[Leaf]:
    """The keys of the section `model`; `texts` has the meanings of those that are no field."""
    vit, resnet = (
        {field.name: field.default for field in dataclasses.fields(kind)}
        for kind in (ViTConfig, ResNetConfig)
    )
    fields = meanings(ViTConfig)
    for name, kind in MODEL_KEYS.items():
        if dataclasses.is_dataclass(kind):
            continue
        default = {**_NO_FIELDS, **_DEFAULTS}.get(name) or str(vit[name])
        if name not in _DEFAULTS and resnet.get(name, vit.get(name)) != vit.get(name):
            default += f", of a ResNet {resnet[name]}"
        text = "whole numbers" if kind is tuple else _kind(kind)
        text = "whole number, or (h, w)" if f"model.{name}" in SIDES else text
        meaning = texts[f"model.{name}"] if name in _NO_FIELDS else fields[name]
        only = "" if name in {*resnet, *_NO_FIELDS} else "ViT"
        yield Leaf(f"model.{name}", text, default, meaning, only)


def matching(prefix: str) -> list[Leaf]:
    """The keys of a section ("optim."), or those with a name or the last part of one ("lr").

    Raises:
      UserError: there is no such key or section.
    """
    every = list(itertools.chain.from_iterable(section.leaves for section in sections()))
    inside = f"{prefix.rstrip('.')}."
    found = [leaf for leaf in every if leaf.key == prefix or leaf.key.startswith(inside)]
    found = found or [leaf for leaf in every if leaf.key.endswith(f".{prefix}")]
    if not found:
        near = nearest(prefix.rstrip("."), [leaf.key for leaf in every])
        raise UserError(f"there is no config key {prefix!r}; {near}")
    return found


def is_key(text: str) -> bool:
    """Whether a word is a key or a section, and not a config file.

    Raises:
      UserError: it is neither.
    """
    if text.endswith("."):
        return True
    if text in recipes() or os.sep in text or ":" in text or text.endswith(".py"):
        return False
    with contextlib.suppress(UserError):
        return bool(matching(text))
    known = [*recipes(), *(leaf.key for section in sections() for leaf in section.leaves)]
    raise UserError(f"{text!r} is no recipe, no FILE.py and no config key; {nearest(text, known)}")


def explained(leaf: Leaf, value: str = "") -> str:
    """A key as lines of text: its name, "=VALUE" if given, type and default; its meaning."""
    default = "required" if leaf.default is None else f"default {leaf.default}"
    kind = " | ".join(leaf.choices) or leaf.kind
    only = f" ({leaf.only})" if leaf.only else ""
    lines = textwrap.wrap(f"{kind}; {default}", 96) + textwrap.wrap(f"{leaf.meaning}.", 96)
    return "\n".join([f"{leaf.key}{value}{only}", *(f"    {line}" for line in lines)])


def resolved(spec: str, overrides: Sequence[str] = ()) -> dict[str, tuple[Any, str]]:
    """Every key of a config with its value, and where that is from.

    Args:
      spec, overrides: as for `load_config`.

    Returns:
      key -> (value, "flag", "file", "variant" or "default").

    Raises:
      UserError: as `load_config`.
    """
    raw = run_config_file(spec)
    said, flags = dict(_flattened(raw)), given_by_flags(raw, overrides)
    config = apply(raw, flags)
    unsaid = _unsaid(config)
    model = {**config.model, **{name: value for name, (value, _) in unsaid.items()}}
    found = {}
    for key, value in _flattened(dataclasses.replace(config, model=model)):
        if not data.is_possible(key):
            continue
        by_flag = any(key == flag or key.startswith(f"{flag}.") for flag in flags)
        origin = "flag" if by_flag else "file" if said.get(key) is not None else "default"
        found[key] = value, origin
    return {**found, **{f"model.{name}": texts for name, texts in unsaid.items()}}


def _flattened(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of dataclasses and dicts by name."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flattened(inner, f"{key}.{name}".lstrip("."))
    else:
        yield key, value


def _unsaid(config: Config) -> dict[str, tuple[Any, str]]:
    """The fields of the model that the section `model` lacks: the variant's, and defaults."""
    name = config.model.get("variant")
    sizes = variant_fields(name) if name else {}
    fields = {field: (value, "variant") for field, value in sizes.items()}
    if name and not config.init_from:
        for field in dataclasses.fields(variant_kind(sizes)):
            if field.name not in ("dtype", "num_classes", "patch_outputs", *SECTIONS):
                fields.setdefault(field.name, (field.default, "default"))
    return {field: texts for field, texts in fields.items() if field not in config.model}


def lines(spec: str, overrides: Sequence[str] = (), prefix: str | None = None) -> Iterator[str]:
    """The text of `vit-jax config FILE [PREFIX]`."""
    found = resolved(spec, overrides)
    if prefix:
        for leaf in matching(prefix):
            texts = "={0[0]} ({0[1]})".format(found[leaf.key]) if leaf.key in found else ""
            yield explained(leaf, texts)
        return
    for key, (value, origin) in found.items():
        yield f"{origin:9}{key}={value}"
    if found["init_from"][0]:
        yield "other fields of the model are those of init_from"


_HEAD = """# Keys of a config

A config file sets any of these keys, and a flag `--config.KEY=VALUE` any of them again. This page
is written from the docstrings of the config's dataclasses, as are these in a terminal:
```bash
vit-jax config digits           # the value of every key, and what it is from
vit-jax config digits optim.    # what the keys of a section mean, and their values
vit-jax config lr               # what a key means
```
"""
_TITLES = {"": "The config itself", "data.train": "`data.train`, `data.val`, `data.test`"}


def page() -> str:
    """The text of docs/reference/config.md."""
    parts = [_HEAD]
    for section in sections():
        if section.name in ("data.val", "data.test") or not section.leaves:
            continue
        title = _TITLES.get(section.name, f"`{section.name}`")
        of_type = section.name.endswith("NAME") and section.leaves[0].only
        parts.append(f"## {title}, {of_type}" if of_type else f"## {title}")
        parts.append(f"\n{_sentence(section.meaning)}\n")
        parts.append("| key | values | default | meaning |\n|---|---|---|---|")
        for leaf in section.leaves:
            _, _, name = leaf.key.rpartition(".")
            kind = ", ".join(f"`{each}`" for each in leaf.choices) or leaf.kind
            default = "required" if leaf.default is None else leaf.default
            alone = "ViT" if leaf.only == "ViT" else ""
            if section.name == "data.train" and name in data.TRAINING_KEYS:
                alone = "data.train"
            meaning = _sentence(leaf.meaning) + (f" `{alone}` only." if alone else "")
            cells = [each.replace("|", "\\|") for each in (kind, default, meaning)]
            parts.append(f"| `{name}` | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].removesuffix('.')}."


if __name__ == "__main__":
    print(page(), end="")
