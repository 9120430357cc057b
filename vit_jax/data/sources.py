"""Where examples come from: random access by index, opened by one string."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vit_jax.data.archives import tar
from vit_jax.data.arrays import arrays, digits
from vit_jax.data.files import folder
from vit_jax.data.fractals import open_fractals
from vit_jax.data.records import records, tfds
from vit_jax.data.scenes import scenes
from vit_jax.data.vtab import vtab
from vit_jax.errors import UserError, nearest

logger = logging.getLogger(__name__)


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
    if name not in SOURCES:
        raise UserError(f"data source {spec!r}: no source {name!r}; {nearest(name, SOURCES)}")
    return SOURCES[name](argument, split)


@dataclasses.dataclass(frozen=True, eq=False)
class Relabelled:
    """A source whose class c is class `classes[c]` of another list of names."""

    source: Source
    classes: tuple[int, ...]
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        label = example["label"]
        if isinstance(label, np.ndarray):
            known = (label >= 0) & (label < len(self.classes))
            classes = np.array((*self.classes, -1), np.int32)
            return {**example, "label": classes[np.where(known, label, -1)]}
        if isinstance(label, tuple):
            return {**example, "label": tuple(self._class(each) for each in label)}
        return {**example, "label": self._class(label)}

    def _class(self, label: int) -> int:
        # A label out of range stays one, and is reported where it is read.
        return self.classes[label] if 0 <= label < len(self.classes) else -1

    @property
    def multi_label(self) -> bool:
        return getattr(self.source, "multi_label", False)

    @property
    def masks(self) -> bool:
        return getattr(self.source, "masks", False)

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint


def with_labels(source: Source, labels: tuple[str, ...]) -> Source:
    """The source with the classes of a model, which may have more of them, in another order.

    Where no name is the same but their number is, as with class ids and their descriptions,
    classes are taken in order, with a warning.

    Raises:
      UserError: the source has classes that the model has not.
    """
    names = source.label_names
    if names == labels:
        return source
    if len(set(labels)) < len(labels) or len(set(names)) < len(names):
        raise UserError("has class names that occur twice, so that classes cannot go by names")
    unknown = [name for name in names if name not in set(labels)]
    if not unknown:
        return Relabelled(source, tuple(labels.index(name) for name in names), labels)
    if len(unknown) == len(names) == len(labels):
        logger.warning(
            "the data's classes (%s, ...) are taken for the model's (%s, ...), in order",
            names[0],
            labels[0],
        )
        return Relabelled(source, tuple(range(len(labels))), labels)
    raise UserError(
        f"has {len(names)} classes, the model {len(labels)}, and the model knows no "
        + ", ".join(repr(name) for name in unknown[:3])
    )
