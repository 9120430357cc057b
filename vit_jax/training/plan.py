"""The plan of a run: its model, data, length and starting point.

It is made from a config, the training data, and the checkpoint to start from. The data flow is
config -> plan -> program (the compiled step) -> loop. `preflight` and `data` make the same plan
without running it. No weights are read, and nothing is allocated. Which checkpoint of a run folder
is whole is found by the loop (`Store.newest`) and passed in.
"""

import dataclasses
import logging
import os
from collections.abc import Sized

import numpy as np
from etils import epath

from vit_jax.checkpoints.card import OBJECTIVES, ModelCard
from vit_jax.checkpoints.families import fitted_preprocess
from vit_jax.checkpoints.opened import Opened, open_together
from vit_jax.data import classes
from vit_jax.data.contents import labels_of
from vit_jax.data.masks import MOST, Palette, default_palette
from vit_jax.data.order import Balance, Growth
from vit_jax.data.pipeline import BatchReader
from vit_jax.data.sources import Source
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ModelConfig
from vit_jax.models.create import structure
from vit_jax.training import growth, native
from vit_jax.training.config import DURATIONS, Config, differences, read_config
from vit_jax.training.distill import Teacher, open_teacher
from vit_jax.training.model import check_adapted, check_sizes, model_config, same_head
from vit_jax.training.objectives import class_weights
from vit_jax.training.phases import Phase, make_phases
from vit_jax.training.trainable import check_learns

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The properties of the training data that a plan depends on.

    `examples` is None for endless data. `multi_label`, `masks`, `palette`, `boxes` and
    `category_ids` are as in `Source`. `counts` has the images of each label, if that is known
    without reading them.
    """

    labels: tuple[str, ...]
    fingerprint: str = ""
    examples: int | None = None
    multi_label: bool = False
    masks: bool = False
    palette: Palette | None = None
    boxes: bool = False
    category_ids: tuple[int, ...] | None = None
    counts: tuple[int, ...] | None = None

    @classmethod
    def of(cls, source: Source) -> "TrainingData":
        """Those of an open source."""
        k, labels = len(source.label_names), labels_of(source)
        return cls(
            source.label_names,
            source.fingerprint,
            len(source) if isinstance(source, Sized) else None,
            getattr(source, "multi_label", False),
            getattr(source, "masks", False),
            getattr(source, "palette", None),
            getattr(source, "boxes", False),
            getattr(source, "category_ids", None),
            None
            if labels is None
            else tuple(np.bincount(labels[labels >= 0], minlength=k).tolist()),
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
      card: the model, its preprocessing and its classes.
      examples: in the training data; None if it is endless.
      resume_step: the checkpoint to resume from, if any.
      init: the model that a new run starts from, if any.
      keep_head: whether the head of `init` is kept.
      counts: the number of training images of each class; None if it is not known or needed.
      teacher: for objective distill, what the model learns from.
    """

    config: Config
    card: ModelCard
    examples: int | None = None
    resume_step: int | None = None
    init: Opened | None = None
    keep_head: bool = False
    counts: tuple[int, ...] | None = None
    teacher: Teacher | None = None

    @property
    def total_steps(self) -> int:
        """The length of the run in steps. Raises a UserError like `count_steps`."""
        return count_steps(self.config, self.examples)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the run. Raises a UserError like `make_phases`."""
        return make_phases(self.config.optim, self.total_steps)

    def with_model(self, model: ModelConfig) -> "Plan":
        """The same run with another model."""
        return dataclasses.replace(self, card=dataclasses.replace(self.card, config=model))

    def reader(self, source: Source) -> BatchReader:
        """Returns the reader of training batches.

        `source` must already have the classes of `card` (see `DataSets.with_labels`).
        """
        config = self.config
        return BatchReader.of(
            source,
            config.data.train,
            self.card.preprocess,
            seed=config.seed,
            on_corrupt=config.data.on_corrupt,
            balance=Balance.of(source, share) if (share := config.data.train.balance) else None,
            repeats=config.data.train.repeats,
            growth=self.growth,
            cache=config.data.cache,
            max_boxes=config.data.max_boxes,
        )

    @property
    def growth(self) -> Growth | None:
        """The sizes of the training images, if they grow. Raises a UserError for too few steps."""
        sides = self.config.augment.image_sizes
        return Growth(sides, self.total_steps) if sides else None

    @property
    def class_weights(self) -> tuple[float, ...] | None:
        """The weight of each class in the loss, by augment.class_weights; None for none."""
        how = self.config.augment.class_weights
        return None if how is None else class_weights(how, self.card.labels, self.counts)


def plan_run(
    config: Config,
    workdir: epath.PathLike,
    source: Source,
    resume_step: int | None,
    extend: bool = False,
) -> Plan:
    """Plans a run in a folder, which starts in one of three ways:

    1. Resume, if `resume_step` is given: config and data must be those of the run.
    2. Fine-tune, if `init_from` names a model: its head is replaced (paper, B.1.1) unless
       model.head=keep, or it is a run of ours with the same classes; its position embeddings are
       resized (section 3.2), and its preprocessing is taken at the new image size, with what
       data.val (or test, or train) sets otherwise.
    3. From scratch.

    Args:
      extend: whether a run may be resumed with a longer duration than it was begun with.

    Raises:
      UserError: the folder holds a run with another config or other data; or as `make_plan`.
    """
    data = TrainingData.of(source)
    if resume_step is None:
        init = None
        if config.init_from is not None:
            init = open_together(config.init_from, **config.init_keys)
        return make_plan(config, data, init, open_teacher(config.distill, open_together))
    begun = read_config(workdir)
    named, config = config.distill, _with_recorded_teacher(begun, config)
    changed = differences(begun, config)
    length = {name: getattr(config, name) for name in DURATIONS}
    if changed and not differences(dataclasses.replace(begun, **length), config):
        old, new = (count_steps(each, data.examples) for each in (begun, config))
        if not extend or new < old:
            longer = "to go on for longer, add --extend" if new > old else "a run cannot be cut"
            raise UserError(
                f"{workdir} holds a run of {old:,} steps, and now it is to have {new:,} "
                f"({'; '.join(changed)}): {longer}"
            )
        changed = []
    if changed:
        raise _another(workdir, changed)
    card = ModelCard.read(workdir)
    if card.fingerprint != data.fingerprint:
        raise UserError(
            f"the data of {config.data.train.source} changed since {workdir} began (fingerprint "
            f"{card.fingerprint} -> {data.fingerprint}): restore it, or name another --workdir"
        )
    counts = _counts(config, data, card.labels)
    opened = open_teacher(named, open_together, workdir)
    teacher = opened and Teacher.of(named, opened, card)
    return Plan(config, card, data.examples, resume_step, counts=counts, teacher=teacher)


def check_begun(workdir: epath.PathLike, begun: Config, config: Config) -> None:
    """Raises a UserError if a run is of another config, wherever its data and teacher are now."""
    changed = differences(begun, _with_recorded_teacher(begun, config))
    may = (*DURATIONS, *(f"data.{split}.source" for split in ("train", "val", "test")))
    if any(each.partition(":")[0] not in may for each in changed):
        raise _another(workdir, changed)


def _with_recorded_teacher(begun: Config, config: Config) -> Config:
    """The config with the name that a teacher had: its weights are compared (`distill.check`)."""
    old, new = begun.distill, config.distill
    if None in (old.teacher, new.teacher):
        return config
    return dataclasses.replace(config, distill=dataclasses.replace(new, teacher=old.teacher))


def _another(workdir: epath.PathLike, changed: list[str]) -> UserError:
    shown = [*changed[:5], f"and {len(changed) - 5} more"] if len(changed) > 6 else changed
    return UserError(
        f"{os.fspath(workdir)} holds a run of another config ({'; '.join(shown)}): give its own "
        "values to resume it, or name another --workdir"
    )


def make_plan(
    config: Config,
    data: TrainingData,
    init: Opened | None = None,
    teacher: Opened | None = None,
) -> Plan:
    """Plans a new run on `data`, from scratch or from `init`; for distillation, with a `teacher`.

    For masked patch prediction the model has no classes; otherwise it has those of the data, with
    the names in data.train.classes, or those of the head that is kept.

    Raises:
      UserError: the model does not fit the data, the objective or `init`.
    """
    _check_labels(config, data)
    base = init and init.card
    head = config.model.get("head") or ("keep" if init and _keeps_head(config, data, init) else "")
    labels, keep_head = _labels(config, data, base, head)
    model = model_config(config, base and base.config, len(labels), keep_head)
    method = config.model.get("position_resize") or (base.position_resize if base else "zoom")
    model = native.fitted(model, config, method)
    if base:
        check_sizes(model, base.config)
        check_adapted(model, init)
    if (optim := config.optim) is not None:
        check_learns(optim, structure(model)[1])
        if optim.probe and not init:
            raise UserError(
                "optim.probe trains the head of a trained model at first, and init_from names "
                "none: leave optim.probe out"
            )
    growth.check_sizes(config.augment.image_sizes, model)
    if model.num_classes != len(labels):
        what = config.data.train.source if config.classifies else f"objective {config.objective}"
        raise UserError(
            f"model.num_classes is {model.num_classes}, but {what} has {len(labels)} classes: "
            "leave model.num_classes out"
        )
    card = ModelCard(
        model,
        _preprocess(config, base, model),
        labels,
        data.fingerprint,
        config.objective,
        method,
        multi_label=data.multi_label and bool(labels),
        palette=_palette(config, data, labels),
        category_ids=_category_ids(config, data, labels),
    )
    if keep_head and "head" not in config.model:
        logger.info(
            "the head of init_from is kept, as it is a run of the same classes: "
            "--config.model.head=fresh makes a new one"
        )
    counts = _counts(config, data, labels)
    return Plan(
        config,
        card,
        data.examples,
        init=init,
        keep_head=keep_head,
        counts=counts,
        teacher=teacher and Teacher.of(config.distill, teacher, card),
    )


def _palette(config: Config, data: TrainingData, labels: tuple[str, ...]) -> Palette | None:
    """The colours of the model's classes, if the data has any."""
    if not config.segments or data.palette is None:
        return None
    colours = list(default_palette(len(labels)))  # of a kept head's other classes
    matched = classes.match(data.labels, labels, config.data.train.classes)
    for label, colour in zip(matched.classes, data.palette, strict=True):
        colours[label] = colour
    return tuple(colours)


def _category_ids(
    config: Config, data: TrainingData, labels: tuple[str, ...]
) -> tuple[int, ...] | None:
    """COCO's ids of the model's classes, if the data has one for each."""
    if not config.detects or data.category_ids is None:
        return None
    matched = classes.match(data.labels, labels, config.data.train.classes).classes
    if sorted(matched) != list(range(len(labels))):
        return None
    return tuple(data.category_ids[matched.index(label)] for label in range(len(labels)))


def _counts(config: Config, data: TrainingData, labels: tuple[str, ...]) -> tuple[int, ...] | None:
    """The images of each of the model's classes, if augment.class_weights needs them."""
    if config.augment.class_weights is None or data.counts is None or not labels:
        return None
    counts = [0] * len(labels)
    matched = classes.match(data.labels, labels, config.data.train.classes)
    for label, count in zip(matched.classes, data.counts, strict=True):
        counts[label] += count
    return tuple(counts)


def _check_labels(config: Config, data: TrainingData) -> None:
    """Raises a UserError if the objective cannot use the data's kind of labels."""
    name = f"data.train.source {config.data.train.source}"
    if data.masks != config.segments:
        raise UserError(
            f"{name} has masks for labels, which objective {config.objective} does not learn: set "
            "--config.objective=segmentation"
            if data.masks
            else f"{name} has no masks, which objective segmentation learns: name a source with "
            "masks, such as scenes:digits, or leave the objective out"
        )
    if data.boxes != config.detects:
        raise UserError(
            f"{name} has boxes for labels, which objective {config.objective} does not learn: set "
            "--config.objective=detection"
            if data.boxes
            else f"{name} has no boxes, which objective detection learns: name a source with "
            "boxes, such as coco:FILE.json or scenes:digits,labels=boxes"
        )
    if data.masks and len(data.labels) > MOST:
        raise UserError(
            f"{name} has {len(data.labels):,} classes, and masks tell at most {MOST} apart: merge "
            "some by data.train.classes"
        )
    if data.multi_label and config.classifies and not OBJECTIVES[config.objective].multi_label:
        raise UserError(
            f"{name} has several labels an image, of which objective {config.objective} would "
            "choose one: set --config.objective=sigmoid"
        )


def _keeps_head(config: Config, data: TrainingData, init: Opened) -> bool:
    """Whether a fine-tuning run keeps the head if its config does not say.

    It does if it starts from a run folder of ours that has the same head, objective and classes,
    by `classes.match`, all of them.
    """
    base = init.card
    if init.step is None or not base.labels or base.objective != config.objective:
        return False
    try:
        matched = classes.match(data.labels, base.labels, config.data.train.classes)
    except UserError:
        return False
    whole = sorted(matched.classes) == list(range(len(base.labels)))
    return whole and same_head(
        model_config(config, base.config, len(base.labels), True), base.config
    )


def _labels(
    config: Config, data: TrainingData, base: ModelCard | None, head: str
) -> tuple[tuple[str, ...], bool]:
    """The model's classes, and whether the head of `base` is kept."""
    keep_head = base is not None and head == "keep"
    if not config.classifies:
        # A patch head is only useful for the target that it was trained for.
        return (), keep_head and not base.labels and base.objective == config.objective
    train, keep_head = config.data.train, keep_head and bool(base.labels)
    try:
        if keep_head:
            classes.match(data.labels, base.labels, train.classes)
            return base.labels, True
        return classes.renamed(data.labels, train.classes)[1], False
    except UserError as error:
        kept = " (model.head=keep)" if keep_head else ""
        raise UserError(f"data.train ({train.source}){kept}: {error}") from None


def _preprocess(config: Config, base: ModelCard | None, model: ModelConfig) -> Preprocess:
    """The model's preprocessing; the same in evaluation and in `predict`.

    For segmentation and detection the whole image is seen, upright as masks and boxes are drawn.
    """
    preprocess = base.preprocess if base else Preprocess(model.image_size, model.in_channels)
    preprocess = fitted_preprocess(preprocess, model)
    if config.segments or config.detects:
        preprocess = dataclasses.replace(preprocess, aspect="squash", crop=1.0, exif=True)
    evaluated = config.data.val or config.data.test or config.data.train
    return evaluated.preprocess(preprocess)


def count_steps(config: Config, num_examples: int | None) -> int:
    """Number of steps of a run with `num_examples` training examples (None: endless).

    Raises:
      UserError: epochs of endless data, or a run of no steps.
    """
    if config.total_steps is not None:
        steps = config.total_steps
    elif config.total_epochs is not None:
        if num_examples is None:
            raise UserError(
                f"{config.data.train.source} is endless, so that there are no epochs: set "
                "total_steps or total_examples instead of total_epochs"
            )
        steps = round(config.total_epochs * num_examples / config.batch_size)
    else:
        steps = round(config.total_examples / config.batch_size)
    if steps < 1:
        raise UserError(_too_short(config, steps, num_examples))
    return steps


def _too_short(config: Config, steps: int, num_examples: int | None) -> str:
    """Explains why the run would have no steps."""
    name = next(name for name in DURATIONS if getattr(config, name) is not None)
    value, batch = getattr(config, name), config.batch_size
    if name == "total_steps" or value <= 0:
        return f"{name} is {value}; it must be above 0"
    text = f"{name}={value:g} in batches of batch_size={batch} comes to {steps} steps"
    if name == "total_epochs" and batch > num_examples:
        text = f"batch_size is {batch}, but data.train has {num_examples} examples: {text}"
    return f"{text}; lower batch_size, or set total_steps"
