"""Converts folders, archives and any other source to ArrayRecord shards.

Each shard is written to a temporary file, renamed, and its metadata saved: a killed run resumes at
the first shard without metadata.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import numpy as np
import tqdm

from vit_jax.data import shards, storage
from vit_jax.data.classes import with_labels
from vit_jax.data.contents import content, image_hash, shared
from vit_jax.data.forms.archives import TarSource, open_tar
from vit_jax.data.forms.class_lists import read_classes
from vit_jax.data.forms.files import WHOLE, PassedOver
from vit_jax.data.forms.open_files import is_compressed
from vit_jax.data.forms.records import RecordSource, records
from vit_jax.data.images import BadImage, decode, encode
from vit_jax.data.sources import SOURCES, Source, open_source
from vit_jax.data.transforms import resize
from vit_jax.errors import UserError
from vit_jax.writing import check_own, check_text, make_folder

logger = logging.getLogger(__name__)

_MOST_READ = 20_000  # images read from another split to compare it


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Shrinks an image if its shorter side is longer than `short_side`, else leaves it as it is.

    A shrunk image is first turned upright by its EXIF orientation, then area-averaged, and written
    as a JPEG of that quality without EXIF.
    """

    short_side: int | None = None
    quality: int = 95

    def __post_init__(self):
        if not 1 <= self.quality <= 100 or (self.short_side is not None and self.short_side < 1):
            raise UserError(
                f"short_side is {self.short_side} and quality {self.quality}; expected at least 1, "
                "and 1 to 100"
            )

    def __call__(self, image: Any) -> bytes:
        """Converts an image file's bytes, or pixels, to the bytes of the new file.

        Raises:
          BadImage: the bytes cannot be decoded.
        """
        pixels = decode(image, exif=True) if isinstance(image, bytes) else image
        shorter = min(pixels.shape[:2])
        if self.short_side is None or shorter <= self.short_side:
            return image if isinstance(image, bytes) else encode(pixels)
        h, w = (round(side * self.short_side / shorter) for side in pixels.shape[:2])
        if max(h, w) > 65500:
            raise BadImage(f"{h} x {w} pixels are more than a JPEG has")
        return encode(resize(pixels, (h, w), "area"), self.quality)


def prepare(
    src: str,
    dst: str,
    *,
    split: str = "train",
    part: str | None = None,
    labels: str | None = None,
    classes: str | None = None,
    conversion: Conversion = Conversion(),
    examples: int | None = None,
    shard_examples: int = 4096,
    threads: int | None = None,
) -> dict[str, Any]:
    """Writes one split of a data set as shards; an interrupted run resumes.

    Images that cannot be read are left out and listed in DST/bad_images_SPLIT.jsonl, files that
    are not images in DST/passed_over_SPLIT.jsonl.

    Args:
      src: a folder, a tar or zip (or a pattern for several; a tar may be compressed by gzip,
        bzip2, xz or Zstandard), or a source such as "fractals:classes=1000".
      dst: a folder. If it has other splits already, this one gets the same classes.
      split: the name of the split in `dst`.
      part: the split of `src` to read. Default: `split` if `src` is a source or a folder that has
        it, else all.
      labels: a file with the class of every image (see `label_files.read_labels`).
      classes: a list or table of class names (see `class_lists.read_classes`), in that order.
        Default: the names found, sorted.
      examples: the number of examples to take from an endless source.
      shard_examples: the number of examples in a shard.

    Returns:
      The contents of DST/vit_jax_SPLIT.json.

    Raises:
      UserError: the source cannot be opened, its classes do not match, no image can be read, or
        `dst` has this split with other settings or another split of the same images.
    """
    if not re.fullmatch(r"\w+", split):
        raise UserError(f"split {split!r}: a name of letters, digits and _ was expected")
    for name, value in {
        "examples": examples,
        "shard_examples": shard_examples,
        "threads": threads,
    }.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    source, sequential = _open(src, part, split, labels)
    if getattr(source, "masks", False):
        raise UserError(f"{src} has masks for labels, which records do not hold")
    total = len(source) if isinstance(source, Sized) else examples
    if total is None:
        raise UserError(f"{src} is endless: say how many --examples to take")
    total = min(total, total if examples is None else examples)
    check_text(dst)
    check_own(dst, shards.FILES, "prepared data")
    make_folder(dst)
    names = _class_names(dst, classes, source.label_names)
    passed = getattr(source, "passed_over", PassedOver())
    source = _with_labels(src, dst, source, names)
    plan = {
        "source": src,
        "source_fingerprint": source.fingerprint,
        "examples": total,
        "shard_examples": shard_examples,
        "label_names": list(names),
        **dataclasses.asdict(conversion),
        "upright": True,
    }
    with _locked(dst):
        done = shards.read_json(shards.info_path(dst, split))
        work = os.path.join(dst, f".unfinished_{split}")
        begun = done["plan"] if done else shards.read_json(os.path.join(work, "plan.json"))
        if begun and "upright" not in begun:  # of a version that turned images only with `exif`
            begun["upright"] = begun.get("short_side") is None or begun.get("exif", False)
        changed = [key for key in plan if begun and begun.get(key) != plan[key] and key != "source"]
        if changed:
            raise UserError(
                f"{dst} holds split {split!r} made otherwise ({', '.join(changed)} differ): delete "
                "it, or choose another folder"
            )
        if done:
            return done
        _refuse_again(dst, split, plan, part, source)
        os.makedirs(work, exist_ok=True)
        shards.write_json(os.path.join(work, "plan.json"), plan)
        starts = range(0, total, shard_examples)
        finished = []
        with (
            concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool,
            tqdm.tqdm(total=total, unit="image", desc=split, disable=None) as bar,
        ):
            for number, start in enumerate(starts):
                indices = range(start, min(start + shard_examples, total))
                file = f"{shards.NAME}-{split}.array_record-{number:05d}-of-{len(starts):05d}"
                metadata = os.path.join(work, f"{file}.json")
                shard = shards.read_json(metadata)
                if shard is None or shards.file_size(os.path.join(dst, file)) != shard["bytes"]:
                    images = shards.converted_images(source, indices, conversion, pool, sequential)
                    shard = shards.write_shard(os.path.join(dst, file), images, bar)
                    shards.write_json(metadata, shard)
                else:
                    bar.update(len(indices))
                finished.append(shard)
        shards.write_passed_over(dst, split, passed)
        info = shards.write_info(dst, split, plan, finished)
        shutil.rmtree(work)
        _say_shared(dst, split)
        return info


def _open(src: str, part: str | None, split: str, labels: str | None) -> tuple[Source, bool]:
    """Opens `src`. Also returns whether it can only be read in order, as a compressed tar."""
    kind, _, argument = src.partition(":")
    if storage.is_folder(path := src.removesuffix(",label=folder")):
        here = storage.is_folder(os.path.join(path, split))
        source = open_source(f"folder:{src}", part or (split if here else WHOLE))
        if not (part or here):
            logger.info("%s has no folder %r: all of it is taken", path, split)
        if not (part or here or any(name.count("/") == 1 for name in source.names)):
            raise UserError(
                f"{path} has no folder {split!r}, and its folders are no classes, which have "
                "images in them: say which --part of it is meant"
            )
    elif kind in ("tar", "zip") or kind not in SOURCES:
        source = open_tar(src if kind not in SOURCES else argument, part or WHOLE, labels)
        if not part:
            logger.info("%s: all of it is taken; --part takes a folder in it", src)
    else:
        source = open_source(src, part or split)
    if labels and not isinstance(source, TarSource):
        raise UserError("--labels is for tar archives, whose folders do not say the classes")
    compressed = isinstance(source, TarSource) and any(map(is_compressed, source.files.paths))
    return source, compressed


def _class_names(dst: str, classes: str | None, found: Sequence[str]) -> tuple[str, ...]:
    """The class names: of the file `classes`, of the other splits in `dst`, or as found."""
    others = list(shards.finished_splits(dst).values())
    names = tuple(others[0]["plan"]["label_names"]) if others else tuple(found)
    if classes is None:
        return names
    given = read_classes(classes, found)
    if others and given != names:
        raise UserError(f"{classes} names other classes than the splits that {dst} holds")
    return given


def _with_labels(src: str, dst: str, source: Source, names: tuple[str, ...]) -> Source:
    """Maps the source's labels to the classes of the data set, logging how if names differ."""
    unknown = set(source.label_names) - set(names)
    try:
        source = with_labels(source, names)
    except UserError:
        raise UserError(
            f"{src} has {len(source.label_names)} classes, of which {dst} or --classes, with "
            f"{len(names)}, knows no {sorted(unknown)[0]!r}"
        ) from None
    if unknown:
        logger.info("%s: %s", src, source.matched)
    return source


def _refuse_again(
    dst: str, split: str, plan: dict[str, Any], part: str | None, source: Source
) -> None:
    """Raises a UserError if another split of `dst`, finished or not, has the same images."""
    finished = shards.finished_splits(dst, but=split)
    plans = {name: (info["plan"], "") for name, info in finished.items()}
    for folder in sorted(n for n in os.listdir(dst) if n.startswith(".unfinished_")):
        begun = shards.read_json(os.path.join(dst, folder, "plan.json"))
        name = folder.removeprefix(".unfinished_")
        if begun and name not in (split, *plans):
            plans[name] = begun, f", begun (if it is not meant, delete {dst}/{folder})"
    base = (part or WHOLE).partition("[")[0]
    for name, (other, note) in plans.items():
        if other.get("source_fingerprint") != plan["source_fingerprint"]:
            continue
        if not note and _only_alike(source, other, records(dst, name).kept_content()):
            continue
        raise UserError(
            f"{plan['source']} as split {split!r} is the same images as split {name!r} of "
            f"{dst}{note}: say which part each split is, such as '--part={base}[:90%]' for one and "
            f"'--part={base}[90%:]' for the other, or --part=NAME of another folder or split"
        )


def _only_alike(source: Source, plan: dict[str, Any], known: Any) -> bool:
    """Whether `source` has other images than a split, though files of the same names and sizes."""
    if known is None:
        return False
    fields = [field.name for field in dataclasses.fields(Conversion)]
    conversion = Conversion(**{name: plan[name] for name in fields if name in plan})
    found = set()
    for index in range(min(16, plan["examples"])):
        with contextlib.suppress(BadImage):
            found.add(image_hash(conversion(source[index]["image"])))
    return bool(found) and not np.isin(np.array(sorted(found), np.uint64), known).any()


def _say_shared(dst: str, split: str) -> None:
    """Warns if images of a new split are in other splits of `dst` too."""
    for name in shards.finished_splits(dst, but=split):
        try:
            found = _shared(records(dst, name), records(dst, split))
        except UserError as error:  # the other split is damaged, not this one
            found = str(error)
        if isinstance(found, str):
            logger.warning("splits %r and %r of %s were not compared: %s", split, name, dst, found)
        elif found:
            logger.warning(
                "%s images of split %r of %s are in split %r too: delete one of the two, "
                "and prepare it from another --part",
                *(f"{found:,}", split, dst, name),
            )


def _shared(a: RecordSource, b: RecordSource) -> int | str:
    """The number of images of `b` that are in `a` too, or why they were not compared."""
    for each in (a, b):
        if each.kept_content() is None and len(each) > _MOST_READ:
            return f"{each.where} has no hashes of its {len(each):,} images"
    return len(shared(content(a), content(b))[1])


@contextlib.contextmanager
def _locked(dst: str) -> Iterator[None]:
    """Locks the folder against a second `prepare`; the lock ends with the process."""
    with open(os.path.join(dst, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another prepare is writing to {dst}") from None
        yield
