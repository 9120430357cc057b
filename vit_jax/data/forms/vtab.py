"""VTAB, the Visual Task Adaptation Benchmark (arXiv 1910.04867): 19 tasks, of 1,000 images each.

Labels and splits are those of its reference code, google-research/task_adaptation at commit
ed9b417768c38c38e1fea8194d23442bd78eeafd.
"""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.data.forms import examples, records, tfds
from vit_jax.data.images import BadImage, decode
from vit_jax.errors import UserError, nearest

SPLITS = ("train", "val", "trainval", "test", "train800", "val200", "train800val200")

# What TFDS calls train, val, test and the first 200 of val, where its own train has n examples.
Parts = tuple[str, str, str, str]


def _own(n: int) -> Parts:
    return "train", "validation", "test", "validation[:200]"


def _cut(n: int, percent: int, test: str = "test") -> Parts:
    k = n * percent // 100
    return f"train[:{k}]", f"train[{k}:]", test, f"train[{k}:{k + 200}]"


def _cut_twice(n: int, percent: int, val_percent: int) -> Parts:
    k = n * percent // 100
    m = k + n * val_percent // 100  # two roundings
    return f"train[:{k}]", f"train[{k}:{m}]", f"train[{m}:]", f"train[{k}:{k + 200}]"


def _half_of_test(n: int) -> Parts:
    return "train", "test[:50%]", "test[50%:]", "test[:200]"


# Rules take all values of the features that the label is made of. A label out of range, as of an
# image without objects, is reported where it is read.

# A distance on a bound belongs to the class below it. The bounds are float32 numbers, as the
# distances are, so that they compare alike in every precision.
_CLEVR_BOUNDS = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
_CLEVR = ("to 8", "8 to 8.5", "8.5 to 9", "9 to 9.5", "9.5 to 10", "beyond 10")
_KITTI_BOUNDS = (-100.0, 8.0, 20.0, 999.0)
_KITTI = ("to 8 m", "8 to 20 m", "beyond 20 m", "no vehicle")
_COUNTS = tuple(str(count) for count in range(3, 11))


def _clevr_count(sizes: Sequence[int]) -> int:
    return len(sizes) - 3


def _clevr_distance(coords: Sequence[float]) -> int:
    """`coords` are x, y and distance of one object after the other."""
    return bisect.bisect_left(_CLEVR_BOUNDS, min(coords[2::3], default=math.inf)) - 1


def _kitti_distance(kinds: Sequence[int], coords: Sequence[float]) -> int:
    """`coords` are x, y and z of one object after the other; kinds 0, 1 and 2 are vehicles."""
    found = [z for kind, z in zip(kinds, coords[2::3], strict=True) if kind < 3]
    return bisect.bisect_left(_KITTI_BOUNDS, min(found, default=1000.0)) - 1


def _group(labels: Sequence[int], classes: int) -> int:
    return labels[0] * 16 // classes


def _sixteen(classes: int) -> tuple[Callable[..., int], tuple[str, ...]]:
    """The rule that groups more classes into 16, and their names."""
    starts = [-(-classes * group // 16) for group in range(17)]
    names = tuple(f"{start} to {end - 1}" for start, end in itertools.pairwise(starts))
    return functools.partial(_group, classes=classes), names


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of VTAB.

    Attributes:
      group: natural, specialized or structured.
      data: the name of the data set in TFDS.
      parts: the splits, given the number of examples in TFDS's train.
      features: the features that the label is computed from.
      rule: computes the label; without it, the feature is the label.
      names: the classes of `rule`.
      factor: pixels are multiplied by it.
    """

    group: str
    data: str
    parts: Callable[[int], Parts] = _own
    features: tuple[str, ...] = ("label",)
    rule: Callable[..., int] | None = None
    names: tuple[str, ...] = ()
    factor: int = 1


_90 = functools.partial(_cut, percent=90)
_60_20 = functools.partial(_cut_twice, percent=60, val_percent=20)
_80_10 = functools.partial(_cut_twice, percent=80, val_percent=10)
_clevr = functools.partial(_90, test="validation")  # its test split has no labels

TASKS: dict[str, Task] = {
    "caltech101": Task("natural", "caltech101", _90),
    "cifar100": Task("natural", "cifar100", _90),
    "dtd": Task("natural", "dtd"),
    "flowers102": Task("natural", "oxford_flowers102"),
    "pets": Task("natural", "oxford_iiit_pet", functools.partial(_cut, percent=80)),
    "sun397": Task("natural", "sun397/tfds"),
    "svhn": Task("natural", "svhn_cropped", _90),
    "patch_camelyon": Task("specialized", "patch_camelyon"),
    "eurosat": Task("specialized", "eurosat/rgb", _60_20),
    "resisc45": Task("specialized", "resisc45", _60_20),
    "diabetic_retinopathy": Task("specialized", "diabetic_retinopathy_detection/btgraham-300"),
    "clevr_count": Task("structured", "clevr", _clevr, ("objects/size",), _clevr_count, _COUNTS),
    "clevr_distance": Task(
        "structured", "clevr", _clevr, ("objects/pixel_coords",), _clevr_distance, _CLEVR
    ),
    "dmlab": Task("structured", "dmlab"),
    "kitti_distance": Task(
        "structured", "kitti", _own, ("objects/type", "objects/location"), _kitti_distance, _KITTI
    ),
    "dsprites_location": Task(
        "structured", "dsprites", _80_10, ("label_x_position",), *_sixteen(32), factor=255
    ),
    "dsprites_orientation": Task(
        "structured", "dsprites", _80_10, ("label_orientation",), *_sixteen(40), factor=255
    ),
    "smallnorb_azimuth": Task("structured", "smallnorb", _half_of_test, ("label_azimuth",)),
    "smallnorb_elevation": Task("structured", "smallnorb", _half_of_test, ("label_elevation",)),
}


@dataclasses.dataclass(frozen=True, eq=False)
class VtabSource(records.RecordSource):
    """The images and labels of a task of TASKS."""

    task: str = dataclasses.field(kw_only=True)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example, factor = super().__getitem__(index), TASKS[self.task].factor
        if factor != 1:
            try:
                example["image"] = decode(example["image"]) * np.uint8(factor)
            except BadImage as error:
                raise BadImage(f"{example['name']}: {error}") from None
        return example

    def _label(self, record: bytes, example: Mapping[str, Any]) -> Any:
        task = TASKS[self.task]
        if task.rule is None:
            return super()._label(record, example)
        return task.rule(*(examples.feature_values(record, key) for key in task.features))


def vtab(argument: str, split: str) -> VtabSource:
    """A task of TASKS, from a data set that TFDS prepared, looked up as for `tfds:NAME`.

    Args:
      split: one of SPLITS. VTAB-1k trains on train800val200 and is evaluated on test.

    Raises:
      UserError: no such task or split, or a data set that is missing, has other features or too few
        examples, or cannot be read by index.
    """
    where = f"vtab:{argument}"
    if argument not in TASKS:
        raise UserError(f"the source {where}: no task {argument!r}; {nearest(argument, TASKS)}")
    if split not in SPLITS:
        raise UserError(f"the source {where} has no split {split!r}; {nearest(split, SPLITS)}")
    task = TASKS[argument]
    builder = tfds.prepared(f"{where} (tfds:{task.data})", task.data)
    info = builder.info
    missing = [key for key in ("image", *task.features) if key.split("/")[0] not in info.features]
    if missing:
        raise UserError(f"{where}: {info.full_name} has no feature {missing[0]!r}")
    names = task.names or tfds.class_names(where, info, task.features[0])[0]
    n = info.splits["train"].num_examples if "train" in info.splits else 0
    train, val, test, val200 = task.parts(n)
    parts = (train, val, f"{train}+{val}", test, "train[:800]", val200, f"train[:800]+{val200}")
    found, identity = tfds.split_records(where, builder, parts[SPLITS.index(split)])
    text = min((k for k, f in info.features.items() if type(f).__name__ == "Text"), default=None)
    keys, fingerprint = ("image", task.features[0], text), records.digest((*identity, names, where))
    return VtabSource(found, keys, f"{where} {split}", names, fingerprint, task=argument)
