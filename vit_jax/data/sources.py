"""Where examples come from: random access by index, opened by one string."""

import os
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from vit_jax.data.forms.archives import tar
from vit_jax.data.forms.arrays import arrays, digits
from vit_jax.data.forms.custom import python
from vit_jax.data.forms.files import folder
from vit_jax.data.forms.fractals import open_fractals
from vit_jax.data.forms.hub import hub
from vit_jax.data.forms.idx import idx
from vit_jax.data.forms.listed import table
from vit_jax.data.forms.records import records
from vit_jax.data.forms.scenes import scenes
from vit_jax.data.forms.tfds import tfds
from vit_jax.data.forms.vtab import vtab
from vit_jax.errors import UserError, nearest


@runtime_checkable
class Source(Protocol):
    """Random access to labelled images. `source[i]` depends on nothing but i.

    `label_names[c]` is the name of class c; `fingerprint` changes when the examples do. A source
    without `__len__` is endless. Sources are sent to worker processes: small when pickled.

    A source may have an attribute `multi_label`; where it is True, images have any number of
    labels, and `label` is a tuple of ints. One with an attribute `masks` that is True has a class
    for each pixel: its images are pixels, no files, and `label` is int32 [h w] beside them.
    `passed_over`, where it has one, is a `files.PassedOver`: what lay among the images unread.
    """

    label_names: tuple[str, ...]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"image": uint8 [h w c] or an image file's bytes, "label": int, "name": str}.

        `name` says in messages which example it is; it may be left out.
        """
        ...

    @property
    def fingerprint(self) -> str: ...


SOURCES: dict[str, Callable[[str, str], Source]] = {
    "digits": digits,
    "arrays": arrays,
    "folder": folder,
    "tar": tar,
    "zip": tar,
    "table": table,
    "idx": idx,
    "hf-data": hub,
    "python": python,
    "tfds": tfds,
    "records": records,
    "vtab": vtab,
    "fractals": open_fractals,
    "scenes": scenes,
}


def open_source(spec: str, split: str) -> Source:
    """Opens `NAME` or `NAME:ARGUMENT`, such as "digits" or "folder:/data/pets".

    Raises:
      UserError: no such source, split or file, or a file of another form.
    """
    name, _, argument = spec.partition(":")
    if (
        name not in SOURCES
        and ":" not in spec.partition(os.sep)[0]
        and (os.sep in spec or os.path.exists(spec))
    ):
        there = "give its kind, as in folder:PATH" if os.path.exists(spec) else "it is not there"
        raise UserError(f"data source {spec!r}: a path alone names no source ({there})")
    if name not in SOURCES:
        raise UserError(f"data source {spec!r}: no source {name!r}; {nearest(name, SOURCES)}")
    return SOURCES[name](os.path.expanduser(argument), split)


# Sources whose argument begins with a path, and those where it may.
_PATHS, _MAYBE_PATHS = (
    ("folder", "tar", "zip", "arrays", "records", "table", "idx"),
    ("tfds", "hf-data"),
)


def located(spec: str) -> str:
    """The same source from wherever it is named: its path absolute, if it has one."""
    name, _, argument = spec.partition(":")
    path = os.path.expanduser(argument)
    is_path = name in _PATHS or (name == "python" and ".py:" in path)
    if name in _MAYBE_PATHS:
        is_path = path.startswith(("/", ".")) or os.path.isdir(path.partition(",")[0])
    if not is_path or "://" in path:
        return spec
    return f"{name}:{os.path.join(os.getcwd(), path)}"
