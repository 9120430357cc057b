"""Prediction of many images, on all devices of a process: classes, masks, boxes or features.

Threads decode ahead, and results are fetched late, so that no device waits for the host. There is
one program for all images: the last batch is padded.
"""

import collections
import concurrent.futures
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Float32, Int

from vit_jax.checkpoints.card import OBJECTIVES
from vit_jax.checkpoints.detect import best as best_boxes
from vit_jax.checkpoints.load import Loaded, each_image, load
from vit_jax.checkpoints.segment import on_device
from vit_jax.compiler import compiler_options
from vit_jax.data.ahead import threads_of
from vit_jax.data.detections import THRESHOLD, Detections, check_threshold
from vit_jax.data.images import Image
from vit_jax.data.inputs import Inputs, Read
from vit_jax.data.joint import common_size
from vit_jax.data.masks import Mask
from vit_jax.data.transforms import Pixels, Preprocess
from vit_jax.errors import UserError, during, nearest
from vit_jax.models.native import check_one_grid
from vit_jax.training.config import EvalConfig
from vit_jax.training.evaluation.evaluation import fetched
from vit_jax.training.evaluation.steps import features_of
from vit_jax.training.evaluation.windows import averaged
from vit_jax.training.sharding import (
    BATCH,
    MeshConfig,
    batch_shards,
    make_mesh,
    placement,
    to_devices,
)
from vit_jax.training.steps import images, merged

WHAT = ("classes", "masks", "boxes", "features", "dense")


class Segmented(NamedTuple):
    """The mask of an image, of its own size, and its pixels, if they are kept."""

    mask: Mask
    pixels: Image | None


class Detected(NamedTuple):
    """The boxes in an image, its (h, w), and its pixels, if they are kept."""

    boxes: Detections
    size: tuple[int, int]
    pixels: Image | None


# Of an image: [(name, probability), ...], features [d], dense features [gh gw d], a mask, boxes, or
# why it cannot be read.
Answer = list[tuple[str, float]] | Float32[np.ndarray, "..."] | Segmented | Detected | UserError
_AHEAD = 2  # batches that are decoded while devices compute


class _Batch(NamedTuple):
    images: dict[str, np.ndarray]  # see `Preprocess.empty`
    sizes: Int[np.ndarray, "b 2"]  # (h, w) of the images themselves
    pixels: list[Image | None]  # of these
    scaled: list[Pixels | None]  # with windows, as the model sees them
    rows: list[concurrent.futures.Future[None]]


def local_mesh() -> Mesh:
    """All devices of this process, which split a batch; each has the whole model."""
    return make_mesh(MeshConfig(), jax.local_devices())


def load_local(model: epath.PathLike | Loaded, **how: Any) -> Loaded:
    """Loads a model onto all devices of this process, unless it is loaded already.

    `how` are arguments of `load`.
    """
    if isinstance(model, Loaded):
        return model
    shardings = functools.partial(placement, mesh=local_mesh())
    return load(model, shardings=shardings, **how)


def default_batch_size(image_size: tuple[int, ...], mesh: Mesh) -> int:
    """As many pixels as 128 images of 224 x 224 a device, at most 1024 images; on CPUs a quarter.

    A power of two for each device; CPU devices share one such part, as they share the cores.
    """
    on_cpu, devices = mesh.devices.flat[0].platform == "cpu", batch_shards(mesh)
    pixels = (32 if on_cpu else 128) * 224 * 224
    each = min(max(pixels // math.prod(image_size), 1), 256 if on_cpu else 1024)
    each = 2 ** (each.bit_length() - 1)
    return max(each, devices) if on_cpu else each * devices


class Predictor:
    """A model on all devices of this process, for any number of images.

    Args:
      loaded: the model; its parameters are copied to the devices that do not have them.
      what: "classes", "masks" (a class for each pixel, as `Loaded.segment`), "boxes" (as
        `Loaded.detect`), "features" (the head's input [d]) or "dense" (features of patches [gh gw
        d]); features are float32.
      topk: how many classes to name.
      threshold: the lowest score of a box.
      keep_pixels: whether masks and boxes come with the pixels of their images.
      windows, stride: for masks, as of `EvalConfig`: how large images are seen.
      batch_size: images at a time on all devices, rounded up to their number; None for a size that
        suits them.
      threads: that decode images; None for one a core.

    Raises:
      UserError: an invalid argument, classes of a model that has no head, or masks or boxes of one
        that gives none.
    """

    def __init__(
        self,
        loaded: Loaded,
        what: str = "classes",
        *,
        topk: int = 5,
        batch_size: int | None = None,
        threads: int | None = None,
        keep_pixels: bool = False,
        threshold: float = THRESHOLD,
        windows: str = "none",
        stride: float = EvalConfig.stride,
    ):
        if what not in WHAT:
            raise UserError(f"what is {what!r}; {nearest(what, WHAT)}")
        for name, value in {"batch_size": batch_size, "threads": threads}.items():
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"{name} is {value!r}; expected a whole number of 1 or more")
        EvalConfig(windows=windows, stride=stride)  # raises where there are none such
        self.what, self.k, self._keep, self._windows = what, 0, keep_pixels, windows
        if what == "masks":
            loaded.check_masks()
        if what == "boxes":
            loaded.check_boxes()
            check_threshold(threshold)
        if what == "classes":
            self.k = min(loaded.checked_topk(topk), len(loaded.labels))
        self.mesh, self.labels, self.preprocess = local_mesh(), loaded.labels, loaded.preprocess
        shards = batch_shards(self.mesh)
        sides = self.preprocess.image_size
        if self.preprocess.max_patches is not None:
            if what == "dense":
                check_one_grid(loaded.config)
            sides = self.preprocess.max_patches, *self.preprocess.patch_size
        size = batch_size or default_batch_size(sides, self.mesh)
        self.batch_size = -(-size // shards) * shards
        self._threads = threads_of(0, threads)
        graphdef, params = nnx.split(loaded.model)
        params = nnx.to_pure_dict(params)
        self._params = jax.device_put(params, placement(params, self.mesh))
        multi_label = OBJECTIVES[loaded.objective].multi_label
        stride = None if windows == "none" else stride
        options = what, self.k, multi_label, stride, float(threshold)
        self._step = _program(graphdef, self.preprocess, self.mesh, *options)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of an image's features: (d,), or dense (gh, gw, d)."""
        images = self.preprocess.empty(batch_shards(self.mesh))
        return jax.eval_shape(self._step, self._params, images)["x"].shape[1:]

    def __call__(self, images: Any) -> Iterator[Answer]:
        """Yields an answer for each image, in order, reading at most 5 batches ahead.

        Args:
          images: as for `Loaded.predict`, or `Inputs`.
        """
        if isinstance(images, Inputs):
            return self._answers(read for _, read in images.readers())
        return self._answers(_given(each_image(images)))

    def forward(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The program: {image: [b h w c] of 0 to 255}, as `preprocess.fill` has it, on the mesh.

        For boxes, the batch has `size`, int32 [b 2], the (h, w) of the images themselves.

        Returns:
          {index: int32 [b k], probability: float32 [b k]}, most likely first, or {x: features, or
          for masks logits [b gh gw k]}, or the boxes of `checkpoints.detect.best`.
        """
        return self._step(self._params, batch)

    def _answers(self, readers: Iterable[Read]) -> Iterator[Answer]:
        pending: collections.deque[_Batch] = collections.deque()
        done = 0

        def results():
            for batch in self._batches(iter(readers)):
                concurrent.futures.wait(batch.rows)
                pending.append(batch)
                yield self._run(batch)

        with during(lambda: f"predicting image {done + 1}"):
            for values in fetched(results()):
                batch = pending.popleft()
                for row, read in enumerate(batch.rows):
                    error = read.exception()
                    if error is not None and not isinstance(error, UserError):
                        raise error
                    yield self._answer(values, batch, row) if error is None else error
                    done += 1

    def _run(self, batch: _Batch) -> dict[str, Array]:
        images, size = dict(batch.images), len(batch.sizes)
        if self.what == "boxes":
            return self.forward(to_devices({**images, "size": batch.sizes}, size, self.mesh))
        if self.what != "masks":
            return self.forward(to_devices(images, size, self.mesh))
        if self._windows != "none":
            images = _together(batch.scaled, self.preprocess)
        on_devices = to_devices({**images, "own": batch.sizes}, size, self.mesh)
        own, of = on_devices.pop("own"), on_devices.get("scaled")
        return {"mask": on_device(self.forward(on_devices)["x"], own, common_size(batch.sizes), of)}

    def _answer(self, values: dict[str, np.ndarray], batch: _Batch, row: int) -> Answer:
        if "mask" in values:
            h, w = batch.sizes[row]
            return Segmented(values["mask"][row, :h, :w], batch.pixels[row])
        if "corners" in values:
            rows = (values[name][row] for name in Detections.ROWS)
            size = tuple(batch.sizes[row].tolist())
            return Detected(Detections.of(*rows), size, batch.pixels[row])
        if "x" in values:
            return values["x"][row]
        found = zip(values["index"][row], values["probability"][row], strict=True)
        return [(self.labels[i], float(probability)) for i, probability in found]

    def _batches(self, readers: Iterator[Read]) -> Iterator[_Batch]:
        """Reads images ahead, all batches of one size: the smallest that does for few images."""
        waiting: collections.deque[_Batch] = collections.deque()
        chunk = list(itertools.islice(readers, self.batch_size))
        size = batch_shards(self.mesh)
        while size < len(chunk):
            size *= 2
        size = min(size, self.batch_size)
        cv2.setNumThreads(1)  # parallel over images instead
        pool = concurrent.futures.ThreadPoolExecutor(self._threads, "predict")
        try:
            while chunk:
                waiting.append(self._begin(pool, chunk, size))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft()
                chunk = list(itertools.islice(readers, size))
            yield from waiting
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, pool: concurrent.futures.Executor, chunk: list[Read], size: int) -> _Batch:
        images, sizes = self.preprocess.empty(size), np.ones((size, 2), np.int32)
        batch = _Batch(images, sizes, [None] * size, [None] * size, [])
        batch.rows.extend(
            pool.submit(self._fill, batch, row, read) for row, read in enumerate(chunk)
        )
        return batch

    def _fill(self, batch: _Batch, row: int, read: Read) -> None:
        """Reads an image into a row of a batch."""
        image = self.preprocess.read(read())
        if self._windows == "none":
            self.preprocess.fill(batch.images, row, self.preprocess.pixels(image))
        else:
            size = self.preprocess.covering(*image.shape[:2], own=self._windows == "own")
            batch.scaled[row] = self.preprocess.to_size(image, size)
        batch.sizes[row] = image.shape[:2]
        if self._keep:
            batch.pixels[row] = image


def _together(scaled: list[Pixels | None], preprocess: Preprocess) -> dict[str, np.ndarray]:
    """Images of their own shapes in one array, and their (h, w); a black one for None."""
    sizes = [preprocess.image_size if each is None else each.shape[:2] for each in scaled]
    of = np.array(sizes, np.int32)
    shape = (len(scaled), *common_size(of), preprocess.in_channels)
    together = np.zeros(shape, preprocess.pixel_dtype)
    for row, each in enumerate(scaled):
        if each is not None:
            together[row, : len(each), : each.shape[1]] = each
    return {"image": together, "scaled": of}


def _given(images: Iterable[Any]) -> Iterator[Read]:
    """Yields what reads each image; what their iterator raises is raised in place of an image."""
    try:
        for image in images:
            yield functools.partial(_same, image)
    except Exception as error:  # noqa: BLE001, raised when it is its turn
        yield functools.partial(_throw, error)


def _same(image: Any) -> Any:
    return image


def _throw(error: Exception) -> Any:
    raise error


@functools.lru_cache(maxsize=16)
def _program(
    graphdef: nnx.GraphDef,
    preprocess: Preprocess,
    mesh: Mesh,
    what: str,
    k: int,
    multi_label: bool,
    stride: float | None,
    threshold: float,
) -> Callable[[Any, dict[str, Array]], dict[str, Array]]:
    """The compiled step; the same one for the same model, so that it is compiled once."""

    def step(params, batch):
        model = merged(graphdef, params, None)
        if stride is not None:
            window, pixels = preprocess.image_size, batch["image"]

            def logits_of(pixels):
                return model(preprocess.normalise(pixels))

            return {"x": averaged(logits_of, pixels, batch["scaled"], window, stride)}
        inputs = images(batch, preprocess)
        if what == "masks":
            return {"x": model(inputs)}
        if what == "boxes":
            spread = NamedSharding(mesh, BATCH)
            return best_boxes(model.config, model(inputs), batch["size"], threshold, spread=spread)
        if what != "classes":
            return {"x": features_of(model, inputs, dense=what == "dense")}
        index, probability = best(model(inputs), k, multi_label)
        return {"index": index, "probability": probability}

    return jax.jit(step, compiler_options=compiler_options(mesh))


def best(logits: Float[Array, "b n"], k: int, multi_label: bool) -> tuple[Array, Array]:
    """The k most likely classes and their probabilities [b k]; of equal ones the first."""
    probabilities = jax.nn.sigmoid(logits) if multi_label else jax.nn.softmax(logits)
    _, index = jax.lax.top_k(logits, k)
    return index, jnp.take_along_axis(probabilities, index, axis=1)
