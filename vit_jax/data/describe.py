"""What a source is understood to be, in words, before anything is trained."""

import collections
import dataclasses
import io
import itertools
import os
import re
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Int64

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
from vit_jax.data.forms import archives, custom, files, hub, idx, listed, records, tfds, vtab
from vit_jax.data.forms.files import WHOLE
from vit_jax.data.images import FORMATS, read_image, sniff
from vit_jax.data.sources import SOURCES, Source, open_source
from vit_jax.errors import UserError

_HEADERS, _DECODED, _MADE = 2000, 200, 200  # examples looked at more closely; of made ones, at all
_ORIENTATION = 0x0112  # the EXIF tag
_MODES = {"L": "grey", "LA": "grey with alpha", "P": "palette", "RGBA": "RGB with alpha"}


def first_lines(named: Mapping[str, Source], specs: Mapping[str, str] | None = None) -> list[str]:
    """A line on each split, for training to print: how many images, of which classes.

    Args:
      specs: by the same names, what the source was opened by, such as "folder:pets, all[:90%]".
    """
    width = max(map(len, named), default=0)
    lines = []
    for name, source in named.items():
        spec = f"{(specs or {}).get(name, '')}: ".removeprefix(": ")
        count = f"{len(source):,}" if isinstance(source, Sized) else "endless"
        names, labels = source.label_names, labels_of(source)
        told = [", ".join(names[:2]) + (", ..." if len(names) > 2 else "")]
        if labels is not None:
            counts = np.bincount(
                labels[labels >= 0], minlength=len(inner_source(source).label_names)
            )
            told.append(f"{_range(counts)} each")
        told += ["several or none an image"] * getattr(source, "multi_label", False)
        told += ["one for each pixel"] * getattr(source, "masks", False)
        classes = "1 class" if len(names) == 1 else f"{len(names):,} classes"
        line = f"{name:<{width}}  {spec}{count} images of {classes} ({'; '.join(told)})"
        passed = getattr(inner_source(source), "passed_over", None)
        lines.append(f"{line}, {passed}" if passed else line)
    return lines


def _range(counts: Any) -> str:
    low, high = int(min(counts)), int(max(counts))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


# -------------------------------------------------------------------------------- splits of a spec


def _array_splits(path: str) -> list[str]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return [name.removesuffix("_images") for name in file.files if name.endswith("_images")]
    except (ValueError, EOFError, zipfile.BadZipFile):
        return []  # opening it says in a sentence what is wrong


def _tfds_splits(argument: str) -> list[str]:
    name = argument.partition(",label=")[0]
    path = name.rstrip("/")
    found = tfds.prepared(f"tfds:{argument}", name, path if os.path.isdir(path) else None)
    return list(found.info.splits)


def _three(argument: str) -> list[str]:
    return ["train", "val", "test"]


# What splits a source has, by its argument; none is the whole of it.
SPLITS: dict[str, Callable[[str], Sequence[str]]] = {
    "digits": _three,
    "fractals": _three,
    "scenes": _three,
    "vtab": lambda argument: vtab.SPLITS,
    "arrays": _array_splits,
    "records": records.record_splits,
    "tfds": _tfds_splits,
    "folder": files.folder_splits,
    "tar": archives.tar_splits,
    "zip": archives.tar_splits,
    "table": listed.table_splits,
    "idx": idx.idx_splits,
    "hf-data": hub.hub_splits,
    "python": custom.python_splits,
}


# The endings of files that are given by their paths alone.
_ENDINGS = {
    "tar": (".tar", ".tgz", *(f".tar.{each}" for each in ("gz", "bz2", "xz", "zst"))),
    "zip": (".zip",),
    "arrays": (".npz",),
    "table": (".csv", ".tsv", ".jsonl"),
}


def splits_of(spec: str) -> list[str]:
    """The names of a source's splits, as far as they can be known; [] where it has none."""
    kind, _, argument = spec.partition(":")
    found = SPLITS[kind](os.path.expanduser(argument)) if kind in SPLITS else ()
    return [name for name in found if name != WHOLE]


def understood(spec: str) -> str:
    """The spec of a source where a path alone is given: by its ending, or what lies there."""
    if spec.partition(":")[0] in SOURCES:
        return spec
    path = re.sub(r"(,\w+=[^,]*)+$", "", spec)
    for kind, endings in _ENDINGS.items():
        if path.lower().endswith(endings):
            return f"{kind}:{spec}"
    if not os.path.isdir(spec):
        return spec
    if records.record_splits(spec):
        return f"records:{spec}"
    return f"{'tfds' if os.path.isfile(f'{spec}/dataset_info.json') else 'folder'}:{spec}"


def open_splits(spec: str, split: str | None = None) -> dict[str, Source | UserError]:
    """Opens one split of a source, or all that it has; one that cannot be is its error.

    Raises:
      UserError: there is but one, and it cannot be opened.
    """
    names = [split] if split else []
    try:
        names = names or splits_of(spec) or [WHOLE]
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        names = [WHOLE]  # opening it says in a sentence what is wrong
    return open_all({name: (spec, name) for name in names})


def open_all(specs: Mapping[str, tuple[str, str]]) -> dict[str, Source | UserError]:
    """Opens sources and their splits; see `open_splits`."""
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
    """How a source was understood: "folder /abs/path"."""
    kind, _, argument = spec.partition(":")
    return f"{kind} {os.path.abspath(argument) if os.path.exists(argument) else argument}".rstrip()


# --------------------------------------------------------------------------------------- a report


class Example(NamedTuple):
    """What one example is, without its pixels."""

    hash: int = 0
    label: Any = ()
    format: str = ""
    bytes: int = 0
    header: tuple[int, int, str, int] | None = None  # h, w, mode, EXIF orientation
    why: str = ""  # it cannot be read


@dataclasses.dataclass
class Look:
    """What was seen of a split.

    Attributes:
      indices: of the examples that were read; all, unless they are made by a formula.
      labels: of each of them: an int, or a tuple of those that it has or whose pixels it has.
      headers: (h, w, mode, EXIF orientation) of those whose header was read.
      bad: example -> its name, and why it cannot be read.
      decoded, seconds: how many were read and decoded on one thread, and how long it took.
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

    @property
    def whole(self) -> bool:
        return isinstance(self.source, Sized) and len(self.indices) == len(self.source)

    @property
    def counts(self) -> Int64[np.ndarray, " k"]:
        """How many examples have each class; of masks, a pixel of it."""
        k = len(self.source.label_names)
        labels = np.fromiter(itertools.chain.from_iterable(map(_tuple, self.labels)), np.int64)
        return np.bincount(labels[(labels >= 0) & (labels < k)], minlength=k)


def _tuple(label: Any) -> tuple[int, ...]:
    return label if isinstance(label, tuple) else (label,)


def spread(n: int, most: int) -> list[int]:
    """Up to `most` numbers below n, evenly."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64)).tolist()


def look(source: Source, title: str | None = None) -> Look:
    """Reads all examples of a split (of one made by a formula, 200), and decodes up to 200."""
    endless = not isinstance(source, Sized)
    n = _MADE if endless else len(source)
    indices = range(min(n, _MADE) if is_made(source) else n)
    bad: dict[int, str] = {}
    # First, while nothing of it is in memory.
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
        warnings.simplefilter("ignore")  # Pillow's, of large images and of odd EXIF
        for at, example in enumerate(found):
            seen.hashes[at] = example.hash
            seen.labels.append(example.label)
            seen.bytes += example.bytes
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
    if isinstance(label, np.ndarray):
        label = tuple(np.unique(label).tolist())
    if not isinstance(image, bytes):
        h, w, c = image.shape if image.ndim == 3 else (*image.shape[:2], 1)
        mode = {1: "grey", 3: "RGB"}.get(c, f"{c} channels")
        mode += "" if image.dtype == np.uint8 else f" {image.dtype}"
        return Example(image_hash(image), label, "pixels", image.nbytes, (h, w, mode, 1))
    found = Example(image_hash(image), label, sniff(image[:32]) or "unknown", len(image))
    if not closely:
        return found
    try:
        return found._replace(header=_header(image))
    except Exception as error:  # noqa: BLE001  Pillow's readers raise what they like
        return found._replace(why=f"{type(error).__name__}: {error}".replace("\n", " "))


def _header(data: bytes) -> tuple[int, int, str, int]:
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        w, h = opened.size
        orientation = 1
        # Of a PNG without it, Pillow would look for EXIF behind the pixels.
        if opened.format != "PNG" or "exif" in opened.info:
            orientation = opened.getexif().get(_ORIENTATION, 1)
        return h, w, _MODES.get(opened.mode, opened.mode), orientation


def report(
    named: Mapping[str, Source | UserError],
    specs: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Yields the lines that say what each split is, and what they share; reads all images.

    Args:
      specs: by the same names, what is to be said behind the name of a split.
    """
    looks: dict[str, Look] = {}
    for name, source in named.items():
        yield ""
        yield f"{name}  {(specs or {}).get(name, '')}".rstrip()
        if isinstance(source, UserError):
            yield from _rows([("not opened", str(source))])
            continue
        looks[name] = look(source, name)
        yield from _rows(_facts(looks[name]))
    if len(looks) > 1:
        yield ""
        yield "between splits"
        yield from _rows(_between(looks))


def _rows(facts: Sequence[tuple[str, str]]) -> Iterator[str]:
    width = max(12, *(len(what) for what, _ in facts))
    for what, value in facts:
        yield f"  {what:<{width}}  {value}".rstrip()


def _facts(seen: Look) -> list[tuple[str, str]]:
    """What to say of a split: (what, value) a line; further lines of one have no name."""
    source, heads, n = seen.source, seen.headers, len(seen.indices)
    total = f"{len(source):,}" if isinstance(source, Sized) else "endless"
    facts = [("examples", total if seen.whole else f"{total}; {n:,} were looked at")]
    facts += _classes(seen)
    facts.append(("formats", _counted(seen.formats)))
    of = "" if len(heads) == n else f" (of {len(heads):,} sampled)"
    if heads:
        sizes = {"h": [head[0] for head in heads], "w": [head[1] for head in heads]}
        told = "; ".join(
            f"{side} {_range(values)}, median {np.median(values):,.0f}"
            for side, values in sizes.items()
        )
        if len({head[:2] for head in heads}) == 1:
            told = f"h {heads[0][0]:,}, w {heads[0][1]:,}"
        facts.append(("sizes", f"{told}{of}"))
        facts.append(("channels", _counted(collections.Counter(head[2] for head in heads)) + of))
        lying = sum(head[3] in (5, 6, 7, 8) for head in heads)
        other = sum(head[3] in (2, 3, 4) for head in heads)
        if lying:
            what = (
                f"{lying:,} of {len(heads):,} sampled lie on their side; turned upright with exif"
            )
            facts.append(("orientation", what))
        if other:
            what = f"{other:,} of {len(heads):,} sampled are upside down or mirrored; exif likewise"
            facts.append(("orientation", what))
    size = f"{seen.bytes / 1e6:,.1f} MB" if seen.bytes >= 1e5 else f"{seen.bytes:,}"
    facts.append(("bytes", size))
    passed = getattr(inner_source(source), "passed_over", None)
    if passed:
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
    kind = " for each pixel" * masks + ", several or none an image" * several
    told = f"{len(names):,}{kind}: in {_range(counts)} images each, median {np.median(counts):,.0f}"
    told += "" if seen.whole else f" (of {len(seen.indices):,})"
    pairs = [f"{name}: {count:,}" for name, count in zip(names, counts.tolist(), strict=True)]
    facts = [("classes", told), ("", ", ".join(pairs[:10]) + ", ..." * (len(pairs) > 10))]
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty and seen.whole:
        more = ", ..." * (len(empty) > 10)
        facts.append(("", f"{len(empty):,} without an image: {', '.join(empty[:10])}{more}"))
    if len(names) == 1 and not several:
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


def _again(seen: Look) -> list[tuple[str, str]]:
    """Images that are there more than once."""
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
        told = {seen.labels[i]: i for i in reversed(group.tolist())}
        names = [
            f"{name_of(seen.source, i, 'file')} is {said(seen.source, label)}"
            for label, i in sorted(told.items(), key=lambda pair: pair[1])
        ]
        facts.append(("", "; ".join(names[:4])))
    return facts


def said(source: Source, label: Any) -> str:
    """The names of an example's classes."""
    names = source.label_names
    told = [names[i] if 0 <= i < len(names) else f"no class ({i})" for i in _tuple(label)]
    return ", ".join(told) or "nothing"


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
            told = "no image is in both, byte for byte"
            if len(second):
                names = f"{name_of(a.source, first[0])} and {name_of(b.source, second[0])}"
                told = f"{len(second):,} of the {len(b.indices):,} images of {other} are in {one}"
                told += f" too, such as {names}"
                torn = sum(
                    said(a.source, a.labels[i]) != said(b.source, b.labels[j])
                    for i, j in zip(first, second, strict=True)
                )
                told += f"; {torn:,} with DIFFERENT labels" if torn else ""
            facts.append((title, told))
    return facts


def mapping_lines(name: str, matched: Matched) -> Iterator[str]:
    """Which class of a model each class of a split is: those that are called otherwise."""
    told = f"{len(matched.names):,} of the model's {len(matched.labels):,}, {matched.rule}"
    other = [("", f"{ours} is {label}") for ours, label in matched.pairs.items() if ours != label]
    yield from _rows([(name, told), *other])
