"""Converts folders, archives and any other source to ArrayRecord shards.

Each shard is written to a temporary file, renamed, and its metadata saved: a killed run resumes at
the first shard without metadata. In a bucket, several processes share one conversion.
"""

import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np
import tqdm

from vit_jax.data import shards, storage
from vit_jax.data.classes import with_labels
from vit_jax.data.contents import Hashes, content, image_hash, shared
from vit_jax.data.destinations import Bucket, Disk, opened
from vit_jax.data.forms.archives import TarSource, open_tar
from vit_jax.data.forms.class_lists import read_classes
from vit_jax.data.forms.coco import is_coco
from vit_jax.data.forms.files import WHOLE, PassedOver
from vit_jax.data.forms.open_files import is_compressed
from vit_jax.data.forms.pair_layouts import is_layout
from vit_jax.data.forms.records import records
from vit_jax.data.forms.yolo import is_yolo
from vit_jax.data.images import BadImage, decode, encode
from vit_jax.data.sources import SOURCES, Source, open_source
from vit_jax.data.transforms import resize
from vit_jax.errors import UserError
from vit_jax.objects import check, is_bucket

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
      dst: a folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER. If it has other splits already, this
        one gets the same classes. Several processes may convert the same to a bucket.
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
      Unreachable: the store does not answer.
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
    dst = check(dst) if is_bucket(dst) else dst
    source, sequential = _open(src, part, split, labels)
    for what in ("masks", "boxes"):
        if getattr(source, what, False):
            raise _of_masks(src, what=what)
    total = len(source) if isinstance(source, Sized) else examples
    if total is None:
        raise UserError(f"{src} is endless: say how many --examples to take")
    total = min(total, total if examples is None else examples)
    passed = getattr(source, "passed_over", PassedOver())
    with opened(dst, split) as place:
        names = _class_names(place, classes, source.label_names)
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
        done = place.info()
        _check_plan(place, split, plan, done["plan"] if done else place.plan())
        if done:
            place.clean()  # a kill may have left it
            return done
        _refuse_again(place.here, dst, split, plan, part, source)
        begun = place.begin(plan)
        _check_plan(place, split, plan, begun)
        count = -(-total // shard_examples)
        jobs = {
            f"{shards.NAME}-{split}.array_record-{number:05d}-of-{count:05d}": range(
                number * shard_examples, min((number + 1) * shard_examples, total)
            )
            for number in range(count)
        }
        finished: dict[str, dict[str, Any]] = {}
        with (
            concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool,
            tqdm.tqdm(total=total, unit="image", desc=split, disable=None) as bar,
        ):

            def make(file: str) -> dict[str, Any]:
                images = shards.converted_images(source, jobs[file], conversion, pool, sequential)
                return shards.write_shard(os.path.join(place.here, file), images, bar)

            while missing := [file for file in jobs if file not in finished]:
                finished |= place.next(missing, make)
                bar.n = sum(len(jobs[file]) for file in finished)
                bar.set_postfix_str(place.progress())

        def write() -> dict[str, Any]:
            shards.write_passed_over(place.here, split, passed, place.name)
            return shards.write_info(
                place.here, split, begun, [dict(finished[file]) for file in jobs]
            )

        info = place.finish(write)
        _say_shared(place, split)
        return info


def _check_plan(
    place: Disk | Bucket, split: str, plan: dict[str, Any], begun: dict[str, Any] | None
) -> None:
    """Raises a UserError if a split was begun with other settings than those of `plan`."""
    if begun and "upright" not in begun:  # of a version that turned images only with `exif`
        begun["upright"] = begun.get("short_side") is None or begun.get("exif", False)
    changed = [key for key in plan if begun and begun.get(key) != plan[key] and key != "source"]
    if changed:
        raise UserError(
            f"{place.name} holds split {split!r} made otherwise ({', '.join(changed)} differ): "
            "delete it, or choose another folder"
        )


def _of_masks(src: str, or_else: str = "", what: str = "masks") -> UserError:
    return UserError(
        f"{src} has {what} for labels, which records do not hold: train on it as it is{or_else}"
    )


def _open(src: str, part: str | None, split: str, labels: str | None) -> tuple[Source, bool]:
    """Opens `src`. Also returns whether it can only be read in order, as a compressed tar."""
    kind, _, argument = src.partition(":")
    if storage.is_folder(path := src.removesuffix(",label=folder")):
        here = storage.is_folder(os.path.join(path, split))
        if not part and (is_coco(path) or is_yolo(path)):
            raise _of_masks(src, what="boxes")
        if is_layout(os.path.join(src, part or split)):
            raise _of_masks(src)
        if not (part or here) and is_layout(src):
            raise _of_masks(src, "; if its images are in folders of classes, say --part=images")
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


def _class_names(
    place: Disk | Bucket, classes: str | None, found: Sequence[str]
) -> tuple[str, ...]:
    """The class names: of the file `classes`, of the destination's other splits, or as found."""
    others = [info["plan"] for info in shards.finished_splits(place.here).values()]
    if not others and isinstance(place, Bucket):  # where others may be at work
        for name, begun in shards.begun_splits(place.here).items():
            logger.info("classes are those of split %r of %s, which is begun", name, place.name)
            others = [begun]
    names = tuple(others[0]["label_names"]) if others else tuple(found)
    if classes is None:
        return names
    given = read_classes(classes, found)
    if others and given != names:
        raise UserError(f"{classes} names other classes than the splits that {place.name} holds")
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
    here: str, dst: str, split: str, plan: dict[str, Any], part: str | None, source: Source
) -> None:
    """Raises a UserError if another split of `dst`, finished or not, has the same images."""
    finished = shards.finished_splits(here, but=split)
    plans = {name: (info["plan"], "") for name, info in finished.items()}
    for name, begun in shards.begun_splits(here, but=split).items():
        note = f", begun (if it is not meant, delete {dst}/{shards.WORK.format(split=name)})"
        plans.setdefault(name, (begun, note))
    base = (part or WHOLE).partition("[")[0]
    for name, (other, note) in plans.items():
        if other.get("source_fingerprint") != plan["source_fingerprint"]:
            continue
        if not note and _only_alike(source, other, shards.kept_content(here, name)):
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


def _say_shared(place: Disk | Bucket, split: str) -> None:
    """Warns if images of a new split are in other splits of the destination too."""
    for name in shards.finished_splits(place.here, but=split):
        try:
            first, second = (_hashes(place, each) for each in (name, split))
        except UserError as error:  # a split is damaged or large
            logger.warning(
                "splits %r and %r of %s were not compared: %s", split, name, place.name, error
            )
            continue
        if found := len(shared(first, second)[1]):
            logger.warning(
                "%s images of split %r of %s are in split %r too: delete one of the two, "
                "and prepare it from another --part",
                *(f"{found:,}", split, place.name, name),
            )


def _hashes(place: Disk | Bucket, split: str) -> Hashes:
    """The hash of each image of a split, read from its records only if they are at hand."""
    if (kept := shards.kept_content(place.here, split)) is not None:
        return kept
    source = records(place.here, split) if isinstance(place, Disk) else None
    count = shards.finished_splits(place.here).get(split, {}).get("examples", 0)
    if source is None or count > _MOST_READ:
        raise UserError(f"records:{place.name} {split} has no hashes of its {count:,} images")
    return content(source)
