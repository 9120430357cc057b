"""What happens to one image on the host: frozen, deterministic given a generator, free of JAX."""

import dataclasses
import os
from typing import Any

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

from vit_jax.errors import UserError, nearest

Image = UInt8[np.ndarray, "h w c"]

_CV2 = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}
_PILLOW = {
    "bilinear_antialias": PIL.Image.Resampling.BILINEAR,
    "bicubic_antialias": PIL.Image.Resampling.BICUBIC,
}


def resize(image: Image, size: tuple[int, int], method: str) -> UInt8[np.ndarray, "h2 w2 c"]:
    """Squashes an image to `size` (h, w).

    `bilinear` and `area` are TensorFlow's without antialiasing (OpenCV's), the `_antialias` ones
    TensorFlow's with it (Pillow's).
    """
    if image.shape[:2] == tuple(size):
        return image
    if method in _CV2:
        out = cv2.resize(image, (size[1], size[0]), interpolation=_CV2[method])
        return out.reshape(*size, image.shape[2])
    channels = [
        np.asarray(PIL.Image.fromarray(image[..., i]).resize((size[1], size[0]), _PILLOW[method]))
        for i in range(image.shape[2])
    ]
    return np.stack(channels, axis=-1)


def to_channels(image: Image, channels: int) -> UInt8[np.ndarray, "h w {channels}"]:
    """Grey to colour by repetition, colour to grey by luminance (ITU-R 601)."""
    if image.shape[2] == channels:
        return image
    if image.shape[2] == 1:
        return np.repeat(image, channels, axis=2)
    if image.shape[2] == 3 and channels == 1:
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    raise UserError(
        f"an image of {image.shape[2]} channels does not fit a model of {channels}: set "
        "model.in_channels"
    )


@dataclasses.dataclass(frozen=True)
class RandomAffine:
    """A random rotation, scaling, shear and shift around the centre, bilinear, black outside.

    Attributes:
      degrees: rotation, uniform in +-degrees.
      translate: shift, uniform in +-translate, as a share of each side.
      scale: zoom factor, uniform in (low, high).
      shear: horizontal shear angle in degrees, uniform in +-shear.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0

    def __post_init__(self):
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"affine.scale is {self.scale}; expected (low, high), 0 < low <= high")

    def __call__(self, image: Image, random: np.random.Generator) -> Image:
        angle, shift_x, shift_y, zoom, shear = random.uniform(size=5)
        h, w, c = image.shape
        angle, shear = np.deg2rad([(2 * angle - 1) * self.degrees, (2 * shear - 1) * self.shear])
        zoom = self.scale[0] + zoom * (self.scale[1] - self.scale[0])
        cos, sin = np.cos(angle), np.sin(angle)
        linear = zoom * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, np.tan(shear)], [0, 1]])
        centre = np.array([(w - 1) / 2, (h - 1) / 2])
        shift = self.translate * np.array([(2 * shift_x - 1) * w, (2 * shift_y - 1) * h])
        matrix = np.column_stack([linear, centre + shift - linear @ centre])
        return cv2.warpAffine(image, matrix, (w, h), flags=cv2.INTER_LINEAR).reshape(h, w, c)


def flip(image: Image, random: np.random.Generator) -> Image:
    """Mirrors left and right, half of the time."""
    return image[:, ::-1] if random.random() < 0.5 else image


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """What a model expects of its images, recorded with its weights.

    Attributes:
      image_size: (h, w) in pixels; images are squashed to it.
      in_channels: 1 for grey, 3 for RGB.
      resize: a method of `resize`.
      mean, std: a pixel p of 0 to 255 becomes (p / 255 - mean) / std, in float32.
    """

    image_size: tuple[int, int]
    in_channels: int = 3
    resize: str = "bilinear"
    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self):
        methods = (*_CV2, *_PILLOW)
        if self.resize not in methods:
            raise UserError(f"data resize {self.resize!r}: {nearest(self.resize, methods)}")

    def pixels(self, image: Image) -> UInt8[np.ndarray, "h2 w2 c2"]:
        """Brings an image to the model's size and channels, still uint8."""
        return resize(to_channels(image, self.in_channels), self.image_size, self.resize)

    def normalise(self, pixels: Any) -> Any:
        """Maps uint8 pixels to the floats that the model takes; NumPy and JAX arrays alike."""
        return (pixels.astype("float32") / 255 - self.mean) / self.std

    def __call__(self, image: Any) -> Float32[np.ndarray, "h w c"]:
        """Prepares one image: a path, a Pillow image, or uint8 [h w], [h w 1] or [h w 3].

        Raises:
          UserError: a file that is missing or no image, or an array of another kind.
        """
        return self.normalise(self.pixels(read_image(image)))


def read_image(image: Any) -> Image:
    """Reads a path, a Pillow image or an array into uint8 [h w c], grey staying grey."""
    if isinstance(image, (str, os.PathLike)):
        try:
            with PIL.Image.open(image) as opened:
                return read_image(opened)
        except FileNotFoundError:
            raise UserError(f"there is no image file {os.fspath(image)!r}") from None
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise UserError(f"{os.fspath(image)!r} is no readable image: {error}") from None
    if isinstance(image, PIL.Image.Image):
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
            image = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        else:
            image = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    sound = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size
    if not sound or image.ndim not in (2, 3):
        found = (
            f"{image.dtype} {list(image.shape)}"
            if hasattr(image, "dtype")
            else type(image).__name__
        )
        raise UserError(f"expected a path, a Pillow image or uint8 [h w c] pixels, found {found}")
    return image if image.ndim == 3 else image[..., None]
