"""What happens to an image and its mask or boxes together, so that each pixel keeps its class."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from vit_jax.data.boxes import Boxes
from vit_jax.data.images import BadImage, Image
from vit_jax.data.masks import IGNORED, Mask, check_classes
from vit_jax.data.sources import Source
from vit_jax.data.transforms import InceptionCrop, Pixels, Preprocess, centre, resize_mask
from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Joint:
    """Brings an image and its label to the model's size: a mask by nearest pixels, or boxes.

    In this order, each if it is set: a random part (`inception_crop`), the size of `preprocess`
    times a random factor (`random_scale`), a random place (both that and `random_crop`), else the
    centre. Where the image does not fill the model's size it is padded with the mean of
    `preprocess`, and a mask with 255. Boxes are cut to what is left of the image (`Boxes.cut`).

    Attributes:
      random_scale: (low, high) of the factor, which is uniform between them; None is 1.
    """

    preprocess: Preprocess
    inception_crop: InceptionCrop | None = None
    random_scale: Sequence[float] | None = None
    random_crop: bool = False

    def __call__(
        self, image: Image, label: Mask | Boxes, random: np.random.Generator | None
    ) -> tuple[Pixels, Mask | Boxes]:
        """Returns pixels [h w c] and a mask [h w] or boxes of the model's size."""
        how = self.preprocess
        if isinstance(label, Boxes):  # which may reach beyond their image
            label = label.clipped(*image.shape[:2])
        if self.inception_crop:
            top, left, height, width = self.inception_crop.box(*image.shape[:2], random)
            part = slice(top, top + height), slice(left, left + width)
            image = image[part]
            label = label.moved(-left, -top) if isinstance(label, Boxes) else label[part]
        factor = 1.0
        if self.random_scale:
            low, high = self.random_scale
            factor = low + random.random() * (high - low)
        old, image = image.shape[:2], how.resized(image, factor)
        new = image.shape[:2]
        label = label.resized(old, new) if isinstance(label, Boxes) else resize_mask(label, new)
        spare = [old - new for old, new in zip(new, how.image_size, strict=True)]
        if self.random_scale or self.random_crop:
            top, left = (
                int(share * (abs(n) + 1)) * (1 if n > 0 else -1)
                for share, n in zip(random.random(2), spare, strict=True)
            )
        else:
            top, left = centre(spare, how.aspect == "small")
        fill = np.broadcast_to(255 * np.asarray(how.mean), (how.in_channels,))
        fill = np.rint(fill) if image.dtype == np.uint8 else fill
        image = window(image, top, left, how.image_size, fill)
        if isinstance(label, Boxes):
            return image, label.moved(-left, -top).cut(*how.image_size)
        return image, window(label, top, left, how.image_size, IGNORED)


def window(
    pixels: Pixels | Mask, top: int, left: int, size: tuple[int, int], fill: int | np.ndarray
) -> Pixels | Mask:
    """Cuts `size` (h, w) out at a place that may be partly outside, where it is filled."""
    bottom, right = top + size[0], left + size[1]
    found = pixels[max(top, 0) : bottom, max(left, 0) : right]
    if found.shape[:2] == tuple(size):
        return found
    out = np.empty((*size, *pixels.shape[2:]), pixels.dtype)
    out[:] = fill
    h, w = found.shape[:2]
    out[max(-top, 0) : max(-top, 0) + h, max(-left, 0) : max(-left, 0) + w] = found
    return out


def check_scale(scale: Sequence[float] | None) -> None:
    """Raises a UserError unless `random_scale` is None or (low, high), 0 < low <= high."""
    if scale is not None and (len(scale) != 2 or not 0 < scale[0] <= scale[1]):
        raise UserError(
            f"data.train.random_scale is {tuple(scale)}; expected (low, high), 0 < low <= high"
        )


def rounded_up(size: int) -> int:
    """The next of 32, 64, 96, 128, 192, ..., so that masks of all sizes need few programs."""
    power = max(32, 1 << (size - 1).bit_length())
    return power * 3 // 4 if size <= power * 3 // 4 and power > 64 else power


def check_mask(name: str, image: Image, mask: object, k: int) -> None:
    """Raises a UserError if a mask has another size than its image, or classes of k and above."""
    if not isinstance(mask, np.ndarray) or mask.dtype != np.uint8 or mask.ndim != 2:
        found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else mask
        raise UserError(
            f"{name} has the mask {found}; expected uint8 {list(image.shape[:2])}, as its image"
        )
    if mask.shape != image.shape[:2]:
        side = ""
        if mask.shape == image.shape[1::-1]:
            side = (
                "; it lies on its side: is the image a photograph that EXIF turns upright, and was "
                "the mask drawn before? Turn one of them"
            )
        raise UserError(
            f"{name} is of {image.shape[0]} x {image.shape[1]} pixels (h x w), and its mask of "
            f"{mask.shape[0]} x {mask.shape[1]}{side}"
        )
    check_classes(name, mask, k)


def mask_sizes(source: Source, indices: np.ndarray) -> list[tuple[int, int]]:
    """The (h, w) of the masks of these examples; -1 is none."""
    return [_mask_size(source, int(index)) for index in indices if index >= 0]


def common_size(sizes: Sequence[tuple[int, int]] | Int[np.ndarray, "n 2"]) -> tuple[int, int]:
    """The (h, w) that all of these fit into, `rounded_up`, of which there are few."""
    h, w = np.max([(1, 1), *sizes], axis=0).tolist()
    return rounded_up(h), rounded_up(w)


def _mask_size(source: Source, index: int) -> tuple[int, int]:
    """The (h, w) of an example's mask; by `source.mask_size`, where it need not be decoded."""
    try:
        if hasattr(source, "mask_size"):
            return source.mask_size(index)
        return source[index]["label"].shape
    except BadImage:
        return 1, 1  # which is said when it is read
