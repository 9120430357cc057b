"""The splits of evaluations: opened, named, and how several labels an image count."""

import logging
from collections.abc import Sized

from vit_jax.checkpoints.card import OBJECTIVES, ModelCard
from vit_jax.data.config import Split
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.training.config import Config
from vit_jax.training.datasets import DataSets
from vit_jax.training.evaluation.evaluators import Classification, Evaluator

logger = logging.getLogger(__name__)
# How images with several labels are counted.
_COUNTED = {
    "any": "an image is right where any is found (ImageNet-ReaL), images without one are left out",
    "each": "each is a question of its own (mAP, micro_f1, macro_f1), of images without one too",
}


# Labels of another kind than classes of images: who reads them, who needs them, who has some.
_READ_BY = {
    "masks": "objective segmentation and an evaluator of type segmentation read",
    "boxes": "objective detection reads",
}
_NEEDS = {
    "masks": ("segmentation", "scenes:digits"),
    "boxes": ("detection", "scenes:digits,labels=boxes"),
}

NO_BOX = "no image has a box to compare with"


def how_several(
    where: str,
    source: Source,
    split: Split,
    evaluator: Evaluator,
    config: Config,
    card: ModelCard,
) -> str | None:
    """How the labels of a split count ("any" or "each"); None if images have one each.

    Raises:
      UserError: an evaluator or an objective that does not support several labels.
    """
    asked = getattr(evaluator, "several", None)
    if not getattr(source, "multi_label", False):
        if asked == "each":
            raise UserError(
                f"{where}: {split.source} has one label an image: leave several=each out"
            )
        return None
    if not isinstance(evaluator, Classification):
        raise UserError(
            f"{where}: {split.source} has several labels an image, which no evaluator of type "
            f"{evaluator.type} takes: measure them by type classification"
        )
    several = asked or ("each" if card.multi_label else "any")
    if several == "each" and not OBJECTIVES[config.objective].multi_label:
        raise UserError(
            f"{where}: {split.source} has several labels an image, each a question of its own, but "
            f"the objective is {config.objective}: set --config.objective=sigmoid"
        )
    logger.info("%s: images have several labels: %s", where, _COUNTED[several])
    return several


def split_names(where: str, evaluator: Evaluator, splits: tuple[Split, ...]) -> tuple[str, ...]:
    """Names of the splits of one of an evaluator's data sets."""
    if len(splits) == 1:
        return (where,)
    parts = [part for part in ("train", "val", "test") if getattr(evaluator, part, None)]
    if len(parts) == len(splits):
        return tuple(f"{where}.{part}" for part in parts)
    return tuple(f"{where} {split.source} {split.split}" for split in splits)


def open_split(data: DataSets, where: str, split: Split, reads: str) -> Source:
    """Opens a split for an evaluator that reads "labels", "masks" or "boxes".

    Raises:
      UserError: it is endless, has others, or no box at all.
    """
    source = data.open(where, split)
    if not isinstance(source, Sized):
        raise UserError(f"{where}.source {split.source} is endless: name a finite split")
    has = next((kind for kind in _READ_BY if getattr(source, kind, False)), "labels")
    boxes = getattr(source, "box_counts", None)
    if reads == "boxes" and boxes is not None and not boxes.any():
        raise UserError(f"{where}: {split.source} {split.split}: {NO_BOX}")
    if has == reads:
        return source
    if reads == "labels":
        raise UserError(f"{where}: {split.source} has {has} for labels, which {_READ_BY[has]}")
    needs, example = _NEEDS[reads]
    raise UserError(
        f"{where}: {split.source} has no {reads}, which {needs} needs: name a source such as "
        f"{example}"
    )
