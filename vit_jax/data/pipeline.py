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
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import cv2
import numpy as np

from vit_jax.data.ahead import Fetched, read_ahead, threads_of
from vit_jax.data.augment import RandAugment, RandomErasing
from vit_jax.data.boxes import Boxes, check_boxes, no_rows
from vit_jax.data.config import AUGMENTATIONS, COLOURS, JOINT, Split
from vit_jax.data.images import BadImage, Image, decode_box
from vit_jax.data.joint import Joint, check_mask, common_size, mask_sizes
from vit_jax.data.masks import IGNORED, Mask
from vit_jax.data.order import Balance, Growth, repeated, shuffled
from vit_jax.data.policies import ColorJitter, ThreeAugment, trivial_augment
from vit_jax.data.sources import Source
from vit_jax.data.transforms import (
    InceptionCrop,
    Pixels,
    Pixels5,
    Preprocess,
    RandomAffine,
    flip,
    mirrored,
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
      whole_masks: whether masks keep their own size, for evaluation: images are then whole.
      windows: with `whole_masks`, whether images keep their shape, as well, for windows of the
        model's size: `none`, `scaled` to cover it, or of their `own` size (see
        `Preprocess.covering`).
      whole_boxes: whether images with boxes are whole, for evaluation, so that batches have their
        own `size`, and no boxes: these are asked of the source.
      max_boxes: how many boxes of an image a batch has at most.
      balance: the order of training examples; None for all of them once an epoch.
      growth: the size of the images of each training step; None is that of `preprocess`.
      repeats: how often each training example comes in a batch (see `order.repeated`).
      cache: where what is read from buckets is kept (see `DataConfig`).
      reported: the examples that were logged as skipped; -1 if those with too many boxes were.
    """

    source: Source
    preprocess: Preprocess
    seed: int = 0
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
    on_corrupt: str = "stop"
    replace: bool = False
    crops: int = 1
    whole_masks: bool = False
    windows: str = "none"
    whole_boxes: bool = False
    max_boxes: int = 100
    balance: Balance | None = None
    repeats: int = 1
    growth: Growth | None = None
    cache: str | None = None
    reported: set[int] = dataclasses.field(default_factory=set, compare=False, repr=False)

    def __post_init__(self):
        moved = [name for name in AUGMENTATIONS if getattr(self, name)]
        if self._masks or self._boxes:
            self._check_placed(moved)
            upright = dataclasses.replace(self.preprocess, exif=True)  # as labels are drawn
            object.__setattr__(self, "preprocess", upright)
        elif self.random_scale or self.whole_masks or self.whole_boxes:
            raise UserError(
                "data: random_scale is for images with masks or boxes: leave it out, or take "
                "inception_crop, which cuts a random part out"
            )
        colours = [name for name in moved if name in COLOURS]
        if colours and (channels := self.preprocess.in_channels) not in (1, 3):
            raise UserError(
                f"data.train.{colours[0]} is for images of 1 or 3 channels, and the model's have "
                f"{channels}: leave it out"
            )
        if self.preprocess.max_patches is not None and self.random_crop:
            raise UserError(
                "data: with model.max_patches images are taken in their own shapes, which "
                "data.train.random_crop is not for: leave it out"
            )
        if self.inception_crop:  # the crop's box is resized without keeping its aspect
            whole = dataclasses.replace(self.preprocess, aspect="squash", crop=1.0)
            object.__setattr__(self, "preprocess", whole)

    def _check_placed(self, moved: Sequence[str]) -> None:
        """Raises a UserError for what is not for images with masks or boxes."""
        kind = "masks" if self._masks else "boxes"
        if left := [name for name in moved if name not in JOINT]:
            raise UserError(
                f"data: {left[0]} is not for labels that are {kind}, which would stay where they "
                f"are: leave it out ({kind} move with {', '.join(JOINT[:4])})"
            )
        if self.preprocess.max_patches is not None:
            raise UserError(
                f"data: with model.max_patches images are taken in their own shapes, which {kind} "
                "are not for: take a model without it"
            )
        if (self.whole_masks or self.whole_boxes) and self.preprocess.cuts:
            how = self.preprocess
            raise UserError(
                f"data: {kind} are evaluated whole, but aspect={how.aspect!r} and crop={how.crop} "
                "cut parts of the image off: set aspect to 'squash' and crop to 1.0"
            )

    @classmethod
    def of(
        cls, source: Source, split: Split, preprocess: Preprocess, **fields: Any
    ) -> "BatchReader":
        """A reader of `source` with the augmentation of `split`, for a model's `preprocess`."""
        for name in AUGMENTATIONS:
            fields[name] = getattr(split, name)
        return cls(source, split.preprocess(preprocess), **fields)

    def in_uint8(self) -> "BatchReader":
        """The reader of training images, which are uint8 whatever evaluation has."""
        if self.preprocess.resize_dtype != "float32":
            return self
        preprocess = dataclasses.replace(self.preprocess, resize_dtype="uint8")
        return dataclasses.replace(self, preprocess=preprocess)

    def fetched(self, threads: int) -> Fetched | None:
        """What reads examples many at a time, before they are decoded, if they are in a bucket."""
        if not getattr(self.source, "in_bucket", False):
            return None
        return Fetched(self.source, min(_FETCHES * threads, AT_ONCE), self.cache)

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
        together: np.ndarray | None = None,
    ) -> Batch:
        """Reads the examples `indices`, at `positions` in the stream.

        An index of -1 is padding: a black image with mask False.

        Args:
          together: the examples of all processes' rows of the batch; None is `indices`.
          fetched: returns the example of a row that is read already, or raises what reading it did.

        Returns:
          {image: uint8 [b h w c] (for models of images of any shape, patches [b n p], and grid:
          int32 [b 2]), label: int32 [b], mask: bool [b], index: int64 [b], corrupt:
          bool [b]}. Images are in 0 to 255, not normalised; float32 if `preprocess` resizes in it.
          `corrupt` marks images that cannot be read. `label` is float32 [b k] of 0 and 1 if the
          source is multi-label. If labels are masks, it is uint8 [b h w] of the model's size, 255
          where there is no class. With `whole_masks` h and w fit the largest of the batch, and
          size: int32 [b 2] has those of each mask, at the top left. With `windows` so do those of
          images, and scaled: int32 [b 2].
          If labels are boxes, it is float32 [b m 5], m = `max_boxes`: rows of (class, x0, y0, x1,
          y1) in pixels of the image in the batch, of class -1 where there is no box; of crowds
          there are none. With `whole_boxes` all m = 1 rows are so, and size: int32 [b 2] has the
          (h, w) of each image as it was.

        Raises:
          UserError: an image that cannot be read, a label without a class name, or a mask or boxes
            that are not of their image's size.
        """
        cv2.setNumThreads(1)  # parallel over images instead
        b = len(indices)
        k, multi_label = len(self.source.label_names), getattr(self.source, "multi_label", False)
        label = np.zeros((b, k), np.float32) if multi_label else np.zeros(b, np.int32)
        if self._masks:
            size = self.preprocess.image_size
            if self.whole_masks:
                sizes = mask_sizes(self.source, indices if together is None else together)
                size = common_size(sizes)
            label = np.full((b, *size), IGNORED, np.uint8)
        elif self._boxes:
            label = no_rows(b, 1 if self.whole_boxes else self.max_boxes)
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
        if self.whole_masks or self.whole_boxes:
            batch["size"] = np.ones((b, 2), np.int32)
        if self.windows != "none":
            size = common_size([self._scaled(h, w) for h, w in sizes])
            shape = (b, *size, self.preprocess.in_channels)
            batch["image"] = np.zeros(shape, self.preprocess.pixel_dtype)
            batch["scaled"] = np.tile(np.array(self.preprocess.image_size, np.int32), (b, 1))
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

    @property
    def _boxes(self) -> bool:
        return getattr(self.source, "boxes", False)

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
        if self.flip and (self._masks or self._boxes):
            if random.random() < 0.5:
                image, width = mirrored(image), image.shape[1]
                label = label.mirrored(width) if self._boxes else mirrored(label)
        elif self.flip:
            image = flip(image, random)
        image = self.rand_augment(image, random) if self.rand_augment else image
        image = trivial_augment(image, random) if self.trivial_augment else image
        image = self.three_augment(image, random) if self.three_augment else image
        image = self.color_jitter(image, random) if self.color_jitter else image
        if self.erasing:
            mean, std = self.preprocess.mean, self.preprocess.std
            image = RandomErasing(self.erasing, mean=mean, std=std)(image, random)
        if self.crops > 1:
            batch["image"][row] = image
        elif self.windows != "none":
            h, w = batch["scaled"][row] = image.shape[:2]
            batch["image"][row, :h, :w] = image
        else:
            self.preprocess.fill(batch, row, image)
        if self.whole_boxes:
            batch["size"][row] = label
        elif isinstance(label, tuple):
            batch["label"][row, list(label)] = 1
        elif self._boxes:
            batch["label"][row] = label.rows(self.max_boxes)
        elif self.whole_masks:
            h, w = batch["size"][row] = label.shape
            batch["label"][row, :h, :w] = label
        else:
            batch["label"][row] = label

    def _read(
        self, batch: Batch, row: int, position: int, fetched: Callable[[int], Any] | None
    ) -> tuple[Pixels | Pixels5 | None, Any, np.random.Generator | None]:
        """An example's image at the model's size (None: masked), label, and random generator.

        The label is an int, a tuple of them, a mask or boxes; with `whole_boxes` the (h, w) of the
        image as it was.
        """
        for _ in range(_MOST_SKIPPED):
            index = int(batch["index"][row])
            name = f"example {index}"
            try:
                example = self.source[index] if fetched is None else fetched(row)
                name, label = example.get("name", name), example["label"]
                random = None
                if any(getattr(self, name) for name in AUGMENTATIONS):
                    random = np.random.default_rng((self.seed, position))
                if self._masks:
                    image = self.preprocess.read(example["image"])
                    check_mask(name, image, label, len(self.source.label_names))
                    return *self._joint(image, label, random), random
                if self._boxes:
                    image, k = self.preprocess.read(example["image"]), len(self.source.label_names)
                    check_boxes(name, image, label, k, example.get("size"))
                    return *self._with_boxes(name, image, label, random), random
                for each in label if isinstance(label, tuple) else (label,):
                    if not 0 <= each < len(self.source.label_names):
                        raise UserError(
                            f"{name} has the label {each}, but there are "
                            f"{len(self.source.label_names)} class names"
                        )
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

    def _joint(
        self, image: Image, mask: Mask, random: np.random.Generator | None
    ) -> tuple[Pixels, Mask]:
        if self.windows != "none":
            return self.preprocess.to_size(image, self._scaled(*mask.shape)), mask
        if self.whole_masks:
            return self.preprocess.pixels(image), mask
        options = self.inception_crop, self.random_scale, self.random_crop
        return Joint(self.preprocess, *options)(image, mask, random)

    def _with_boxes(
        self, name: str, image: Image, boxes: Boxes, random: np.random.Generator | None
    ) -> tuple[Pixels, Boxes | tuple[int, int]]:
        if self.whole_boxes:
            return self.preprocess.pixels(image), image.shape[:2]
        options = self.inception_crop, self.random_scale, self.random_crop
        image, boxes = Joint(self.preprocess, *options)(image, boxes[~boxes.crowd], random)
        if len(boxes) > self.max_boxes and -1 not in self.reported:
            self.reported.add(-1)
            counts = getattr(self.source, "box_counts", None)
            more = "" if counts is None else f"; {np.sum(counts > self.max_boxes):,} have more"
            text = "%s has %d boxes: of an image the %d largest are learned (data.max_boxes)%s"
            logger.warning(text, name, len(boxes), self.max_boxes, more)
        return image, boxes

    def _scaled(self, h: int, w: int) -> tuple[int, int]:
        return self.preprocess.covering(h, w, own=self.windows == "own")

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
    fetched: Fetched | None = None

    def __call__(self, step: int) -> Batch:
        positions, places, first = self._places(int(step))
        indices = self.indices(self.read, places)
        fetched = None
        if self.fetched is not None:
            stride = max(self.workers, 1)
            fetched = self.fetched.rows(int(step), stride, self.stop, self._indices)
        together = None
        if self.read.whole_masks:
            every = dataclasses.replace(self, rows=slice(None))
            together = every._indices(int(step))
        batch = self.read.at(int(step))(positions, indices, self.threads, fetched, together)
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

    def close(self) -> None:
        if self.fetched is not None:
            self.fetched.close()


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
    fetched = read.fetched(threads)
    step = _Step(read, _train_indices, batch_size, rows, threads, stop_step, workers, fetched)
    return read_ahead(step, range(start_step, stop_step), workers, step.close)


def eval_batches(
    read: BatchReader,
    batch_size: int,
    *,
    rows: slice | np.ndarray = slice(None),
    threads: int | None = None,
) -> contextlib.closing[Iterator[Batch]]:
    """Returns every example once, in order, the last batch padded, to be used in a `with`."""
    stop = -(-len(read.source) // batch_size)
    threads = threads_of(0, threads)
    step = _Step(
        read, _eval_indices, batch_size, rows, threads, stop, fetched=read.fetched(threads)
    )
    return read_ahead(step, range(stop), 0, step.close)
