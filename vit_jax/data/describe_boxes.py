"""What a report on a data set says of boxes: how many of each class, their sizes, what is odd."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from vit_jax.data.boxes import Boxes

_SMALL, _LARGE = 32**2, 96**2  # square pixels, COCO's


class BoxLook(NamedTuple):
    """What is kept of an image's boxes: what each is, and how many are odd."""

    classes: Int32[np.ndarray, " n"]
    sides: Float32[np.ndarray, "n 2"]  # (w, h)
    area: Float32[np.ndarray, " n"]
    crowd: int
    twice: int
    beyond: int
    thin: int


def look_at(boxes: Boxes, size: tuple[int, int] | None) -> BoxLook:
    """Looks at the boxes of an image of `size` (h, w), or of one that is not known."""
    same = np.column_stack([boxes.corners, boxes.classes])
    beyond = 0
    if size is not None:
        inside = boxes.clipped(*size).corners
        beyond = np.count_nonzero((np.abs(inside - boxes.corners) > 1).any(axis=1))
    return BoxLook(
        boxes.classes,
        boxes.sides,
        boxes.area,
        np.count_nonzero(boxes.crowd),
        len(same) - len(np.unique(same, axis=0)),
        beyond,
        np.count_nonzero((boxes.sides < 1).any(axis=1)),
    )


def box_facts(looks: Sequence[BoxLook], names: Sequence[str], how: str) -> list[tuple[str, str]]:
    """The lines on boxes, as (what, value)."""
    counts = np.array([len(each.classes) for each in looks])
    total = counts.sum()
    none = np.count_nonzero(counts == 0)
    text = f"{total:,} in {len(looks) - none:,} images, up to {max(counts, default=0):,} in one"
    facts = [("boxes", text + (f"; images without any: {none:,}" if none else ""))]
    if total:
        classes = np.concatenate([each.classes for each in looks])
        each = np.bincount(classes[(classes >= 0) & (classes < len(names))], minlength=len(names))
        order = np.argsort(-each, kind="stable").tolist()
        first = ", ".join(f"{names[i]}: {each[i]:,}" for i in order[:10])
        facts.append(("", first + ", ..." * (len(names) > 10)))
        sides = np.concatenate([look.sides for look in looks])
        spans = [
            f"{what} {low:,.0f} to {high:,.0f}, median {middle:,.0f}"
            for what, (low, middle, high) in zip(
                "hw", np.quantile(sides[:, ::-1], (0, 0.5, 1), axis=0).T, strict=True
            )
        ]
        facts.append(("their sizes", f"{'; '.join(spans)}"))
        area = np.concatenate([look.area for look in looks])
        shares = np.mean(
            [area < _SMALL, (area >= _SMALL) & (area < _LARGE), area >= _LARGE], axis=1
        )
        text = "{:.0%} are small (below 32 x 32 pixels), {:.0%} medium, {:.0%} large (from 96 x 96)"
        facts.append(("", text.format(*shares)))
    for name, what in {
        "crowd": "around crowds, which are not learned",
        "twice": "there twice, with the same class and corners",
        "beyond": "reaching beyond their image by more than a pixel, and cut there",
        "thin": "with a side of less than a pixel",
    }.items():
        if count := sum(getattr(look, name) for look in looks):
            facts.append(("", f"{what}: {count:,}"))
    return facts + [("read as", how)] * bool(how)
