"""The input pipeline. The batch of step i is a pure function of (config, seed, i).

The order of rows, the examples and their augmentation do not depend on hosts, workers or threads,
so the step number is the only state: resuming at step i means `[i:]`.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sized
from typing import Any

import cv2
import numpy as np

from vit_jax.data import storage
from vit_jax.data.ahead import Fetched, read_ahead, threads_of
from vit_jax.data.augment import RandAugment, RandomErasing
from vit_jax.data.config import AUGMENTATIONS, COLOURS, Split
from vit_jax.data.images import BadImage, decode_box
from vit_jax.data.order import Balance, Growth, repeated, shuffled
from vit_jax.data.policies import ColorJitter, ThreeAugment, trivial_augment
from vit_jax.data.sources import Source
from vit_jax.data.transforms import (
    InceptionCrop,
    Mask,
    Pixels,
    Pixels5,
    Preprocess,
    RandomAffine,
    flip,
)
from vit_jax.errors import UserError
from vit_jax.objects import AT_ONCE

logger = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
_FETCHES = 64  # examples at once from a bucket, for each thread that decodes
_MOST_SKIPPED = 100  # in a row, which is then an error
HOST_KEYS = ("index", "corrupt")  # of a batch, not copied to the device


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """Reads, augments and stacks the examples of one batch.

    Attributes:
      replace: whether, with on_corrupt="skip", an example that cannot be read is replaced by the
        next one of the source (training), or masked (evaluation).
      crops: how many crops of each image to read, for evaluation alone: 1, or 5 (see
        `Preprocess.five_crops`), so that `image` is [b 5 h w c].
      balance: the order of training examples; None for all of them once an epoch.
      growth: the size of the images of each training step; None is that of `preprocess`.
      repeats: how often each training example comes in a batch (see `order.repeated`).
      in_bucket: whether examples are fetched many at a time, before they are decoded.
      cache: where what is fetched is kept (see `DataConfig`).
      reported: the examples that were logged as skipped.
    """

    source: Source
    preprocess: Preprocess
    seed: int = 0
    inception_crop: InceptionCrop | None = None
    random_crop: bool = False
    crop_padding: int = 0
    affine: RandomAffine | None = None
    flip: bool = False
    rand_augment: RandAugment | None = None
    trivial_augment: bool = False
    three_augment: ThreeAugment | None = None
    color_jitter: ColorJitter | None = None
    erasing: float = 0.0
    on_corrupt: str = "stop"
    replace: bool = False
    crops: int = 1
    balance: Balance | None = None
    repeats: int = 1
    growth: Growth | None = None
    in_bucket: bool = False
    cache: str | None = None
    reported: set[int] = dataclasses.field(default_factory=set, compare=False, repr=False)

    def __post_init__(self):
        moved = [name for name in AUGMENTATIONS if getattr(self, name)]
        if moved and self._masks:
            raise UserError(
                f"data: {moved[0]} is not for labels that are masks, which would stay where they "
                "are: leave it out"
            )
        colours = [name for name in moved if name in COLOURS]
        if colours and (channels := self.preprocess.in_channels) not in (1, 3):
            raise UserError(
                f"data.train.{colours[0]} is for images of 1 or 3 channels, and the model's have "
                f"{channels}: leave it out"
            )
        if self.preprocess.max_patches is not None and (self._masks or self.random_crop):
            raise UserError(
                "data: with model.max_patches images are taken in their own shapes, which "
                + (
                    "masks are not for: take a model without it"
                    if self._masks
                    else "data.train.random_crop is not for: leave it out"
                )
            )
        if self.inception_crop:  # the crop's box is resized without keeping its aspect
            whole = dataclasses.replace(self.preprocess, aspect="squash", crop=1.0)
            object.__setattr__(self, "preprocess", whole)

    @classmethod
    def of(
        cls, source: Source, split: Split, preprocess: Preprocess, **fields: Any
    ) -> "BatchReader":
        """A reader of `source` with the augmentation of `split`, for a model's `preprocess`."""
        for name in AUGMENTATIONS:
            fields[name] = getattr(split, name)
        fields["in_bucket"] = "://" in split.source
        return cls(source, split.preprocess(preprocess), **fields)

    def in_uint8(self) -> "BatchReader":
        """The reader of training images, which are uint8 whatever evaluation has."""
        if self.preprocess.resize_dtype != "float32":
            return self
        preprocess = dataclasses.replace(self.preprocess, resize_dtype="uint8")
        return dataclasses.replace(self, preprocess=preprocess)

    def at(self, step: int) -> "BatchReader":
        """The reader of the batch of a step, for images of its size."""
        if self.growth is None:
            return self
        size = (self.growth(step),) * 2
        preprocess = dataclasses.replace(self.preprocess, image_size=size)
        return dataclasses.replace(self, preprocess=preprocess, growth=None)

    def __call__(
        self,
        positions: np.ndarray,
        indices: np.ndarray,
        threads: int = 1,
        fetched: Callable[[int], Any] | None = None,
    ) -> Batch:
        """Reads the examples `indices`, at `positions` in the stream.

        An index of -1 is padding: a black image with mask False.

        Args:
          fetched: returns the example of a row that is read already, or raises what reading it did.

        Returns:
          {image: uint8 [b h w c] (for models of images of any shape, patches [b n p], and grid:
          int32 [b 2]), label: int32 [b], mask: bool [b], index: int64 [b], corrupt:
          bool [b]}. Images are in 0 to 255, not normalised; float32 if `preprocess` resizes in it.
          `corrupt` marks images that cannot be read. `label` is float32 [b k] of 0 and 1 if the
          source is multi-label, and int32 [b h w] if labels are masks.

        Raises:
          UserError: an image that cannot be read, a label without a class name, or a mask that is
            not of its image's size.
        """
        cv2.setNumThreads(1)  # parallel over images instead
        b = len(indices)
        k, multi_label = len(self.source.label_names), getattr(self.source, "multi_label", False)
        label = np.zeros((b, k), np.float32) if multi_label else np.zeros(b, np.int32)
        if self._masks:
            label = np.zeros((b, *self.preprocess.image_size), np.int32)
        images = self.preprocess.empty(b)
        if self.crops > 1:
            size = (b, self.crops, *self.preprocess.shape)
            images = {"image": np.empty(size, self.preprocess.pixel_dtype)}
        batch = {
            **images,
            "label": label,
            "mask": indices >= 0,
            "index": np.array(indices),
            "corrupt": np.zeros(b, bool),
        }
        # Each thread takes the next row, so that none waits for another's large images.
        rows = itertools.count()

        def work():
            while (row := next(rows)) < b:
                self._fill(batch, row, int(positions[row]), fetched)

        if threads == 1:
            work()
        else:
            done = [_pool(threads).submit(work) for _ in range(threads)]
            for each in concurrent.futures.wait(done).done:
                each.result()
        return batch

    @property
    def _masks(self) -> bool:
        return getattr(self.source, "masks", False)

    def _fill(
        self, batch: Batch, row: int, position: int, fetched: Callable[[int], Any] | None
    ) -> None:
        """Reads one row of a batch."""
        image = None
        if batch["mask"][row]:
            image, label, random = self._read(batch, row, position, fetched)
        if image is None:
            batch["image"][row] = 0
            return
        image = self.affine(image, random) if self.affine else image
        image = flip(image, random) if self.flip else image
        image = self.rand_augment(image, random) if self.rand_augment else image
        image = trivial_augment(image, random) if self.trivial_augment else image
        image = self.three_augment(image, random) if self.three_augment else image
        image = self.color_jitter(image, random) if self.color_jitter else image
        if self.erasing:
            mean, std = self.preprocess.mean, self.preprocess.std
            image = RandomErasing(self.erasing, mean=mean, std=std)(image, random)
        if self.crops > 1:
            batch["image"][row] = image
        else:
            self.preprocess.fill(batch, row, image)
        if isinstance(label, tuple):
            batch["label"][row, list(label)] = 1
        else:
            batch["label"][row] = label

    def _read(
        self, batch: Batch, row: int, position: int, fetched: Callable[[int], Any] | None
    ) -> tuple[Pixels | Pixels5 | None, int | tuple[int, ...] | Mask, np.random.Generator | None]:
        """An example's image at the model's size (None: masked), label, and random generator."""
        for _ in range(_MOST_SKIPPED):
            index = int(batch["index"][row])
            name = f"example {index}"
            try:
                example = self.source[index] if fetched is None else fetched(row)
                name, label = example.get("name", name), example["label"]
                if self._masks:
                    self._check_mask(name, example["image"], label)
                    image = self._cut(example["image"], None)
                    return image, self.preprocess.mask(label), None
                for each in label if isinstance(label, tuple) else (label,):
                    if not 0 <= each < len(self.source.label_names):
                        raise UserError(
                            f"{name} has the label {each}, but there are "
                            f"{len(self.source.label_names)} class names"
                        )
                random = None
                if any(getattr(self, name) for name in AUGMENTATIONS):
                    random = np.random.default_rng((self.seed, position))
                return self._cut(example["image"], random), label, random
            except BadImage as error:
                if self.on_corrupt == "stop":
                    raise BadImage(
                        f"{name} is no readable image: {error}; "
                        "--config.data.on_corrupt=skip goes on without it"
                    ) from None
                if index not in self.reported:
                    self.reported.add(index)
                    logger.warning("skipped %s: %s", name, error)
            batch["corrupt"][row], fetched = True, None
            if not self.replace:
                batch["mask"][row] = False
                return None, 0, None
            batch["index"][row] = (index + 1) % _length(self.source, index + 2)
        raise UserError(f"{_MOST_SKIPPED} images in a row cannot be read, up to {name}")

    def _check_mask(self, name: str, image: Any, mask: Any) -> None:
        """Raises a UserError if a mask has another size than its image, or unknown classes."""
        if not isinstance(image, np.ndarray):
            raise UserError(f"{name} is an image file, but masks go with pixels: decode it before")
        of_ints = isinstance(mask, np.ndarray) and mask.dtype == np.int32
        if not of_ints or mask.shape != image.shape[:2]:
            found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else mask
            raise UserError(
                f"{name} has the mask {found}; expected int32 {list(image.shape[:2])}, as its image"
            )
        k = len(self.source.label_names)
        for each in (int(mask.min()), int(mask.max())):
            if not 0 <= each < k:
                raise UserError(
                    f"{name} has the label {each} in its mask, but there are {k} class names"
                )

    def _cut(self, image: Any, random: np.random.Generator | None) -> Pixels | Pixels5:
        crop, how = self.inception_crop, self.preprocess
        if crop and isinstance(image, bytes):
            box = functools.partial(crop.box, random=random)
            image = decode_box(image, box, how.jpeg, how.exif)
        else:
            image = how.read(image)
            image = crop(image, random) if crop else image
        if self.crops > 1:
            return how.five_crops(image)
        return how.pixels(image, random if self.random_crop else None, self.crop_padding)


def _length(source: Source, endless: int) -> int:
    return len(source) if isinstance(source, Sized) else endless


@functools.lru_cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(threads, "read")


@dataclasses.dataclass(frozen=True)
class _Step:
    """Reads the batch of a step; a class, not a closure, to be pickled for worker processes."""

    read: BatchReader
    indices: Callable[[BatchReader, np.ndarray], np.ndarray]
    batch_size: int
    rows: slice | np.ndarray  # of the global batch, for this process
    threads: int
    stop: int
    workers: int = 0

    def __call__(self, step: int) -> Batch:
        positions, places, first = self._places(int(step))
        indices = self.indices(self.read, places)
        fetched = None
        if self.read.in_bucket:
            stride = max(self.workers, 1)
            fetched = self._fetched.rows(int(step), stride, self.stop, self._indices)
        batch = self.read.at(int(step))(positions, indices, self.threads, fetched)
        # Counted once: each epoch of the order has every example once.
        length = _length(self.read.source, int(places.max(initial=0)) + 1)
        batch["corrupt"] &= first & (places < length)
        return batch

    def _places(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = np.arange(self.batch_size, dtype=np.int64)[self.rows]
        positions = rows + step * self.batch_size
        return positions, *repeated(positions, self.batch_size, self.read.repeats)

    def _indices(self, step: int) -> np.ndarray:
        return self.indices(self.read, self._places(step)[1])

    @functools.cached_property
    def _fetched(self) -> Fetched:
        storage.keep(self.read.cache)
        return Fetched(self.read.source, min(_FETCHES * self.threads, AT_ONCE))


def _train_indices(read: BatchReader, positions: np.ndarray) -> np.ndarray:
    if not isinstance(read.source, Sized):
        # Endless: no example repeats, and another seed has other examples.
        return positions + read.seed % 2**20 * 2**40
    if read.balance is not None:
        return read.balance(read.seed, positions)
    return shuffled(read.seed, len(read.source), positions)


def _eval_indices(read: BatchReader, positions: np.ndarray) -> np.ndarray:
    return np.where(positions < len(read.source), positions, -1)


def train_batches(
    read: BatchReader,
    batch_size: int,
    *,
    start_step: int,
    stop_step: int,
    rows: slice | np.ndarray = slice(None),
    workers: int = 0,
    threads: int | None = None,
) -> contextlib.closing[Iterator[Batch]]:
    """Returns the batches of steps start_step to stop_step - 1, to be used in a `with`.

    Examples are shuffled every epoch; a batch may span two epochs, so none is dropped. Images are
    uint8, a quarter of the bytes, even if the model is evaluated in float32. `corrupt` counts each
    example once: the first time, in the first epoch.

    Args:
      batch_size: the global batch size.
      rows: the rows of the global batch that this process reads: a slice or ascending numbers.
      workers: processes that read ahead; 0 reads ahead on `threads` threads of this process.
    """
    read = dataclasses.replace(read.in_uint8(), replace=True)
    threads = threads_of(workers, threads)
    step = _Step(read, _train_indices, batch_size, rows, threads, stop_step, workers)
    return read_ahead(step, range(start_step, stop_step), workers)


def eval_batches(
    read: BatchReader,
    batch_size: int,
    *,
    rows: slice | np.ndarray = slice(None),
    threads: int | None = None,
) -> contextlib.closing[Iterator[Batch]]:
    """Returns every example once, in order, the last batch padded, to be used in a `with`."""
    stop = -(-len(read.source) // batch_size)
    step = _Step(read, _eval_indices, batch_size, rows, threads_of(0, threads), stop)
    return read_ahead(step, range(stop), 0)
