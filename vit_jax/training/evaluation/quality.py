"""How good a classifier is: errors by class, confusion, calibration, and intervals of them.

Functions of labels, predictions and logits on the host. Shares are in [0, 1]; intervals are of 95%.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.special
import scipy.stats
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from vit_jax.checkpoints.card import OBJECTIVES
from vit_jax.training.evaluation.multilabel import average_precision

LEVEL = 0.95  # of all intervals
RESAMPLES, SEED = 2000, 0  # of the bootstrap
BINS = 15  # of the calibration, as Guo et al. have them
_CHUNK = 1 << 22  # logits that are worked on at a time

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Confusion:
    """A confusion matrix, sparse: how many images of class `label` were predicted as `predicted`.

    One entry for each pair that occurs, sorted by label, then by prediction.
    """

    label: Int64[np.ndarray, " c"]
    predicted: Int64[np.ndarray, " c"]
    count: Int64[np.ndarray, " c"]
    num_classes: int

    @classmethod
    def of(
        cls,
        label: Int32[np.ndarray, " n"],
        predicted: Int32[np.ndarray, " n"],
        num_classes: int,
    ) -> "Confusion":
        pairs = label.astype(np.int64) * num_classes + predicted
        found, count = np.unique(pairs, return_counts=True)
        return cls(*np.divmod(found, num_classes), count.astype(np.int64), num_classes)

    def dense(self) -> Int64[np.ndarray, "k k"]:
        """The matrix; rows are labels, columns are predictions."""
        matrix = np.zeros((self.num_classes,) * 2, np.int64)
        matrix[self.label, self.predicted] = self.count
        return matrix

    def most_confused(self, count: int) -> list[tuple[int, int, int]]:
        """The mistakes that are most frequent: (label, predicted, images), at most `count`."""
        wrong = np.flatnonzero(self.label != self.predicted)
        order = wrong[np.argsort(-self.count[wrong], kind="stable")][:count]
        columns = (self.label, self.predicted, self.count)
        return [tuple(int(column[i]) for column in columns) for i in order]

    def chosen(self, most: int) -> list[int]:
        """All classes, or of more than `most`, those of the most frequent mistakes, in order."""
        if self.num_classes <= most:
            return list(range(self.num_classes))
        found: set[int] = set()
        for label, predicted, _ in self.most_confused(most):
            if len(found | {label, predicted}) <= most:
                found |= {label, predicted}
        for c in np.unique(self.label).tolist():  # where hardly a mistake was made
            if len(found) < 2:
                found.add(c)
        return sorted(found)

    def among(self, chosen: list[int]) -> tuple[Int64[np.ndarray, "m m"], Int64[np.ndarray, " m"]]:
        """The matrix of some classes, and each row's sum over all other predictions."""
        place = np.full(self.num_classes, -1)
        place[chosen] = np.arange(len(chosen))
        row, column = place[self.label], place[self.predicted]
        counts = np.zeros((len(chosen), len(chosen) + 1), np.int64)
        np.add.at(counts, (row[row >= 0], column[row >= 0]), self.count[row >= 0])  # -1: the last
        return counts[:, :-1], counts[:, -1]


@dataclasses.dataclass(frozen=True, eq=False)
class Classes:
    """Each class on its own. What is not defined is NaN: all of a class without images, the
    precision of a class that is never predicted.

    Attributes:
      images: how many images have the class.
      predicted: how many images are predicted to have it.
      recall: the share of its images that are found: the accuracy of the class.
      low, high: the Wilson interval of the recall.
      precision: the share of the predictions that are right.
      f1: 2 TP / (images + predicted).
      average_precision: where images have several labels, the area under precision and recall.
    """

    images: Int64[np.ndarray, " k"]
    predicted: Int64[np.ndarray, " k"]
    recall: Float64[np.ndarray, " k"]
    low: Float64[np.ndarray, " k"]
    high: Float64[np.ndarray, " k"]
    precision: Float64[np.ndarray, " k"]
    f1: Float64[np.ndarray, " k"]
    average_precision: Float64[np.ndarray, " k"] | None = None

    @classmethod
    def of_counts(
        cls,
        images: Int64[np.ndarray, " k"],
        predicted: Int64[np.ndarray, " k"],
        right: Int64[np.ndarray, " k"],
        average_precision: Float64[np.ndarray, " k"] | None = None,
    ) -> "Classes":
        some = images > 0
        recall = _ratio(right, images)
        low, high = wilson(right, images)
        precision = np.where(some, _ratio(right, predicted), np.nan)
        f1 = np.where(some, _ratio(2 * right, images + predicted), np.nan)
        return cls(images, predicted, recall, low, high, precision, f1, average_precision)

    @classmethod
    def of(cls, confusion: Confusion) -> "Classes":
        """Of images with one label each."""
        k, hit = confusion.num_classes, confusion.label == confusion.predicted

        def counts(of: Int64[np.ndarray, " _c"], which: Bool[np.ndarray, " _c"] | slice):
            return np.bincount(of[which], confusion.count[which], k).astype(np.int64)

        everything = slice(None)
        return cls.of_counts(
            counts(confusion.label, everything),
            counts(confusion.predicted, everything),
            counts(confusion.label, hit),
        )

    @classmethod
    def of_questions(
        cls, logits: Float32[np.ndarray, "n k"], labels: Float32[np.ndarray, "n k"]
    ) -> "Classes":
        """Of classes that are a question each: predicted where the probability is above 0.5."""
        truth, predicted = labels > 0, logits > 0
        ranked = [
            average_precision(logits[:, c], truth[:, c]) if truth[:, c].any() else np.nan
            for c in range(truth.shape[1])
        ]
        counts = [x.sum(axis=0, dtype=np.int64) for x in (truth, predicted, truth & predicted)]
        return cls.of_counts(*counts, np.array(ranked, np.float64))


def _ratio(a: np.ndarray, b: np.ndarray) -> Float64[np.ndarray, "..."]:
    """a / b; NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=b > 0)


def wilson(
    right: Int64[np.ndarray, " k"], images: Int64[np.ndarray, " k"]
) -> tuple[Float64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
    """The Wilson score interval of a share; NaN of no images."""
    z = scipy.stats.norm.ppf((1 + LEVEL) / 2)
    n, share = np.where(images > 0, images, np.nan).astype(np.float64), _ratio(right, images)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)


def share_interval(right: int, images: int) -> Interval:
    """The percentile bootstrap interval of an accuracy, over images.

    Resamples of images that are all right, or all wrong, are all the same: there it is Wilson's.
    """
    if right in (0, images):
        low, high = wilson(np.array([right]), np.array([images]))
        return float(low[0]), float(high[0])
    return _percentiles(_random().binomial(images, right / images, RESAMPLES) / images)


def mean_intervals(confusion: Confusion) -> dict[str, Interval]:
    """Percentile bootstrap intervals of balanced accuracy and macro F1, over images.

    Images with the same label and prediction are the same to both: a resample of n images is a
    multinomial draw of the counts of the confusion matrix. A class that a resample lacks is left
    out of its means. {} if there is no mistake, as all resamples would be the same.
    """
    k, n, c = confusion.num_classes, int(confusion.count.sum()), len(confusion.count)
    hit = confusion.label == confusion.predicted
    if hit.all():
        return {}
    of_label, of_predicted = (
        scipy.sparse.csr_array((np.ones(c), (np.arange(c), column)), (c, k))
        for column in (confusion.label, confusion.predicted)
    )
    known = np.bincount(confusion.label, confusion.count, k) > 0
    random, shares = _random(), confusion.count / n
    recalls, f1s = [], []
    some = max(1, _CHUNK // max(c, k))  # resamples at a time
    for start in range(0, RESAMPLES, some):
        drawn = random.multinomial(n, shares, size=min(some, RESAMPLES - start))
        images, predicted = (drawn @ of for of in (of_label, of_predicted))
        right = (drawn * hit) @ of_label
        f1 = np.where(images > 0, _ratio(2 * right, images + predicted), np.nan)
        recalls.append(np.nanmean(_ratio(right, images)[:, known], axis=1))
        f1s.append(np.nanmean(f1[:, known], axis=1))
    named = {"balanced_accuracy": recalls, "macro_f1": f1s}
    return {name: _percentiles(np.concatenate(values)) for name, values in named.items()}


def _random() -> np.random.Generator:
    return np.random.default_rng(SEED)


def _percentiles(values: Float64[np.ndarray, " r"]) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


# Calibration


@dataclasses.dataclass(frozen=True, eq=False)
class Reliability:
    """How often predictions of a confidence are right, in bins of equal width.

    Bin i of m has the confidences above i/m, up to (i + 1)/m; a bin without images has NaN.
    """

    images: Int64[np.ndarray, " m"]
    confidence: Float64[np.ndarray, " m"]
    accuracy: Float64[np.ndarray, " m"]

    @classmethod
    def of(
        cls,
        confidence: Float64[np.ndarray, " n"],
        correct: Bool[np.ndarray, " n"],
        bins: int = BINS,
    ) -> "Reliability":
        bin_ = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
        images = np.bincount(bin_, minlength=bins).astype(np.int64)
        sums = (np.bincount(bin_, values, bins) for values in (confidence, correct))
        return cls(images, *(_ratio(values, images) for values in sums))

    @property
    def ece(self) -> float:
        """The expected calibration error (arXiv 1706.04599): the mean gap over all images."""
        some = self.images > 0
        gaps = np.abs(self.confidence - self.accuracy)[some]
        return float(np.sum(gaps * self.images[some]) / self.images.sum())


def confidences(
    logits: Float32[np.ndarray, "n k"], temperature: float, objective: str
) -> Float64[np.ndarray, " n"]:
    """The probability of the most likely class, of logits divided by a temperature."""
    beta = 1.0 / temperature
    found = []
    for rows, _ in _chunks(logits, np.zeros(len(logits), np.int32)):
        z = rows.astype(np.float64) * beta
        top = z.max(axis=1)
        if OBJECTIVES[objective].multi_label:
            found.append(scipy.special.expit(top))
        else:
            found.append(1 / np.exp(z - top[:, None]).sum(axis=1))
    return np.concatenate(found)


def fit_temperature(
    logits: Float32[np.ndarray, "n k"], label: Int32[np.ndarray, " n"], objective: str
) -> float | None:
    """The temperature T that minimises the loss of logits / T (arXiv 1706.04599, section 4.2).

    The loss is the mean negative log-likelihood of the objective, convex in 1 / T. None if it is
    lowest outside of [0.01, 100], as where every image is right and T would be 0.
    """
    bounds = np.log([0.01, 100.0])

    def loss(log_beta: float) -> float:
        beta, total = np.float32(np.exp(log_beta)), 0.0
        for rows, right in _chunks(logits, label):
            own = rows[np.arange(len(rows)), right]
            if OBJECTIVES[objective].multi_label:
                z = rows * beta
                total += np.logaddexp(0, z).sum(dtype=np.float64)
                total -= float(beta) * own.sum(dtype=np.float64)
            else:
                top = rows.max(axis=1)
                sums = np.exp((rows - top[:, None]) * beta).sum(axis=1, dtype=np.float64)
                total += np.sum(np.log(sums) + (top - own) * np.float64(beta))
        return total / len(label)

    best = scipy.optimize.minimize_scalar(
        loss, bounds=bounds, method="bounded", options={"xatol": 1e-4}
    )
    if min(map(loss, bounds)) <= best.fun:
        return None
    return float(np.exp(-best.x))


def _chunks(
    logits: Float32[np.ndarray, "n k"], label: Int32[np.ndarray, " n"]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rows = max(1, _CHUNK // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield logits[start : start + rows], label[start : start + rows]


# Comparison of two models on the same images


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two models on the same images.

    Attributes:
      both, only_first, only_second, neither: how many images they are right of.
      p: McNemar's test, exact: the probability, if both were equally good, of the images that one
        alone is right of to be shared so unequally, or more so.
      difference: accuracy of the second less that of the first.
      interval: of the difference, by percentile bootstrap over images.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    p: float
    difference: float
    interval: Interval


def compare(first: Bool[np.ndarray, " n"], second: Bool[np.ndarray, " n"]) -> Paired:
    """Compares two models by which of n images each is right of."""
    counts = [
        int(np.sum(x & y))
        for x, y in ((first, second), (first, ~second), (~first, second), (~first, ~second))
    ]
    n, (_, b, c, _) = len(first), counts
    p = min(1.0, 2 * float(scipy.stats.binom.cdf(min(b, c), b + c, 0.5)))
    drawn = _random().multinomial(n, np.array(counts) / n, RESAMPLES)
    return Paired(*counts, p, (c - b) / n, _percentiles((drawn[:, 2] - drawn[:, 1]) / n))
