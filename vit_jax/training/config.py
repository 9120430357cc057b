"""A config file's fields, typed: every key is known, or the nearest known one is named."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import operator
import os
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

from vit_jax.data.pipeline import DataConfig
from vit_jax.errors import UserError, nearest
from vit_jax.models.config import (
    CHOICES,
    FAMILIES,
    ModelConfig,
    ViTConfig,
    check_fields,
    variant,
    variant_fields,
    variant_kind,
)
from vit_jax.models.posembed import RESIZE_METHODS
from vit_jax.models.resnet import STYLES
from vit_jax.training import masking
from vit_jax.training.evaluators import Classification, Evaluator, evaluator_kind
from vit_jax.training.objectives import OBJECTIVES, Augment
from vit_jax.training.optim import OptimConfig
from vit_jax.training.sharding import MeshConfig

DURATIONS = ("total_steps", "total_epochs", "total_examples")
# What a run may be resumed with in another form; everything else decides what it computes.
RESUMABLE = (
    "mesh",
    *(f"data.{name}" for name in ("workers", "threads", "on_corrupt", "same_images")),
)
RESUMABLE += ("log", "eval", "checkpoint")


def _not_none(kind: Any) -> Any:
    """Takes `X | None` to X."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (k for k in typing.get_args(kind) if k is not types.NoneType)
    return kind


# What the `model` section may say; what it computes in is `precision`.
MODEL_KEYS = {"variant": str, "head": str, "position_resize": str} | {
    field.name: tuple
    if field.name in ("image_size", "patch_size", "resnet")
    else _not_none(field.type)
    for kind in FAMILIES.values()
    for field in dataclasses.fields(kind)
    if field.name != "dtype"
}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """`every` steps the val split is evaluated (0: at the end only); in batches of `batch_size`.

    `evaluators` is what is measured beside val and test, each under a name of its own.
    """

    every: int = 0
    batch_size: int | None = None
    evaluators: dict[str, Evaluator] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in self.evaluators:
            if not name.isidentifier() or name in ("train", "val", "test"):
                raise UserError(
                    f"eval.evaluators.{name}: expected a name of letters, other than train, val, "
                    "test"
                )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """`every` steps a checkpoint is saved (0: at the end only), and the last `keep` are kept."""

    every: int = 0
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """`every` steps metrics are written, to metrics.jsonl and, if `tensorboard`, to its events.

    With `wandb` also to Weights & Biases, in `wandb_project` (left out: the one it chooses).
    """

    every: int = 50
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. `batch_size` is global.

    To train, data.train, `optim` and exactly one of the three durations must be set; a config that
    only evaluates has none of them.

    `model` has `variant`, any field of its ViTConfig or ResNetConfig, and for fine-tuning `head`
    (`fresh`, or `keep` the checkpoint's where the classes agree) and `position_resize` (see
    models/posembed.py). With `init_from`, what `model` leaves out is the checkpoint's.
    """

    batch_size: int
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig | None = None
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    total_steps: int | None = None
    total_epochs: float | None = None
    total_examples: int | None = None
    init_from: str | None = None
    augment: Augment = dataclasses.field(default_factory=Augment)
    objective: str = "softmax"
    precision: str = "float32"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)

    def __post_init__(self):
        for name, value, least in (
            ("batch_size", self.batch_size, 1),
            ("eval.batch_size", self.eval.batch_size, 1),
            ("eval.every", self.eval.every, 0),
            ("checkpoint.every", self.checkpoint.every, 0),
            ("checkpoint.keep", self.checkpoint.keep, 1),
            ("log.every", self.log.every, 0),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")
        for name, value, known in (
            ("objective", self.objective, (*OBJECTIVES, *masking.OBJECTIVES)),
            ("precision", self.precision, CHOICES["dtype"]),
        ):
            if value not in known:
                raise UserError(f"{name} is {value!r}; {nearest(value, known)}")
        given = [name for name in DURATIONS if getattr(self, name) is not None]
        if len(given) > 1 or (self.optim is not None and not given):
            raise UserError(
                f"set exactly one of {', '.join(DURATIONS)}; found {' and '.join(given) or 'none'}"
            )
        for name in self.model:
            if name not in MODEL_KEYS:
                raise UserError(f"unknown config key model.{name}; {nearest(name, MODEL_KEYS)}")

        if self.objective in masking.OBJECTIVES:
            self._check_masked()

    def _check_masked(self) -> None:
        for name in ("mixup", "cutmix", "label_smoothing"):
            if getattr(self.augment, name):
                raise UserError(
                    f"augment.{name} is for classification: set it to 0 with objective "
                    f"{self.objective}, which reads no labels"
                )
        for name, evaluator in self.eval.evaluators.items():
            if isinstance(evaluator, Classification):
                raise UserError(
                    f"eval.evaluators.{name} classifies, but a model of objective {self.objective} "
                    "has no classes: use fewshot, knn or probe, which read features"
                )

    def check_trains(self) -> None:
        """Raises a UserError for a config that can only evaluate."""
        for name, value in (("data.train", self.data.train), ("optim", self.optim)):
            if value is None:
                raise UserError(f"{name} is not set: this config can evaluate, but not train")

    def steps(self, num_examples: int | None) -> int:
        """The length of the run, where the training split has `num_examples` (None: endless)."""
        examples = self.total_examples
        if self.total_steps is not None:
            steps = self.total_steps
        elif self.total_epochs is not None:
            if num_examples is None:
                raise UserError(
                    f"{self.data.train.source} is endless, so that there are no epochs: set "
                    "total_steps or total_examples instead of total_epochs"
                )
            steps = round(self.total_epochs * num_examples / self.batch_size)
        else:
            steps = round(examples / self.batch_size)
        if steps < 1:
            raise UserError(f"the run comes to {steps} steps; it must be at least 1")
        return steps

    def model_config(
        self, base: ModelConfig | None, num_classes: int, keep_head: bool = False
    ) -> ModelConfig:
        """The model: `base` (the checkpoint's, where there is one) with what `model` says.

        Unless the checkpoint's head is kept, its hidden layer goes too.

        Raises:
          UserError: `model` names no variant, says what such a model does not have, or has
            another ResNet than `base`, or one where that has none.
        """
        fields = dict(self.model)
        name = fields.pop("variant", None)
        method, head = fields.pop("position_resize", None), fields.pop("head", "fresh")
        for key, value, known in (
            ("head", head, ("fresh", "keep")),
            ("position_resize", method, RESIZE_METHODS),
        ):
            if value is not None and value not in known:
                raise UserError(f"model.{key} is {value!r}; {nearest(value, known)}")
        fields.setdefault("num_classes", num_classes)
        fields["dtype"] = self.precision
        if base is not None and not keep_head:
            base = base.with_fresh_head(num_classes)
        if base is not None:
            is_vit = isinstance(base, ViTConfig)
            old, wanted = _network(is_vit, base.resnet, base.resnet_style), is_vit
            if name is not None:
                sizes = {"resnet": None, **variant_fields(name)}
                fields, wanted = {**sizes, **fields}, variant_kind(sizes) is ViTConfig
            units, style = (fields.get(f, getattr(base, f)) for f in ("resnet", "resnet_style"))
            if (new := _network(wanted, units, style)) != old:
                raise UserError(
                    f"the model is to be {new}, but the checkpoint of init_from is {old}: leave "
                    "model.variant and model.resnet out, or start from such a model"
                )
            check_fields(type(base), fields)
            return self._predicting(dataclasses.replace(base, **fields))
        if name is None:
            raise UserError("model.variant is not set: name one such as B/16, or an init_from")
        return self._predicting(variant(name, **fields))

    def _predicting(self, model: ModelConfig) -> ModelConfig:
        """The model with what the objective has it predict of patches."""
        given, wanted = self.model.get("patch_outputs"), 0
        if self.objective in masking.OBJECTIVES:
            wanted = masking.patch_outputs(self.objective, model)
        if given not in (None, wanted):
            raise UserError(
                f"model.patch_outputs is {given}, but objective {self.objective} needs {wanted}: "
                "leave it out"
            )
        return dataclasses.replace(model, patch_outputs=wanted) if wanted else model


def _network(is_vit: bool, units: Any, style: Any) -> str:
    """What a checkpoint and a model that starts from it have to agree in, in words."""
    if units is None:
        return "a ViT without a ResNet" if is_vit else "a ResNet of no units"
    normed = "pre" if style in STYLES and STYLES[style].preact else "post"
    units = tuple(units) if isinstance(units, list) else units
    resnet = f"a {normed}-activation ResNet of {units} units"
    return f"a ViT on {resnet}" if is_vit else resnet


def load_config(spec: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file and applies `--config.KEY=VALUE` flags to it.

    Args:
      spec: `FILE.py` or `FILE.py:ARGUMENT`; the file has get_config, which the argument goes to.
      overrides: flags for any key of the config, whether the file mentions it or not. None takes
        back what the file says. A flag that sets a duration clears the file's.

    Raises:
      UserError: no such file or key, a value of another type, or a config that is not consistent.
    """
    config = _run_config_file(spec)
    names = [flag.removeprefix("--config.").partition("=")[0] for flag in overrides]
    _fill(config, Config, names)
    known = [name for name, _ in _leaves(config)]
    for flag, name in zip(overrides, names, strict=True):
        section = flag.endswith("=None") and any(each.startswith(f"{name}.") for each in known)
        if name not in known and not section:
            raise UserError(f"unknown config key in {flag}; {nearest(name, known)}")
    with config.ignore_type():
        for flag, name in zip(overrides, names, strict=True):
            if flag.endswith("=None"):
                *parents, last = name.split(".")
                functools.reduce(operator.getitem, parents, config)[last] = None
    flag_values = flags.FlagValues()
    argv = ["vit_jax", *(flag for flag in overrides if not flag.endswith("=None"))]
    config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=argv)
    try:
        flag_values(argv)
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(f"a --config flag could not be read: {error}") from None
    config = flag_values["config"].value
    if any(name in DURATIONS for name in names):
        for name in set(DURATIONS) - set(names):
            config[name] = None
    return unpack(Config, config)


def _run_config_file(spec: str) -> ml_collections.ConfigDict:
    path, _, argument = spec.partition(":")
    if not os.path.isfile(path) or not path.endswith(".py"):
        raise UserError(f"there is no config file {path!r} (--config={spec}); expected FILE.py")
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("c", path))
    with _importable(os.path.dirname(os.path.abspath(path))):
        module.__spec__.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path} is no config file: it has no function get_config")
        try:
            config = module.get_config(argument) if argument else module.get_config()
        except (ValueError, TypeError) as error:
            raise UserError(f"{spec}: {error}") from None
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{path} is no config file: get_config returns no ConfigDict")
    return ml_collections.ConfigDict(config.to_dict(), type_safe=True)


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Config files may import one another; of two folders, each its own."""
    sys.path.insert(0, folder)
    before = set(sys.modules)
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if os.path.dirname(getattr(sys.modules[name], "__file__", None) or "") == folder:
                del sys.modules[name]


def _fill(config: ml_collections.ConfigDict, kind: Any, wanted: Sequence[str]) -> None:
    """Adds what the file leaves out, as defaults and placeholders, so that flags can set it."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = _not_none(hints[field.name])
        here = [name.partition(".")[2] for name in wanted if name.split(".")[0] == field.name]
        if field.name == "model":
            if config.get("model") is None:
                config.model = ml_collections.ConfigDict()
            section = config.model
            for name, value_type in MODEL_KEYS.items():
                if section.get(name) is None:
                    section[name] = ml_collections.config_dict.placeholder(value_type)
        elif inner == dict[str, Evaluator]:
            if config.get(field.name) is None:
                config[field.name] = ml_collections.ConfigDict()
            for name, section in config[field.name].items():
                inside = [n.partition(".")[2] for n in here if n.split(".")[0] == name]
                _fill(section, evaluator_kind(name, section.get("type")), inside)
        elif dataclasses.is_dataclass(inner):
            if config.get(field.name) is None and (inner is hints[field.name] or any(here)):
                config[field.name] = ml_collections.ConfigDict()
            if config.get(field.name) is not None:
                _fill(config[field.name], inner, here)
        elif config.get(field.name) is None:
            value_type = typing.get_origin(inner) or inner
            config[field.name] = ml_collections.config_dict.placeholder(value_type)
            if field.default not in (None, dataclasses.MISSING):
                config[field.name] = field.default


def _leaves(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def unpack(kind: Any, value: Any, path: str = "") -> Any:
    """Turns a (nested) ConfigDict or dict into the dataclass `kind`, checking names and types.

    Raises:
      UserError: a key that no field has, a required one that is missing, a value of another type.
    """
    where = path or "the config"
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    if value is None:
        return None
    kind = _not_none(kind)
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"config {where} is {value!r}; expected a section with keys")
        fields = {f.name: f for f in dataclasses.fields(kind)}
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in fields:
                full = f"{path}.{key}".lstrip(".")
                raise UserError(f"unknown config key {full}; {nearest(key, fields)}")
        inner = {k: unpack(hints[k], v, f"{path}.{k}".lstrip(".")) for k, v in value.items()}
        for name, field in fields.items():
            default = (field.default, field.default_factory)
            # A placeholder that nobody filled is None: the same as leaving the field out.
            if inner.get(name) is None and default != (dataclasses.MISSING,) * 2:
                if name in inner and field.default is not None:
                    del inner[name]
            elif inner.get(name) is None:
                raise UserError(f"config {f'{path}.{name}'.lstrip('.')} is not set")
        return kind(**inner)
    if origin is tuple:
        kinds, items = typing.get_args(kind), value if isinstance(value, (tuple, list)) else None
        if items is not None and kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(items)
        if items is None or len(items) != len(kinds):
            count = "several" if kinds[-1] is Ellipsis else len(kinds)
            raise UserError(f"config {where} is {value!r}; expected {count} values")
        return tuple(unpack(k, item, where) for k, item in zip(kinds, items, strict=True))
    if kind == dict[str, Evaluator]:
        sections = {k: v for k, v in value.items() if v is not None}
        return {
            k: unpack(evaluator_kind(k, dict(v).get("type")), v, f"{path}.{k}")
            for k, v in sections.items()
        }
    if origin is dict:
        return {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if v is not None
        }
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if value is not None and type(value) is not kind:
        raise UserError(f"config {where} is {value!r}; expected {kind.__name__}")
    return value


def to_json(config: Config) -> str:
    """The whole config, defaults included, as `from_json` reads it."""
    return json.dumps(dataclasses.asdict(config), indent=1)


def from_json(text: str) -> Config:
    """The inverse of `to_json`; raises a UserError for keys or values that are not a config's."""
    return unpack(Config, json.loads(text))


def flat(config: Config) -> dict[str, Any]:
    """Every leaf of a config by its name, "optim.lr": 0.001, in the types of JSON."""
    return flatten_dict(json.loads(to_json(config)), sep=".", keep_empty_nodes=False)


def is_resumable(name: str) -> bool:
    """Whether a run may be resumed with another value of this leaf."""
    return any(name == free or name.startswith(f"{free}.") for free in RESUMABLE)


def differences(old: Config, new: Config) -> list[str]:
    """What keeps `new` from resuming a run of `old`: "optim.lr: 0.001 -> 0.01"."""
    old_flat, new_flat = flat(old), flat(new)
    names = [*old_flat, *(name for name in new_flat if name not in old_flat)]
    return [
        f"{name}: {old_flat.get(name)!r} -> {new_flat.get(name)!r}"
        for name in names
        if old_flat.get(name) != new_flat.get(name) and not is_resumable(name)
    ]
