"""What a model says of each image of a split, and its file: a row an image, as CSV or JSON lines.

All of it is on the host of every process. The logits are kept where they fit into MOST_LOGITS bytes
(50,000 images of 1,000 classes are 0.2 GB); of more, only what a row of the file needs.
"""

import concurrent.futures
import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import scipy.special
from jaxtyping import Bool, Float, Float32, Float64, Int, Int32, Int64

from vit_jax.checkpoints.card import OBJECTIVES
from vit_jax.data.config import Split
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.writing import write_atomically

MOST_LOGITS = 2 << 30  # bytes of float32 that the logits of one split may take
ENDINGS = (".csv", ".jsonl")
COLUMNS = (
    *("split", "position", "file", "label", "predicted", "correct"),
    *("label_probability", "predicted_probability"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of n images, in the order of their split.

    Attributes:
      source: where the images are, with the classes of the model.
      split: the section of the config.
      objective: how logits become probabilities (see `checkpoints.card.OBJECTIVES`).
      several: None if an image has one label; else how several count (see `Classification`).
      positions: of the images in the source.
      label: the class of each, or 1 for each of its classes and 0 for the others.
      predicted: the class of the highest logit, the first of equals.
      correct: whether that is (one of) the image's own.
      log_label: log of the probability of the label; None if images may have several.
      log_predicted: log of the probability of `predicted`.
      logits: None if there are too many to keep.
      flip, crops: the views of an image that all of this is the mean of (see `EvalConfig`).
    """

    source: Source
    split: Split
    objective: str
    several: str | None
    positions: Int64[np.ndarray, " n"]
    label: Int32[np.ndarray, " n"] | Float32[np.ndarray, "n k"]
    predicted: Int32[np.ndarray, " n"]
    correct: Bool[np.ndarray, " n"]
    log_label: Float64[np.ndarray, " n"] | None
    log_predicted: Float64[np.ndarray, " n"]
    logits: Float32[np.ndarray, "n k"] | None
    flip: bool = False
    crops: int = 1

    @property
    def finite(self) -> bool:
        """Whether all logits are numbers, so that there are probabilities."""
        return bool(np.isfinite(self.log_predicted).all())

    @property
    def labelled(self) -> Bool[np.ndarray, " n"]:
        """Which images have a label, and count in the accuracy."""
        if self.several is None:
            return np.ones(len(self.positions), bool)
        return self.label.any(axis=1)


def log_probabilities(
    logits: Float[np.ndarray, "n k"], chosen: Int[np.ndarray, " n"], objective: str
) -> Float64[np.ndarray, " n"]:
    """The log of the probability of one class of each row; NaN if a logit of the row is."""
    z = logits.astype(np.float64)
    of_chosen = np.take_along_axis(z, chosen[:, None].astype(np.int64), axis=1)[:, 0]
    if OBJECTIVES[objective].multi_label:
        bad = np.isnan(z).any(axis=1)
        return np.where(bad, np.nan, scipy.special.log_expit(of_chosen))
    return of_chosen - scipy.special.logsumexp(z, axis=1)


class Gathered:
    """Gathers `Predictions` of a split of n images, batch by batch."""

    def __init__(self, n: int, several: str | None, objective: str):
        self._n, self._several, self._objective = n, several, objective
        self._columns: dict[str, list[np.ndarray]] = {}

    def add(
        self,
        start: int,
        logits: Float32[np.ndarray, "b k"],
        label: Int32[np.ndarray, " b"] | Float32[np.ndarray, "b k"],
        mask: Bool[np.ndarray, " b"],
    ) -> None:
        """Adds the examples of a batch, whose first is at position `start`; others are padding."""
        logits, label, positions = logits[mask], label[mask], start + np.flatnonzero(mask)
        predicted = np.where(np.isnan(logits), -np.inf, logits).argmax(axis=1).astype(np.int32)
        columns = {
            "positions": positions.astype(np.int64),
            "label": label,
            "predicted": predicted,
            "log_predicted": log_probabilities(logits, predicted, self._objective),
        }
        if self._several is None:
            columns["correct"] = label == predicted
            columns["log_label"] = log_probabilities(logits, label, self._objective)
        else:
            columns["correct"] = label[np.arange(len(label)), predicted] > 0
        if self._several is not None or self._n * logits.shape[1] * 4 <= MOST_LOGITS:
            columns["logits"] = logits
        for name, rows in columns.items():
            self._columns.setdefault(name, []).append(rows)

    def predictions(self, source: Source, split: Split, **views: Any) -> Predictions:
        """What was added, at least one batch; `views` are `flip` and `crops`."""
        columns: dict[str, Any] = {"log_label": None, "logits": None, **views}
        columns |= {name: np.concatenate(rows) for name, rows in self._columns.items()}
        return Predictions(source, split, self._objective, self._several, **columns)


def check_path(path: str) -> None:
    """Raises a UserError unless predictions can be written to a path of this name."""
    if not path.endswith(ENDINGS):
        raise UserError(f"--predictions is {path}; expected FILE.csv or FILE.jsonl")
    if os.path.isdir(path):
        raise UserError(f"--predictions={path} is a folder; expected the name of a file")


def write_rows(path: str, found: Mapping[str, Predictions]) -> int:
    """Writes a row an image, of all splits, and returns their number.

    CSV or JSON lines, by the ending. Examples are read again for the names of their files.
    """
    rows = [row for name, each in found.items() for row in rows_of(name, each)]
    if path.endswith(".jsonl"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        file = io.StringIO()
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
        text = file.getvalue()
    write_atomically(path, text)
    return len(rows)


def _cell(value: Any) -> Any:
    """A value as a cell of CSV; of several labels, all in one cell."""
    if isinstance(value, bool):
        return str(value).lower()
    return ";".join(map(str, value)) if isinstance(value, list) else value


def rows_of(name: str, found: Predictions) -> Iterator[dict[str, Any]]:
    """A row for each image of the split or evaluator `name`.

    Where images have several labels, classes and probabilities are lists: `label` of all that an
    image has, `predicted` of the most likely one ("any"), or of all above 0.5 ("each"). An image is
    correct if that one is right, or if the two sets are the same.
    """
    classes = found.source.label_names
    for i, file in enumerate(names_of(found)):
        if found.several is None:
            label, predicted = int(found.label[i]), int(found.predicted[i])
            correct = bool(found.correct[i])
            chances = [float(np.exp(each[i])) for each in (found.log_label, found.log_predicted)]
            names = [classes[label], classes[predicted]]
        else:
            of_class = OBJECTIVES[found.objective].probabilities(found.logits[i].astype(np.float64))
            right = np.flatnonzero(found.label[i])
            top = np.array([found.predicted[i]])
            top = np.flatnonzero(found.logits[i] > 0) if found.several == "each" else top
            same = np.array_equal(right, top)
            correct = same if found.several == "each" else bool(found.correct[i])
            chances = [[float(of_class[c]) for c in each] for each in (right, top)]
            names = [[classes[c] for c in each] for each in (right, top)]
        values = (name, int(found.positions[i]), file, *names, correct, *chances)
        yield dict(zip(COLUMNS, values, strict=True))


def names_of(found: Predictions) -> list[str]:
    """The file of each image, or what its source calls it, or its position; read by threads."""

    def name(position: np.int64) -> str:
        try:
            example = found.source[int(position)]
        except UserError:  # it was there a moment ago
            return str(position)
        return str(example.get("file", example.get("name", position)))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(name, found.positions))
