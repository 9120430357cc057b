"""`vit_jax.load`: loads a model with its preprocessing and class names from a path.

opened.py identifies the file, fit.py adapts the parameters.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import PIL.Image
from etils import epath
from flax import nnx

from vit_jax.checkpoints import families
from vit_jax.checkpoints.adapter import Adapter
from vit_jax.checkpoints.card import OBJECTIVES, ModelCard, Report
from vit_jax.checkpoints.detect import best
from vit_jax.checkpoints.fit import native_card, place, with_adapter
from vit_jax.checkpoints.keys import Patterns
from vit_jax.checkpoints.opened import facts, open_model
from vit_jax.checkpoints.segment import pixel_classes
from vit_jax.compiler import compiler_options
from vit_jax.data.detections import THRESHOLD, Detections, check_threshold
from vit_jax.data.masks import Mask, Palette
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError, during, nearest
from vit_jax.models import posembed
from vit_jax.models.config import ModelConfig, check_fields, pair
from vit_jax.models.create import Model, structure
from vit_jax.models.native import packed


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A loaded model, ready to use.

    Attributes:
      model: a `ViT` or `ResNet`; `model(images)` takes [b h w c], as `preprocess` returns them,
        or, with `config.max_patches`, a list of images of any shapes.
      config: its ViTConfig or ResNetConfig.
      preprocess: a path, a Pillow image or uint8 pixels -> float32 [h w c].
      labels: the name of each class.
      report: where the weights came from, and how each parameter was treated.
      step: of the checkpoint; None for a weight file.
      palette: the colour of each class, of a model that gives masks; None for default ones.
      category_ids: COCO's id of each class, of a model that gives boxes, if its data had some.
      adapter: what is merged into the model's kernels, if it was trained with LoRA: `save` writes
        it with format="lora".
    """

    model: Model
    config: ModelConfig
    preprocess: Preprocess
    labels: tuple[str, ...]
    report: Report
    step: int | None
    objective: str = "softmax"
    position_resize: str = "zoom"
    multi_label: bool = False
    adapter: Adapter | None = None
    palette: Palette | None = None
    category_ids: tuple[int, ...] | None = None

    @functools.cached_property
    def _forward(self) -> Callable[[Any, Any], jax.Array]:
        graphdef = nnx.graphdef(self.model)
        return jax.jit(
            lambda params, images: nnx.merge(graphdef, params)(images),
            compiler_options=compiler_options(),
        )

    def predict(self, images: Any, topk: int = 5) -> Iterator[list[tuple[str, float]]]:
        """Yields the top classes of each image: [(name, probability), ...], most likely first.

        Images are read one at a time, when their answer is asked for, and run on one device; for
        many images `vit_jax.predict` is faster.

        Args:
          images: one image, anything that `preprocess` takes, or an iterable of them; an array of
            uint8 [b h w c] is b images.
          topk: how many classes to return, at least 1, at most all.

        Raises:
          UserError: the model has no head, or `topk` or `images` is invalid; while iterating, an
            image cannot be read.
        """
        topk = self.checked_topk(topk)
        return self._answers(each_image(images), topk)

    def segment(self, images: Any) -> Mask | list[Mask]:
        """The class of each pixel: uint8 [h w] of an image's own size, a list of them for several.

        Logits of patches are interpolated bilinearly to the image's pixels, of which each gets the
        class of the highest. Photographs are turned upright as their EXIF orientation says. For
        many images `predict --out=FOLDER` is faster.

        Args:
          images: as for `predict`.

        Raises:
          UserError: the model gives no masks, or an image cannot be read.
        """
        self.check_masks()
        several, found = each_image(images), []
        params = nnx.state(self.model)
        for number, image in enumerate(several, 1):
            with during(lambda number=number: f"segmenting image {number}"):
                pixels = self.preprocess.read(image)
                inputs = self.preprocess.normalise(self.preprocess.pixels(pixels))
                logits = self._forward(params, inputs[None])
                found.append(pixel_classes(logits, [pixels.shape[:2]])[0])
        return found if several is images else found[0]

    def check_masks(self) -> None:
        """Raises a UserError unless the model gives a class for each pixel."""
        if not OBJECTIVES[self.objective].masks:
            raise UserError(
                "the model tells what is in an image, not where: masks are of models trained with "
                "objective segmentation"
            )

    def detect(self, images: Any, threshold: float = THRESHOLD) -> Detections | list[Detections]:
        """The boxes of the objects in an image, at most 100; a list of them for several images.

        Corners are in pixels of an image of its own size; photographs are turned upright as their
        EXIF orientation says. For many images `predict --out=FOLDER` is faster.

        Args:
          images: as for `predict`.
          threshold: the lowest score of a box.

        Raises:
          UserError: the model gives no boxes, the threshold is not in [0, 1), or an image cannot be
            read.
        """
        self.check_boxes()
        check_threshold(threshold)
        several, found = each_image(images), []
        params = nnx.state(self.model)
        for number, image in enumerate(several, 1):
            with during(lambda number=number: f"detecting in image {number}"):
                pixels = self.preprocess.read(image)
                inputs = self.preprocess.normalise(self.preprocess.pixels(pixels))
                outputs = self._forward(params, inputs[None])
                size = np.array([pixels.shape[:2]], np.int32)
                rows = best(self.config, outputs, size, threshold)
                found.append(Detections.of(*(np.asarray(rows[n][0]) for n in Detections.ROWS)))
        return found if several is images else found[0]

    def check_boxes(self) -> None:
        """Raises a UserError unless the model gives boxes."""
        if not OBJECTIVES[self.objective].boxes:
            raise UserError(
                "the model gives no boxes: they are of models trained with objective detection"
            )

    def checked_topk(self, topk: Any) -> int:
        """Returns `topk`. UserError: it is no number of classes, or the model names none."""
        if OBJECTIVES[self.objective].boxes:
            raise UserError(
                "the model gives boxes, not a class for each image: take them (Loaded.detect; "
                "predict --out=FOLDER)"
            )
        if OBJECTIVES[self.objective].masks:
            raise UserError(
                "the model gives a class for each pixel, not for each image: take its masks "
                "(Loaded.segment; predict --out=FOLDER)"
            )
        if not self.labels:
            raise UserError(
                "the model has no head to name classes by: give num_classes= and fine-tune it, or "
                "take its features (vit_jax.features; predict --features)"
            )
        if isinstance(topk, bool) or not isinstance(topk, (int, np.integer)) or topk < 1:
            raise UserError(f"topk is {topk!r}; expected how many classes to name, at least 1")
        return int(topk)

    def _answers(self, images: Iterable[Any], topk: int) -> Iterator[list[tuple[str, float]]]:
        params = nnx.state(self.model)
        for number, image in enumerate(images, 1):
            with during(lambda number=number: f"predicting image {number}"):
                inputs = self.preprocess(image)[None]
                if self.preprocess.max_patches is not None:  # one shape for all images
                    inputs = packed(inputs, self.config)
                logits = self._forward(params, inputs)[0]
                logits = np.asarray(logits, np.float64)
            probabilities = OBJECTIVES[self.objective].probabilities(logits)
            best = np.argsort(-probabilities, kind="stable")[:topk]
            yield [(self.labels[i], float(probabilities[i])) for i in best]

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self.labels[:3])) + (", ..." if len(self.labels) > 3 else "")
        size = "{}x{} pixels".format(*self.config.image_size)
        if self.preprocess.max_patches is not None:
            size = f"images of any shape, at most {self.preprocess.max_patches} patches"
        return (
            f"{type(self.model).__name__} {self.report.facts['variant']}, {size}\n"
            f"  {len(self.labels)} classes{': ' * bool(names)}{names}\n"
            f"  from {self.report.facts['file']}"
        )

    @property
    def card(self) -> ModelCard:
        """The metadata to save with the weights."""
        return ModelCard(
            self.config,
            self.preprocess,
            self.labels,
            objective=self.objective,
            position_resize=self.position_resize,
            multi_label=self.multi_label,
            palette=self.palette,
            category_ids=self.category_ids,
        )


def each_image(images: Any) -> Iterable[Any]:
    """Wraps a single image in a list; returns several as they are."""
    one = (str, os.PathLike, bytes, bytearray, memoryview, PIL.Image.Image)
    if isinstance(images, one) or getattr(images, "ndim", None) in (2, 3):
        return [images]
    if hasattr(images, "read") or not isinstance(images, Iterable):
        raise UserError(
            f"expected an image (a path, an image file's bytes, a Pillow image or uint8 [h w c] "
            f"pixels) or an iterable of images, found {type(images).__name__}"
        )
    return images


def load(
    path: epath.PathLike,
    *,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    num_classes: int | None = None,
    dtype: str | None = None,
    position_resize: str | None = None,
    max_patches: int | None = None,
    shardings: Callable[[Any], Any] | None = None,
    architecture: str | None = None,
    step: int | str | None = None,
    adapter: epath.PathLike | None = None,
    only: Patterns = (),
    ignore: Patterns = (),
    **known: Any,
) -> Loaded:
    """Loads a model: weights of any code base, or a run folder of ours.

    Args:
      path: a run folder (its newest complete checkpoint, with the EMA weights, if any); an
        .npz of Google's code bases; a .safetensors of timm or Hugging Face, or the folder it is
        in; "hf:owner/name" or "gs://..." for the same (see `published.fetch`).
      image_size: another (h, w) in pixels, or one number for a square: the position embedding is
        resized to its grid (paper, section 3.2), a position bias as well (see `relative.resize`);
        learned embeddings of offsets (`relative`) cannot be resized.
      patch_size: another (h, w): the patch embedding is resampled (FlexiViT, arXiv 2212.08013).
      in_channels: another number of channels (see `posembed.adapt_channels`).
      num_classes: replaces the trained head by a zero head with this many classes.
      dtype: the compute dtype: "float32" or "bfloat16".
      position_resize: a method of `posembed.resize`, overriding the family's own.
      max_patches: the most patches of an image, for a model that takes images of any shapes, each
        at the grid nearest to its own shape (NaFlex, arXiv 2502.14786), positions resized to it.
        One program serves all: patches are padded to this number, and padding is masked. Without
        it, but with an image_size, such a model is made for that size alone.
      shardings: nested dict of shapes -> nested dict of shardings, such as
        `functools.partial(training.sharding.placement, mesh=mesh)`: every parameter is put on its
        devices as it is read, so that the host never holds all of them.
      architecture: the name of a timm or transformers model that computes the same as this one:
        "vit_base_patch16_224", "Dinov2Model". It overrides the name in config.json, which is
        refused unless it is known (see `architectures`).
      step: of a run folder: the number of a kept checkpoint, or "best" (see checkpoint.best);
        None is the last. RUN/checkpoints/STEP and RUN/checkpoints/best name the same as a path.
      adapter: a file that `save` wrote with format="lora", to merge into the model, which must be
        the one that it was trained on; head, classes and image size are then the adapter's.
      only: a pattern of keys or several, in which * is any text, of a file that holds more than one
        model: "model_ema.*". What is left out is listed in the report.
      ignore: patterns of keys to leave out: "text_model.*".
      **known: fields of the config that a file does not say, such as gelu="tanh" or num_heads=8.

    Raises:
      UserError: no such file, a damaged one, or one of another model; sizes that do not fit; an
        adapter of other weights.
    """
    size = None if image_size is None else pair(image_size, "image_size")
    how = dict(architecture=architecture, step=step, only=only, ignore=ignore)
    opened = open_model(path, file_size=size, **how, **known)
    if adapter is not None:
        opened = with_adapter(opened, Adapter.read(adapter), path)
    card = opened.card
    changes: dict[str, Any] = {"image_size": size, "in_channels": in_channels, "dtype": dtype}
    if patch_size is not None:
        changes["patch_size"] = pair(patch_size, "patch_size")
    changes = {name: value for name, value in changes.items() if value is not None}
    check_fields(type(card.config), changes)
    method = card.position_resize if position_resize is None else position_resize
    if method not in posembed.RESIZE_METHODS:
        raise UserError(f"position_resize {method!r}: {nearest(method, posembed.RESIZE_METHODS)}")
    if max_patches is not None:
        if size is not None:
            raise UserError(
                f"image_size {image_size!r} is the size of all images, and max_patches "
                f"{max_patches!r} is for images of any: give one of them"
            )
        card = native_card(card, max_patches, method)
    elif getattr(card.config, "native_resize", None) is not None:
        changes["native_resize"] = method
        changes |= {} if size is None else {"max_patches": None}
    config = dataclasses.replace(card.config, **changes)
    if num_classes is not None:
        config = config.with_fresh_head(num_classes)
        # The objective of a model without classes does not apply to a new head.
        objective = card.objective if card.labels else "softmax"
        names = tuple(str(i) for i in range(num_classes))
        card = dataclasses.replace(
            card, labels=names, objective=objective, palette=None, category_ids=None
        )
    preprocess = families.fitted_preprocess(card.preprocess, config)

    head = "keep" if num_classes is None else "fresh"
    params, lines = place(opened, config, head=head, method=method, shardings=shardings)
    model = nnx.merge(structure(config)[0], params)
    summary = facts(opened.facts["file"], config)
    summary |= {name: what for name, what in opened.facts.items() if name == "prefix"}
    report = Report(lines, summary, opened.assumed)
    return Loaded(
        model,
        config,
        preprocess,
        card.labels,
        report,
        opened.step,
        card.objective,
        card.position_resize,
        card.multi_label,
        opened.adapter if num_classes is None and config == opened.card.config else None,
        card.palette,
        card.category_ids,
    )
