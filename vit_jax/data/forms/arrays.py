"""Images in memory: scikit-learn's digits, and `.npz` files."""

import dataclasses
import functools
import hashlib
import zipfile
import zlib
from collections.abc import Collection
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from vit_jax.data import storage
from vit_jax.data.forms.files import parse_split, percentile
from vit_jax.errors import UserError, check_refused, nearest
from vit_jax.extras import install


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Images and labels in memory."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, " n"]
    label_names: tuple[str, ...]

    def __post_init__(self):
        if len(self.images) != len(self.labels):
            raise UserError(f"{len(self.images)} images but {len(self.labels)} labels")
        if not len(self.images):
            raise UserError("a source needs at least one example")
        check_labels(self.labels, len(self.label_names))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.images.shape, self.label_names)).encode())
        digest.update(np.ascontiguousarray(self.images))
        digest.update(np.ascontiguousarray(self.labels))
        return digest.hexdigest()[:16]


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises a UserError unless every label is one of the classes."""
    low, high = int(labels.min(initial=0)), int(labels.max(initial=0))
    if low < 0 or high >= num_classes:
        raise UserError(f"labels from {low} to {high} do not fit {num_classes} class names")


# The fractions of each class in the held-out splits.
_DIGITS_HELD_OUT = {"test": 0.2, "val": 0.1}


@functools.cache
def _digits() -> Any:
    """scikit-learn's data, cached, as it is parsed from a slow text file."""
    from sklearn.datasets import load_digits

    return load_digits()


def digits(argument: str, split: str) -> ArraySource:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; splits `train`, `val` and `test`.

    The split is stratified and fixed: drawn class by class from NumPy's legacy generator, which
    does not change between versions.
    """
    try:
        bunch = _digits()
    except ImportError:
        raise UserError(
            f"the source digits needs scikit-learn, which ships the images: {install('demo')}"
        ) from None
    if argument:
        raise UserError(f"the source digits takes no argument, found digits:{argument}")
    check_split("digits", split, ("train", "val", "test"))
    random = np.random.RandomState(0)
    chosen = []
    for label in range(10):
        members = random.permutation(np.flatnonzero(bunch.target == label))
        ends = np.cumsum([round(len(members) * share) for share in _DIGITS_HELD_OUT.values()])
        parts = dict(zip((*_DIGITS_HELD_OUT, "train"), np.split(members, ends), strict=True))
        chosen.append(parts[split])
    indices = np.sort(np.concatenate(chosen))
    images = np.round(bunch.images[indices] * (255 / 16)).astype(np.uint8)
    labels = bunch.target[indices].astype(np.int32)
    return ArraySource(images[..., None], labels, tuple(str(name) for name in range(10)))


def arrays(path: str, split: str) -> ArraySource:
    """A `.npz` file with `SPLIT_images` (uint8 [n h w c] or [n h w]), `SPLIT_labels` (int [n] or
    [n 1], as in MedMNIST) and, for names other than "0", "1", ..., `label_names` (strings [k]).

    A part of a split, such as "train[:90%]", is drawn by a hash of the image's number.
    """
    part, (split, low, high) = split, parse_split(split)
    try:
        with zipfile.ZipFile(storage.local(path)):  # np.load does not check this
            pass
        with np.load(storage.local(path), allow_pickle=False) as file:
            contents = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"the source arrays:{path}: there is no such file") from None
    except (
        *(ValueError, OSError, EOFError, MemoryError, RuntimeError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        check_refused(error, path)
        raise UserError(f"the source arrays:{path} is no readable .npz: {error}") from None
    splits = [name.removesuffix("_images") for name in contents if name.endswith("_images")]
    if not splits:
        raise UserError(
            f"arrays:{path} holds {', '.join(contents) or 'nothing'}; expected SPLIT_images and "
            "SPLIT_labels, such as train_images and train_labels"
        )
    check_split(f"arrays:{path}", split, splits)
    images, labels = contents[f"{split}_images"], contents.get(f"{split}_labels")
    if labels is None:
        raise UserError(f"arrays:{path} holds {split}_images but no {split}_labels")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape[1:]:
        raise UserError(
            f"arrays:{path}: {split}_images is {images.dtype} {list(images.shape)}; expected uint8 "
            "[n h w c] or [n h w]"
        )
    labels = _column(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(
            f"arrays:{path}: {split}_labels is {labels.dtype} {list(labels.shape)}; expected "
            "integers [n]"
        )
    if images.ndim == 4 and images.shape[1] in (1, 3) and min(images.shape[2:]) > 4:
        raise UserError(
            f"arrays:{path}: {split}_images is {list(images.shape)}, which looks like [n c h w]; "
            "expected [n h w c]: images.transpose(0, 2, 3, 1) makes it"
        )
    names = contents.get("label_names")
    if names is not None:
        if names.ndim != 1:
            raise UserError(
                f"arrays:{path}: label_names is {list(names.shape)}; expected strings [k]"
            )
        names = np.char.decode(names, "utf-8") if names.dtype.kind == "S" else names
        if len(np.unique(names)) < len(names):
            raise UserError(f"arrays:{path}: label_names has a class twice")
    if names is None:
        # Over all splits, so that each of them counts the same classes.
        every = [_column(contents[f"{s}_labels"]) for s in splits if f"{s}_labels" in contents]
        every = [part for part in every if part.size and part.dtype.kind in "iu"]
        names = range(1 + max((int(part.max()) for part in every), default=0))
    # Before the cast, in which 2**32 would become class 0.
    check_labels(labels, min(len(names), 2**31))
    images = images if images.ndim == 4 else images[..., None]
    if (low, high) != (0, 100):
        chosen = [i for i in range(len(images)) if low <= percentile(f"{split}/{i}") < high]
        if not chosen:
            raise UserError(f"arrays:{path} has no image in split {part!r}")
        images, labels = images[chosen], labels[chosen]
    return ArraySource(images, labels.astype(np.int32), tuple(str(name) for name in names))


def _column(labels: np.ndarray) -> np.ndarray:
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def check_split(source: str, split: str, known: Collection[str]) -> None:
    """Raises a UserError unless the split is a known one."""
    if split not in known:
        raise UserError(f"the source {source} has no split {split!r}; {nearest(split, known)}")
