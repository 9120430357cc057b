"""The typed config of a run; unknown keys are errors that suggest the nearest known key."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import ml_collections
from etils import epath

from vit_jax.checkpoints.card import OBJECTIVES
from vit_jax.data.config import DataConfig
from vit_jax.errors import UserError, nearest
from vit_jax.models.config import CHOICES, FAMILIES, SECTIONS
from vit_jax.training.distill import DistillConfig
from vit_jax.training.evaluation.evaluators import Classification, Evaluator, evaluator_kind
from vit_jax.training.objectives import Augment
from vit_jax.training.optim import Group, OptimConfig
from vit_jax.training.selection import Metric, StopConfig
from vit_jax.training.sharding import MeshConfig

WINDOWS = ("none", "scaled", "own")
DURATIONS = ("total_steps", "total_epochs", "total_examples")
SIDES = ("model.image_size", "model.patch_size")  # (h, w), or one number, which means square
# Fields that may change when a run is resumed; all others decide what it computes.
RESUMABLE = (
    "mesh",
    *(f"data.{name}" for name in ("workers", "threads", "cache", "on_corrupt", "same_images")),
)
RESUMABLE += ("log", "eval", "checkpoint", "stop")


def not_none(kind: Any) -> Any:
    """Returns X for the type `X | None`."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (k for k in typing.get_args(kind) if k is not types.NoneType)
    return kind


# Keys of the `model` section; the compute dtype is in `precision`. Dataclasses are sections. Those
# of `CHOSEN` are arguments of `load`.
CHOSEN = ("only", "ignore")
MODEL_KEYS: dict[str, Any] = {"variant": str, "head": str, "position_resize": str}
MODEL_KEYS |= dict.fromkeys((*CHOSEN, "fresh"), tuple[str, ...])
MODEL_KEYS |= {
    field.name: tuple
    if field.name in ("image_size", "patch_size", "resnet")
    else not_none(field.type)
    for kind in FAMILIES.values()
    for field in dataclasses.fields(kind)
    if field.name != "dtype"
}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The `eval` section: when to evaluate, and what in addition to val and test.

    Attributes:
      every: steps between evaluations of `data.val`; 0 is only at the end.
      batch_size: global batch size of evaluation; None is that of training.
      flip: whether to classify each image mirrored as well (see `evaluation/steps.averaged`).
      crops: how many crops of an image to classify: 1, or 5, the centre and the corners; with
        `flip`, each mirrored as well. They differ where images are resized to more than the model's
        size: by `crop` below 1, or by `aspect`.
      windows: for segmentation, how large images are seen: `none`, whole, resized to the model's
        size; or in windows of the model's size, of images of their own shape that are `scaled` to
        cover it, or of their `own` size. Where windows overlap their logits are averaged.
      stride: the distance from one window to the next, in windows.
      evaluators: further evaluations, each a section under a name of its own.
    """

    every: int = 0
    batch_size: int | None = None
    flip: bool = False
    crops: int = 1
    windows: str = "none"
    stride: float = 2 / 3
    evaluators: dict[str, Evaluator] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.crops not in (1, 5):
            hint = "; ten are crops=5 with flip=True" if self.crops == 10 else ""
            raise UserError(f"eval.crops is {self.crops}; expected 1 or 5{hint}")
        if self.windows not in WINDOWS:
            raise UserError(f"eval.windows is {self.windows!r}; {nearest(self.windows, WINDOWS)}")
        if not 0 < self.stride <= 1:
            raise UserError(f"eval.stride is {self.stride}; expected a number in (0, 1]")
        for name in self.evaluators:
            if not name.isidentifier() or name in ("train", "val", "test"):
                raise UserError(
                    f"eval.evaluators.{name}: expected a name of letters, other than train, val, "
                    "test"
                )

    @property
    def views(self) -> str | None:
        """The key by which an image is classified in several views; None for one view."""
        return "flip" if self.flip else "crops" if self.crops > 1 else None


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The `checkpoint` section: when to save, besides at the end, and how many to keep.

    Attributes:
      every: steps between checkpoints; 0 is not by steps.
      every_minutes: minutes from a checkpoint to the next; 0 is not by time.
      keep: how many of the last checkpoints are kept.
      best: a metric such as val/accuracy or val/loss (`:min` or `:max` says what is better, where
        its name does not): a checkpoint is saved at each evaluation that is the best so far, and
        the best one is kept beside the last.
    """

    every: int = 0
    every_minutes: float = 10.0
    keep: int = 2
    best: str | None = None

    def __post_init__(self):
        if self.best is not None:
            Metric.parse("checkpoint.best", self.best)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """The `log` section: how often metrics are written to metrics.jsonl, and where else.

    Attributes:
      every: steps between lines of metrics; 0 is only at the end.
      tensorboard: whether to write TensorBoard events, if tensorboardX is installed.
      wandb: whether to write to Weights & Biases as well.
      wandb_project: project at Weights & Biases; None is the one that it chooses.
    """

    every: int = 50
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """The config of a run.

    Training requires data.train, `optim` and exactly one of the three durations; a config that only
    evaluates has none of them.

    Attributes:
      batch_size: images in a batch, over all devices and micro-batches.
      model: the model: `variant`, any field of its ViTConfig or ResNetConfig, and for fine-tuning
        `head`, `position_resize`, `only`, `ignore` and `fresh`. With `init_from`, fields missing
        here are the checkpoint's.
      model.variant: name of its sizes, such as B/16, R50+B/16 or R50x1 (see models/variants.py).
      model.head: with init_from, a `fresh` head, or `keep` the checkpoint's if the classes agree.
        None keeps it if that is a run folder of ours with the same head, objective and classes.
      model.position_resize: with init_from, how the position embedding is resized to another grid;
        None is the checkpoint's own method, `zoom` for the paper's (see models/posembed.py).
      model.only: with init_from, patterns of the keys to read of a file that holds more than one
        model, such as `model_ema.*`; * is any text.
      model.ignore: with init_from, patterns of keys to leave out, such as `text_model.*`.
      model.fresh: with init_from, patterns of the model's parameters that are drawn anew, such as
        `pos_embed` (big_vision's dont_load); `inspect` lists their names.
      seed: seed of initialisation, order and augmentation.
      total_steps: length of the run in steps.
      total_epochs: length of the run in passes over the training images.
      total_examples: length of the run in images.
      init_from: weights to start from: anything that `vit_jax.load` reads, such as a run folder.
      objective: the loss: `softmax`, `sigmoid` for images with several labels, `distill` to learn
        from another model (section `distill`), `segmentation` for masks, the class of each pixel,
        `detection` for boxes around objects, or masked patch prediction of the mean colour, of 4x4
        pixels or of all pixels of a patch.
      precision: dtype of the computation; parameters are always float32.
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
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    precision: str = "float32"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    stop: StopConfig = dataclasses.field(default_factory=StopConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)

    def __post_init__(self):
        for name, value, least in (
            ("batch_size", self.batch_size, 1),
            ("eval.batch_size", self.eval.batch_size, 1),
            ("eval.every", self.eval.every, 0),
            ("checkpoint.every", self.checkpoint.every, 0),
            ("checkpoint.every_minutes", self.checkpoint.every_minutes, 0),
            ("checkpoint.keep", self.checkpoint.keep, 1),
            ("log.every", self.log.every, 0),
            ("seed", self.seed, 0),
        ):
            if value is not None and not value >= least:
                raise UserError(f"{name} is {value}; it must be at least {least}")
        for name, value, known in (
            ("objective", self.objective, OBJECTIVES),
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
        for name in (*self.init_keys, *(["fresh"] if self.model.get("fresh") else [])):
            if self.init_from is None:
                raise UserError(
                    f"model.{name} chooses keys of init_from, which is not set: set it, or leave "
                    f"model.{name} out"
                )

        if self.model.get("fresh") and self.model.get("lora"):
            raise UserError(
                "model.fresh draws parameters anew that model.lora would freeze: leave one out"
            )
        if self.stop.patience and self.stop.metric is None and self.checkpoint.best is None:
            raise UserError("stop.patience needs a metric: set stop.metric, such as val/accuracy")
        self.distill.check(self.objective, self.augment)
        if self.segments or self.detects:
            self._check_places()
        if self.detects:
            self._check_detection()
        if not self.segments and self.eval.windows != "none":
            raise UserError(
                f"eval.windows is {self.eval.windows}, and objective {self.objective} is of whole "
                "images (windows are for segmentation): leave it out"
            )
        if not self.segments and self.augment.dice:
            raise UserError(
                f"augment.dice is for masks, which objective {self.objective} does not learn: set "
                "--config.objective=segmentation, or leave it out"
            )
        if not self.classifies:
            self._check_masked()
        elif (name := self.eval.views) and not self._evaluates_classes():
            raise UserError(
                f"eval.{name} is for evaluations that classify, of which there is none: set "
                "data.val, or leave it out"
            )
        if self.data.train is not None:
            self._check_repeats(self.data.train.repeats)

    def _evaluates_classes(self) -> bool:
        given = (isinstance(each, Classification) for each in self.eval.evaluators.values())
        return bool(self.data.val or self.data.test) or any(given)

    def _check_repeats(self, repeats: int) -> None:
        if self.batch_size % repeats:
            raise UserError(
                f"data.train.repeats is {repeats}, which does not divide batch_size "
                f"{self.batch_size}: make batch_size a multiple, such as "
                f"{max(self.batch_size // repeats, 1) * repeats}"
            )
        if self.augment.mixes and 1 < repeats == self.batch_size:
            raise UserError(
                f"data.train.repeats is {repeats}, as large as batch_size: mixup and cutmix would "
                "mix an image with itself"
            )

    def _check_places(self) -> None:
        """What is for whole images, and not for masks or boxes."""
        have, tells = ("masks", "the class of each pixel") if self.segments else ("boxes",) * 2
        for name in ("mixup", "cutmix"):
            if getattr(self.augment, name):
                raise UserError(
                    f"augment.{name} mixes the labels of whole images, and objective "
                    f"{self.objective} has {have}: set it to 0"
                )
        if name := self.eval.views:
            raise UserError(
                f"eval.{name} averages what a model says of whole images, and objective "
                f"{self.objective} tells {tells}: leave it out"
            )

    def _check_detection(self) -> None:
        for name in ("label_smoothing", "class_weights", "focal"):
            if getattr(self.augment, name):
                raise UserError(
                    f"augment.{name} is not for objective detection, whose loss is FCOS's (focal, "
                    "with gamma 2): leave it out"
                )

    def _check_masked(self) -> None:
        for name in ("mixup", "cutmix", "label_smoothing", "class_weights", "focal"):
            if getattr(self.augment, name):
                raise UserError(
                    f"augment.{name} is for classification: set it to 0 with objective "
                    f"{self.objective}, which reads no labels"
                )
        if name := self.eval.views:
            raise UserError(
                f"eval.{name} averages what a model says of classes, which objective "
                f"{self.objective} has not: leave it out"
            )
        for name, evaluator in self.eval.evaluators.items():
            if isinstance(evaluator, Classification):
                raise UserError(
                    f"eval.evaluators.{name} classifies, but a model of objective {self.objective} "
                    "has no classes: use fewshot, knn or probe, which read features"
                )

    @property
    def init_keys(self) -> dict[str, Any]:
        """Which keys of `init_from` are read, as arguments of `load`."""
        return {name: self.model[name] for name in CHOSEN if self.model.get(name)}

    @property
    def classifies(self) -> bool:
        """Whether the objective is about classes; masked patch prediction reads no labels."""
        return OBJECTIVES[self.objective].probabilities is not None

    @property
    def segments(self) -> bool:
        """Whether the objective is about the class of each pixel."""
        return OBJECTIVES[self.objective].masks

    @property
    def detects(self) -> bool:
        """Whether the objective is about boxes."""
        return OBJECTIVES[self.objective].boxes

    def check_trains(self) -> None:
        """Raises a UserError for a config that can only evaluate."""
        for name, value in (("data.train", self.data.train), ("optim", self.optim)):
            if value is None:
                raise UserError(f"{name} is not set: this config can evaluate, but not train")


def typed_keys(kind: Any, values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every key that a config may have, with its type, including those of its evaluators.

    Fewer keys come out only if `values` does not have a config's structure, which `unpack` refuses.
    """
    values = values if isinstance(values, dict) else {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner, name = not_none(hints[field.name]), f"{prefix}{field.name}"
        here = values.get(field.name)
        if name == "model":
            for key, value_type in MODEL_KEYS.items():
                yield from _typed_model_key(key, value_type)
        elif inner == dict[str, Evaluator]:
            for key, section in here.items() if isinstance(here, dict) else ():
                if isinstance(section, dict):
                    evaluator = evaluator_kind(key, section.get("type"))
                    yield from typed_keys(evaluator, section, f"{name}.{key}.")
        elif inner == dict[str, Group]:
            for key in here if isinstance(here, dict) else ():
                yield from typed_keys(Group, here[key], f"{name}.{key}.")
        elif dataclasses.is_dataclass(inner):
            yield from typed_keys(inner, here, f"{name}.")
        else:
            yield name, inner


def _typed_model_key(name: str, kind: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(kind):
        yield from typed_keys(kind, {}, f"model.{name}.")
    else:
        yield f"model.{name}", kind


def keys() -> list[str]:
    """Names of all keys of a config, such as "optim.lr", except those of evaluators."""
    return [name for name, _ in typed_keys(Config, {})]


def unpack(kind: Any, value: Any, path: str = "") -> Any:
    """Converts a (nested) ConfigDict or dict to the dataclass `kind`, checking names and types.

    Raises:
      UserError: an unknown key, a missing required key, or a value of another type.
    """
    where = path or "the config"
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    if value is None:
        return None
    kind = not_none(kind)
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"config {where} is {value!r}; expected a section with keys")
        fields = {f.name: f for f in dataclasses.fields(kind)}
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in fields:
                full = f"{path}.{key}".lstrip(".")
                raise UserError(f"unknown config key {full}; {_nearest_key(full, value, fields)}")
        inner = {k: unpack(hints[k], v, f"{path}.{k}".lstrip(".")) for k, v in value.items()}
        for name, field in fields.items():
            default = (field.default, field.default_factory)
            # An unfilled placeholder is None: the same as leaving the field out.
            if inner.get(name) is None and default != (dataclasses.MISSING,) * 2:
                if name in inner and field.default is not None:
                    del inner[name]
            elif inner.get(name) is None:
                raise UserError(f"config {f'{path}.{name}'.lstrip('.')} is not set")
        return kind(**inner)
    if origin is tuple:
        kinds, items = typing.get_args(kind), value if isinstance(value, (tuple, list)) else None
        if kinds[-1] is Ellipsis and items is None and type(value) in (int, float, str):
            items = (value,)
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
    if kind == dict[str, Group]:
        return {k: unpack(Group, v, f"{path}.{k}") for k, v in value.items() if v is not None}
    if origin is dict:
        given = {k: v for k, v in value.items() if v is not None}
        inner = {
            k: unpack(SECTIONS[k], v, f"{path}.{k}") for k, v in given.items() if k in SECTIONS
        }
        return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()} | inner
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if value is not None and type(value) is not kind:
        raise UserError(f"config {where} is {value!r}; expected {kind.__name__}")
    return value


def _nearest_key(name: str, values: dict[str, Any], fields: Iterable[str]) -> str:
    """Suggests what `name` in a section may have meant; a section only if the value is one."""
    section, _, last = name.rpartition(".")
    here = [f"{section}.{field}".lstrip(".") for field in fields]
    known = [*keys(), *here]
    if isinstance(values[last], dict):
        above = {key.rpartition(".")[0] for key in known} - {""}
        known = [key for key in here if key in above] or here
    return nearest(name, known)


def to_json(config: Config) -> str:
    """Serialises the whole config, including defaults, for `from_json`."""
    return json.dumps(dataclasses.asdict(config), indent=1)


def from_json(text: str) -> Config:
    """The inverse of `to_json`; raises a UserError for unknown keys or wrong values."""
    return unpack(Config, json.loads(text))


def read_config(workdir: epath.PathLike) -> Config:
    """Reads the config that a run folder was trained with."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} is no run folder: it has no config.json")
    try:
        return from_json(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged or of another version: {error}") from None


def flat(config: Config) -> dict[str, Any]:
    """All leaves of a config by name, such as "optim.lr": 0.001, as JSON types."""
    from flax.traverse_util import flatten_dict

    return flatten_dict(json.loads(to_json(config)), sep=".", keep_empty_nodes=False)


def is_resumable(name: str) -> bool:
    """Whether a run may be resumed with another value of this leaf."""
    return any(name == free or name.startswith(f"{free}.") for free in RESUMABLE)


def differences(old: Config, new: Config) -> list[str]:
    """Lists what keeps `new` from resuming a run of `old`, such as "optim.lr: 0.001 -> 0.01"."""
    old_flat, new_flat = flat(old), flat(new)
    names = [*old_flat, *(name for name in new_flat if name not in old_flat)]
    for name in SIDES:
        for values in (old_flat, new_flat):
            sides = values.get(name)
            sides = [sides] if isinstance(sides, int) else sides
            values[name] = sides * 2 if sides and len(sides) == 1 else sides
    return [
        f"{name}: {old_flat.get(name)!r} -> {new_flat.get(name)!r}"
        for name in names
        if old_flat.get(name) != new_flat.get(name) and not is_resumable(name)
    ]
