"""Boxes that a model found in images, as a record and as COCO's JSON."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Float32, Int32, Integer

from vit_jax.errors import UserError

THRESHOLD = 0.05  # the lowest score of a box, if none is given
CATEGORIES_FROM = 1  # COCO's ids, where the data had none of its own


@dataclasses.dataclass(frozen=True, eq=False)
class Detections:
    """The boxes found in an image, the most likely first.

    Attributes:
      corners: x0 y0 x1 y1 in pixels of the upright image: 0 is its left or upper edge, and x1 and
        y1 are the edges of the box, so that x1 - x0 is its width.
      classes: of each box, by its number.
      scores: in [0, 1].
    """

    ROWS: ClassVar[tuple[str, ...]] = ("corners", "classes", "scores")

    corners: Float32[np.ndarray, "n 4"]
    classes: Int32[np.ndarray, " n"]
    scores: Float32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.classes)

    @classmethod
    def of(
        cls,
        corners: Float[np.ndarray, "m 4"],
        classes: Integer[np.ndarray, " m"],
        scores: Float[np.ndarray, " m"],
    ) -> "Detections":
        """Those of rows of which some are padding, of class -1."""
        there = classes >= 0
        return cls(
            corners[there].astype(np.float32),
            classes[there].astype(np.int32),
            scores[there].astype(np.float32),
        )

    def above(self, threshold: float) -> "Detections":
        """Those with at least such a score."""
        some = self.scores >= threshold
        return Detections(self.corners[some], self.classes[some], self.scores[some])


def check_threshold(threshold: float) -> None:
    """Raises a UserError unless it is a score in [0, 1)."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise UserError(f"threshold is {threshold!r}; expected a score, such as 0.3")
    if not 0 <= threshold < 1:
        raise UserError(f"threshold is {threshold:g}; expected a score in [0, 1), such as 0.3")


def bbox(corners: Float[np.ndarray, "4"]) -> list[float]:
    """COCO's x, y, width, height of a box."""
    x0, y0, x1, y1 = map(float, corners)
    return [x0, y0, x1 - x0, y1 - y0]


def coco(
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    found: Sequence[Detections],
    labels: Sequence[str],
    category_ids: Sequence[int] | None = None,
) -> str:
    """The boxes of images as COCO's JSON: as annotations, each of which has a `score`.

    Args:
      names: the file_name of each image.
      sizes: (h, w) of each.
      labels: the names of the classes.
      category_ids: COCO's ids of them; None is 1, 2, ...

    Returns:
      The text, with boxes to a thousandth of a pixel and scores to a millionth. `annotations` by
      itself is what pycocotools' `loadRes` takes.
    """
    ids = list(category_ids or range(CATEGORIES_FROM, CATEGORIES_FROM + len(labels)))
    annotations: list[dict[str, Any]] = []
    for image, each in enumerate(found, 1):
        for corners, label, score in zip(each.corners, each.classes, each.scores, strict=True):
            x, y, w, h = bbox(corners)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": ids[label],
                    "bbox": [round(value, 3) for value in (x, y, w, h)],
                    "area": round(w * h, 3),
                    "iscrowd": 0,
                    "score": round(float(score), 6),
                }
            )
    told = {
        "images": [
            {"id": image, "file_name": name, "height": h, "width": w}
            for image, (name, (h, w)) in enumerate(zip(names, sizes, strict=True), 1)
        ],
        "categories": [
            {"id": number, "name": name} for number, name in zip(ids, labels, strict=True)
        ],
        "annotations": annotations,
    }
    return json.dumps(told)
