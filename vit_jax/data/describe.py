"""Reports on a data set before training: classes, sizes, formats, duplicates, unreadable images."""

import collections
import dataclasses
import io
import itertools
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Int64

from vit_jax.data.boxes import Boxes, other_size
from vit_jax.data.classes import Matched
from vit_jax.data.contents import (
    Hashes,
    duplicates,
    image_hash,
    inner_source,
    is_made,
    labels_of,
    name_of,
    read_each,
    shared,
)
from vit_jax.data.describe_boxes import BoxLook, box_facts, look_at
from vit_jax.data.images import FORMATS, read_image, sniff
from vit_jax.data.masks import IGNORED
from vit_jax.data.sources import Source
from vit_jax.errors import UserError

# How many headers are read, and images decoded; and how many made by a formula are looked at.
_HEADERS, _DECODED, _MADE = 2000, 200, 200
_ORIENTATION = 0x0112  # the EXIF tag
_ON_SIDE = (5, 6, 7, 8)  # its values
_MODES = {"L": "grey", "LA": "grey with alpha", "P": "palette", "RGBA": "RGB with alpha"}


def first_lines(named: Mapping[str, Source], specs: Mapping[str, str] | None = None) -> list[str]:
    """A line for each split, which training prints: the number of images, and the classes.

    Args:
      specs: name -> how the source was opened, such as "folder:pets, all[:90%]".
    """
    width = max(map(len, named), default=0)
    lines = []
    for name, source in named.items():
        spec = f"{(specs or {}).get(name, '')}: ".removeprefix(": ")
        count = f"{len(source):,}" if isinstance(source, Sized) else "endless"
        names, labels = source.label_names, labels_of(source)
        text = [", ".join(names[:2]) + (", ..." if len(names) > 2 else "")]
        if labels is not None:
            k = len(inner_source(source).label_names)
            counts = np.bincount(labels[labels >= 0], minlength=k)
            text.append(f"{_range(counts)} each")
        text += ["several or none an image"] * getattr(source, "multi_label", False)
        text += ["one for each pixel"] * getattr(source, "masks", False)
        if getattr(source, "boxes", False):
            known = getattr(source, "box_counts", None)
            text.append("in boxes" if known is None else f"in {known.sum():,} boxes")
        classes = "1 class" if len(names) == 1 else f"{len(names):,} classes"
        line = f"{name:<{width}}  {spec}{count} images of {classes} ({'; '.join(text)})"
        passed = getattr(inner_source(source), "passed_over", None)
        lines.append(f"{line}, {passed}" if passed else line)
    return lines


def _range(counts: Any) -> str:
    low, high = int(min(counts)), int(max(counts))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


class Example(NamedTuple):
    """What is kept of an example."""

    hash: int = 0
    label: Any = ()
    format: str = ""
    bytes: int = 0
    header: tuple[int, int, str, int] | None = None  # h, w, mode, EXIF orientation
    pixels: Int64[np.ndarray, "256"] | None = None  # of each class in its mask
    boxes: BoxLook | None = None
    why: str = ""  # why it cannot be read


@dataclasses.dataclass
class Look:
    """Statistics of a split.

    Attributes:
      indices: the examples read: all, unless they are made by a formula.
      labels: an int for each example, or a tuple of its classes, or of its pixels' or boxes'.
      headers: (h, w, mode, EXIF orientation) of the examples that were sampled.
      bad: example -> its name, and why it cannot be read.
      pixels: of masks, the number of pixels of each class.
      boxes: what is kept of the boxes of each example that has some or may have.
      decoded, seconds: the number of examples decoded on one thread, and how long it took.
    """

    source: Source
    indices: Sequence[int]
    hashes: Hashes
    bad: dict[int, str]
    decoded: int
    seconds: float
    labels: list[Any] = dataclasses.field(default_factory=list)
    formats: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    headers: list[tuple[int, int, str, int]] = dataclasses.field(default_factory=list)
    bytes: int = 0
    pixels: Int64[np.ndarray, "256"] = dataclasses.field(
        default_factory=lambda: np.zeros(256, np.int64)
    )
    boxes: list[BoxLook] = dataclasses.field(default_factory=list)

    @property
    def whole(self) -> bool:
        return isinstance(self.source, Sized) and len(self.indices) == len(self.source)

    @property
    def counts(self) -> Int64[np.ndarray, " k"]:
        """The number of examples of each class; with masks or boxes, those with one of it."""
        k = len(self.source.label_names)
        labels = np.fromiter(itertools.chain.from_iterable(map(_tuple, self.labels)), np.int64)
        return np.bincount(labels[(labels >= 0) & (labels < k)], minlength=k)


def _tuple(label: Any) -> tuple[int, ...]:
    return label if isinstance(label, tuple) else (label,)


def spread(n: int, most: int) -> list[int]:
    """Up to `most` evenly spaced numbers from 0 to n - 1."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64)).tolist()


def look(source: Source, title: str | None = None) -> Look:
    """Reads all examples of a split (200 if made by a formula), and decodes up to 200."""
    endless = not isinstance(source, Sized)
    n = _MADE if endless else len(source)
    indices = range(min(n, _MADE) if is_made(source) else n)
    bad: dict[int, str] = {}
    # First, before the files are in the page cache.
    decoded = [indices[i] for i in spread(len(indices), _DECODED)]
    began = time.perf_counter()
    for index in decoded:
        name = f"example {index}"
        try:
            example = source[index]
            name = example.get("file", example.get("name", name))
            read_image(example["image"])
        except UserError as error:
            bad[index] = f"{name}: {error}"
    seconds = time.perf_counter() - began
    closely = {indices[i] for i in spread(len(indices), _HEADERS)}
    seen = Look(source, indices, np.zeros(len(indices), np.uint64), bad, len(decoded), seconds)
    found = read_each(lambda i: _look_at(source, i, i in closely), indices, title=title)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about large images and invalid EXIF
        for at, example in enumerate(found):
            seen.hashes[at] = example.hash
            seen.labels.append(example.label)
            seen.bytes += example.bytes
            if example.pixels is not None:
                seen.pixels += example.pixels
            if example.boxes is not None:
                seen.boxes.append(example.boxes)
            if example.format:
                seen.formats[example.format] += 1
            if example.header:
                seen.headers.append(example.header)
            if example.why and indices[at] not in bad:
                bad[indices[at]] = f"{name_of(source, indices[at], 'file')}: {example.why}"
    return seen


def _look_at(source: Source, index: int, closely: bool) -> Example:
    try:
        example = source[index]
    except UserError as error:
        return Example(why=str(error))
    image, label = example["image"], example["label"]
    pixels = shape = boxes = None
    if isinstance(label, Boxes):
        shape = example.get("size")
        boxes = look_at(label, image.shape[:2] if isinstance(image, np.ndarray) else shape)
        label = tuple(np.unique(label.classes).tolist())
    if isinstance(label, np.ndarray):
        shape, pixels = label.shape, np.bincount(label.ravel(), minlength=256)
        label = tuple(np.flatnonzero(pixels[:IGNORED]).tolist())
    if not isinstance(image, bytes):
        h, w, c = image.shape if image.ndim == 3 else (*image.shape[:2], 1)
        mode = {1: "grey", 3: "RGB"}.get(c, f"{c} channels")
        mode += "" if image.dtype == np.uint8 else f" {image.dtype}"
        header = h, w, mode, 1
        return Example(image_hash(image), label, "pixels", image.nbytes, header, pixels, boxes)
    format_ = sniff(image[:32]) or "unknown"
    found = Example(image_hash(image), label, format_, len(image), None, pixels, boxes)
    if not closely:
        return found
    try:
        found = found._replace(header=_header(image))
    except Exception as error:  # noqa: BLE001  Pillow's readers raise any exception
        return found._replace(why=f"{type(error).__name__}: {error}".replace("\n", " "))
    h, w, _, orientation = found.header
    upright = (w, h) if orientation in _ON_SIDE else (h, w)
    if boxes is not None and shape not in (None, upright):
        return found._replace(why=other_size(upright, shape))
    if shape not in (None, upright):
        sizes = (f"{side[0]} x {side[1]}" for side in (upright, shape))
        return found._replace(why="{} pixels, and its mask has {}".format(*sizes))
    return found


def _header(data: bytes) -> tuple[int, int, str, int]:
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        w, h = opened.size
        orientation = 1
        # For a PNG without EXIF, Pillow would decode the image to look for it at the end.
        if opened.format != "PNG" or "exif" in opened.info:
            orientation = opened.getexif().get(_ORIENTATION, 1)
        return h, w, _MODES.get(opened.mode, opened.mode), orientation


def report(
    named: Mapping[str, Source | UserError], specs: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yields the lines of a report on splits, and on what they share; reads all images.

    Args:
      specs: name -> what is printed behind the name of the split.
    """
    looks: dict[str, Look] = {}
    for name, source in named.items():
        yield from ("", f"{name}  {(specs or {}).get(name, '')}".rstrip())
        if isinstance(source, UserError):
            yield from _rows([("not opened", str(source))])
            continue
        looks[name] = look(source, name)
        yield from _rows(_facts(looks[name]))
    if len(looks) > 1:
        yield from ("", "between splits")
        yield from _rows(_between(looks))


def _rows(facts: Sequence[tuple[str, str]]) -> Iterator[str]:
    width = max(12, *(len(what) for what, _ in facts))
    for what, value in facts:
        yield f"  {what:<{width}}  {value}".rstrip()


def _facts(seen: Look) -> list[tuple[str, str]]:
    """The lines on a split, as (what, value); `what` is empty for further lines of one fact."""
    source, heads, n = seen.source, seen.headers, len(seen.indices)
    total = f"{len(source):,}" if isinstance(source, Sized) else "endless"
    facts = [("examples", total if seen.whole else f"{total}; {n:,} were looked at")]
    facts += _classes(seen)
    facts += _pixels(seen)
    if getattr(source, "boxes", False):
        facts += box_facts(seen.boxes, source.label_names, getattr(inner_source(source), "how", ""))
    facts.append(("formats", _counted(seen.formats)))
    of = "" if len(heads) == n else f" (of {len(heads):,} sampled)"
    if heads:
        sizes = {"h": [head[0] for head in heads], "w": [head[1] for head in heads]}
        text = "; ".join(
            f"{side} {_range(each)}, median {np.median(each):,.0f}" for side, each in sizes.items()
        )
        if len({head[:2] for head in heads}) == 1:
            text = f"h {heads[0][0]:,}, w {heads[0][1]:,}"
        facts.append(("sizes", f"{text}{of}"))
        facts.append(("channels", _counted(collections.Counter(head[2] for head in heads)) + of))
        for values, what in (
            (_ON_SIDE, "lie on their side; turned upright with exif"),
            ((2, 3, 4), "are upside down or mirrored; exif likewise"),
        ):
            if count := sum(head[3] in values for head in heads):
                facts.append(("orientation", f"{count:,} of {len(heads):,} sampled {what}"))
    size = f"{seen.bytes / 1e6:,.1f} MB" if seen.bytes >= 1e5 else f"{seen.bytes:,}"
    facts.append(("bytes", size))
    if passed := getattr(inner_source(source), "passed_over", None):
        facts.append(("passed over", str(passed)))
        facts += [("", f"{name}: {why}") for name, why in passed.files[:5]]
    if seen.bad:
        facts.append(("unreadable", f"{len(seen.bad):,} found; {seen.decoded:,} were decoded"))
        facts += [("", seen.bad[index]) for index in sorted(seen.bad)[:5]]
    facts += _again(seen)
    rate = f"{seen.decoded / max(seen.seconds, 1e-9):,.0f} images/s on one thread"
    facts.append(("time to read", f"{rate} (measured here, {seen.decoded:,} images)"))
    return facts


def _counted(counts: Mapping[str, int]) -> str:
    counts = collections.Counter(counts)
    return ", ".join(f"{count:,} {what}" for what, count in counts.most_common())


def _classes(seen: Look) -> list[tuple[str, str]]:
    source, counts = seen.source, seen.counts
    names = source.label_names
    masks, several = (getattr(source, name, False) for name in ("masks", "multi_label"))
    kind = " for each pixel" * masks + " of boxes" * getattr(source, "boxes", False)
    kind += ", several or none an image" * several
    text = f"{len(names):,}{kind}: in {_range(counts)} images each, median {np.median(counts):,.0f}"
    text += "" if seen.whole else f" (of {len(seen.indices):,})"
    pairs = [f"{name}: {count:,}" for name, count in zip(names, counts.tolist(), strict=True)]
    facts = [("classes", text), ("", ", ".join(pairs[:10]) + ", ..." * (len(pairs) > 10))]
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty and seen.whole:
        more = ", ..." * (len(empty) > 10)
        facts.append(("", f"{len(empty):,} without an image: {', '.join(empty[:10])}{more}"))
    if len(names) == 1 and not several and not getattr(source, "boxes", False):
        facts.append(("", "one class alone: nothing to tell apart"))
    odd = [
        (index, label)
        for index, labels in zip(seen.indices, seen.labels, strict=True)
        for label in _tuple(labels)
        if not 0 <= label < len(names)
    ]
    if odd:
        which = f"{name_of(source, odd[0][0], 'file')} has {odd[0][1]}"
        facts.append(("", f"{len(odd):,} labels are of no class: {which}"))
    return facts


def _pixels(seen: Look) -> list[tuple[str, str]]:
    """The lines on the pixels of masks, and on how these are read."""
    names, total = seen.source.label_names, seen.pixels.sum()
    if not total:
        return []
    each = seen.pixels[: len(names)]
    shares = [
        f"{names[i]} {each[i] / total:.1%}" for i in np.argsort(-each, kind="stable")[:10].tolist()
    ]
    text = f"{total:,}, of no class {seen.pixels[IGNORED] / total:.1%}"
    facts = [("pixels", text), ("", ", ".join(shares) + ", ..." * (len(names) > 10))]
    how = getattr(inner_source(seen.source), "how", "")
    return facts + [("masks", how)] * bool(how)


def _again(seen: Look) -> list[tuple[str, str]]:
    """The lines on duplicates."""
    if not seen.whole:
        return [("duplicates", "not looked for: images are made by a formula")]
    groups = duplicates(seen.hashes)
    if not groups:
        return [("duplicates", "none, byte for byte")]
    count = sum(map(len, groups))
    first = ", ".join(name_of(seen.source, i, "file") for i in groups[0][:3])
    more = ", ..." * (len(groups[0]) > 3)
    facts = [("duplicates", f"{count:,} images are but {len(groups):,}, such as {first}{more}")]
    torn = [g for g in groups if len({seen.labels[i] for i in g}) > 1]
    if torn:
        facts.append(("", f"{len(torn):,} of the {len(groups):,} with DIFFERENT labels:"))
    for group in torn[:5]:
        first = {seen.labels[i]: i for i in reversed(group.tolist())}
        names = [
            f"{name_of(seen.source, i, 'file')} is {said(seen.source, label)}"
            for label, i in sorted(first.items(), key=lambda pair: pair[1])
        ]
        facts.append(("", "; ".join(names[:4])))
    return facts


def said(source: Source, label: Any) -> str:
    """The names of an example's classes, as text."""
    names = source.label_names
    words = [names[i] if 0 <= i < len(names) else f"no class ({i})" for i in _tuple(label)]
    return ", ".join(words) or "nothing"


def _between(looks: Mapping[str, Look]) -> list[tuple[str, str]]:
    facts = []
    for one, other in itertools.combinations(looks, 2):
        a, b = looks[one], looks[other]
        title = f"{one}, {other}"
        kinds = [{kind == "pixels" for kind in seen.formats} for seen in (a, b)]
        if not (a.whole and b.whole):
            facts.append((title, "not compared: images are made by a formula"))
        elif kinds[0] != kinds[1]:
            facts.append((title, "not compared: pixels with files"))
        else:
            first, second = shared(a.hashes, b.hashes)
            text = "no image is in both, byte for byte"
            if len(second):
                names = f"{name_of(a.source, first[0])} and {name_of(b.source, second[0])}"
                text = f"{len(second):,} of the {len(b.indices):,} images of {other} are in {one}"
                text += f" too, such as {names}"
                torn = sum(
                    said(a.source, a.labels[i]) != said(b.source, b.labels[j])
                    for i, j in zip(first, second, strict=True)
                )
                text += f"; {torn:,} with DIFFERENT labels" if torn else ""
            facts.append((title, text))
    return facts


def mapping_lines(name: str, matched: Matched) -> Iterator[str]:
    """The lines on how a split's classes map to a model's: those with another name."""
    text = f"{len(matched.names):,} of the model's {len(matched.labels):,}, {matched.rule}"
    other = [("", f"{ours} is {label}") for ours, label in matched.pairs.items() if ours != label]
    yield from _rows([(name, text), *other])
