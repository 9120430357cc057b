"""The command `predict` of models that segment: a folder of masks, and overlays."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import tqdm

from vit_jax.checkpoints.card import OBJECTIVES
from vit_jax.checkpoints.keys import Patterns
from vit_jax.checkpoints.load import Loaded
from vit_jax.checkpoints.opened import open_model
from vit_jax.data.images import encode
from vit_jax.data.inputs import Inputs
from vit_jax.data.masks import default_palette, encode_mask, overlay
from vit_jax.errors import UserError
from vit_jax.training.evaluation.predict import Predictor, Segmented
from vit_jax.training.evaluation.predict_output import ENDINGS, tell
from vit_jax.writing import write_atomically

logger = logging.getLogger(__name__)

CLASSES = "classes.txt"  # their names, in order, as `pairs:` reads them
OVERLAY = ".overlay.png"


def answers(model: str, out: str | None, only: Patterns = (), ignore: Patterns = ()) -> str:
    """What `predict` writes: "masks" or "boxes" into a folder, if the model gives such."""
    if out is None or out.lower().endswith(ENDINGS["classes"]):
        return "classes"  # of a model that gives others, an error once it is loaded
    found = OBJECTIVES[open_model(model, only=only, ignore=ignore).card.objective]
    return "masks" if found.masks else "boxes" if found.boxes else "classes"


def masks_to(
    folder: str,
    inputs: Inputs,
    load: Callable[[], Loaded],
    *,
    overlays: bool = False,
    windows: str = "none",
    batch_size: int | None = None,
    threads: int | None = None,
) -> bool:
    """Writes the mask of each image into a folder, and the names of the classes.

    A mask is an indexed PNG of its image's size, with the model's colours or default ones, at the
    image's path below what was named: of `pets`, pets/dogs/1.jpg has dogs/1.png. Nothing that is
    there is overwritten.

    Args:
      load: loads the model, once it is known that nothing is in the way.
      windows: how large images are seen, as of `EvalConfig`.
      overlays: whether to write NAME.overlay.png, the image half covered by its mask, too.

    Returns:
      Whether every image has a mask, and no file but hidden ones was passed over.

    Raises:
      UserError: a file is there already, two images would have one mask, or the model gives none.
    """
    endings = (".png", OVERLAY) if overlays else (".png",)
    paths = list(paths_of(folder, inputs.below, endings))
    check_free(paths, inputs.names, {os.path.join(folder, CLASSES): "the list of classes"})
    vit = load()
    options = dict(batch_size=batch_size, threads=threads, keep_pixels=overlays, windows=windows)
    predictor = Predictor(vit, "masks", **options)
    palette = vit.palette or default_palette(len(vit.labels))
    began, failed = time.monotonic(), list[str]()
    write_atomically(os.path.join(folder, CLASSES), "".join(f"{name}\n" for name in vit.labels))
    names = tqdm.tqdm(inputs.names, unit=" images", disable=None)
    for name, where, answer in zip(names, paths, predictor(inputs), strict=True):
        if isinstance(answer, Segmented):
            write_atomically(where[0], encode_mask(answer.mask, palette))
            if overlays:
                write_atomically(where[1], encode(overlay(*reversed(answer), palette)))
        else:
            text = str(answer)
            failed.append(text if text.startswith(name) else f"{name}: {text}")
    count = len(inputs) - len(failed)
    seconds = time.monotonic() - began
    logger.info("%s: %s masks in %.1f s, classes by %s", folder, f"{count:,}", seconds, CLASSES)
    return tell(failed, len(inputs), inputs.passed_over)


def paths_of(
    folder: str, below: Sequence[str], endings: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    """The files of each image, by its path below what was named."""
    for name in below:
        inside = os.path.normpath(name)
        if os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir:
            raise UserError(f"{name!r} is a path out of its archive: what is written has no place")
        stem = os.path.join(folder, os.path.splitext(inside)[0])
        yield tuple(f"{stem}{ending}" for ending in endings)


def check_free(
    paths: Sequence[tuple[str, ...]], names: Sequence[str], others: Mapping[str, str]
) -> None:
    """Raises a UserError if a file is there already, or is that of two images.

    `others` are files beside those of the images, and what they are.
    """
    seen = dict(others)
    for name, files in zip(names, paths, strict=True):
        for path in files:
            if path in seen:
                raise UserError(
                    f"{name} and {seen[path]} would both go to {path}: predict them one by one, "
                    "into folders of their own"
                )
            seen[path] = name
    for path in seen:
        if os.path.lexists(path):
            raise UserError(
                f"{path} is there already, and nothing is overwritten: name another --out"
            )
