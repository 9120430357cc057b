"""The source `python:`: a function of the user."""

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np

from vit_jax.data.boxes import Boxes
from vit_jax.data.forms.class_lists import sorted_names
from vit_jax.errors import UserError, nearest


def python(argument: str, split: str) -> "CustomSource | EndlessCustomSource":
    """Calls a function with a split.

    It returns a source (see `sources.Source`), or a sequence of examples, {"image": an image file's
    bytes or uint8 [h w c], "label": a class name, a number, or a tuple of them}, which is read
    once to find its classes. Worker processes call it again. For example, emoji.py, for the source
    python:emoji.py:emoji, with npm's emoji-datasource-google:

        import json
        import pathlib

        from vit_jax.data.forms.files import percentile

        ROOT = pathlib.Path("~/package").expanduser()


        def emoji(split):
            examples = []
            for each in json.loads((ROOT / "emoji.json").read_text()):
                file = ROOT / "img/google/64" / each["image"]
                part = "train" if percentile(each["image"]) < 90 else "val"
                if part == split and file.exists():
                    image, label = file.read_bytes(), each["category"]
                    examples.append({"image": image, "label": label, "name": file.name})
            return examples


        emoji.splits = ("train", "val")

    Args:
      argument: MODULE:FUNCTION, with a module that can be imported, or the path of a .py file.
      split: the function's argument; one of its attribute `splits`, if it has that.

    Raises:
      UserError: no such module or function, or it does not return a source.
    """
    where = f"python:{argument}"
    function = _function(argument)
    known = getattr(function, "splits", None)
    if known is not None and split not in known:
        raise UserError(f"{where} has no split {split!r}; {nearest(split, known)}")
    inner = _called(argument, split)
    kind = CustomSource if isinstance(inner, Sized) else EndlessCustomSource
    source = kind(argument, split, tuple(inner.label_names), inner.fingerprint)
    vars(source)["inner"] = inner
    if not isinstance(inner, Sized) or len(inner):
        _check_example(where, inner)
    return source


def python_splits(argument: str) -> tuple[str, ...]:
    """The function's attribute `splits`, or ()."""
    return tuple(getattr(_function(argument), "splits", ()))


@dataclasses.dataclass(frozen=True, eq=False)
class EndlessCustomSource:
    """The result of a function; pickled by name, so that unpickling calls it again."""

    argument: str
    split: str
    label_names: tuple[str, ...]
    fingerprint: str

    @functools.cached_property
    def inner(self) -> Any:
        inner = _called(self.argument, self.split)
        if inner.fingerprint != self.fingerprint:
            raise UserError(
                f"python:{self.argument} gave another fingerprint in another process: "
                f"{inner.fingerprint!r}, not {self.fingerprint!r}"
            )
        return inner

    def __getstate__(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.inner[index]

    @property
    def multi_label(self) -> bool:
        return getattr(self.inner, "multi_label", False)

    @property
    def masks(self) -> bool:
        return getattr(self.inner, "masks", False)

    @property
    def boxes(self) -> bool:
        return getattr(self.inner, "boxes", False)

    def boxes_of(self, index: int) -> Boxes:
        return self.inner.boxes_of(index)


class CustomSource(EndlessCustomSource):
    """A source with a length."""

    def __len__(self) -> int:
        return len(self.inner)


class _Listed:
    """A sequence of examples as a source."""

    def __init__(self, where: str, examples: Sequence[Mapping[str, Any]]):
        digest, self._examples, labels = hashlib.sha256(), examples, []
        for index, example in enumerate(examples):
            _check_keys(f"{where}, example {index}", example)
            label = example["label"]
            labels.append([_named(where, each) for each in _several(label)])
            image = example["image"]
            identity = (labels[-1], getattr(image, "shape", None), example.get("name"))
            digest.update(repr(identity).encode())
            digest.update(image if isinstance(image, bytes) else np.ascontiguousarray(image))
        if not labels:
            raise UserError(f"{where} gave no examples")
        self.multi_label = any(isinstance(e["label"], (tuple, list)) for e in examples)
        self.label_names = sorted_names(each for label in labels for each in label)
        numbers = {name: number for number, name in enumerate(self.label_names)}
        self._labels = [tuple(sorted(numbers[name] for name in set(each))) for each in labels]
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = self._labels[index]
        return {**self._examples[index], "label": label if self.multi_label else label[0]}


def _several(label: Any) -> Sequence[Any]:
    return label if isinstance(label, (tuple, list)) else [label]


def _named(where: str, label: Any) -> str:
    if isinstance(label, str) and label.strip():
        return label.strip()
    if isinstance(label, (int, np.integer)) and not isinstance(label, bool) and label >= 0:
        return str(int(label))
    raise UserError(f"{where}: a label is {label!r}; expected the name or the number of a class")


def _function(argument: str) -> Any:
    """Imports the function from a module or a file."""
    module, _, name = argument.rpartition(":")
    if not module or not name.isidentifier():
        raise UserError(f"python:{argument}: expected MODULE:FUNCTION or FILE.py:FUNCTION")
    try:
        found = _file(module) if module.endswith(".py") else importlib.import_module(module)
    except FileNotFoundError:
        raise UserError(f"python:{argument}: there is no file {module!r}") from None
    except ModuleNotFoundError as error:
        raise UserError(
            f"python:{argument}: {error}; a file is given by its path, as in ./{module}.py:{name}"
        ) from None
    if not callable(getattr(found, name, None)):
        known = [each for each, value in vars(found).items() if callable(value)]
        raise UserError(f"python:{argument}: no function {name!r}; {nearest(name, known)}")
    return getattr(found, name)


def _file(path: str) -> Any:
    """Imports a file as a module, once in a process."""
    path = os.path.abspath(os.path.expanduser(path))
    name = f"vit_jax_source_{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        if not os.path.isfile(path):
            raise FileNotFoundError(path)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # as dataclasses and pickle look it up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _called(argument: str, split: str) -> Any:
    """Calls the function. UserError: it does not return a source."""
    where, given = f"python:{argument}", _function(argument)(split)
    names = getattr(given, "label_names", None)
    if names is None and isinstance(given, (list, tuple)):
        return _Listed(where, given)
    if not hasattr(given, "__getitem__"):
        raise UserError(
            f"{where} gave {type(given).__name__}; expected a source, or a list of examples"
        )
    if not isinstance(names, (tuple, list)) or not all(isinstance(each, str) for each in names):
        raise UserError(f"{where}: label_names is {names!r}; expected the names of the classes")
    if len(set(names)) < len(names):
        raise UserError(f"{where}: label_names has a class twice")
    fingerprint = getattr(given, "fingerprint", None)
    if not isinstance(fingerprint, str) or not fingerprint:
        raise UserError(
            f"{where}: fingerprint is {fingerprint!r}; expected text that changes when the "
            "examples do, so that no run goes on with other data than it began with"
        )
    return given


def _check_keys(where: str, example: Any) -> None:
    if not isinstance(example, Mapping) or not {"image", "label"} <= set(example):
        raise UserError(f"{where} is {_short(example)}; expected a dict with image and label")
    image = example["image"]
    if isinstance(image, bytes):
        return
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
        raise UserError(
            f"{where}: image is {_short(image)}; expected the bytes of an image file, or uint8 "
            "[h w c]"
        )


def _check_example(where: str, source: Any) -> None:
    """Raises a UserError if the first example is not valid."""
    where, example = f"{where}, example 0", source[0]
    _check_keys(where, example)
    label = example["label"]
    if getattr(source, "masks", False):
        fits = isinstance(label, np.ndarray) and label.dtype == np.uint8 and label.ndim == 2
        expected = "uint8 [h w]"
    elif getattr(source, "boxes", False):
        fits, expected = isinstance(label, Boxes), "vit_jax.data.boxes.Boxes"
        if not hasattr(source, "boxes_of"):
            raise UserError(f"{where}: a source of boxes has boxes_of(i), the boxes of example i")
    else:
        many = getattr(source, "multi_label", False)
        fits = isinstance(label, tuple) == many and all(type(n) is int for n in _several(label))
        expected = "a tuple of ints" if many else "an int (multi_label allows a tuple of them)"
    if not fits:
        raise UserError(f"{where}: label is {_short(label)}; expected {expected}")
    known = len(source.label_names)
    if not isinstance(label, np.ndarray | Boxes) and any(
        not 0 <= n < known for n in _several(label)
    ):
        raise UserError(f"{where}: label is {label}, but there are {known} classes")


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} {repr(value)[:60]}"
