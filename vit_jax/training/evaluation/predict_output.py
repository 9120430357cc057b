"""The command `predict`: answers of many images as JSON lines, CSV, Parquet or .npy."""

import contextlib
import csv
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tqdm

from vit_jax.checkpoints.load import Loaded
from vit_jax.data.forms.files import PassedOver
from vit_jax.data.inputs import Inputs
from vit_jax.errors import UserError
from vit_jax.training.evaluation.predict import Answer, Predictor
from vit_jax.writing import replacing

logger = logging.getLogger(__name__)

Write = Callable[[str, Answer], None]  # of the name of an image and its answer
# What may be in a file, by its ending.
ENDINGS = {
    "classes": (".jsonl", ".csv", ".parquet"),
    "features": (".npy", ".parquet"),
    "dense": (".npy",),
}
_NAMED = 5  # files named on the screen, of those without an answer
_QUIET = ("hidden", "of a folder")  # why files are passed over that nobody takes for images
_ROWS = 1024  # in a group of a Parquet file


def check_out(out: str | None, what: str) -> None:
    """Raises a UserError unless `what` ("classes", "features" or "dense") can be written there."""
    endings = " or ".join(ENDINGS[what])
    if out is None and what != "classes":
        raise UserError(f"--{what} writes a file: name it by --out=FILE ({endings})")
    if out is not None and not out.lower().endswith(ENDINGS[what]):
        raise UserError(f"--out={out}: {what} go to a file that ends in {endings}")


def predict_to(
    out: str | None,
    inputs: Inputs,
    load: Callable[[], Loaded],
    what: str = "classes",
    *,
    topk: int = 5,
    batch_size: int | None = None,
    threads: int | None = None,
) -> bool:
    """Writes an answer for each image, in order; shows progress on stderr, if it is a terminal.

    An image that cannot be read has a row with the error, or NaN in an .npy.

    Args:
      out: a file, which is there when all is in it and not before; None prints JSON lines.
      load: loads the model, once it is known that `out` can be written.
      what: "classes" with the `topk` most likely ones, "features" or "dense" (see `Predictor`).

    Returns:
      Whether every image has an answer, and no file but hidden ones was passed over.

    Raises:
      UserError: `out` has an ending for something else; as `Predictor`.
    """
    check_out(out, what)
    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(replacing(path)) for path in _files(out)]
        predictor = Predictor(load(), what, topk=topk, batch_size=batch_size, threads=threads)
        began, failed = time.monotonic(), list[str]()
        first = None  # when the first batch was there, so all is compiled
        write = stack.enter_context(_writer(out, paths, predictor, len(inputs)))
        hidden = True if out is None and sys.stdout.isatty() else None  # None: if it is no terminal
        names = tqdm.tqdm(inputs.names, unit=" images", disable=hidden)
        for name, answer in zip(names, predictor(inputs), strict=True):
            first = first or time.monotonic()
            write(name, answer)
            if isinstance(answer, UserError):
                text = str(answer)
                failed.append(text if text.startswith(name) else f"{name}: {text}")
    ended = time.monotonic()
    if out is not None or len(inputs) > 1:
        told = f"{out}: " if out is not None else ""
        told += f"{len(inputs):,} images in {ended - began:.1f} s"
        later = len(inputs) - predictor.batch_size
        if later > 3 * predictor.batch_size:
            told += f", {later / (ended - first):,.4g} images/s after the first batch"
        logger.info("%s", told)
    return tell(failed, len(inputs), inputs.passed_over)


def tell(failed: list[str], images: int, passed: PassedOver) -> bool:
    """Names the files without an answer; returns whether there are none."""
    loud = [f"{name}: {why}" for name, why in passed.files if not why.startswith(_QUIET)]
    unread = f"{len(failed):,} of {images:,} images cannot be read"
    for heading, named in ((unread, failed), (str(passed), loud)):
        if named:
            more = [f"and {len(named) - _NAMED:,} more"] if len(named) > _NAMED else []
            logger.warning("%s", "\n  ".join([heading, *named[:_NAMED], *more]))
    return not failed and not loud


def _files(out: str | None) -> list[str]:
    """The files that are written: `out`, and for an .npy the list of its images."""
    if out is None:
        return []
    stem, ending = os.path.splitext(out)
    return [out, f"{stem}.files.jsonl"] if ending.lower() == ".npy" else [out]


@contextlib.contextmanager
def _writer(
    out: str | None, paths: Sequence[str], predictor: Predictor, images: int
) -> Iterator[Write]:
    """Yields what writes an answer to `paths`, in the form that the ending of `out` names."""
    if out is None:
        yield lambda name, answer: print(as_json(_row(name, answer)), flush=True)
        return
    ending = os.path.splitext(out)[1].lower()
    if ending == ".parquet":
        with _parquet(paths[0], predictor) as write:
            yield write
    elif ending == ".npy":
        with _npy(paths[0], (images, *predictor.feature_shape), paths[1]) as write:
            yield write
    else:
        newline = "" if ending == ".csv" else "\n"
        with open(paths[0], "w", encoding="utf-8", newline=newline) as file:
            if ending == ".csv":
                rows = csv.DictWriter(file, list(_schema(predictor).names))
                rows.writeheader()
                yield lambda name, answer: rows.writerow(_cells(name, answer))
            else:
                yield lambda name, answer: print(
                    as_json(_row(name, answer), file.encoding), file=file
                )


def as_json(value: object, encoding: str | None = None) -> str:
    """Formats a value as one line of JSON; escapes only what cannot be encoded, as "\\udce9".

    Args:
      encoding: default that of stdout.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(encoding or sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def _row(name: str, answer: Answer) -> dict[str, Any]:
    if isinstance(answer, UserError):
        return {"file": name, "error": str(answer)}
    return {"file": name, "labels": answer} if isinstance(answer, list) else {"file": name}


def _schema(predictor: Predictor) -> pyarrow.Schema:
    """The columns of a table: file, label1, probability1, ... or features, and error."""
    text = pyarrow.string()
    if predictor.what == "classes":
        kinds = {"label": text, "probability": pyarrow.float32()}
        values = [
            (f"{column}{i + 1}", kind) for i in range(predictor.k) for column, kind in kinds.items()
        ]
    else:
        values = [("features", pyarrow.list_(pyarrow.float32(), predictor.feature_shape[0]))]
    return pyarrow.schema([("file", text), *values, ("error", text)])


def _cells(name: str, answer: Answer) -> dict[str, Any]:
    """A row of a table; columns without a value are left out."""
    row: dict[str, Any] = {"file": os.fsencode(name).decode("utf-8", "backslashreplace")}
    if isinstance(answer, UserError):
        return row | {"error": str(answer)}
    if isinstance(answer, np.ndarray):
        return row | {"features": answer}
    for i, (label, probability) in enumerate(answer, 1):
        row |= {f"label{i}": label, f"probability{i}": probability}
    return row


@contextlib.contextmanager
def _parquet(path: str, predictor: Predictor) -> Iterator[Write]:
    schema = _schema(predictor)
    rows: list[dict[str, Any]] = []
    with pyarrow.parquet.ParquetWriter(path, schema) as file:

        def flush():
            file.write_table(pyarrow.Table.from_pylist(rows, schema))
            rows.clear()

        def write(name, answer):
            rows.append(_cells(name, answer))
            if len(rows) == _ROWS:
                flush()

        yield write
        flush()


@contextlib.contextmanager
def _npy(path: str, shape: tuple[int, ...], names: str) -> Iterator[Write]:
    """Rows of float32 one after the other, so that the array need not fit into memory."""
    size, free = 4 * math.prod(shape), shutil.disk_usage(os.path.dirname(path) or ".").free
    if size > free:
        raise UserError(
            f"float32 {list(shape)} takes {size / 2**30:,.3g} GiB, but {free / 2**30:,.3g} GiB are "
            "free where --out is: name another place, or fewer images"
        )
    missing = np.full(shape[1:], np.nan, np.float32).tobytes()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with open(path, "wb") as file, open(names, "w", encoding="utf-8", newline="\n") as list_:
        np.lib.format.write_array_header_1_0(file, header)

        def write(name, answer):
            failed = isinstance(answer, UserError)
            file.write(missing if failed else answer.astype("<f4").tobytes())
            print(as_json(_row(name, answer), list_.encoding), file=list_)

        yield write
