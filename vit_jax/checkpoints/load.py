"""`vit_jax.load`: from a path to a model, its preprocessing and its label names.

Where the weights are from is decided once, in `open_model`: a run folder of ours (its newest
checkpoint, of that the running average) or a file of any code base that `convert` knows. What then
becomes of them is decided once too, in `fitted`: kept, resized, made anew or dropped.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import PIL.Image
from etils import epath
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import distributed
from vit_jax.checkpoints import families
from vit_jax.checkpoints.card import BROKEN, Line, ModelCard, Report, family_of
from vit_jax.checkpoints.convert import accounted, read_foreign, shapes_of
from vit_jax.checkpoints.published import fetch
from vit_jax.checkpoints.store import Store
from vit_jax.compiler import compiler_options
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError, nearest
from vit_jax.models import posembed, positions
from vit_jax.models.config import ModelConfig, ResNetConfig, check_fields, pair
from vit_jax.models.vit import Model, init_params, structure


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that is ready to use.

    Attributes:
      model: a `ViT` or `ResNet`; `model(images)` takes [b h w c] of what `preprocess` returns.
      config: its ViTConfig or ResNetConfig.
      preprocess: a path, a Pillow image or uint8 pixels -> float32 [h w c].
      labels: the name of each class.
      report: where it came from, and what became of every parameter.
      step: of the checkpoint that the weights are from; None for a file of weights.
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

    @functools.cached_property
    def _forward(self) -> Callable[[Any, Any], jax.Array]:
        graphdef = nnx.graphdef(self.model)
        return jax.jit(
            lambda params, images: nnx.merge(graphdef, params)(images),
            compiler_options=compiler_options(),
        )

    def predict(self, images: Any, topk: int = 5) -> Iterator[list[tuple[str, float]]]:
        """Yields the likeliest classes of each image, the first one first: [(name, probability)].

        Args:
          images: one image, anything that `preprocess` takes, or an iterable of them; an array of
            uint8 [b h w c] is b images.
          topk: how many classes to name, at least 1; all of them, where there are fewer.

        Raises:
          UserError: the model has no head, or `topk` or `images` are no such; and when it comes to
            an image, that it cannot be read.
        """
        if not self.labels:
            raise UserError(
                "the model has no head to name classes by: give num_classes= and fine-tune it"
            )
        if isinstance(topk, bool) or not isinstance(topk, (int, np.integer)) or topk < 1:
            raise UserError(f"topk is {topk!r}; expected how many classes to name, at least 1")
        return self._answers(_each(images), int(topk))

    def _answers(self, images: Iterable[Any], topk: int) -> Iterator[list[tuple[str, float]]]:
        params = nnx.state(self.model)
        for image in images:
            logits = np.asarray(self._forward(params, self.preprocess(image)[None])[0], np.float64)
            if self.objective == "sigmoid":
                probabilities = 1 / (1 + np.exp(-logits))
            else:
                weights = np.exp(logits - logits.max())
                probabilities = weights / weights.sum()
            best = np.argsort(-probabilities, kind="stable")[:topk]
            yield [(self.labels[i], float(probabilities[i])) for i in best]

    @property
    def card(self) -> ModelCard:
        """What is written beside the weights when they are saved."""
        return ModelCard(
            self.config,
            self.preprocess,
            self.labels,
            objective=self.objective,
            position_resize=self.position_resize,
            multi_label=self.multi_label,
        )


def _each(images: Any) -> Iterable[Any]:
    """One image as a list of one; several as they are."""
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
    shardings: Callable[[Any], Any] | None = None,
    architecture: str | None = None,
    **known: Any,
) -> Loaded:
    """Loads a model: weights of any code base, or a run folder of ours.

    Args:
      path: a run folder (its newest whole checkpoint, of that the running average, if any); an
        .npz of Google's code bases; a .safetensors of timm or Hugging Face, or the folder it is
        in; "hf:owner/name" or "gs://..." for the same (see `published.fetch`).
      image_size: another (h, w) in pixels, or one number for a square: the position embedding is
        resized to its grid (paper, section 3.2); relative ones are for one grid alone.
      patch_size: another (h, w): the patch embedding is resampled (FlexiViT, arXiv 2212.08013).
      in_channels: another number of channels (see `posembed.adapt_channels`).
      num_classes: a fresh zero head for so many classes, in place of the trained one.
      dtype: what to compute in: "float32" or "bfloat16".
      position_resize: a method of `posembed.resize` in place of the family's own.
      shardings: nested dict of shapes -> the same of shardings, such as
        `functools.partial(training.sharding.placement, mesh=mesh)`: every parameter goes to its
        devices as it is read, so that the host never holds all of them.
      architecture: a model of timm or transformers that computes as this one does, by name:
        "vit_base_patch16_224", "Dinov2Model". It counts more than what config.json names, which
        is refused unless it is known (see `architectures`).
      **known: fields of the config that a file does not say, such as gelu="tanh" or num_heads=8.

    Raises:
      UserError: no such file, a damaged one, or one of another model; sizes that do not fit.
    """
    size = None if image_size is None else pair(image_size, "image_size")
    opened = open_model(path, file_size=size, architecture=architecture, **known)
    card = opened.card
    changes: dict[str, Any] = {"image_size": size, "in_channels": in_channels, "dtype": dtype}
    if patch_size is not None:
        changes["patch_size"] = pair(patch_size, "patch_size")
    changes = {name: value for name, value in changes.items() if value is not None}
    check_fields(type(card.config), changes)
    config = dataclasses.replace(card.config, **changes)
    if num_classes is not None:
        config = config.with_fresh_head(num_classes)
        # What a model without classes was trained for says nothing of a head.
        objective = card.objective if card.labels else "softmax"
        names = tuple(str(i) for i in range(num_classes))
        card = dataclasses.replace(card, labels=names, objective=objective)
    method = card.position_resize if position_resize is None else position_resize
    if method not in posembed.RESIZE_METHODS:
        raise UserError(f"position_resize {method!r}: {nearest(method, posembed.RESIZE_METHODS)}")
    preprocess = families.fitted_preprocess(card.preprocess, config)

    head = "keep" if num_classes is None else "fresh"
    params, lines = place(opened, config, head=head, method=method, shardings=shardings)
    model = nnx.merge(structure(config)[0], params)
    report = Report(lines, opened.facts, opened.assumed)
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
    )


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model on disk, before it is read.

    Attributes:
      card: what its weights mean.
      shapes: of its parameters, by their paths.
      read: path of a parameter -> float32 array.
      sources: what each parameter is called in the file.
      leftover: keys of the file that are no part of the model, and their shapes.
    """

    card: ModelCard
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    sources: Mapping[str, str]
    facts: Mapping[str, str]
    assumed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    leftover: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    step: int | None = None

    def dropped(self, config: ModelConfig) -> list[Line]:
        """What a model of `config` does not take."""
        kept = shapes_of(config)
        lines = [
            Line(name, shape, "dropped", self.sources[name])
            for name, shape in self.shapes.items()
            if name not in kept
        ]
        return lines + [Line(key, shape, "left over", key) for key, shape in self.leftover.items()]


def open_model(
    path: epath.PathLike,
    *,
    file_size: tuple[int, int] | None = None,
    architecture: str | None = None,
    **known: Any,
) -> Opened:
    """Finds out what is at `path` and accounts for every key of it; reads no weights yet.

    Args:
      file_size: the (h, w) in pixels of a file that does not say it and whose grid is no square.
      architecture: as `load` has it.
      known: fields of the config that the caller knows better than the file.

    Raises:
      UserError: as `load`.
    """
    path = os.path.expanduser(path)
    local = fetch(path)
    if not epath.Path(local).exists():
        raise UserError(f"there is no {os.fspath(path)!r} to load a model from")
    if (epath.Path(local) / "model" / "model.json").exists():
        told = known if architecture is None else {**known, "architecture": architecture}
        return _open_run(epath.Path(local), **told)
    foreign = read_foreign(local, file_size=file_size, architecture=architecture, **known)
    weights, config, assumed = foreign.weights, foreign.config, dict(foreign.assumed)
    if weights.card:
        try:
            told = {"config": dataclasses.asdict(config), "family": family_of(config)}
            told = {**weights.card, **told}
            card = ModelCard.from_json(told)
        except BROKEN as error:
            raise UserError(f"the card of {local} is damaged: {error!r}") from None
    else:
        told = (weights.config, weights.preprocessor)
        card = ModelCard(
            config,
            families.read_preprocess(foreign.dialect, config, *told, assumed),
            families.read_labels(config, weights.config, assumed),
            position_resize=families.position_resize(foreign.dialect, config),
        )
    return Opened(
        card,
        foreign.shapes,
        foreign.read,
        {name: source for name, _, source in accounted(foreign)},
        facts(f"{foreign.dialect}, {local}", config),
        {name: f"{getattr(config, name, '')} {why}".strip() for name, why in assumed.items()},
        {key: weights.shapes[key] for key in foreign.leftover},
    )


def inspect(path: epath.PathLike, **known: Any) -> Report:
    """Accounts for every key of whatever `load` takes, without loading it.

    Raises:
      UserError: as `load`.
    """
    opened = open_model(path, **known)
    lines = [
        Line(name, shape, "as it is", opened.sources[name]) for name, shape in opened.shapes.items()
    ]
    lines += opened.dropped(opened.card.config)
    told = dict(opened.facts)
    pre, labels = opened.card.preprocess, opened.card.labels
    told["preprocessing"] = (
        f"{pre.resize} {pre.resize_dtype}, {pre.aspect}, crop {pre.crop:.4g}, mean {pre.mean}, "
        f"std {pre.std}"
    )
    told["labels"] = ", ".join(map(repr, labels[:3])) + (", ..." if len(labels) > 3 else "")
    return Report(tuple(lines), told, opened.assumed)


def facts(origin: str, config: ModelConfig) -> dict[str, str]:
    """What a model is, in words, by what it is a word for."""
    total = sum(int(np.prod(shape)) for shape in shapes_of(config).values())
    image = "{}x{} pixels of {} channels".format(*config.image_size, config.in_channels)
    known = {"file": origin, "variant": f"{families.variant_name(config)}, {total:,} parameters"}
    resnet = f"{config.resnet} units, width {config.resnet_width}, style {config.resnet_style}"
    if isinstance(config, ResNetConfig):
        return {**known, "ResNet": resnet, "image": image, "head": f"{config.num_classes} classes"}
    if config.resnet is not None:
        known["ResNet"] = resnet
    tokens = {
        "class token": config.has_class_token,
        "distillation token": config.distillation != "none",
        f"{config.registers} registers": config.registers,
    }
    if config.patch_outputs:
        known["patch head"] = f"{config.patch_outputs} numbers for each corrupted patch"
    with_rows = f", {config.num_position_prefix} with positions"
    prefix = ", ".join(name for name, there in tokens.items() if there)
    where = "" if config.position_at == "input" else f", at {config.position_at}"
    return {
        **known,
        "sizes": f"width {config.width}, depth {config.depth}, MLP {config.mlp_dim} "
        f"({config.mlp}), {config.num_heads} heads",
        "image": image,
        "grid": "{}x{} patches of {}x{}".format(*config.grid, *config.patch_size),
        "prefix tokens": f"{config.num_prefix_tokens} ({prefix}{with_rows})" if prefix else "0",
        "positions": config.position + where,
        "pooling": config.pool + (", then LayerNorm" if config.norm_after_pool else ""),
        "GELU": f"{config.gelu}, LayerNorm eps {config.layernorm_eps:g}",
        "head": f"{config.num_classes} classes"
        + (f", hidden tanh of {config.representation_size}" if config.representation_size else ""),
    }


def _open_run(workdir: epath.Path, **known: Any) -> Opened:
    """A run folder: its newest whole checkpoint, and of that the running average, if any."""
    if known:
        raise UserError(f"{workdir} is a run folder, which says itself what {min(known)} is")
    card = ModelCard.read(workdir)
    store = Store(workdir)
    while True:
        step = store.newest()
        if step is None:
            raise UserError(f"{workdir} holds no checkpoint yet: the run has not saved one")
        try:
            weights = "ema" if "ema" in store.names(step) else "params"
            target = {weights: structure(card.config)[1]}
            params = flatten_dict(store.restore(step, target)[weights], sep="/")
            break
        except (OSError, ValueError):
            if step in store.steps():
                raise
            # The run that is still training has replaced it meanwhile: there is a newer one.
    return Opened(
        card,
        {name: value.shape for name, value in params.items()},
        params.pop,  # each is let go of once it is on its device
        {name: f"{weights}/{name}" for name in params},
        facts(f"run folder, {workdir}, step {step}", card.config),
        step=step,
    )


def open_together(path: epath.PathLike) -> Opened:
    """`open_model` on every process of a run, which must all find the same (collective)."""
    opened = distributed.each("open", lambda: open_model(path))
    steps = distributed.gather("opened", f"{opened.step} of {shapes_of(opened.card.config)}")
    if len(set(steps)) > 1:
        raise UserError(
            f"{os.fspath(path)}: the processes see different models there; is it being trained? "
            "Wait for its end, and name a path that all hosts share"
        )
    return opened


def read_model(path: epath.PathLike) -> tuple[ModelCard, dict[str, Any], int | None]:
    """Reads a model into its card, its parameters as NumPy arrays, and their step."""
    opened = open_model(path)
    params = {name: opened.read(name) for name in list(opened.shapes)}
    return opened.card, unflatten_dict(params, sep="/"), opened.step


def place(
    opened: Opened,
    config: ModelConfig,
    *,
    head: str = "keep",
    method: str = "zoom",
    seed: int = 0,
    shardings: Callable[[Any], Any] | None = None,
) -> tuple[dict[str, Any], tuple[Line, ...]]:
    """Reads a model, fits it to `config` (see `fitted`) and puts it on its devices, one by one.

    Returns:
      Parameters as a nested dict of arrays, and what became of each and of what was dropped.
    """
    places = flatten_dict(shardings(structure(config)[1]), sep="/") if shardings else {}
    params, lines = {}, []
    for value, line in fitted(opened, config, head=head, method=method, seed=seed):
        lines.append(line)
        if line.name in places:
            params[line.name] = jax.make_array_from_callback(
                value.shape, places[line.name], lambda index, value=value: value[index]
            )
        else:
            params[line.name] = jax.device_put(value)
    return unflatten_dict(params, sep="/"), (*lines, *opened.dropped(config))


def fitted(
    opened: Opened, new: ModelConfig, *, head: str = "keep", method: str = "zoom", seed: int = 0
) -> Iterator[tuple[np.ndarray, Line]]:
    """Fits parameters to another resolution, patch, stem or head, one after another.

    Args:
      head: `fresh` drops the head, and the hidden layer before it, for a zero linear layer
        (paper, B.1.1); `keep` keeps both where the classes agree. So it is with a `patch_head`.
      method: how position embeddings are resized (see `posembed.resize`; paper, section 3.2).
      seed: of parameters that the old model does not have.

    Raises:
      UserError: a parameter that is none of these has another shape.
    """
    old, expected = opened.card.config, shapes_of(new)
    replaced = (
        ("head", "pre_logits/", "patch_head/") if head == "fresh" or _heads_differ(old, new) else ()
    )
    fresh = [n for n in expected if n not in opened.shapes or n.startswith(replaced)]
    made = _fresh(new, fresh, seed)
    for name, shape in expected.items():
        if name in made:
            yield made.pop(name), Line(name, shape, "fresh")
            continue
        value, fate = opened.read(name), "kept"
        if name == "patch_embed/kernel":
            value, fate = _fit_stem(value, new.patch_channels, new.patch_size)
        elif name == "resnet/conv_root/kernel":
            value, fate = _fit_stem(value, new.in_channels, value.shape[:2])
        elif name.endswith(positions.NAMES):
            value, fate = positions.fitted(name, value, old, new, method)
        if value.shape != shape:
            raise UserError(
                f"parameter {name} is {list(value.shape)} in the checkpoint and {list(shape)} in "
                "the model: only image_size, patch_size, in_channels and the head may change"
            )
        yield value, Line(name, shape, fate, opened.sources[name])


def _fit_stem(kernel: np.ndarray, channels: int, patch: tuple[int, ...]) -> tuple[np.ndarray, str]:
    (*old_patch, old_channels, _), fates = kernel.shape, []
    if old_channels != channels:
        kernel = posembed.adapt_channels(kernel, channels)
        fates.append(f"{old_channels} -> {channels} channels")
    if tuple(old_patch) != patch:
        kernel = posembed.resample_patches(kernel, patch)
        fates.append("resampled {}x{} -> {}x{}".format(*old_patch, *patch))
    return kernel, ", ".join(fates) or "kept"


def _fresh(config: ModelConfig, names: list[str], seed: int) -> dict[str, np.ndarray]:
    """New parameters by their paths; a head alone, which starts at zero, compiles nothing."""
    if all(name.startswith("head") for name in names):
        shapes = shapes_of(config)
        fills = {name: config.head_bias if name.endswith("bias") else 0.0 for name in names}
        return {name: np.full(shapes[name], fill, np.float32) for name, fill in fills.items()}

    def some():
        params = flatten_dict(init_params(config, seed), sep="/")
        return {name: params[name] for name in names}

    return jax.device_get(jax.jit(some)())


def _heads_differ(old: ModelConfig, new: ModelConfig) -> bool:
    def sizes(config):
        beside = (getattr(config, name, None) for name in ("representation_size", "patch_outputs"))
        return config.num_classes, *beside

    return sizes(old) != sizes(new)
