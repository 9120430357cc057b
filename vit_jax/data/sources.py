"""Data sources: random access to examples by index, opened by a string such as "folder:pets"."""

import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vit_jax.data import storage
from vit_jax.data.forms.archives import tar, tar_splits
from vit_jax.data.forms.arrays import arrays, digits
from vit_jax.data.forms.coco import coco, coco_splits, is_coco
from vit_jax.data.forms.custom import python, python_splits
from vit_jax.data.forms.files import WHOLE, folder, folder_splits
from vit_jax.data.forms.fractals import open_fractals
from vit_jax.data.forms.hub import hub, hub_splits
from vit_jax.data.forms.idx import idx, idx_splits
from vit_jax.data.forms.listed import table, table_splits
from vit_jax.data.forms.pair_layouts import is_layout
from vit_jax.data.forms.pairs import pairs, pairs_splits
from vit_jax.data.forms.records import record_splits, records
from vit_jax.data.forms.scenes import scenes
from vit_jax.data.forms.tfds import prepared, tfds
from vit_jax.data.forms.vtab import SPLITS as VTAB_SPLITS
from vit_jax.data.forms.vtab import vtab
from vit_jax.data.forms.yolo import is_yolo, yolo, yolo_splits
from vit_jax.errors import UserError, nearest


@runtime_checkable
class Source(Protocol):
    """Random access to labelled images; `source[i]` depends only on i.

    `label_names[c]` is the name of class c; `fingerprint` changes when the examples do. A source
    without `__len__` is endless. Sources are pickled for worker processes, so they must be small.

    Optional attributes: with `multi_label` True, images have any number of labels, and `label` is
    a tuple of ints. With `masks` True, there is a class for each pixel: `label` is uint8 [h w],
    255 for none; `mask_size(i)` is its (h, w) without decoding it, and `palette` may have the
    colours (r, g, b) of classes. With `boxes` True, `label` is `boxes.Boxes`, which `boxes_of(i)`
    is without reading the image; `box_counts` may have the number of each example's, but for
    crowds, `category_ids` the numbers of classes in a COCO file, and `size` in an example the
    (h, w) of the image that they were drawn on. With `in_bucket` True, many examples are read at
    once, as each takes its time. `passed_over` is a `files.PassedOver`: the files skipped.
    """

    label_names: tuple[str, ...]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"image": uint8 [h w c] or an image file's bytes, "label": int, "name": str}.

        `name` identifies the example in messages; it is optional.
        """
        ...

    @property
    def fingerprint(self) -> str: ...


SOURCES: dict[str, Callable[[str, str], Source]] = {
    "digits": digits,
    "arrays": arrays,
    "folder": folder,
    "pairs": pairs,
    "coco": coco,
    "yolo": yolo,
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


def open_source(spec: str, split: str = "train") -> Source:
    """Opens `NAME` or `NAME:ARGUMENT`, such as "digits" or "folder:/data/pets".

    Raises:
      UserError: no such source, split or file, or a file of another form.
    """
    name, _, argument = spec.partition(":")
    if (
        name not in SOURCES
        and ":" not in spec.partition(os.sep)[0]
        and (os.sep in spec or storage.exists(spec))
    ):
        there = "give its kind, as in folder:PATH" if storage.exists(spec) else "it is not there"
        raise UserError(f"data source {spec!r}: a path alone names no source ({there})")
    if name not in SOURCES:
        folder = "" if ":" in spec else " (a folder is folder:PATH)"
        near = nearest(name, SOURCES)
        raise UserError(f"data source {spec!r}: no source {name!r}; {near}{folder}")
    return SOURCES[name](os.path.expanduser(argument), split)


# Sources with a path as argument, and those where it may be one.
_PATHS, _MAYBE_PATHS = (
    ("folder", "pairs", "coco", "yolo", "tar", "zip", "arrays", "records", "table", "idx"),
    ("tfds", "hf-data"),
)


def located(spec: str) -> str:
    """Makes the path in a spec, if it has one, absolute."""
    name, _, argument = spec.partition(":")
    path = os.path.expanduser(argument)
    is_path = name in _PATHS or (name == "python" and ".py:" in path)
    if name in _MAYBE_PATHS:
        is_path = path.startswith(("/", ".")) or os.path.isdir(path.partition(",")[0])
    if not is_path or "://" in path:
        return spec
    return f"{name}:{os.path.join(os.getcwd(), path)}"


def _array_splits(path: str) -> list[str]:
    try:
        with np.load(storage.local(path), allow_pickle=False) as file:
            return [name.removesuffix("_images") for name in file.files if name.endswith("_images")]
    except (ValueError, EOFError, zipfile.BadZipFile):
        return []  # opening it raises the error


def _tfds_splits(argument: str) -> list[str]:
    name = re.sub(r"(,\w+=[^,]*)+$", "", argument)
    path = name.rstrip("/")
    found = prepared(f"tfds:{argument}", name, path if storage.is_folder(path) else None)
    return list(found.info.splits)


def _three(argument: str) -> list[str]:
    return ["train", "val", "test"]


# The splits of a source, by its argument; empty if it has none.
SPLITS: dict[str, Callable[[str], Sequence[str]]] = {
    "digits": _three,
    "fractals": _three,
    "scenes": _three,
    "vtab": lambda argument: VTAB_SPLITS,
    "arrays": _array_splits,
    "records": record_splits,
    "tfds": _tfds_splits,
    "folder": folder_splits,
    "pairs": pairs_splits,
    "coco": coco_splits,
    "yolo": yolo_splits,
    "tar": tar_splits,
    "zip": tar_splits,
    "table": table_splits,
    "idx": idx_splits,
    "hf-data": hub_splits,
    "python": python_splits,
}


# The kind of a file that is given without one, by its ending.
_ENDINGS = {
    "tar": (".tar", ".tgz", *(f".tar.{each}" for each in ("gz", "bz2", "xz", "zst"))),
    "zip": (".zip",),
    "arrays": (".npz",),
    "table": (".csv", ".tsv", ".jsonl"),
    "coco": (".json",),
    "yolo": (".yaml", ".yml"),
}


def splits_of(spec: str) -> list[str]:
    """The names of a source's splits; [] if it has none or they are not known."""
    kind, _, argument = spec.partition(":")
    found = SPLITS[kind](os.path.expanduser(argument)) if kind in SPLITS else ()
    return [name for name in found if name != WHOLE]


def understood(spec: str) -> str:
    """Adds the kind to a spec that is only a path: by its ending, or by the files in the folder."""
    if spec.partition(":")[0] in SOURCES:
        return spec
    path = re.sub(r"(,\w+=[^,]*)+$", "", spec)
    for kind, endings in _ENDINGS.items():
        if path.lower().endswith(endings):
            return f"{kind}:{spec}"
    if not storage.is_folder(spec):
        return spec
    if record_splits(spec):
        return f"records:{spec}"
    if storage.is_file(f"{spec}/dataset_info.json"):
        return f"tfds:{spec}"
    if is_coco(spec):
        return f"coco:{spec}"
    if is_yolo(spec):
        return f"yolo:{spec}"
    return f"{'pairs' if is_layout(spec) else 'folder'}:{spec}"


def open_splits(spec: str, split: str | None = None) -> dict[str, Source | UserError]:
    """Opens one split of a source, or all of them: split -> source, or the error if it has one.

    Raises:
      UserError: the only split cannot be opened.
    """
    names = [split] if split else []
    try:
        names = names or splits_of(spec) or [WHOLE]
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        names = [WHOLE]  # opening it raises the error
    return open_all({name: (spec, name) for name in names})


def open_all(specs: Mapping[str, tuple[str, str]]) -> dict[str, Source | UserError]:
    """Opens name -> (spec, split); see `open_splits`."""
    found: dict[str, Source | UserError] = {}
    for name, (spec, split) in specs.items():
        try:
            found[name] = open_source(spec, split)
        except UserError as error:
            if len(specs) == 1:
                raise
            found[name] = error
    return found


def heading(spec: str) -> str:
    """A spec as a title: "folder /abs/path"."""
    kind, _, argument = spec.partition(":")
    return f"{kind} {os.path.abspath(argument) if os.path.exists(argument) else argument}".rstrip()
