"""A picture of what a run's model finds: masks or boxes, beside the true ones."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from jaxtyping import UInt8

from vit_jax.checkpoints.load import Loaded
from vit_jax.data.boxed import boxed, drawable
from vit_jax.data.boxes import Boxes
from vit_jax.data.config import Split
from vit_jax.data.describe import spread
from vit_jax.data.images import Image
from vit_jax.data.joint import check_mask
from vit_jax.data.masks import IGNORED, Mask, Palette, default_palette
from vit_jax.data.pipeline import BatchReader
from vit_jax.data.sources import Source
from vit_jax.data.transforms import Preprocess, resize_mask
from vit_jax.errors import UserError
from vit_jax.training.config import read_config
from vit_jax.training.datasets import DataSets
from vit_jax.training.evaluation.files import PICTURES
from vit_jax.training.evaluation.predict import Detected, Predictor, Segmented, load_local
from vit_jax.training.evaluation.predict_boxes import DRAWN
from vit_jax.writing import replacing

logger = logging.getLogger(__name__)

IMAGES = 6  # at most, in two columns
_LEAST, _MOST = 384, 512  # of a panel's longer side, in pixels
_GAP, _LINE = 12, 24  # between panels, and of a line of text
_PAPER, _INK = (255, 255, 255), (20, 20, 20)

Panel = UInt8[np.ndarray, "_h _w 3"]


class _Example(NamedTuple):
    image: Image  # as it is
    label: Mask | Boxes  # the true ones
    answer: Segmented | Detected


def write_found(workdir: str | os.PathLike) -> str | None:
    """Draws WORKDIR/pictures.png, of a run that learns masks or boxes and has a val or test split.

    One process alone does it, on its own devices, with the newest checkpoint; up to IMAGES images
    are evenly spaced in the split, and one that cannot be read is passed over. Whatever goes wrong
    is logged in a line, as the run itself is finished.

    Returns:
      The name of the file, None if it is not drawn.
    """
    try:
        page = _page(workdir)
        if page is None:
            return None
        with replacing(os.path.join(workdir, PICTURES)) as temporary:
            page.save(temporary, "PNG")
        return PICTURES
    except Exception as error:  # noqa: BLE001
        lines = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning("%s is not drawn: %s", PICTURES, lines[0])
        return None


def _page(workdir: str | os.PathLike) -> PIL.Image.Image | None:
    config = read_config(workdir)
    splits = {"val": config.data.val, "test": config.data.test}
    name, split = next(((k, v) for k, v in splits.items() if v is not None), (None, None))
    if split is None or not (config.segments or config.detects):
        return None
    vit, data, where = load_local(workdir), DataSets.of_run(workdir), f"data.{name}"
    data.open(where, split)
    source = data.with_labels(where, split, vit.labels)
    examples = list(_examples(vit, source, split, config.eval))
    if not examples:
        raise UserError(f"no image of {where} can be read")
    windows, how = config.eval.windows, _read_as(vit, source, split)
    rows = [_panels(each, vit, _shown_size(each.image, how, windows), how) for each in examples]
    heads = ("image", "true", "found") if config.segments else ("true", f"found, {DRAWN:g} or more")
    legend = _legend(examples, vit) if config.segments else []
    return _sheet(rows, heads, f"{name}, step {vit.step:,}", legend)


def _read_as(vit: Loaded, source: Source, split: Split) -> Preprocess:
    """How images of the split are read when it is evaluated."""
    return BatchReader.of(source, split, vit.preprocess).preprocess


def _examples(vit: Loaded, source: Source, split: Split, evaluated: Any) -> Iterator[_Example]:
    """Images of the source that can be read, with what the model finds in them."""
    kept = []
    for index in spread(len(source), IMAGES):
        try:
            kept.append(source[index])
        except UserError as error:
            logger.debug("%s", error)
    vit = dataclasses.replace(vit, preprocess=_read_as(vit, source, split))
    what = "boxes" if getattr(source, "boxes", False) else "masks"
    how = dict(threshold=DRAWN) if what == "boxes" else {}
    if what == "masks" and evaluated.windows != "none":
        how = dict(windows=evaluated.windows, stride=evaluated.stride)
    predictor = Predictor(vit, what, keep_pixels=True, batch_size=IMAGES, **how)
    answers = predictor([each["image"] for each in kept])
    for each, answer in zip(kept, answers, strict=True):
        try:
            if isinstance(answer, UserError):
                raise answer
            if what == "masks":
                check_mask("it", answer.pixels, each["label"], len(vit.labels))
        except UserError as error:
            logger.debug("%s", error)
            continue
        yield _Example(answer.pixels, each["label"], answer)


def _shown_size(image: Image, how: Preprocess, windows: str) -> tuple[int, int]:
    """The (h, w) that the model sees an image at, up to _MOST pixels."""
    size = how.image_size
    if windows != "none":
        size = how.covering(*image.shape[:2], own=windows == "own")
    share = min(1, _MOST / max(size))
    return max(1, round(size[0] * share)), max(1, round(size[1] * share))


def _panels(each: _Example, vit: Loaded, size: tuple[int, int], how: Preprocess) -> list[Panel]:
    """The image and both masks, or the image with the true boxes and with those found."""
    image = np.rint(how.to_size(each.image, size)).clip(0, 255).astype(np.uint8)
    if isinstance(each.answer, Detected):
        true, found = each.label[~each.label.crowd], each.answer.boxes
        scale = np.array([size[1], size[0]] * 2, np.float32)
        scale /= np.array([*each.answer.size[::-1]] * 2, np.float32)
        names = [vit.labels[label] for label in true.classes]
        scored = [
            f"{vit.labels[label]} {score:.2f}"
            for label, score in zip(found.classes, found.scores, strict=True)
        ]
        return [
            boxed(image, some.corners * scale, some.classes, texts, least=_LEAST)
            for some, texts in ((true, names), (found, scored))
        ]
    colours = np.full((IGNORED + 1, 3), 255, np.uint8)
    palette = _palette(vit)
    colours[: len(palette)] = palette
    masks = (colours[resize_mask(mask, size)] for mask in (each.label, each.answer.mask))
    rgb = image[..., :3] if image.shape[2] > 2 else np.repeat(image[..., :1], 3, axis=2)
    factor = max(1, _LEAST // max(size))
    return [panel.repeat(factor, 0).repeat(factor, 1) for panel in (rgb, *masks)]


def _palette(vit: Loaded) -> Palette:
    return vit.palette or default_palette(len(vit.labels))


def _legend(examples: Sequence[_Example], vit: Loaded) -> list[tuple[str, tuple[int, ...]]]:
    """The names and colours of the classes in these masks, true or found."""
    seen = {
        int(label)
        for each in examples
        for mask in (each.label, each.answer.mask)
        for label in np.unique(mask)
    }
    names = [(vit.labels[i], _palette(vit)[i]) for i in sorted(seen - {IGNORED})]
    return names + ([("of no class", (255, 255, 255))] if IGNORED in seen else [])


def _sheet(
    rows: Sequence[Sequence[Panel]],
    heads: Sequence[str],
    title: str,
    legend: Sequence[tuple[str, tuple[int, ...]]],
) -> PIL.Image.Image:
    """Two examples in a row, with names above their panels, and the colours of classes below."""
    h, w = np.max([panel.shape[:2] for row in rows for panel in row], axis=0).tolist()
    n, columns = len(heads), min(2, len(rows))
    block = n * (w + _GAP) + _GAP
    width, font = columns * block, PIL.ImageFont.load_default(16)
    places, x, y = [], _GAP, 0
    for text, colour in legend:
        text = "".join(drawable(c, font) for c in text)
        wide = round(font.getlength(text)) + 16 + 2 * _GAP
        x, y = (x, y) if x + wide <= width or x == _GAP else (_GAP, y + 1)
        places.append((text, colour, x, y))
        x += wide
    top = 2 * _LINE + _GAP
    below = top + -(-len(rows) // columns) * (h + _GAP)
    page = PIL.Image.new("RGB", (width, below + (y + 1) * _LINE * bool(legend)), _PAPER)
    draw = PIL.ImageDraw.Draw(page)
    draw.text((_GAP, 6), title, _INK, font)
    for number, row in enumerate(rows):
        left, down = _GAP + number % columns * block, top + number // columns * (h + _GAP)
        for i, panel in enumerate(row):
            at = left + i * (w + _GAP)
            if number < columns:
                draw.text((at, top - _LINE), heads[i], _INK, font)
            page.paste(PIL.Image.fromarray(panel), (at, down))
    for text, colour, x, line in places:
        y = below + line * _LINE
        draw.rectangle((x, y + 2, x + 15, y + 17), colour, _INK)
        draw.text((x + 20, y), text, _INK, font)
    return page
