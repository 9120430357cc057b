"""Loads a config file, with command line overrides, into a `Config`."""

import contextlib
import functools
import logging
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from vit_jax.data.config import is_possible
from vit_jax.errors import UserError, nearest, outermost
from vit_jax.models.config import pair
from vit_jax.recipes import find, run_file
from vit_jax.training.config import DURATIONS, SIDES, Config, not_none, typed_keys, unpack

logger = logging.getLogger(__name__)


def load_config(spec: str, overrides: Sequence[str] = ()) -> Config:
    """Loads a config file and applies `--config.KEY=VALUE` flags to it.

    Args:
      spec: `FILE.py` or `FILE.py:ARGUMENT`, or a recipe's name in the file's place (see
        `recipes.find`); the file defines get_config, which gets the argument.
      overrides: flags for any key of the config, whether the file sets it or not. None unsets a
        key. A flag that sets a duration clears the file's. The end of a key will do if no other
        key ends so, or only in sections of its own section: `--config.lr` sets optim.lr, with a
        message.

    Raises:
      UserError: no such file or key, a value of another type, or an inconsistent config.
    """
    return overridden(run_config_file(spec), overrides)


def overridden(config: dict[str, Any], overrides: Sequence[str]) -> Config:
    """Applies flags, as for `load_config`, to nested dicts and returns the config."""
    return apply(config, given_by_flags(config, overrides))


def apply(config: dict[str, Any], given: Mapping[str, str]) -> Config:
    """Applies the texts of flags, key -> text, to nested dicts and returns the config."""
    keys = dict(typed_keys(Config, config))
    for name, text in given.items():
        section = text == "None" and any(key.startswith(f"{name}.") for key in keys)
        if name not in keys and not section:
            # --workdir is among the suggestions, too.
            near = nearest(name, [*keys, "--workdir"])
            raise UserError(f"unknown config key in --config.{name}={text}; {near}")
        *parents, last = name.split(".")
        inside = config
        for parent in parents:
            if inside.get(parent) is None:
                inside[parent] = {}
            inside = inside[parent]
            if not isinstance(inside, dict):
                raise UserError(f"config {parent} is {inside!r}; expected a section with keys")
        inside[last] = None if text == "None" else read_value(name, text, keys[name])
        if name in SIDES and text != "None":
            pair(inside[last], last)
    if any(name in DURATIONS for name in given):
        for name in set(DURATIONS) - set(given):
            config[name] = None
    return unpack(Config, config)


def given_by_flags(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Parses flags to key -> text; the last one counts if a key is repeated."""
    for flag in overrides:  # which may name new groups
        if group := re.match(r"--config\.optim\.groups\.([^.=]+)\.[^.=]+=", flag):
            optim = config.get("optim") or {}
            config["optim"] = {**optim, "groups": {**(optim.get("groups") or {})}}
            config["optim"]["groups"].setdefault(group[1], {})
    keys = [key for key, _ in typed_keys(Config, config)]
    found: dict[str, str] = {}
    for flag in overrides:
        name, _, text = flag.removeprefix("--config.").partition("=")
        name = _whole_name(name, keys)
        if found.get(name, text) != text:
            logger.info("--config.%s=%s counts, not the %s before it", name, text, found[name])
        found[name] = text
    for name, text in found.items():
        for other in found:
            if text == "None" and other.startswith(f"{name}."):
                raise UserError(
                    f"--config.{name}=None and --config.{other}={found[other]} exclude each other"
                )
    return found


def _whole_name(name: str, keys: Iterable[str]) -> str:
    """The key that a flag's name is the end of, such as "optim.lr" for "lr", if it is only one's.

    A section's own key goes before those of sections in it, such as optim.probe.lr. Names of keys
    and sections, and unknown ones, are returned as they are.

    Raises:
      UserError: several keys end so.
    """
    if name in keys or any(key.startswith(f"{name}.") for key in keys):
        return name
    ends = outermost([key for key in keys if key.endswith(f".{name}") and is_possible(key)])
    if len(ends) > 1:
        several = ", ".join(f"--config.{key}" for key in ends)
        raise UserError(f"--config.{name} may be any of {several}: write one of them")
    if ends:
        _mention_name(name, ends[0])
    return ends[0] if ends else name


@functools.cache
def _mention_name(name: str, key: str) -> None:
    logger.info("--config.%s sets %s", name, key)


_EXPECTED = {int: "a whole number", float: "a number", bool: "True or False"}
_TRUTH = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def read_value(name: str, text: str, kind: Any) -> Any:
    """Parses a flag's value as the type `kind`; a tuple is "(0.3, 0.6)", "0.3,0.6" or "64x96".

    Raises:
      UserError: it is of another type.
    """
    kind = not_none(kind)
    kind = typing.get_origin(kind) or kind
    if kind is tuple:
        return _items(text)
    if kind not in _EXPECTED:
        return text
    try:
        if kind is bool:
            return _TRUTH[text.strip().lower()]
        number = float(text)  # "1e6" is a whole number, too
        return number if kind is float else int(text) if _is_digits(text) else _whole(number)
    except (KeyError, ValueError, OverflowError):
        raise UserError(f"{name} is {text!r}; expected {_EXPECTED[kind]}") from None


def _is_digits(text: str) -> bool:
    return text.strip().lstrip("+-").isdecimal()


def _whole(number: float) -> int:
    if number != int(number) or abs(number) > 2**53:
        raise ValueError
    return int(number)


def _items(text: str) -> tuple[int | float | str, ...]:
    text = text.strip()
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]
    if re.fullmatch(r"\d+(x\d+)+", text):
        text = text.replace("x", ",")
    return tuple(_item(each.strip()) for each in text.split(",") if each.strip())


def _item(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def run_config_file(spec: str) -> dict[str, Any]:
    """What a config file returns, as nested dicts."""
    path, argument = find(spec)
    with _importable(os.path.dirname(os.path.abspath(path))):
        module = run_file(path)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path} is no config file: it has no function get_config")
        try:
            config = module.get_config(argument) if argument else module.get_config()
        except (ValueError, TypeError) as error:
            raise UserError(f"{spec}: {error}") from None
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{path} is no config file: get_config returns no ConfigDict")
    return config.to_dict()


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Lets config files of a folder import one another, separately for each folder."""
    sys.path.insert(0, folder)
    before = set(sys.modules)
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if os.path.dirname(getattr(sys.modules[name], "__file__", None) or "") == folder:
                del sys.modules[name]


def as_flags(overrides: Mapping[str, Any]) -> list[str]:
    """The flags of Python values: {"optim": {"lr": 1e-3}} and {"optim.lr": 1e-3} are the same.

    Raises:
      UserError: a value that no flag can express.
    """
    flags = []
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            flags += as_flags({f"{key}.{inner}": each for inner, each in value.items()})
        else:
            flags.append(f"--config.{key}={plain(key, value)}")
    return flags


def plain(name: str, value: Any) -> Any:
    """Converts a value to what a flag can express; NumPy's numbers become Python's.

    Raises:
      UserError: it is something else; the message begins with `name`.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and hasattr(value, "dtype"):
        value = value.item() if value.ndim == 0 else tuple(value.tolist())
    if isinstance(value, (list, tuple)):
        return tuple(plain(name, each) for each in value)
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise UserError(
            f"{name} is {value!r}; an override is a number, a text, a bool, None or a "
            "tuple of these, and a key of a section is written section.key"
        )
    return value
