"""Contact sheets of examples, as they are stored and as the model gets them."""

import dataclasses
import os
import re
from collections.abc import Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from vit_jax.data.boxed import drawable
from vit_jax.data.boxes import NONE, Boxes, outlined
from vit_jax.data.config import Split
from vit_jax.data.describe import said, spread
from vit_jax.data.images import read_image
from vit_jax.data.masks import IGNORED, default_palette, overlay
from vit_jax.data.pipeline import BatchReader
from vit_jax.data.sources import Source
from vit_jax.data.transforms import InceptionCrop, Preprocess
from vit_jax.errors import UserError
from vit_jax.writing import make_folder, replacing

SIDE, GAP, CAPTION = 224, 12, 42  # of a tile, around it, and below it, in pixels
_PAPER, _EMPTY, _INK, _GREY = (255, 255, 255), (236, 236, 236), (20, 20, 20), (110, 110, 110)


class Tile(NamedTuple):
    """An image, or None if it cannot be read, with a title and a smaller note below it."""

    image: np.ndarray | None
    title: str
    note: str


def corner(number: int, columns: int) -> tuple[int, int]:
    """The (left, top) of a tile on its sheet."""
    row, column = divmod(number, columns)
    return GAP + column * (SIDE + GAP), GAP + row * (SIDE + CAPTION + GAP)


def sheet(tiles: Sequence[Tile], columns: int = 8) -> PIL.Image.Image:
    """Draws tiles in rows. Small images are enlarged by a whole number, large ones shrunk."""
    columns = min(columns, len(tiles))
    left, top = corner(len(tiles) - 1, columns)
    width = corner(columns - 1, columns)[0] + SIDE + GAP
    page = PIL.Image.new("RGB", (width, top + SIDE + CAPTION + GAP), _PAPER)
    draw = PIL.ImageDraw.Draw(page)
    large, small = (PIL.ImageFont.load_default(size) for size in (16, 12))
    for number, tile in enumerate(tiles):
        left, top = corner(number, columns)
        draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), _EMPTY)
        if tile.image is not None:
            image = fitted(tile.image)
            page.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
        for text, font, colour, below in (
            (tile.title, large, _INK, 2),
            (tile.note, small, _GREY, 23),
        ):
            text = shortened(text, font)
            draw.text((left, top + SIDE + below), text, colour, font)
    return page


def fitted(image: np.ndarray) -> PIL.Image.Image:
    """Pixels [h w c] as an image of at most SIDE x SIDE."""
    c = image.shape[2]
    pixels = np.rint(image).clip(0, 255).astype(np.uint8)[..., : 3 if c > 2 else 1]
    h, w = pixels.shape[:2]
    page = PIL.Image.fromarray(pixels if c > 2 else pixels[..., 0]).convert("RGB")
    if max(h, w) <= SIDE:
        factor = SIDE // max(h, w)
        return page.resize((w * factor, h * factor), PIL.Image.Resampling.NEAREST)
    share = SIDE / max(h, w)
    size = tuple(max(1, round(side * share)) for side in (w, h))
    return page.resize(size, PIL.Image.Resampling.LANCZOS)


def shortened(text: str, font: Any) -> str:
    """Fits a text to one line of a tile, leaving out its middle if it is too long."""
    text = "".join(drawable(c, font) for c in text)
    kept, short = len(text), text
    while kept and font.getlength(short) > SIDE:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return short


def chosen(source: Source, most: int = 48) -> list[int]:
    """The examples to show: evenly spaced, or the first ones of an endless source."""
    return spread(len(source), most) if isinstance(source, Sized) else list(range(most))


def stored(source: Source, indices: Sequence[int]) -> list[Tile]:
    """Examples as stored: not rotated by EXIF, and without transparency."""
    tiles = []
    for index in indices:
        try:
            example = source[index]
        except UserError:
            tiles.append(Tile(None, "cannot be read", f"example {index}"))
            continue
        note = os.path.basename(str(example.get("file", f"example {index}")))
        label = example["label"]
        if isinstance(label, np.ndarray):
            label = tuple(np.unique(label[label != IGNORED]).tolist())
        if isinstance(label, Boxes):
            label = tuple(np.unique(label.classes).tolist())
        try:
            image = read_image(example["image"])
        except UserError:
            tiles.append(Tile(None, "cannot be read", note))
            continue
        tiles.append(Tile(image, said(source, label), note))
    return tiles


def as_read(read: BatchReader, indices: Sequence[int], tiles: Sequence[Tile]) -> list[Tile]:
    """The same examples as the model gets them from `read`, with the captions of `tiles`."""
    read = dataclasses.replace(read.in_uint8(), on_corrupt="skip", replace=False)
    images = []
    for position, (index, tile) in enumerate(zip(indices, tiles, strict=True)):
        try:  # one by one: a label may be out of range
            if tile.image is None:
                raise UserError(tile.title)
            batch = read(np.array([position]), np.array([index]))
            images.append(_drawn(read.source, batch) if batch["mask"][0] else None)
        except UserError:
            images.append(None)
    return [tile._replace(image=image) for tile, image in zip(tiles, images, strict=True)]


def _drawn(source: Source, batch: dict[str, np.ndarray]) -> np.ndarray:
    """The image of a batch, half covered by the colours of its mask, or with its boxes."""
    image = batch["image"][0]
    if getattr(source, "boxes", False):
        rows = batch["label"][0]
        rows = rows[rows[:, 0] != NONE]
        colours = np.array(default_palette(len(source.label_names) + 1)[1:], np.uint8)
        return outlined(image, rows[:, 1:], colours[rows[:, 0].astype(int)])
    if not getattr(source, "masks", False):
        return image
    palette = getattr(source, "palette", None) or default_palette(len(source.label_names))
    return overlay(image, batch["label"][0], palette)


def default_reader(source: Source) -> tuple[BatchReader, str]:
    """The reader to use without a config, as in configs/images.py; and its description."""
    split, how = Split("", "", exif=True), "224 x 224, upright"
    if not (getattr(source, "masks", False) or getattr(source, "boxes", False)):
        split = dataclasses.replace(
            split, inception_crop=InceptionCrop((0.05, 1.0), (0.75, 1.33)), flip=True, jpeg="fast"
        )
        how = "Inception's crop and flip, 224 x 224, upright, as with configs/images.py"
    return BatchReader.of(source, split, Preprocess((224, 224))), how


def draw(folder: str, name: str, source: Source, read: BatchReader, how: str) -> list[str]:
    """Writes two sheets of a split, NAME_stored.png and NAME_model.png, and returns lines on them.

    Raises:
      UserError: the folder is a file.
    """
    make_folder(folder)
    indices = chosen(source)
    tiles = stored(source, indices)
    start = os.path.join(folder, re.sub(r"\W+", "_", name).strip("_") or "all")
    lines = []
    for end, shown, what in (
        ("stored", tiles, "as stored"),
        ("model", as_read(read, indices, tiles), f"as the model gets them ({how})"),
    ):
        path = f"{start}_{end}.png"
        with replacing(path) as temporary:
            sheet(shown).save(temporary, "PNG")
        lines.append(f"{path}: {len(indices)} examples of {name}, {what}")
    return lines
