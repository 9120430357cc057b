"""What images are, by their bytes: copies within a split and across splits, before any training."""

import concurrent.futures
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import tqdm
from jaxtyping import Int64, UInt64

from vit_jax.data.forms.archives import TarSource
from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.forms.files import FolderSource
from vit_jax.data.forms.fractals import FractalSource
from vit_jax.data.forms.records import RecordSource
from vit_jax.data.forms.scenes import SceneSource
from vit_jax.data.images import BadImage
from vit_jax.data.sources import Source
from vit_jax.errors import UserError

Hashes = UInt64[np.ndarray, " _n"]
Indices = Int64[np.ndarray, " _m"]

_BLOCK = 64  # examples that a thread reads at a time


def image_hash(image: Any) -> int:
    """64 bits of an image file's bytes as they are stored, or of pixels, shape and dtype; not 0."""
    digest = hashlib.blake2b(digest_size=8)
    if not isinstance(image, bytes):
        image = np.ascontiguousarray(image)
        digest.update(f"{image.dtype.str} {image.shape} ".encode())
    digest.update(image)
    return int.from_bytes(digest.digest(), "little") or 1


def content(source: Source, *, threads: int | None = None, title: str | None = None) -> Hashes:
    """The `image_hash` of each example of a finite source; 0 for one that cannot be read.

    All are read, by several threads and without decoding; but of shards the hashes that `prepare`
    kept are taken.

    Args:
      title: with one, a bar of progress is shown.

    Raises:
      UserError: a file that is gone or cannot be opened.
    """
    source = inner_source(source)
    if isinstance(source, RecordSource) and (kept := source.kept_content()) is not None:
        return kept

    def read(index: int) -> int:
        try:
            return image_hash(source[index]["image"])
        except BadImage:
            return 0

    found = read_each(read, range(len(source)), threads, title)
    return np.fromiter(found, np.uint64, len(source))


def duplicates(hashes: Hashes) -> list[Indices]:
    """The groups of examples with one content, by their first; each of two examples or more."""
    _, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    again = np.flatnonzero((counts[which] > 1) & (hashes != 0))
    order = again[np.argsort(which[again], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(which[order])) + 1) if len(order) else []
    return sorted(groups, key=lambda group: int(group[0]))


def shared(a: Hashes, b: Hashes) -> tuple[Indices, Indices]:
    """The examples of `b` whose content `a` has too: the first in `a` for each, and they."""
    values, first = np.unique(a, return_index=True)
    at = np.searchsorted(values, b).clip(max=max(len(values) - 1, 0))
    known = values[at] == b if len(values) else np.zeros(len(b), bool)
    found = np.flatnonzero(known & (b != 0))
    return first[at[found]], found


def inner_source(source: Source) -> Source:
    """The source itself, under other names of its classes."""
    while hasattr(under := getattr(source, "source", None), "label_names"):
        source = under
    return source


def is_made(source: Source) -> bool:
    """Whether its images are made by a formula: no two are the same, and each costs time."""
    return isinstance(inner_source(source), FractalSource | SceneSource)


def read_each(
    read: Callable[[int], Any],
    indices: Sequence[int],
    threads: int | None = None,
    title: str | None = None,
) -> Iterator[Any]:
    """Yields read(index) of each, in order, a block a thread at a time."""
    blocks = [indices[i : i + _BLOCK] for i in range(0, len(indices), _BLOCK)]
    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        tqdm.tqdm(
            total=len(indices), unit="image", desc=title, disable=None if title else True
        ) as bar,
    ):
        for found in pool.map(lambda block: [read(int(i)) for i in block], blocks):
            bar.update(len(found))
            yield from found


def check_splits(
    named: Mapping[str, Source],
    *,
    most: int = 20_000,
    allow: bool = False,
    classes: bool = True,
) -> list[str]:
    """Checks, before training, that splits are no copies of one another; no image is decoded.

    Args:
      named: the sources by their config keys, such as "data.train".
      most: up to how many images of two splits are read to be compared; those in memory, and in
        shards whose hashes `prepare` kept, always are.
      allow: whether splits may be the same images, which is then returned as a line.
      classes: whether data.train's classes are to be learnt.

    Returns:
      What is to be printed: images that two splits share, and what was not compared.

    Raises:
      UserError: two splits are the same images, or share more than half of the smaller one's; or
        data.train has one class alone.
    """
    if classes and "data.train" in named:
        _check_classes(named["data.train"])
    lines: list[str] = []
    finite = {name: source for name, source in named.items() if isinstance(source, Sized)}
    known = {name: kept for name in finite if (kept := _at_hand(finite[name])) is not None}
    unread: dict[str, None] = {}
    for pair in itertools.combinations(finite, 2):
        small, large = sorted(reversed(pair), key=lambda name: len(finite[name]))
        a, b = finite[large], finite[small]
        same, hashes = a.fingerprint == b.fingerprint, None
        if any(is_made(each) or getattr(each, "masks", False) for each in (a, b)):
            pass  # their fingerprints say all
        elif sum(len(finite[name]) for name in pair if name not in known) <= most:
            for name in pair:
                known[name] = known[name] if name in known else content(finite[name])
            hashes = known[large], known[small]
        elif not same:
            unread |= dict.fromkeys(pair)
            hashes = _places(a), _places(b)
        if not same and (hashes is None or hashes[0] is None or hashes[1] is None):
            continue
        count, such = len(b), ""
        if hashes is not None:
            first, found = shared(*hashes)
            if not len(found):
                continue
            count, such = len(found), f", such as {name_of(a, first[0])} and {name_of(b, found[0])}"
        line = f"{count:,} of the {len(b):,} images of {small} are in {large} too{such}"
        if count == len(a) == len(b):
            line = f"{pair[0]} and {pair[1]} are the same {count:,} images"
        if 2 * count > len(b) and not allow:
            raise UserError(
                f"{line}: hold images out, such as split all[:90%] for one and all[90%:] for the "
                "other (where there are splits, train[:90%] and train[90%:]), or set "
                "data.same_images=True if it is meant"
            )
        lines.append(line)
    if unread:
        lines.append(
            f"whether {' and '.join(unread)} share images was not looked at, by their contents "
            f"(more than {most:,}): `python -m vit_jax data --config=FILE` does"
        )
    return lines


def _check_classes(train: Source) -> None:
    """Raises a UserError where there is one class to learn."""
    if getattr(train, "multi_label", False) or getattr(train, "masks", False):
        return
    names, labels = train.label_names, labels_of(train)
    alone = names[0] if len(names) == 1 else None
    if alone is None and labels is not None and len(labels) and (labels == labels[0]).all():
        one = int(labels[0])
        alone = inner_source(train).label_names[one] if one >= 0 else None
    if alone is not None:
        said = (
            "has one class alone" if len(names) == 1 else f"is of one of {len(names)} classes alone"
        )
        raise UserError(
            f"data.train {said}, {alone!r}: nothing to tell apart; name the folder whose "
            "sub-folders are the classes (`python -m vit_jax data SPEC` says what is seen)"
        )


def labels_of(source: Source) -> np.ndarray | None:
    """The labels of all examples, where they are at hand without reading one."""
    labels = getattr(inner_source(source), "labels", None)
    return labels if isinstance(labels, np.ndarray) and labels.ndim == 1 else None


def _at_hand(source: Source) -> Hashes | None:
    """The contents of all examples where no file or record need be read for them."""
    source = inner_source(source)
    if isinstance(source, ArraySource):
        return content(source)
    return source.kept_content() if isinstance(source, RecordSource) else None


def _places(source: Source) -> Hashes | None:
    """A hash of where each example lies, for files that may be too many to read."""
    source = inner_source(source)
    if isinstance(source, FolderSource):
        root = os.path.realpath(source.root)
        texts = (os.fsencode(f"{root}/{name}") for name in source.names)
    elif isinstance(source, TarSource):
        files = [os.fsencode(os.path.realpath(path)) for path in source.files.paths]
        at = zip(source.archive, source.offsets, strict=True)
        texts = (b"%d %b" % (offset, files[number]) for number, offset in at)
    else:
        return None
    return np.fromiter(map(image_hash, texts), np.uint64, len(source))


def name_of(source: Source, index: int | np.integer, key: str = "name") -> str:
    """What an example is called: its `name`, which says where it is, or its shorter `file`."""
    try:
        return str(source[int(index)].get(key, f"example {index}"))
    except UserError:
        return f"example {index}"
