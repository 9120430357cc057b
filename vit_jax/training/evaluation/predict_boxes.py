"""The command `predict` of models that detect: a COCO file of boxes, and overlays."""

import logging
import os
import time
from collections.abc import Callable, Sequence

import tqdm

from vit_jax.checkpoints.load import Loaded
from vit_jax.data.boxed import boxed
from vit_jax.data.detections import THRESHOLD, Detections, check_threshold, coco
from vit_jax.data.images import Image, encode
from vit_jax.data.inputs import Inputs
from vit_jax.errors import UserError
from vit_jax.training.evaluation.predict import Detected, Predictor
from vit_jax.training.evaluation.predict_masks import OVERLAY, check_free, paths_of
from vit_jax.training.evaluation.predict_output import tell
from vit_jax.writing import write_atomically

logger = logging.getLogger(__name__)

BOXES = "boxes.json"
DRAWN = 0.5  # the lowest score of a box that is drawn, if no threshold is given


def boxes_to(
    folder: str,
    inputs: Inputs,
    load: Callable[[], Loaded],
    *,
    overlays: bool = False,
    threshold: float | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
) -> bool:
    """Writes the boxes of all images into FOLDER/boxes.json, in the form of COCO.

    The file_name of an image is its path below what was named: of `pets`, pets/dogs/1.jpg is
    dogs/1.jpg. Nothing that is there is overwritten.

    Args:
      load: loads the model, once it is known that nothing is in the way.
      overlays: whether to write NAME.overlay.png, the image with its boxes and their names, too.
      threshold: the lowest score of a box; None is THRESHOLD in the file, and DRAWN in overlays.

    Returns:
      Whether every image could be read, and no file but hidden ones was passed over.

    Raises:
      UserError: a file is there already, two images would have one file_name or overlay, or the
        model gives no boxes.
    """
    least, drawn = (THRESHOLD, DRAWN) if threshold is None else (threshold, threshold)
    check_threshold(least)
    paths = list(paths_of(folder, inputs.below, (OVERLAY,) if overlays else ()))
    file = os.path.join(folder, BOXES)
    check_free(paths, inputs.names, {file: "the file of boxes"})
    below = [os.path.normpath(each).replace(os.sep, "/") for each in inputs.below]
    _check_names(below, inputs.names)
    vit = load()
    options = dict(batch_size=batch_size, threads=threads, keep_pixels=overlays, threshold=least)
    predictor = Predictor(vit, "boxes", **options)
    began, failed = time.monotonic(), list[str]()
    known = list[tuple[str, tuple[int, int], Detections]]()
    names = tqdm.tqdm(inputs.names, unit=" images", disable=None)
    for name, inside, where, answer in zip(names, below, paths, predictor(inputs), strict=True):
        if isinstance(answer, Detected):
            known.append((inside, answer.size, answer.boxes))
            for path in where:
                write_atomically(path, encode(_drawn(answer, vit, drawn)))
        else:
            text = str(answer)
            failed.append(text if text.startswith(name) else f"{name}: {text}")
    columns = ([each[i] for each in known] for i in range(3))
    write_atomically(file, coco(*columns, vit.labels, vit.category_ids))
    count, seconds = sum(len(boxes) for *_, boxes in known), time.monotonic() - began
    told = f"; those of {drawn:g} and above are drawn" if overlays else ""
    logger.info(
        "%s: %s boxes with a score of at least %g in %s images, in %.1f s%s",
        *(file, f"{count:,}", least, f"{len(known):,}", seconds, told),
    )
    return tell(failed, len(inputs), inputs.passed_over)


def _check_names(below: Sequence[str], names: Sequence[str]) -> None:
    """Raises a UserError if two images would have the same file_name."""
    seen: dict[str, str] = {}
    for inside, name in zip(below, names, strict=True):
        if inside in seen:
            raise UserError(
                f"{name} and {seen[inside]} would both be {inside} in {BOXES}: predict them one by "
                "one, into folders of their own"
            )
        seen[inside] = name


def _drawn(answer: Detected, vit: Loaded, least: float) -> Image:
    """The image with those of its boxes that have such a score, and their names."""
    some = answer.boxes.above(least)
    texts = [
        f"{vit.labels[label]} {score:.2f}"
        for label, score in zip(some.classes, some.scores, strict=True)
    ]
    return boxed(answer.pixels, some.corners, some.classes, texts)
