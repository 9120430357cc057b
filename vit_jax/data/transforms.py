"""What happens to one image on the host: frozen, deterministic given a generator, free of JAX."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

from vit_jax.data.images import MAX_PIXELS, BadImage, Image, check_jpeg, read_image
from vit_jax.data.masks import Mask
from vit_jax.data.native import cut, native_grid
from vit_jax.errors import UserError, nearest

Pixels = UInt8[np.ndarray, "_h _w _c"] | Float32[np.ndarray, "_h _w _c"]  # of 0 to 255
Pixels5 = UInt8[np.ndarray, "5 _h _w _c"] | Float32[np.ndarray, "5 _h _w _c"]

_CV2 = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}
_PILLOW = {
    "bilinear_antialias": PIL.Image.Resampling.BILINEAR,
    "bicubic_antialias": PIL.Image.Resampling.BICUBIC,
}
CHOICES = {
    "resize": (*_CV2, *_PILLOW),
    "aspect": ("squash", "keep", "small"),
    "resize_dtype": ("uint8", "float32", "truncated"),
}


def resize(image: Pixels, size: tuple[int, int], method: str) -> Pixels:
    """Squashes an image to `size` (h, w), in its own dtype: uint8 is rounded, float32 is not.

    `bilinear` and `area` are TensorFlow's without antialiasing (OpenCV's), the `_antialias` ones
    TensorFlow's with it (Pillow's). Bicubic may leave 0 to 255 in float32, as TensorFlow's does.
    """
    (h, w, c), (new_h, new_w) = image.shape, size
    if (h, w) == (new_h, new_w):
        return image
    if method == "area" and (new_h > h) != (new_w > w):
        # OpenCV skips pixels where one side grows and the other shrinks: one side at a time.
        wide = cv2.resize(image.astype(np.float32), (new_w, h), interpolation=cv2.INTER_AREA)
        out = cv2.resize(wide, (new_w, new_h), interpolation=cv2.INTER_AREA)
        out = np.rint(out).astype(np.uint8) if image.dtype == np.uint8 else out
        return out.reshape(new_h, new_w, c)
    if method in _CV2:
        out = cv2.resize(image, (new_w, new_h), interpolation=_CV2[method])
        return out.reshape(new_h, new_w, c)
    channels = [
        np.asarray(PIL.Image.fromarray(image[..., i]).resize((new_w, new_h), _PILLOW[method]))
        for i in range(c)
    ]
    return np.stack(channels, axis=-1)


def resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """Squashes a mask to `size` (h, w): each pixel is the old one that its centre lies in.

    Centres are half pixels, as in all methods of `resize`; a centre on an edge takes the later one.
    """
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new)
        for old, new in zip(mask.shape, size, strict=True)
    )
    return mask.take(rows, axis=0).take(columns, axis=1)


def random_crop(
    image: Pixels, size: tuple[int, int], random: np.random.Generator, padding: int = 0
) -> Pixels:
    """Cuts `size` (h, w) out of anywhere, uniformly, of the image and a reflected border."""
    if padding:
        image = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), "reflect")
    spare = [old - new for old, new in zip(image.shape[:2], size, strict=True)]
    top, left = (int(share * (n + 1)) for share, n in zip(random.random(2), spare, strict=True))
    return image[top : top + size[0], left : left + size[1]]


def centre_crop(image: Pixels | Mask, size: tuple[int, int], down: bool = False) -> Pixels | Mask:
    """Cuts `size` (h, w) out of the middle. Half a pixel goes to the even side, as in torchvision.

    big_vision rounds it down (`down`). So do Hugging Face's processors, which may thus cut one
    pixel beside.
    """
    spare = [old - new for old, new in zip(image.shape[:2], size, strict=True)]
    top, left = centre(spare, down)
    return image[top : top + size[0], left : left + size[1]]


def centre(spare: Sequence[int], down: bool = False) -> tuple[int, ...]:
    """The (top, left) of the middle, of the pixels to spare in each direction."""
    return tuple(n // 2 if down else round(n / 2) for n in spare)


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


@dataclasses.dataclass(frozen=True)
class InceptionCrop:
    """Cuts a random box out of an image, as TensorFlow's `sample_distorted_bounding_box` does.

    That draws the height uniformly, not the area: its boxes are smaller than those of
    torchvision's RandomResizedCrop (of areas from 5 to 100%, 34% on average, not 42%).

    Attributes:
      area: (low, high) of the share of the image's area that a box may have.
      ratio: (low, high) of width / height; the default is TensorFlow's, not quite 3/4 to 4/3.
    """

    area: tuple[float, float] = (0.05, 1.0)
    ratio: tuple[float, float] = (0.75, 1.33)

    def __post_init__(self):
        for name, high in {"area": 1.0, "ratio": math.inf}.items():
            value = getattr(self, name)
            if len(value) != 2 or not 0 < value[0] <= value[1] <= high:
                raise UserError(
                    f"inception_crop.{name} is {value}; expected (low, high), 0 < low <= high"
                    + (" <= 1" if name == "area" else "")
                )

    def box(self, h: int, w: int, random: np.random.Generator) -> tuple[int, int, int, int]:
        """Returns (top, left, height, width) in an image of h x w; all of it after 100 failures."""
        least, most = self.area[0] * h * w, self.area[1] * h * w
        for _ in range(100):
            share, down, right, ratio = random.random(4).tolist()
            ratio = self.ratio[0] + ratio * (self.ratio[1] - self.ratio[0])
            low = round(math.sqrt(least / ratio))
            high = round(math.sqrt(most / ratio))
            if round(high * ratio) > w:
                high = int((w + 0.5 - 1e-7) / ratio)
                high -= round(high * ratio) > w
            high = min(high, h)
            height = low + int(share * (high - low + 1)) if low < high else high
            width = round(height * ratio)
            if width * height < least:  # rounding must not make the box fail
                height += 1
                width = round(height * ratio)
            if width * height > most:
                height -= 1
                width = round(height * ratio)
            if least <= width * height <= most and 0 < width <= w and 0 < height <= h:
                return int(down * (h - height)), int(right * (w - width)), height, width
        return 0, 0, h, w

    def __call__(self, image: Image, random: np.random.Generator) -> Pixels:
        top, left, height, width = self.box(*image.shape[:2], random)
        return image[top : top + height, left : left + width]


def flip(image: Image, random: np.random.Generator) -> Image:
    """Mirrors left and right, half of the time."""
    return mirrored(image) if random.random() < 0.5 else image


def mirrored(image: Image | Mask) -> Image | Mask:
    """Left is right."""
    return cv2.flip(image, 1).reshape(image.shape)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """What a model expects of its images, recorded with its weights.

    `dataclasses.asdict` gives what JSON can hold, and `Preprocess(**that)` takes it back; lists
    become tuples.

    Attributes:
      image_size: (h, w) in pixels.
      in_channels: 1 for grey, 3 for RGB.
      resize: a method of `resize`.
      aspect: "squash" resizes an image of any shape to the box of `image_size`; "keep" keeps its
        shape, covers the box and cuts the centre out, with the roundings of torchvision and timm;
        "small" does so with those of big_vision's resize_small and central_crop.
      crop: in (0, 1], timm's crop_pct: the box is `image_size` / crop, rounded down, and the
        centre of `image_size` is cut out of it.
      resize_dtype: "uint8" rounds what resizing gives, "float32" does not (vit_jax), "truncated"
        rounds it down to uint8 (big_vision, which casts).
      jpeg, exif: how image files are decoded (see `images.decode`).
      mean, std: a pixel p of 0 to 255 becomes (p / 255 - mean) / std, in float32; one number, or
        one for each channel.
      max_patches, patch_size: for models of images of any shape: how many patches an image has at
        most, and (h, w) of a patch in pixels; an image keeps its shape as well as whole patches
        allow (see `native.native_grid`). None brings all to `image_size`.
    """

    image_size: Sequence[int]
    in_channels: int = 3
    resize: str = "bilinear"
    aspect: str = "squash"
    crop: float = 1.0
    resize_dtype: str = "uint8"
    jpeg: str = "accurate"
    exif: bool = False
    mean: float | Sequence[float] = 0.5
    std: float | Sequence[float] = 0.5
    max_patches: int | None = None
    patch_size: Sequence[int] | None = None

    def __post_init__(self):
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"data {name} {value!r}: {nearest(value, known)}")
        check_jpeg(self.jpeg)
        if not 0 < self.crop <= 1:
            raise UserError(f"data crop is {self.crop}; it must be above 0 and at most 1")
        object.__setattr__(self, "image_size", tuple(self.image_size))
        if self.patch_size is not None:
            object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if self.max_patches is not None and (self.aspect, self.crop) != ("squash", 1):
            key = "crop" if self.crop != 1 else "aspect"
            raise UserError(
                f"data {key} is {getattr(self, key)!r}, and with model.max_patches an image is "
                "taken whole, in its own shape: set aspect to 'squash' and crop to 1.0"
            )
        for name, kind in {"mean": "finite", "std": "positive"}.items():
            numbers = np.asarray(getattr(self, name), float)
            sound = np.isfinite(numbers) & ((numbers > 0) | (name == "mean"))
            if numbers.shape not in ((), (1,), (self.in_channels,)) or not sound.all():
                raise UserError(
                    f"data {name} is {numbers.tolist()}; expected one {kind} number, or one for "
                    f"each of the {self.in_channels} channels"
                )
            value = tuple(numbers.tolist()) if numbers.ndim else float(numbers)
            object.__setattr__(self, name, value)

    def read(self, image: Any) -> Image:
        """Reads a path, encoded bytes, a Pillow image or an array (see `images.read_image`).

        Raises:
          UserError: as `read_image`; or an array whose last axis is no channels of the model's.
        """
        pixels = read_image(image, self.jpeg, self.exif)
        known = sorted({1, 3, self.in_channels})
        first, last = pixels.shape[0], pixels.shape[2]
        if last in known:
            return pixels
        if first in (1, 2, 3, 4, self.in_channels):
            hint = "where channels come first, image.transpose(1, 2, 0) puts them last"
        elif last in (2, 4):
            hint = f"image[..., :{last - 1}] leaves the last one out, if that is transparency"
        else:
            hint = "of several grey images, take one at a time"
        raise UserError(
            f"expected pixels [h w c] with {', '.join(map(str, known[:-1]))} or {known[-1]} "
            f"channels, found {list(pixels.shape)}; {hint}"
        )

    def pixels(
        self, image: Image, random: np.random.Generator | None = None, padding: int = 0
    ) -> Pixels:
        """Brings an image to the model's size and channels: `pixel_dtype`, of 0 to 255.

        With a generator, it is cut out of the resized image anywhere, not from the centre (see
        `random_crop`). With `max_patches`, it is the whole image, of its own size.
        """
        image = self.resized(image)
        if self.max_patches is not None:
            return image
        if random is not None:
            return random_crop(image, self.image_size, random, padding)
        return centre_crop(image, self.image_size, down=self.aspect == "small")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image in a batch: (h, w, c), or with `max_patches` its padded patches, (n, p)."""
        if self.max_patches is None:
            return *self.image_size, self.in_channels
        return self.max_patches, math.prod(self.patch_size) * self.in_channels

    def fill(self, batch: dict[str, np.ndarray], row: int, pixels: Pixels) -> None:
        """Puts what `pixels` returned into a row of `image`, with `max_patches` also of `grid`."""
        if self.max_patches is None:
            batch["image"][row] = pixels
        else:
            patches = cut(pixels, self.patch_size, self.max_patches)
            batch["image"][row], batch["grid"][row] = patches

    def empty(self, count: int) -> dict[str, np.ndarray]:
        """The `image` and, with `max_patches`, the `grid` of a batch of black images, of one patch.

        They are of `pixel_dtype` [b h w c], or [b n p] and int32 [b 2].
        """
        batch = {"image": np.zeros((count, *self.shape), self.pixel_dtype)}
        if self.max_patches is not None:
            batch["grid"] = np.ones((count, 2), np.int32)
        return batch

    def five_crops(self, image: Image) -> Pixels5:
        """The centre, as `pixels` cuts it, and the four corners of the resized image."""
        image, (h, w) = self.resized(image), self.image_size
        bottom, right = image.shape[0] - h, image.shape[1] - w
        corners = [
            image[top : top + h, left : left + w] for top in (0, bottom) for left in (0, right)
        ]
        return np.stack([centre_crop(image, (h, w), down=self.aspect == "small"), *corners])

    @property
    def cuts(self) -> bool:
        """Whether an image may be resized to more than the model's size, so that crops differ."""
        if self.max_patches is not None:
            return False
        return self.aspect != "squash" or self._resized(1, 1) != tuple(self.image_size)

    def resized(self, image: Image, factor: float = 1.0) -> Pixels:
        """The image with the model's channels, before anything is cut out of it.

        It has the size to which images are resized, times a factor.
        """
        size = self._resized(*image.shape[:2])
        if factor != 1:
            size = tuple(max(1, round(side * factor)) for side in size)
        return self.to_size(image, size)

    def to_size(self, image: Image, size: tuple[int, int]) -> Pixels:
        """The image with the model's channels, resized to (h, w)."""
        image = to_channels(image, self.in_channels)
        if size[0] * size[1] > MAX_PIXELS:
            h, w, _ = image.shape
            raise BadImage(f"{h} x {w} pixels would become {size[0]} x {size[1]}")
        if self.resize_dtype != "uint8":
            image = image.astype(np.float32)
        image = resize(image, size, self.resize)
        if self.resize_dtype == "truncated":
            image = image.clip(0, 255).astype(np.uint8)
        return image

    @property
    def pixel_dtype(self) -> str:
        """What `pixels` returns: uint8 or float32."""
        return "float32" if self.resize_dtype == "float32" else "uint8"

    def _resized(self, h: int, w: int) -> tuple[int, int]:
        """The (h, w) to which an image of h x w is resized, before the centre is cut out."""
        if self.max_patches is not None:
            grid = native_grid(h, w, self.patch_size, self.max_patches)
            return grid[0] * self.patch_size[0], grid[1] * self.patch_size[1]
        # 384 / (384 / 448) may fall just short of 448.
        box_h, box_w = (math.floor(side / self.crop + 1e-6) for side in self.image_size)
        if self.aspect == "squash":
            return box_h, box_w
        if self.aspect == "small":
            factor = max(np.float32(box_h) / np.float32(h), np.float32(box_w) / np.float32(w))
            return int(np.rint(h * factor)), int(np.rint(w * factor))
        if box_h == box_w:  # torchvision's Resize of the shorter side
            if h <= w:
                return box_h, int(box_h * w / h)
            return int(box_w * h / w), box_w
        ratio = min(h / box_h, w / box_w)  # timm's ResizeKeepRatio, which rounds
        return round(h / ratio), round(w / ratio)

    def covering(self, h: int, w: int, *, own: bool) -> tuple[int, int]:
        """The least (h, w) of the same shape that the model's size fits into, for windows of it.

        Args:
          own: whether an image that is large enough keeps its size.
        """
        box_h, box_w = self.image_size
        if own and h >= box_h and w >= box_w:
            return h, w
        factor = max(box_h / h, box_w / w)
        return max(box_h, round(h * factor)), max(box_w, round(w * factor))

    def normalise(self, pixels: Any) -> Any:
        """Maps pixels [... c] of 0 to 255 to the floats that the model takes.

        uint8 and float32, NumPy and JAX arrays alike; here and nowhere else. With `max_patches`,
        also patches [b n p].
        """
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        if self.max_patches is not None and pixels.shape[-2:] == self.shape:
            mean, std = (np.resize(each, self.shape[1]) for each in (mean, std))
        return (pixels.astype("float32") / 255 - mean) / std

    def pixels_of(self, values: Any) -> Any:
        """The inverse of `normalise`: pixels of 0 to 255, in float32."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (values * std + mean) * 255

    def __call__(self, image: Any) -> Float32[np.ndarray, "h w c"]:
        """Prepares one image: a path, bytes, a Pillow image, or uint8 [h w], [h w 1], [h w 3].

        An array may also have as many channels as the model; transparency is not taken off it.

        Raises:
          UserError: a file that is missing or no image, or an array of another kind.
        """
        return self.normalise(self.pixels(self.read(image)))
