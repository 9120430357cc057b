"""Folders, archives and any other source -> ArrayRecord shards, which TFDS can read as well.

A shard is written under another name, then renamed, then vouched for by a small file beside it: a
run that was killed goes on with the first shard that nothing vouches for.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import tqdm
from jaxtyping import UInt64

from vit_jax.data.classes import with_labels
from vit_jax.data.contents import content, image_hash, shared
from vit_jax.data.forms.archives import TarSource, open_tar
from vit_jax.data.forms.examples import write_example
from vit_jax.data.forms.files import WHOLE, PassedOver, open_file
from vit_jax.data.forms.records import CONTENT, INFO, RecordSource, content_digest, records
from vit_jax.data.forms.tables import read_classes
from vit_jax.data.images import BadImage, decode, encode
from vit_jax.data.sources import SOURCES, Source, open_source
from vit_jax.data.transforms import resize
from vit_jax.errors import UserError

logger = logging.getLogger(__name__)

NAME = "images"  # of the data set, as TFDS calls it
_LEFT_FREE = 256 * 2**20  # bytes of disk
_MOST_READ = 20_000  # images of another split that are read to be compared


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What is done to an image: nothing, unless its shorter side is longer than `short_side`.

    Then it is turned upright as its EXIF orientation says, which the new file does not, shrunk
    (each new pixel the mean of those that it covers) and written as a JPEG of that quality.
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
        """Takes an image file's bytes, or pixels, to the bytes to be written.

        Raises:
          BadImage: bytes that no image can be read from.
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
    """Writes one split of a data set as shards; a run that was stopped goes on where it was.

    Images that cannot be read are left out, and listed in DST/bad_images_SPLIT.jsonl; files that
    are no images in DST/passed_over_SPLIT.jsonl.

    Args:
      src: a folder, a tar or zip (or a pattern for several; a tar may be compressed by gzip,
        bzip2, xz or Zstandard), or a source such as "fractals:classes=1000".
      dst: a folder, which may hold other splits; their classes are then this one's too.
      split: what the split is called from now on.
      part: which part of `src` it is: see the source. By default `split` where a folder has it, or
        where `src` is a source; else all.
      labels: a file that says the class of every image (see `tables.read_labels`).
      classes: a list or table of class names (see `tables.read_classes`), which fixes their order;
        by default sorted.
      examples: how many to take, of an endless source.
      shard_examples: how many go into a shard.

    Returns:
      What DST/vit_jax_SPLIT.json says.

    Raises:
      UserError: a source that cannot be opened, classes that do not fit, no image that can be
        read, a full disk, a split in `dst` that was made otherwise, or another one of it that is
        of the same images.
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
    try:
        os.makedirs(dst, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{dst} is a file; expected a folder") from None
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
        done = _read(os.path.join(dst, INFO.format(split=split)))
        work = os.path.join(dst, f".unfinished_{split}")
        begun = done["plan"] if done else _read(os.path.join(work, "plan.json"))
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
        _write(os.path.join(work, "plan.json"), plan)
        starts = range(0, total, shard_examples)
        shards = []
        with (
            concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool,
            tqdm.tqdm(total=total, unit="image", desc=split, disable=None) as bar,
        ):
            for number, start in enumerate(starts):
                indices = range(start, min(start + shard_examples, total))
                file = f"{NAME}-{split}.array_record-{number:05d}-of-{len(starts):05d}"
                vouched = os.path.join(work, f"{file}.json")
                shard = _read(vouched)
                if shard is None or _size(os.path.join(dst, file)) != shard["bytes"]:
                    examples_of = _converted(source, indices, conversion, pool, sequential)
                    shard = _write_shard(os.path.join(dst, file), examples_of, bar)
                    _write(vouched, shard)
                else:
                    bar.update(len(indices))
                shards.append(shard)
        _list_passed_over(dst, split, passed)
        info = _finish(dst, split, plan, shards)
        shutil.rmtree(work)
        _say_shared(dst, split)
        return info


def _open(src: str, part: str | None, split: str, labels: str | None) -> tuple[Source, bool]:
    """Opens what is to be prepared; and says whether it can only be read in order."""
    kind, _, argument = src.partition(":")
    if os.path.isdir(path := src.removesuffix(",label=folder")):
        here = os.path.isdir(os.path.join(path, split))
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
    compressed = isinstance(source, TarSource) and not all(
        isinstance(open_file(path), io.FileIO) for path in source.files.paths
    )
    return source, compressed


def _class_names(dst: str, classes: str | None, found: Sequence[str]) -> tuple[str, ...]:
    """The classes of the data set: those of the file, of its other splits, or those found."""
    others = [info for info in map(_read, _infos(dst)) if info]
    names = tuple(others[0]["plan"]["label_names"]) if others else tuple(found)
    if classes is None:
        return names
    given = read_classes(classes, found)
    if others and given != names:
        raise UserError(f"{classes} names other classes than the splits that {dst} holds")
    return given


def _with_labels(src: str, dst: str, source: Source, names: tuple[str, ...]) -> Source:
    """The source with the classes of the data set; says by what, where it is not the names."""
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


def _infos(dst: str) -> list[str]:
    start, end = INFO.split("{split}")
    names = sorted(n for n in os.listdir(dst) if n.startswith(start) and n.endswith(end))
    return [os.path.join(dst, name) for name in names]


def _others(dst: str, split: str) -> dict[str, dict[str, Any]]:
    """What is said of each other split that is finished."""
    start = len(INFO.partition("{split}")[0])
    told = {os.path.basename(path)[start : -len(".json")]: _read(path) for path in _infos(dst)}
    return {name: info for name, info in told.items() if info and name != split}


def _refuse_again(
    dst: str, split: str, plan: dict[str, Any], part: str | None, source: Source
) -> None:
    """Raises a UserError if another split of `dst`, finished or begun, is of the same images."""
    plans = {name: (info["plan"], "") for name, info in _others(dst, split).items()}
    for folder in sorted(n for n in os.listdir(dst) if n.startswith(".unfinished_")):
        begun = _read(os.path.join(dst, folder, "plan.json"))
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
            f"{dst}{note}: say which part each split is, such as --part={base}[:90%] for one and "
            f"--part={base}[90%:] for the other, or --part=NAME of another folder or split"
        )


def _only_alike(source: Source, plan: dict[str, Any], known: Any) -> bool:
    """Whether files of the same names and sizes are other images than those of a split."""
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
    """Warns of images of a new split that other splits of `dst` have too."""
    for name in _others(dst, split):
        try:
            found = _shared(records(dst, name), records(dst, split))
        except UserError as error:  # another split is damaged: this one is not
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
    """How many images of `b` are in `a` too, or why that is not known."""
    for each in (a, b):
        if each.kept_content() is None and len(each) > _MOST_READ:
            return f"{each.where} has no hashes of its {len(each):,} images"
    return len(shared(content(a), content(b))[1])


def _converted(
    source: Source,
    indices: Iterable[int],
    conversion: Conversion,
    pool: concurrent.futures.Executor,
    sequential: bool,
) -> Iterator[tuple[bytes | None, int, str, str]]:
    """Yields (record or None, its image's hash, name, why there is none), in order, a few ahead."""

    def read(index):
        try:
            return source[index]
        except BadImage as error:
            return error

    def convert(index, example=None):
        name = f"example {index}"
        try:
            example = example or read(index)
            if isinstance(example, BadImage):
                raise example
            name = example.get("name", name)
            image = conversion(example["image"])
        except BadImage as error:
            return None, 0, name, str(error)
        label = example["label"]
        if isinstance(label, tuple):
            raise UserError(f"{name} has several labels or none: shards hold one of each image")
        if not 0 <= label < len(source.label_names):
            return None, 0, name, f"label {label}"
        file = os.path.basename(example.get("file", str(index))).encode("utf-8", "replace")
        record = write_example({"image": image, "label": label, "name": file})
        return record, image_hash(image), name, ""

    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    for index in indices:
        waiting.append(pool.submit(convert, index, read(index) if sequential else None))
        if len(waiting) >= 64:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write_shard(
    path: str, examples: Iterable[tuple[bytes | None, int, str, str]], bar: tqdm.tqdm
) -> dict[str, Any]:
    """Writes a shard and returns what vouches for it."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder, partial = os.path.dirname(path), f"{path}.partial"
    digest, count, total, bad, hashes = hashlib.sha256(), 0, 0, [], []
    # Image files are compressed already; groups of one are read without their neighbours.
    writer = ArrayRecordWriter(partial, "group_size:1,uncompressed")
    for record, hashed, name, why in examples:
        bar.update()
        if record is None:
            bad.append({"name": name, "why": why})
            continue
        # Looked at every 64 MB.
        if total % 2**26 < len(record) and shutil.disk_usage(folder).free < _LEFT_FREE:
            raise OSError(errno.ENOSPC, "the disk is nearly full", path)
        with _writing(path):
            writer.write(record)
        digest.update(record)
        hashes.append(hashed)
        count, total = count + 1, total + len(record)
    with _writing(path):
        writer.close()
    with open(partial, "rb") as file:
        os.fsync(file.fileno())  # what vouches for it must not outlive it
    os.replace(partial, path)
    return {
        "file": os.path.basename(path),
        "bytes": os.path.getsize(path),
        "record_bytes": total,
        "examples": count,
        "sha256": digest.hexdigest(),
        "bad": bad,
        "content": np.array(hashes, "<u8").tobytes().hex(),
    }


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    """Says as an OSError what the writer of ArrayRecord raises on a full disk."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(errno.ENOSPC, str(error), path) from None


def _finish(
    dst: str, split: str, plan: dict[str, Any], shards: list[dict[str, Any]]
) -> dict[str, Any]:
    """Writes what says which shards there are: for TFDS first, for us last."""
    bad = [each for shard in shards for each in shard.pop("bad")]
    hashes = [shard.pop("content", None) for shard in shards]
    if not any(shard["examples"] for shard in shards):
        why = f"; the first, {bad[0]['name']}: {bad[0]['why']}"
        raise UserError(f"none of the {len(bad)} images of {plan['source']} can be read{why}")
    log = os.path.join(dst, f"bad_images_{split}.jsonl")
    if bad:
        _write_text(log, "".join(json.dumps(each) + "\n" for each in bad))
    digest = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode())
    digest.update(json.dumps(plan["label_names"]).encode())
    info = {
        "fingerprint": digest.hexdigest()[:16],
        "examples": sum(shard["examples"] for shard in shards),
        "bad_images": len(bad),
        "plan": plan,
        "label_names": plan["label_names"],
        "shards": shards,
    }
    if None not in hashes:  # an earlier version may have begun it
        whole = np.frombuffer(bytes.fromhex("".join(hashes)), "<u8").astype(np.uint64)
        _write_array(os.path.join(dst, CONTENT.format(split=split)), whole)
        info["content"] = content_digest(whole)
    path = os.path.join(dst, INFO.format(split=split))
    others = _others(dst, split).items()
    _write(os.path.join(dst, "features.json"), _features(len(plan["label_names"])))
    _write_text(os.path.join(dst, "label.labels.txt"), "\n".join(plan["label_names"]) + "\n")
    _write(os.path.join(dst, "dataset_info.json"), _tfds_info([*others, (split, info)]))
    _write(path, info)
    return info


def _list_passed_over(dst: str, split: str, passed: PassedOver) -> None:
    """Writes which files were passed over, and logs how many."""
    if passed:
        path = os.path.join(dst, f"passed_over_{split}.jsonl")
        lines = [{"name": name, "why": why} for name, why in passed.files]
        if len(passed) > len(lines):
            lines.append({"more": len(passed) - len(lines)})
        _write_text(path, "".join(json.dumps(each) + "\n" for each in lines))
        logger.info("%s, listed in %s", passed, path)


def _tfds_info(splits: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """TFDS's dataset_info.json."""
    return {
        "fileFormat": "array_record",
        "name": NAME,
        "version": "1.0.0",
        "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
        "splits": [
            {
                "name": name,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(shard["record_bytes"] for shard in info["shards"])),
                "shardLengths": [str(shard["examples"]) for shard in info["shards"]],
            }
            for name, info in splits
        ],
    }


def _features(num_classes: int) -> dict[str, Any]:
    """TFDS's features.json: an image of any size, a class and a name."""
    package = "tensorflow_datasets.core.features"
    shape = {"dimensions": ["-1", "-1", "3"]}
    features = {
        "image": {
            "image": {"dtype": "uint8", "shape": shape},
            "pythonClassName": f"{package}.image_feature.Image",
        },
        "label": {
            "classLabel": {"numClasses": str(num_classes)},
            "pythonClassName": f"{package}.class_label_feature.ClassLabel",
        },
        "name": {"text": {}, "pythonClassName": f"{package}.text_feature.Text"},
    }
    return {
        "featuresDict": {"features": features},
        "pythonClassName": f"{package}.features_dict.FeaturesDict",
    }


@contextlib.contextmanager
def _locked(dst: str) -> Iterator[None]:
    """Keeps a second `prepare` out of the same folder; a kill frees it."""
    with open(os.path.join(dst, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another prepare is writing to {dst}") from None
        yield


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else -1


def _read(path: str) -> Any:
    """What a JSON file says; None where it is not there or was not written to its end."""
    try:
        with open(path) as file:
            return json.load(file)
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _write(path: str, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=1))


def _write_array(path: str, values: UInt64[np.ndarray, " n"]) -> None:
    out = io.BytesIO()
    np.save(out, values)
    _write_bytes(path, out.getvalue())


def _write_text(path: str, text: str) -> None:
    _write_bytes(path, text.encode("utf-8"))


def _write_bytes(path: str, data: bytes) -> None:
    with open(f"{path}.partial", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.partial", path)
