"""The `data` section of a config: its splits, and how they are read."""

import dataclasses
import re

from vit_jax.data.augment import RandAugment, RandomErasing
from vit_jax.data.cache import parse
from vit_jax.data.joint import check_scale
from vit_jax.data.policies import ColorJitter, ThreeAugment
from vit_jax.data.transforms import InceptionCrop, Preprocess, RandomAffine
from vit_jax.errors import UserError, nearest

ON_CORRUPT = ("stop", "skip")
POLICIES = ("rand_augment", "trivial_augment", "three_augment")  # one of them
COLOURS = (*POLICIES, "color_jitter")  # which know grey and RGB alone
# Which move a mask or boxes with their image, and which leave all pixels where they are.
JOINT = ("inception_crop", "random_crop", "random_scale", "flip", "three_augment", "color_jitter")
AUGMENTATIONS = (
    "inception_crop",
    "random_crop",
    "crop_padding",
    "random_scale",
    "affine",
    "flip",
    *COLOURS,
    "erasing",
)
TRAINING_KEYS = (*AUGMENTATIONS, "balance", "repeats")  # of data.train alone


def is_possible(key: str) -> bool:
    """Whether a key of a config can be set: TRAINING_KEYS of a split are for data.train alone."""
    split = re.match(r"(?:data|eval\.evaluators\.\w+)\.(?:train|val|test)\.(\w+)", key)
    return key.startswith("data.train.") or not (split and split[1] in TRAINING_KEYS)


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of the `data` section: where its examples come from, what is done to them.

    Attributes:
      source: where images come from: "digits", "folder:PATH", "tfds:NAME", ... (see sources.py).
      split: the source's own name of the split, or a part of it such as "train[:90%]".
      classes: what its classes are called, if their names differ from the model's: a file (see
        `classes.renamed`), or "in_order": as the model's, one after the other.
      resize: interpolation that brings images to the model's size; None is the model's own, as for
        the next five.
      resize_dtype: "uint8" rounds what resizing gives, "float32" does not, "truncated" rounds down.
      aspect: "squash" resizes to the model's size, "keep" keeps the shape and cuts the centre out,
        "small" does so with big_vision's roundings.
      crop: in (0, 1], timm's crop_pct: images are resized to size / crop, and their centre is cut
        out.
      jpeg: decoding of JPEG files: "fast" as TensorFlow's default, "accurate" as Pillow's.
      exif: whether photographs are turned upright as their EXIF orientation says.
      inception_crop: cuts a random box out of the image, which `resize` then brings to size.
      random_crop: whether to cut the model's size out of the resized image anywhere, not from its
        centre: aspect="keep" and crop=0.875 cut 224 out of a shorter side of 256.
      crop_padding: pixels by which random_crop extends the resized image on each side, reflected;
        with aspect="keep" and 4, it is the simple random crop of DeiT III.
      random_scale: of images with masks or boxes, (low, high) of a uniform factor of the size to
        which they are resized; the model's size is then cut out anywhere, and what is beyond the
        image is the mean colour and of no class.
      affine: a random affine map of every training image.
      flip: whether to mirror half of the training images.
      rand_augment: changes colours and geometry of training images further.
      trivial_augment: whether to change training images by TrivialAugment (arXiv 2103.10158): one
        operation each, of any strength.
      three_augment: changes training images by 3-Augment of DeiT III (arXiv 2204.07118).
      color_jitter: random brightness, contrast, saturation and hue, after the others.
      erasing: probability that a training image gets a box of noise (see `RandomErasing`).
      balance: of data.train: how equally often classes come: 0 as in the data, 1 all equally often,
        between them in proportion to images ** (1 - balance).
      repeats: how often each image comes in a batch, augmented anew each time (arXiv 1901.09335; 3
        in DeiT). An epoch has as many batches as ever, with 1 / repeats of the images.
    """

    source: str
    split: str
    classes: str | None = None
    resize: str | None = None
    resize_dtype: str | None = None
    aspect: str | None = None
    crop: float | None = None
    jpeg: str | None = None
    exif: bool | None = None
    inception_crop: InceptionCrop | None = None
    random_crop: bool = False
    crop_padding: int = 0
    random_scale: tuple[float, float] | None = None
    affine: RandomAffine | None = None
    flip: bool = False
    rand_augment: RandAugment | None = None
    trivial_augment: bool = False
    three_augment: ThreeAugment | None = None
    color_jitter: ColorJitter | None = None
    erasing: float = 0.0
    balance: float = 0.0
    repeats: int = 1

    def __post_init__(self):
        RandomErasing(self.erasing)  # raises where it is no probability
        if self.inception_crop and self.random_crop:
            raise UserError("data: inception_crop and random_crop exclude each other")
        if self.inception_crop and self.random_scale:
            raise UserError("data: inception_crop and random_scale exclude each other")
        check_scale(self.random_scale)
        if self.crop_padding < 0 or (self.crop_padding and not self.random_crop):
            raise UserError(
                f"data.train.crop_padding is {self.crop_padding}; expected 0 or, with random_crop, "
                "a number of pixels"
            )
        policies = [name for name in POLICIES if getattr(self, name)]
        if len(policies) > 1:
            raise UserError(
                f"data.train has {' and '.join(policies)}, each of which is made to be the only "
                "one: leave one"
            )
        if not 0 <= self.balance <= 1:
            raise UserError(f"data.train.balance is {self.balance}; it must be in [0, 1]")
        if self.repeats < 1:
            raise UserError(f"data.train.repeats is {self.repeats}; it must be at least 1")

    def first_for_training(self) -> str | None:
        """The first key that is set and is for data.train alone; None for none."""
        changed = (key for key in TRAINING_KEYS if getattr(self, key) != getattr(Split, key))
        return next(changed, None)

    def preprocess(self, base: Preprocess, image_size: tuple[int, int] | None = None) -> Preprocess:
        """`base` as this split uses it: with its own resize rule, at another image size."""
        changes = {
            "resize": self.resize,
            "resize_dtype": self.resize_dtype,
            "aspect": self.aspect,
            "crop": self.crop,
            "jpeg": self.jpeg,
            "exif": self.exif,
            "image_size": image_size,
        }
        given = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(base, **given)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The `data` section: what is trained on and measured, and how it is read.

    With on_corrupt="skip" an unreadable image is named once, by each process that meets it.
    `train/corrupt` is how many images there were so far that could not be read, each counted once;
    `val/corrupt` how many were left out.

    Attributes:
      train: the split to train on; None is a config that only evaluates.
      val: the split that is evaluated during training; None is none.
      test: the split that is evaluated once, at the end; None is none.
      workers: processes that read ahead; with 0, threads of this process do.
      threads: threads that read ahead; None is one for each core that this process may use.
      on_corrupt: what an image that cannot be read does: "stop" the run, or "skip": the next one
        of the source takes its place in training, and none in evaluation.
      cache: where what is read from buckets is kept, and how much of it, such as
        "/tmp/images,100GB": pieces of files with checksums, shared by processes and runs. None
        reads anew in each epoch.
      max_boxes: how many boxes of an image are learned at most: of more, the largest; that there
        are some is said once.
      same_images: whether what is measured may be what is trained on.
    """

    train: Split | None = None
    val: Split | None = None
    test: Split | None = None
    workers: int = 0
    threads: int | None = None
    on_corrupt: str = "stop"
    same_images: bool = False
    cache: str | None = None
    max_boxes: int = 100

    def __post_init__(self):
        if self.max_boxes < 1:
            raise UserError(f"data.max_boxes is {self.max_boxes}; it must be at least 1")
        if self.workers < 0 or (self.threads is not None and self.threads < 1):
            raise UserError(
                f"data.workers is {self.workers} and data.threads {self.threads}; expected at "
                "least 0 and 1"
            )
        if self.on_corrupt not in ON_CORRUPT:
            raise UserError(
                f"data.on_corrupt is {self.on_corrupt!r}; {nearest(self.on_corrupt, ON_CORRUPT)}"
            )
        if self.cache is not None:
            parse(self.cache)
        for name, split in {"val": self.val, "test": self.test}.items():
            if split and (key := split.first_for_training()):
                raise UserError(f"data.{name} is evaluated as it is: {key} is for data.train")
