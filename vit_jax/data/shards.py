"""Writes ArrayRecord shards, and the metadata that TFDS and `records` read."""

import collections
import concurrent.futures
import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tqdm
from jaxtyping import UInt64

from vit_jax.data.contents import image_hash
from vit_jax.data.forms.examples import write_example
from vit_jax.data.forms.files import PassedOver
from vit_jax.data.forms.records import CONTENT, INFO, content_digest, record_splits
from vit_jax.data.images import BadImage
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.writing import replacing, write_atomically

logger = logging.getLogger(__name__)

NAME = "images"  # of the data set, as TFDS calls it
# What `prepare` writes.
FILES = (
    *(f"{NAME}-*.array_record-*", "vit_jax_*", "content_*", "features.json", "label.labels.txt"),
    *("dataset_info.json", "bad_images_*.jsonl", "passed_over_*.jsonl", "lost+found"),
)
WORK = ".unfinished_{split}"  # the folder of what only an unfinished split needs
_LEFT_FREE = 256 * 2**20  # bytes of disk


def finished_splits(dst: str, but: str | None = None) -> dict[str, dict[str, Any]]:
    """Split -> what its file INFO says, for each split that is finished, except `but`."""
    infos = {name: read_json(info_path(dst, name)) for name in record_splits(dst)}
    return {name: info for name, info in infos.items() if info and name != but}


def begun_splits(dst: str, but: str | None = None) -> dict[str, dict[str, Any]]:
    """Split -> its plan, for each split that was begun, except `but`."""
    start = WORK.format(split="")
    names = [name.removeprefix(start) for name in sorted(os.listdir(dst)) if start in name]
    plans = {n: read_json(os.path.join(dst, WORK.format(split=n), "plan.json")) for n in names}
    return {name: plan for name, plan in plans.items() if plan and name != but}


def kept_content(dst: str, split: str) -> UInt64[np.ndarray, " n"] | None:
    """The saved hash of each image of a finished split; None if missing or outdated."""
    try:
        hashes = np.load(os.path.join(dst, CONTENT.format(split=split)), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    expected = (read_json(info_path(dst, split)) or {}).get("content")
    whole = hashes.dtype == np.uint64 and content_digest(hashes) == expected
    return hashes if whole else None


def info_path(dst: str, split: str) -> str:
    """The path of the JSON file that describes a prepared split."""
    return os.path.join(dst, INFO.format(split=split))


def converted_images(
    source: Source,
    indices: Iterable[int],
    conversion: Callable[[Any], bytes],
    pool: concurrent.futures.Executor,
    sequential: bool,
) -> Iterator[tuple[bytes | None, int, str, str]]:
    """Yields (record or None, image hash, name, error) in order, converting 64 images ahead."""

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


def write_shard(
    path: str, examples: Iterable[tuple[bytes | None, int, str, str]], bar: tqdm.tqdm
) -> dict[str, Any]:
    """Writes a shard and returns its metadata, which marks it as complete once it is saved."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = os.path.dirname(path)
    digest, count, total, bad, hashes = hashlib.sha256(), 0, 0, [], []
    with replacing(path) as temporary:
        # No compression, as image files have it; groups of one record for random access.
        writer = ArrayRecordWriter(temporary, "group_size:1,uncompressed")
        for record, hashed, name, why in examples:
            bar.update()
            if record is None:
                bad.append({"name": name, "why": why})
                continue
            # Checked every 64 MB.
            if total % 2**26 < len(record) and shutil.disk_usage(folder).free < _LEFT_FREE:
                raise OSError(errno.ENOSPC, "the disk is nearly full", path)
            with _writing(path):
                writer.write(record)
            digest.update(record)
            hashes.append(hashed)
            count, total = count + 1, total + len(record)
        with _writing(path):
            writer.close()
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
    """Turns the RuntimeError that ArrayRecord raises on a full disk into an OSError."""
    try:
        yield
    except RuntimeError as error:
        numbers = (errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)
        number = next((n for n in numbers if os.strerror(n) in str(error)), errno.ENOSPC)
        raise OSError(number, os.strerror(number), path) from None


def write_info(
    dst: str, split: str, plan: dict[str, Any], shards: list[dict[str, Any]]
) -> dict[str, Any]:
    """Writes the metadata of a finished split: TFDS's files first, our own file INFO last."""
    bad = [each for shard in shards for each in shard.pop("bad")]
    hashes = [shard.pop("content", None) for shard in shards]
    if not any(shard["examples"] for shard in shards):
        why = f"; the first, {bad[0]['name']}: {bad[0]['why']}"
        raise UserError(f"none of the {len(bad)} images of {plan['source']} can be read{why}")
    log = os.path.join(dst, f"bad_images_{split}.jsonl")
    if bad:
        write_atomically(log, "".join(json.dumps(each) + "\n" for each in bad))
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
    if None not in hashes:  # None: a shard of an earlier version
        whole = np.frombuffer(bytes.fromhex("".join(hashes)), "<u8").astype(np.uint64)
        _write_array(os.path.join(dst, CONTENT.format(split=split)), whole)
        info["content"] = content_digest(whole)
    others = finished_splits(dst, but=split).items()
    write_json(os.path.join(dst, "features.json"), _features(len(plan["label_names"])))
    write_atomically(os.path.join(dst, "label.labels.txt"), "\n".join(plan["label_names"]) + "\n")
    write_json(os.path.join(dst, "dataset_info.json"), _tfds_info([*others, (split, info)]))
    write_json(info_path(dst, split), info)
    return info


def write_passed_over(dst: str, split: str, passed: PassedOver, shown: str) -> None:
    """Writes the list of files that were skipped, and logs how many; `shown` names the folder."""
    if passed:
        path = os.path.join(dst, f"passed_over_{split}.jsonl")
        lines = [{"name": name, "why": why} for name, why in passed.files]
        if len(passed) > len(lines):
            lines.append({"more": len(passed) - len(lines)})
        write_atomically(path, "".join(json.dumps(each) + "\n" for each in lines))
        logger.info("%s, listed in %s/%s", passed, shown, os.path.basename(path))


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


def file_size(path: str) -> int:
    """The size of a file in bytes; -1 if it is missing."""
    return os.path.getsize(path) if os.path.exists(path) else -1


def read_json(path: str) -> Any:
    """Reads a JSON file; None if it is missing or incomplete."""
    try:
        with open(path) as file:
            return json.load(file)
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write_json(path: str, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_atomically(path, json.dumps(value, indent=1))


def _write_array(path: str, values: UInt64[np.ndarray, " n"]) -> None:
    out = io.BytesIO()
    np.save(out, values)
    write_atomically(path, out.getvalue())
