"""Identifies what is at a path, before weights are read: a run folder, or any code base's file.

`open_model` decides, and accounts for every key.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import buckets, distributed
from vit_jax.checkpoints import families
from vit_jax.checkpoints.adapter import Adapter
from vit_jax.checkpoints.card import BROKEN, OBJECTIVES, Line, ModelCard, Report, family_of
from vit_jax.checkpoints.convert import accounted, read_foreign, shapes_of
from vit_jax.checkpoints.files import read_json
from vit_jax.checkpoints.keys import Patterns
from vit_jax.checkpoints.published import fetch
from vit_jax.checkpoints.store import Store
from vit_jax.errors import UserError
from vit_jax.models.config import ModelConfig, ResNetConfig, check_fields
from vit_jax.models.create import structure


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model on disk, identified but not yet read.

    Attributes:
      card: the metadata of its weights.
      shapes: of its parameters, by path.
      read: path of a parameter -> float32 array.
      sources: the name of each parameter in the file.
      leftover: keys of the file that are not part of the model, and their shapes.
      left_out: keys that the caller chose to leave out, and their shapes.
      adapter: what is merged into the kernels, if it was trained with LoRA.
    """

    card: ModelCard
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    sources: Mapping[str, str]
    facts: Mapping[str, str]
    assumed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    leftover: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    step: int | None = None
    adapter: Adapter | None = None

    def dropped(self, config: ModelConfig) -> list[Line]:
        """Lists the arrays that a model of `config` does not use."""
        kept = shapes_of(config)
        lines = [
            Line(name, shape, "dropped", self.sources[name])
            for name, shape in self.shapes.items()
            if name not in kept
        ]
        for status, keys in {"left over": self.leftover, "left out": self.left_out}.items():
            lines += [Line(key, shape, status, key) for key, shape in keys.items()]
        return lines


def open_model(
    path: epath.PathLike,
    *,
    file_size: tuple[int, int] | None = None,
    architecture: str | None = None,
    step: int | str | None = None,
    only: Patterns = (),
    ignore: Patterns = (),
    **known: Any,
) -> Opened:
    """Identifies what is at `path` and accounts for every key; reads no weights yet.

    Args:
      file_size: the image size (h, w) in pixels, needed if the file does not say it and its
        position grid is not square.
      architecture, step, only, ignore: as in `load`.
      known: config fields given by the caller, which override the file.

    Raises:
      UserError: as `load`.
    """
    path = os.path.expanduser(path)
    local = fetch(path)
    run, name = os.path.split(os.fspath(local).rstrip("/"))
    if os.path.basename(run) == "checkpoints" and (name.isdigit() or name == "best"):
        if step is not None:
            raise UserError(f"{path} is one checkpoint already: leave step={step!r} out")
        local, step = os.path.dirname(run) or ".", name if name == "best" else int(name)
    if not epath.Path(local).exists():
        raise UserError(f"there is no {os.fspath(path)!r} to load a model from")
    if (epath.Path(local) / "model" / "model.json").exists():
        if only or ignore:
            raise UserError(f"{path} is a run folder, of one model: leave only and ignore out")
        if architecture is not None:
            known["architecture"] = architecture
        return _open_run(epath.Path(local), step, **known)
    if step is not None:
        raise UserError(f"{path} is no run folder, which alone has checkpoints: leave step out")
    chosen = dict(only=only, ignore=ignore)
    foreign = read_foreign(local, file_size, architecture, **chosen, **known)
    weights, config, assumed = foreign.weights, foreign.config, dict(foreign.assumed)
    if weights.card:
        try:
            model = {"config": dataclasses.asdict(config), "family": family_of(config)}
            card = ModelCard.from_json({**weights.card, **model})
        except BROKEN as error:
            raise UserError(f"the card of {local} is damaged: {error!r}") from None
    else:
        card = ModelCard(
            config,
            families.read_preprocess(
                foreign.dialect, config, weights.config, weights.preprocessor, assumed
            ),
            families.read_labels(config, weights.config, assumed),
            position_resize=families.position_resize(foreign.dialect, config),
        )
    taken_off = {"prefix": f"{weights.before}, taken off every key"} if weights.before else {}
    return Opened(
        card,
        foreign.shapes,
        foreign.read,
        {name: source for name, _, source in accounted(foreign)},
        facts(f"{foreign.dialect}, {local}", config) | taken_off,
        {name: f"{getattr(config, name, '')} {why}".strip() for name, why in assumed.items()},
        {weights.before + key: weights.shapes[key] for key in foreign.leftover},
        weights.left_out,
    )


def inspect(path: epath.PathLike, **known: Any) -> Report:
    """Reports on every key of anything that `load` takes, without loading it.

    Raises:
      UserError: as `load`.
    """
    opened = open_model(path, **known)
    lines = [
        Line(name, shape, "as it is", opened.sources[name]) for name, shape in opened.shapes.items()
    ]
    lines += opened.dropped(opened.card.config)
    summary = dict(opened.facts)
    pre, labels = opened.card.preprocess, opened.card.labels
    shape = f"{pre.aspect}, crop {pre.crop:.4g}" if pre.max_patches is None else "whole"
    summary["preprocessing"] = (
        f"{pre.resize} {pre.resize_dtype}, {shape}, mean {pre.mean}, std {pre.std}"
    )
    if OBJECTIVES[opened.card.objective].masks:
        summary["outputs"] = "a class for each pixel (segmentation): masks of an image's own size"
    elif OBJECTIVES[opened.card.objective].boxes:
        summary["outputs"] = "boxes, their classes and scores (detection), in an image's own pixels"
    summary["labels"] = ", ".join(map(repr, labels[:3])) + (", ..." if len(labels) > 3 else "")
    return Report(tuple(lines), summary, opened.assumed)


def facts(origin: str, config: ModelConfig) -> dict[str, str]:
    """Summary of a model for people: description by topic."""
    total = sum(int(np.prod(shape)) for shape in shapes_of(config).values())
    image = "{}x{} pixels of {} channels".format(*config.image_size, config.in_channels)
    if (most := getattr(config, "max_patches", None)) is not None:
        image = f"any shape, at most {most} patches, {config.in_channels} channels"
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
    rows = config.num_position_prefix
    with_rows = "" if config.position in ("rope", "relative_bias") else f", {rows} with positions"
    prefix = ", ".join(name for name, there in tokens.items() if there)
    where = "" if config.position_at == "input" else f", at {config.position_at}"
    beside = [f"; {each}" for each in (config.rotary, config.relative_bias) if each is not None]
    norm = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[config.norm]
    parts = {
        "norms behind the branches": config.norm_after_branch,
        "attention and MLP parallel": config.parallel,
        f"{config.branches} on the same tokens": config.branches > 1,
        f"{norm} of queries and keys ({config.qk_norm})": config.qk_norm != "none",
        "differential attention": config.differential,
    }
    if any(parts.values()):
        known["blocks"] = ", ".join(part for part, there in parts.items() if there)
    return {
        **known,
        "sizes": f"width {config.width}, depth {config.depth}, MLP {config.mlp_dim} "
        f"({config.mlp}), {config.num_heads} heads",
        "image": image,
        "grid": "{}x{} patches of {}x{}".format(*config.grid, *config.patch_size),
        "prefix tokens": f"{config.num_prefix_tokens} ({prefix}{with_rows})" if prefix else "0",
        "positions": config.position + where + "".join(beside),
        "pooling": config.pool
        + (f", then {norm}" if config.norm_after_pool else "")
        + (f", then a pyramid of {config.pyramid} channels" if config.pyramid else ""),
        "GELU": f"{config.gelu}, {norm} eps {config.layernorm_eps:g}",
        "head": f"{config.num_classes} classes"
        + (f", towers of {config.towers} convolutions" if config.pool == "locations" else "")
        + (f", hidden tanh of {config.representation_size}" if config.representation_size else ""),
    }


def _open_run(workdir: epath.Path, wanted: int | str | None, **known: Any) -> Opened:
    """Opens a run folder: a complete checkpoint, or the newest, with the EMA weights, if any."""
    card = ModelCard.read(workdir)
    if known:
        check_fields(type(card.config), known.keys() - {"architecture"})
        raise UserError(f"{workdir} is a run folder, which says itself what {min(known)} is")
    store = Store(workdir)
    if wanted is not None:
        if wanted != "best" and type(wanted) is not int:
            raise UserError(f"step is {wanted!r}; expected the number of a step, or 'best'")
        wanted = store.best() if wanted == "best" else wanted
        store.whole(wanted)
    while True:
        step = store.newest() if wanted is None else wanted
        if step is None:
            raise UserError(
                f"{buckets.shown(workdir)} holds no checkpoint yet: the run has not saved one"
            )
        try:
            weights = "ema" if "ema" in store.names(step) else "params"
            target = {weights: structure(card.config)[1]}
            params = flatten_dict(store.restore(step, target)[weights], sep="/")
            break
        except (OSError, ValueError):
            if step in store.steps():
                raise
            # The run is still training and has deleted this checkpoint: there is a newer one.
    sources, adapter = {name: f"{weights}/{name}" for name in params}, None
    if getattr(card.config, "lora", None) is not None:
        begun = read_json(os.fspath(workdir / "config.json"))
        adapter = Adapter.of(card, params, str(begun.get("init_from")))
        sources |= {kernel: f"{sources[kernel]}, with its adapter" for kernel in adapter.kernels}
        card, params = adapter.plain_card, adapter.merged(params)
    return Opened(
        card,
        {name: value.shape for name, value in params.items()},
        params.pop,  # each is let go of once it is on its device
        {name: sources[name] for name in params},
        facts(f"run folder, {buckets.shown(workdir)}, step {step}", card.config),
        step=step,
        adapter=adapter,
    )


def open_together(path: epath.PathLike, **chosen: Patterns) -> Opened:
    """`open_model` on every process of a run; raises unless all find the same (collective).

    `chosen` are its `only` and `ignore`.
    """
    opened = distributed.each("open", lambda: open_model(path, **chosen))
    steps = distributed.gather("opened", f"{opened.step} of {shapes_of(opened.card.config)}")
    if len(set(steps)) > 1:
        raise UserError(
            f"{os.fspath(path)}: the processes see different models there; is it being trained? "
            "Wait for its end, and name a path that all hosts share"
        )
    return opened


def read_model(path: epath.PathLike) -> tuple[ModelCard, dict[str, Any], int | None]:
    """Reads a model: its card, its parameters as NumPy arrays, and their step."""
    opened = open_model(path)
    params = {name: opened.read(name) for name in list(opened.shapes)}
    return opened.card, unflatten_dict(params, sep="/"), opened.step
