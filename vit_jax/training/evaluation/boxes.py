"""Evaluation of boxes: COCO's metrics by pycocotools, over all images of a split."""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array

from vit_jax.checkpoints.detect import best
from vit_jax.data.boxes import Boxes
from vit_jax.data.detections import Detections, bbox
from vit_jax.data.sources import Source
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.extras import install
from vit_jax.models.config import ModelConfig
from vit_jax.models.create import merged
from vit_jax.models.stack import Layout
from vit_jax.training.steps import Batch, images

# The metrics of all classes: of COCO's numbers the first nine of twelve.
METRICS = ("map", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
_SIZES = ("all", "small", "medium", "large")  # COCO's: up to 32^2 pixels of area, 96^2, above


def check_installed() -> None:
    """Raises a UserError if pycocotools is missing, which measures boxes."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError:
        raise UserError(
            f"objective detection is measured by pycocotools: {install('detection')}"
        ) from None


def make_box_eval_step(
    graphdef: nnx.GraphDef,
    config: ModelConfig,
    preprocess: Preprocess,
    *,
    layout: Layout | None = None,
    spread: NamedSharding | None = None,
) -> Callable[[Any, Batch], dict[str, Array]]:
    """Returns (params, batch) -> {corners [b m 4], classes [b m], scores [b m], mask [b]}.

    Corners are in pixels of each image as it is; rows without a box have the class -1. `spread` is
    how the images of a batch are spread over devices.
    """

    def eval_step(params, batch):
        outputs = merged(graphdef, params, layout)(images(batch, preprocess), layout=layout)
        return {**best(config, outputs, batch["size"], spread=spread), "mask": batch["mask"]}

    return eval_step


class Gathered:
    """Gathers the boxes found in the images of a split, batch by batch, by their positions."""

    def __init__(self):
        self.found: dict[int, Detections] = {}

    def add(self, start: int, values: Mapping[str, np.ndarray]) -> None:
        """Adds a batch whose first image is at position `start`; others are padding."""
        for row in np.flatnonzero(values["mask"]).tolist():
            rows = (values[name][row] for name in Detections.ROWS)
            self.found[start + row] = Detections.of(*rows)

    def beside(self, source: Source) -> tuple[list[Boxes], list[Detections]]:
        """The boxes of the source, and those found, of all images that were added."""
        return [source.boxes_of(position) for position in self.found], list(self.found.values())


def metrics(
    truth: Sequence[Boxes], found: Sequence[Detections], names: Sequence[str]
) -> dict[str, float]:
    """COCO's metrics of boxes, of the same images in the same order.

    A crowd's box is neither missed nor wrong, whatever is found in it. Sizes are by `area`.

    Returns:
      map (the mean average precision over classes and over IoUs of 0.5, 0.55, ..., 0.95), ap50 and
      ap75 (of one IoU), ap_small, ap_medium and ap_large (up to 32^2 and 96^2 pixels, and above),
      ar1, ar10 and ar100 (recall, of so many boxes an image) and ap/NAME of each class. What no
      box is of is left out; {} if there is no box to find.

    Raises:
      UserError: pycocotools is missing.
    """
    check_installed()
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # which pycocotools prints to
        known = [_annotations(i, each) for i, each in enumerate(truth, 1)]
        seen = [_annotations(i, each) for i, each in enumerate(found, 1)]
        run = COCOeval(*(_coco(each, len(truth), len(names)) for each in (known, seen)), "bbox")
        run.evaluate()
        run.accumulate()
    precision, recall = run.eval["precision"], run.eval["recall"]  # [t r k a m], [t k a m]
    iou = {value: i for i, value in enumerate(run.params.iouThrs.round(2).tolist())}
    sizes = {name: i for i, name in enumerate(run.params.areaRngLbl)}
    most = {count: i for i, count in enumerate(run.params.maxDets)}
    of_most = precision[..., most[100]]
    values = {
        "map": of_most[..., sizes["all"]],
        "ap50": of_most[iou[0.5], ..., sizes["all"]],
        "ap75": of_most[iou[0.75], ..., sizes["all"]],
        **{f"ap_{name}": of_most[..., sizes[name]] for name in _SIZES[1:]},
        **{f"ar{count}": recall[:, :, sizes["all"], at] for count, at in most.items()},
        **{f"ap/{name}": of_most[:, :, k, sizes["all"]] for k, name in enumerate(names)},
    }
    # Where a class has no box of the size, COCO's number is -1.
    return {
        name: float(each[each > -1].mean()) for name, each in values.items() if (each > -1).any()
    }


def _annotations(image: int, boxes: Boxes | Detections) -> list[dict[str, Any]]:
    """The boxes of an image, numbered from 1 on, as COCO has them."""
    found: list[dict[str, Any]] = []
    for row, (corners, label) in enumerate(zip(boxes.corners, boxes.classes, strict=True)):
        x, y, w, h = bbox(corners)
        each = {"image_id": image, "category_id": int(label) + 1, "bbox": [x, y, w, h]}
        if isinstance(boxes, Detections):
            each |= {"score": float(boxes.scores[row]), "area": w * h, "iscrowd": 0}
        else:
            each |= {"area": float(boxes.area[row]), "iscrowd": int(boxes.crowd[row])}
        found.append(each)
    return found


def _coco(annotations: Sequence[Sequence[dict[str, Any]]], images: int, k: int) -> Any:
    """A data set of pycocotools."""
    from pycocotools.coco import COCO

    made, flat = COCO(), [each for of_image in annotations for each in of_image]
    made.dataset = {
        "images": [{"id": i} for i in range(1, images + 1)],
        "categories": [{"id": i} for i in range(1, k + 1)],
        # From 1 on: pycocotools takes a box of id 0 for none.
        "annotations": [{"id": i, **each} for i, each in enumerate(flat, 1)],
    }
    made.createIndex()
    return made
