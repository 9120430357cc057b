"""The quality of a model on each split, from its predictions, and the lines that sum it up."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.training.evaluation import quality
from vit_jax.training.evaluation.predictions import Predictions
from vit_jax.training.evaluation.quality import Classes, Confusion, Interval, Reliability

logger = logging.getLogger(__name__)
FITTED_ON = "val"  # the split that the temperature is fitted on
_FEW = 3  # classes and confusions that are printed


@dataclasses.dataclass(frozen=True, eq=False)
class Quality:
    """How good a model is on the images of one split.

    Attributes:
      images: how many have a label, and count in the accuracy.
      accuracy: share of them whose most likely class is right.
      interval: of the accuracy.
      several: as in `Predictions`.
      classes, confusion: None where images have several labels, any of which is right; the latter
        also where each is a question of its own.
      means: "balanced_accuracy" (the mean recall of the classes that have images), "macro_f1".
      mean_intervals: of these; {} where there is no mistake.
      reliability: of the model's confidences; None where each label is a question of its own.
      scaled: of those with the temperature that was fitted on FITTED_ON; None on that split.
      temperature: that temperature, if there is one.
    """

    images: int
    accuracy: float
    interval: Interval
    several: str | None
    classes: Classes | None = None
    confusion: Confusion | None = None
    means: dict[str, float] = dataclasses.field(default_factory=dict)
    mean_intervals: dict[str, Interval] = dataclasses.field(default_factory=dict)
    reliability: Reliability | None = None
    scaled: Reliability | None = None
    temperature: float | None = None
    notes: tuple[str, ...] = ()

    def scalars(self, name: str) -> dict[str, float]:
        """What is new beside accuracy, top5 and loss: {"val/ece": ...}."""
        low, high = self.interval
        found = {"accuracy_low": low, "accuracy_high": high, **self.means}
        if self.reliability is not None:
            found["ece"] = self.reliability.ece
        if self.scaled is not None:
            found["ece_scaled"] = self.scaled.ece
        if self.temperature is not None and name == FITTED_ON:
            found["temperature"] = self.temperature
        return {f"{name}/{key}": float(value) for key, value in found.items()}


def assess(found: Mapping[str, Predictions]) -> dict[str, Quality]:
    """The quality on each split whose logits are all finite; others are named in a warning."""
    temperature, why = _temperature(found.get(FITTED_ON))
    results = {}
    for name, each in found.items():
        if not each.finite:
            bad = int(np.sum(~np.isfinite(each.log_predicted)))
            logger.warning(
                "%s: %s of %s images have logits that are not finite: no class, confusion or "
                "calibration is measured",
                *(name, f"{bad:,}", f"{len(each.positions):,}"),
            )
        else:
            results[name] = _assess(name, each, temperature, why)
    return results


def _temperature(val: Predictions | None) -> tuple[float | None, str]:
    """The temperature fitted on val, or why there is none."""
    if val is None or not val.finite:
        return None, f"there is no {FITTED_ON} to fit it on"
    if val.several is not None:
        return None, f"images of {FITTED_ON} have several labels"
    if val.logits is None:
        return None, f"the logits of {FITTED_ON} are too many to keep"
    found = quality.fit_temperature(val.logits, val.label, val.objective)
    return found, f"{FITTED_ON} has no best one, as where every image is right"


def _assess(name: str, found: Predictions, temperature: float | None, why: str) -> Quality:
    right, labelled = found.correct[found.labelled], found.labelled
    fields: dict[str, Any] = {
        "images": len(right),
        "accuracy": float(right.mean()),
        "interval": quality.share_interval(int(right.sum()), len(right)),
        "several": found.several,
        "temperature": temperature,
    }
    notes = []
    if found.several == "each":
        fields["classes"] = Classes.of_questions(found.logits, found.label)
    else:
        confidence = np.exp(found.log_predicted[labelled])
        fields["reliability"] = Reliability.of(confidence, right)
        if temperature is None:
            notes.append(f"no temperature is fitted: {why}")
        elif found.logits is None:
            notes.append("the temperature is not applied: the logits are too many to keep")
        elif name != FITTED_ON:
            warm = quality.confidences(found.logits[labelled], temperature, found.objective)
            fields["scaled"] = Reliability.of(warm, right)
    if found.several is None:
        k = len(found.source.label_names)
        confusion = Confusion.of(found.label, found.predicted, k)
        classes = Classes.of(confusion)
        some = classes.images > 0
        means = {"balanced_accuracy": classes.recall, "macro_f1": classes.f1}
        fields |= {
            "classes": classes,
            "confusion": confusion,
            "means": {key: float(values[some].mean()) for key, values in means.items()},
            "mean_intervals": quality.mean_intervals(confusion),
        }
    else:
        notes.append("no confusion matrix: images may have several labels")
    classes = fields.get("classes")
    if classes is not None and (empty := int(np.sum(classes.images == 0))):
        notes.append(f"{empty:,} of {len(classes.images):,} classes have no images: left out")
    return Quality(**fields, notes=tuple(notes))


# Lines


def lines(found: Mapping[str, Quality], names: Mapping[str, tuple[str, ...]]) -> list[str]:
    """A compact summary of each split; `names` are its classes."""
    return [line for name, each in found.items() for line in _lines(name, each, names[name])]


def _lines(name: str, found: Quality, names: tuple[str, ...]) -> list[str]:
    low, high = found.interval
    head = f"{name} accuracy {found.accuracy:.4f}, 95% interval {low:.4f} to {high:.4f}"
    rows = {
        "means": ", ".join(
            f"{k.replace('_', ' ').replace('f1', 'F1')} {v:.4f}" for k, v in found.means.items()
        )
    }
    if found.reliability is not None:
        words = f"ECE {found.reliability.ece:.4f}"
        if found.scaled is not None:
            words += (
                f"; {found.scaled.ece:.4f} with temperature {found.temperature:.3g}, fitted on "
            )
            words += FITTED_ON
        elif found.temperature is not None and name == FITTED_ON:
            words += f"; the loss is lowest at temperature {found.temperature:.3g}"
        rows["calibration"] = words
    rows["weakest"] = _weakest(found, names)
    if found.confusion is not None:
        pairs = found.confusion.most_confused(_FEW)
        told = (f"{_short(names[a])} as {_short(names[b])} ({n:,})" for a, b, n in pairs)
        rows["confused"] = ", ".join(told)
    rows["note"] = "; ".join(found.notes)
    told = [f"  {title:<11}  {words}" for title, words in rows.items() if words]
    return [f"{head} ({found.images:,} images)", *told]


def _weakest(found: Quality, names: tuple[str, ...]) -> str:
    """The classes of the lowest recall, or average precision, with their images."""
    if found.classes is None:
        return ""
    by, what = found.classes.recall, "recall"
    if found.classes.average_precision is not None:
        by, what = found.classes.average_precision, "average precision"
    order = np.argsort(by, kind="stable")  # NaN, of classes without images, comes last
    weak = [c for c in order if by[c] < 1][:_FEW]
    told = (f"{_short(names[c])} ({by[c]:.3f}, {found.classes.images[c]:,} images)" for c in weak)
    return f"{', '.join(told)} by {what}" if weak else ""


def _short(name: str, most: int = 24) -> str:
    """A class name for one line."""
    name = "".join(c if c.isprintable() else " " for c in name)
    return name if len(name) <= most else f"{name[: most - 3]}..."
