"""The lines of a file of boxes as of YOLO: class, centre, width and height, or an outline."""

import math

from vit_jax.data.boxes import Boxes
from vit_jax.data.forms.box_files import note
from vit_jax.errors import UserError

_SLACK = 0.01  # by which shares may leave 0 to 1, as roundings do


class Counts:
    """What occurred in files, for the user: a count and the first place of each."""

    def __init__(self):
        self._found: dict[str, list[str]] = {}

    def add(self, what: str, where: str) -> None:
        known = self._found.setdefault(what, [0, where])
        known[0] += 1

    def notes(self) -> list[str]:
        return [note(what, count, where) for what, (count, where) in self._found.items()]


def boxes_in(where: str, text: str, k: int, points: int | None, counts: Counts) -> Boxes:
    """The boxes of a text, in shares of the image's width and height.

    Args:
      where: the file, for messages.
      k: the number of classes.
      points: numbers of keypoints behind each box; None for none.
      counts: where it is counted what was ignored, and what was not quite as it should be.

    Raises:
      UserError: a line that is no box, of another class, or in pixels.
    """
    corners, classes, seen = [], [], set()
    for number, line in enumerate(text.splitlines(), 1):
        cells = line.split()
        if not cells:
            continue
        here = f"{where}, line {number}"
        try:
            values = [float(cell) for cell in cells]
        except ValueError:
            raise UserError(
                f"{here}: {line.strip()!r} has more than numbers; expected class x y width height"
            ) from None
        if not all(map(math.isfinite, values)):
            raise UserError(f"{here}: {line.strip()!r} has no finite number")
        label, row = values[0], values[1:]
        if label != int(label) or not 0 <= label < k:
            raise UserError(
                f"{here} is of class {cells[0]}, but there are {k}, 0 to {k - 1}: are all named?"
            )
        box, outside = _corners(here, row, points, counts)
        if outside:
            counts.add("boxes a little beyond 0 to 1 (cut there)", here)
        if tuple(values) in seen:
            counts.add("lines that are there twice (taken once)", here)
            continue
        seen.add(tuple(values))
        if box[2] <= box[0] or box[3] <= box[1]:
            counts.add("boxes without width or height (ignored)", here)
            continue
        corners.append(box)
        classes.append(int(label))
    return Boxes.of(corners, classes)


def _corners(
    here: str, row: list[float], points: int | None, counts: Counts
) -> tuple[tuple[float, float, float, float], bool]:
    """x0, y0, x1, y1 of the numbers behind a class, and whether some are not within 0 to 1."""
    if points is not None:
        if len(row) != 4 + points:
            raise UserError(
                f"{here} has {1 + len(row)} numbers; expected class x y width height and {points} "
                "of keypoints, by kpt_shape"
            )
        row = row[:4]
    if len(row) == 5:
        raise UserError(
            f"{here} has a sixth number, a confidence, as detections have: labels are lines of "
            "class x y width height"
        )
    if len(row) != 4 and (len(row) < 6 or len(row) % 2):
        raise UserError(
            f"{here} has {1 + len(row)} numbers; expected class x y width height, or a class and "
            "x y of the corners of an outline (keypoints need kpt_shape in the .yaml)"
        )
    if odd := [n for n in row if not -_SLACK <= n <= 1 + _SLACK]:
        raise UserError(
            f"{here} has {odd[0]:g}, beyond 0 to 1: x, y, width and height are shares of the "
            "image's (divide pixels by them)"
        )
    inside = [min(max(n, 0.0), 1.0) for n in row]
    if len(row) == 4:
        x, y, w, h = inside
        return (x - w / 2, y - h / 2, x + w / 2, y + h / 2), inside != row
    counts.add("boxes around outlines", here)
    xs, ys = inside[::2], inside[1::2]
    return (min(xs), min(ys), max(xs), max(ys)), inside != row
