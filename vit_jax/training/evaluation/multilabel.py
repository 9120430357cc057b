"""Metrics for multi-label classification: mAP and F1.

Functions of logits and labels on the host, in float64; images without labels count as negatives.
"""

import numpy as np
from jaxtyping import Bool, Float, Float32


def average_precision(scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"]) -> float:
    """Average precision: the sum of precisions, each weighted by the gain in recall.

    Examples with equal scores share a threshold. There must be at least one positive.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    found = np.cumsum(labels[order])[last]
    gained = np.diff(found, prepend=0)
    return float(np.sum(gained * (found / (last + 1))) / found[-1])


def scores(
    logits: Float32[np.ndarray, "n k"], labels: Float32[np.ndarray, "n k"]
) -> dict[str, float]:
    """mAP, micro_f1 and macro_f1 over all n examples; NaN if a logit is NaN.

    mAP is the mean over the classes with at least one example. A class is predicted if its
    probability is above 0.5. F1 is 2 TP / (2 TP + FP + FN): micro_f1 of the sums over classes,
    macro_f1 the mean over all k classes, 0 for a class without examples and predictions.
    """
    if np.isnan(logits).any():
        return dict.fromkeys(("mAP", "micro_f1", "macro_f1"), float("nan"))
    truth, predicted = labels > 0, logits > 0
    known = np.flatnonzero(truth.any(axis=0))
    precisions = [average_precision(logits[:, c], truth[:, c]) for c in known]
    both = np.sum(truth & predicted, axis=0, dtype=np.float64)
    either = np.sum(truth, axis=0, dtype=np.float64) + np.sum(predicted, axis=0)
    return {
        "mAP": float(np.mean(precisions)) if precisions else float("nan"),
        "micro_f1": float(2 * both.sum() / max(either.sum(), 1.0)),
        "macro_f1": float(np.mean(2 * both / np.maximum(either, 1.0))),
    }
