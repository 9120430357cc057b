"""The files of an evaluation in a run folder: evaluation/SPLIT.json and evaluation/SPLIT.npz."""

import dataclasses
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Int64

from vit_jax.errors import UserError
from vit_jax.training.evaluation import quality
from vit_jax.training.evaluation.assess import FITTED_ON, Quality
from vit_jax.training.evaluation.predictions import Predictions
from vit_jax.training.evaluation.quality import Classes, Confusion
from vit_jax.writing import write_atomically

FOLDER = "evaluation"  # of a run folder
PICTURES = "pictures.png"  # of a run that learns masks or boxes: what its model finds
_BINNED = ("confidence", "accuracy")  # of a reliability diagram


def to_json(
    name: str,
    found: Quality,
    predictions: Predictions,
    results: Mapping[str, int | float],
) -> dict[str, Any]:
    """All of a split as JSON; what is not defined is null."""
    measured = {
        key.partition("/")[2]: value for key, value in results.items() if key.startswith(f"{name}/")
    }
    names = predictions.source.label_names
    told: dict[str, Any] = {
        "split": name,
        "data": f"{predictions.split.source}, {predictions.split.split}",
        "fingerprint": predictions.source.fingerprint,
        "step": results.get("step"),
        "images": found.images,
        "flip": predictions.flip,
        "crops": predictions.crops,
        "metrics": measured,
        "intervals": {"accuracy": found.interval, **found.mean_intervals},
        "bootstrap": {"resamples": quality.RESAMPLES, "seed": quality.SEED, "level": quality.LEVEL},
        "calibration": _calibration(found),
        "classes": _classes(found.classes, names),
        "confusion": None,
        "notes": found.notes,
    }
    if found.confusion is not None:
        told["confusion"] = np.stack(
            [found.confusion.label, found.confusion.predicted, found.confusion.count], axis=1
        ).tolist()
    return _nulled(told)


def _calibration(found: Quality) -> dict[str, Any] | None:
    if found.reliability is None:
        return None
    told: dict[str, Any] = {"temperature": found.temperature, "fitted_on": FITTED_ON}
    for key, each in (("as_is", found.reliability), ("scaled", found.scaled)):
        told[key] = each and {
            "ece": each.ece,
            **{field: getattr(each, field).tolist() for field in ("images", *_BINNED)},
        }
    return told


def _classes(found: Classes | None, names: tuple[str, ...]) -> list[dict[str, Any]] | None:
    if found is None:
        return None
    columns = {
        field.name: getattr(found, field.name).tolist()
        for field in dataclasses.fields(found)
        if getattr(found, field.name) is not None
    }
    rows = zip(*columns.values(), strict=True)
    return [
        {"name": name, **dict(zip(columns, row, strict=True))}
        for name, row in zip(names, rows, strict=True)
    ]


def _nulled(value: Any) -> Any:
    """The value with null in place of NaN, which JSON has not."""
    if isinstance(value, dict):
        return {key: _nulled(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_nulled(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(folder: epath.PathLike, name: str, told: Mapping[str, Any], found: Predictions) -> None:
    """Writes NAME.json and NAME.npz; the former, which comes last, has the checksum of the latter.

    NAME.npz has, of each image: position, labelled, correct, predicted, log_predicted and, if an
    image has one label, label and log_label.
    """
    columns = {"position": found.positions, "labelled": found.labelled, "correct": found.correct}
    columns |= {"predicted": found.predicted, "log_predicted": found.log_predicted}
    if found.several is None:
        columns |= {"label": found.label, "log_label": found.log_label}
    file = io.BytesIO()
    np.savez_compressed(file, **columns)
    write_atomically(epath.Path(folder) / f"{name}.npz", file.getvalue())
    told = {**told, "sha256": hashlib.sha256(file.getvalue()).hexdigest()}
    write_atomically(epath.Path(folder) / f"{name}.json", json.dumps(told, indent=1))


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """What a run folder has of a split: its JSON, and which images are right, by position."""

    told: dict[str, Any]
    position: Int64[np.ndarray, " n"]
    correct: Bool[np.ndarray, " n"]

    @property
    def confusion(self) -> Confusion | None:
        """The confusion matrix, if it is defined."""
        if not self.told["confusion"]:
            return None
        columns = np.array(self.told["confusion"], np.int64).T
        return Confusion(*columns, len(self.told["classes"]))


def checked(told: Any) -> dict[str, Any]:
    """What `to_json` wrote, read from a file that may be damaged.

    Raises:
      ValueError, KeyError, TypeError: it is something else.
    """
    numbers = [told["images"], told["crops"], *told["intervals"]["accuracy"]]
    numbers += [value for value in told["metrics"].values() if value is not None]
    for row in told["classes"] or []:
        numbers += [value for key, value in row.items() if key != "name" and value is not None]
    k = len(told["classes"] or [])
    for label, predicted, count in told["confusion"] or []:
        if not (0 <= label < k and 0 <= predicted < k):
            raise ValueError("a class that is not there")
        numbers.append(count)
    for key in ("as_is", "scaled"):
        each = (told["calibration"] or {}).get(key)
        if each:
            columns = [each["images"], *(each[field] for field in _BINNED)]
            numbers += [each["ece"], *(x for column in columns for x in column if x is not None)]
            if len({len(column) for column in columns}) != 1:
                raise ValueError("bins of different numbers")
    texts = [told["fingerprint"], *(row["name"] for row in told["classes"] or [])]
    sound = all(isinstance(value, int | float) for value in numbers)
    step = told["step"]
    if not sound or not all(isinstance(text, str) for text in texts):
        raise TypeError("numbers and texts are mixed up")
    if not isinstance(step, int | None) or not isinstance(told["flip"], bool):
        raise TypeError("step or flip is of another type")
    return told


def read(workdir: epath.PathLike) -> tuple[dict[str, Stored], list[str]]:
    """Reads the evaluations of a run folder by split, and a note on each that is damaged."""
    folder, found, notes = epath.Path(workdir) / FOLDER, {}, []
    if not folder.is_dir():
        return found, notes
    for path in sorted(folder.glob("*.json"), key=os.fspath):
        try:
            told = checked(json.loads(path.read_text()))
            content = path.with_suffix(".npz").read_bytes()
            if hashlib.sha256(content).hexdigest() != told["sha256"]:
                raise UserError("the two files are of two evaluations")
            with np.load(io.BytesIO(content), allow_pickle=False) as columns:
                some = columns["labelled"]
                found[path.stem] = Stored(told, columns["position"][some], columns["correct"][some])
        except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
            notes.append(f"{FOLDER}/{path.name} cannot be read ({error})")
    return found, notes
