"""Boxes: where the objects of an image are, and how they move with its pixels."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from vit_jax.data.images import Image
from vit_jax.errors import UserError

NONE = -1  # the class in a row of a batch that has no box
# A box of a cut image is dropped if it has a side of fewer pixels, or a smaller share is left.
LEAST_SIDE, LEAST_SHARE = 1.0, 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Boxes:
    """The boxes of an image; `boxes[which]` are some of them, by a mask or by numbers.

    Attributes:
      corners: x0, y0, x1, y1 in pixels of the upright image. 0 is its left or top edge, and its
        width or height the right or bottom one: COCO's x, y, w, h is x, y, x + w, y + h.
      classes: the number of each one's class.
      crowd: whether it is around many objects that are not told apart (COCO's iscrowd).
      area: of the object, in square pixels: COCO's `area`, else that of the box.
    """

    corners: Float32[np.ndarray, "n 4"]
    classes: Int32[np.ndarray, " n"]
    crowd: Bool[np.ndarray, " n"]
    area: Float32[np.ndarray, " n"]

    @classmethod
    def of(
        cls,
        corners: object,
        classes: object,
        crowd: object = None,
        area: object = None,
    ) -> "Boxes":
        """Boxes of lists or arrays: corners [n 4]; none is a crowd, and areas are the boxes'."""
        corners = np.asarray(corners, np.float32).reshape(-1, 4)
        if area is None:
            area = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
        crowd = np.zeros(len(corners), bool) if crowd is None else np.asarray(crowd, bool)
        return cls(corners, np.asarray(classes, np.int32), crowd, np.asarray(area, np.float32))

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, which: np.ndarray | slice) -> "Boxes":
        return Boxes(self.corners[which], self.classes[which], self.crowd[which], self.area[which])

    @property
    def sides(self) -> Float32[np.ndarray, "n 2"]:
        """(w, h) of each."""
        return self.corners[:, 2:] - self.corners[:, :2]

    def moved(self, right: int | float, down: int | float) -> "Boxes":
        """Shifted by as many pixels."""
        shift = np.array([right, down] * 2, np.float32)
        return dataclasses.replace(self, corners=self.corners + shift)

    def resized(self, old: tuple[int, int], new: tuple[int, int]) -> "Boxes":
        """As an image of `old` (h, w) is squashed to `new`."""
        y, x = new[0] / old[0], new[1] / old[1]
        corners = self.corners * np.array([x, y] * 2, np.float32)
        return dataclasses.replace(self, corners=corners, area=self.area * np.float32(x * y))

    def mirrored(self, width: int) -> "Boxes":
        """Left is right, in an image as wide as this."""
        x0, y0, x1, y1 = self.corners.T
        return dataclasses.replace(self, corners=np.stack([width - x1, y0, width - x0, y1], 1))

    def clipped(self, h: int, w: int) -> "Boxes":
        """What is in an image of h x w; of a box beside it, a line or point at its edge."""
        corners = self.corners.clip(0, np.array([w, h] * 2, np.float32))
        return dataclasses.replace(self, corners=corners)

    def cut(self, h: int, w: int) -> "Boxes":
        """`clipped`, without those of which too little is left: LEAST_SIDE, LEAST_SHARE."""
        found = self.clipped(h, w)
        share = found.sides.prod(axis=1) >= LEAST_SHARE * self.sides.prod(axis=1)
        return found[share & (found.sides >= LEAST_SIDE).all(axis=1)]

    def rows(self, most: int) -> Float32[np.ndarray, "{most} 5"]:
        """Rows of (class, x0, y0, x1, y1), of more than `most` the largest; NONE and 0 below."""
        found = self
        if len(self) > most:
            order = np.argsort(-self.sides.prod(axis=1), kind="stable")
            found = self[np.sort(order[:most])]
        rows = no_rows(most)
        rows[: len(found), 0], rows[: len(found), 1:] = found.classes, found.corners
        return rows


def no_rows(*shape: int) -> Float32[np.ndarray, "... 5"]:
    """Rows of a batch that have no box."""
    rows = np.zeros((*shape, 5), np.float32)
    rows[..., 0] = NONE
    return rows


def outlined(
    image: Image, corners: Float32[np.ndarray, "n 4"], colours: UInt8[np.ndarray, "n 3"]
) -> UInt8[np.ndarray, "_h _w 3"]:
    """The image in RGB with the outlines of boxes, a hundredth of its shorter side wide."""
    out = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image.copy()
    h, w = out.shape[:2]
    wide = max(1, round(min(h, w) / 100))
    for (x0, y0, x1, y1), colour in zip(np.rint(corners).astype(int), colours, strict=True):
        x0, y0 = max(x0, 0), max(y0, 0)
        inside = out[y0:y1, x0:x1]
        for edge in (inside[:wide], inside[-wide:], inside[:, :wide], inside[:, -wide:]):
            edge[:] = colour
    return out


def check_boxes(
    name: str, image: Image, boxes: object, k: int, size: tuple[int, int] | None
) -> None:
    """Raises a UserError unless boxes are `Boxes` of classes below k, of an image of this size.

    Args:
      size: the (h, w) of the image on which they were drawn; None where nothing says it.
    """
    if not isinstance(boxes, Boxes):
        raise UserError(f"{name} has the label {boxes!r}; expected vit_jax.data.boxes.Boxes")
    if (odd := boxes.classes[(boxes.classes < 0) | (boxes.classes >= k)]).size:
        raise UserError(f"{name} has a box of class {odd[0]}, but there are {k}, 0 to {k - 1}")
    if not np.isfinite(boxes.corners).all():
        raise UserError(f"{name} has a box with corners that are no numbers")
    if (boxes.sides < 0).any():
        raise UserError(f"{name} has a box whose corners are not x0, y0, x1, y1, the smaller first")
    if size is not None and image.shape[:2] != tuple(size):
        raise UserError(f"{name} {other_size(image.shape[:2], size)}")


def other_size(found: tuple[int, ...], said: tuple[int, int]) -> str:
    """That an image is of another (h, w) than its boxes were drawn on, to follow its name."""
    text = (
        f"is of {found[0]} x {found[1]} pixels (h x w), and its boxes are of an image of "
        f"{said[0]} x {said[1]}: "
    )
    if tuple(found) == tuple(said[::-1]):
        return text + (
            "EXIF turns the photograph upright, and the size is that of the picture as it is "
            "stored. If the boxes are too, take the turn out of the file (exiftool -Orientation= "
            "FILE); if they are upright, exchange height and width"
        )
    return text + "was it resized afterwards? Take the images on which the boxes were drawn"
