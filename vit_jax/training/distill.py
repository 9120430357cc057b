"""Distillation: a model, the student, learns from the logits of another one, its teacher.

Soft targets (arXiv 1503.02531) or hard ones, for which the student may have a distillation token
with a head of its own (DeiT, arXiv 2012.12877). Teacher and student see the same pixels, after
crop, flip and mixing (arXiv 2106.05237).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vit_jax.checkpoints.card import OBJECTIVES, ModelCard
from vit_jax.checkpoints.fit import place
from vit_jax.checkpoints.opened import Opened
from vit_jax.data import classes
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError, nearest
from vit_jax.models.config import ModelConfig
from vit_jax.models.create import merged, structure
from vit_jax.models.stack import Layout
from vit_jax.training.objectives import Augment
from vit_jax.training.sharding import placement
from vit_jax.writing import write_atomically

KINDS = ("soft", "hard")
FILE = "teacher.json"
_TEXTS = ("teacher", "place", "file", "fingerprint")  # of the file, that are read
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601, as in transforms.to_channels


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The `distill` section: what a model of objective distill learns from.

    Attributes:
      teacher: the model to learn from: anything that `vit_jax.load` reads. It has the classes of
        the data, or more, and its own image size and preprocessing.
      kind: `soft`, the Kullback-Leibler divergence from the teacher's probabilities (arXiv
        1503.02531), or `hard`, the cross-entropy with its top class (arXiv 2012.12877).
      temperature: of soft: what the logits of both are divided by; the loss is multiplied by its
        square.
      weight: the share of the teacher's loss; the rest is that of the labels. 1 is the teacher
        alone (arXiv 2106.05237).
      only: patterns of the keys to read of a teacher's file that holds more than one model, such as
        `model_ema.*`, in which * is any text.
      ignore: patterns of keys to leave out of it.
    """

    teacher: str | None = None
    kind: str = "soft"
    temperature: float = 1.0
    weight: float = 0.5
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"distill.kind is {self.kind!r}; {nearest(self.kind, KINDS)}")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"distill.temperature is {self.temperature}; it must be above 0")
        if not 0 < self.weight <= 1:
            raise UserError(f"distill.weight is {self.weight}; it must be in (0, 1]")
        if self.kind == "hard" and self.temperature != 1:
            raise UserError(
                f"distill.temperature is {self.temperature}, but distill.kind hard has none: leave "
                "it out, or set distill.kind=soft"
            )

    def check(self, objective: str, augment: Augment) -> None:
        """Raises a UserError for settings that do not go with the objective or `augment`."""
        if objective != "distill":
            for field in dataclasses.fields(self):
                if (value := getattr(self, field.name)) != field.default:
                    raise UserError(
                        f"distill.{field.name} is {value!r}, but objective {objective} has no "
                        "teacher: set --config.objective=distill"
                    )
        elif self.teacher is None:
            raise UserError(
                "objective distill needs a teacher: set --config.distill.teacher to a run folder "
                "or a weight file"
            )
        elif self.weight == 1:
            for name in ("label_smoothing", "class_weights", "focal"):
                if getattr(augment, name):
                    raise UserError(
                        f"augment.{name} is for the loss of the labels, of which distill.weight=1 "
                        "leaves nothing: leave one of them out"
                    )


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher as a student sees it; its weights are not part of it.

    Attributes:
      settings: how the student learns from it.
      model: its config, in the student's compute dtype.
      preprocess: how it takes its images.
      columns: its class for each of the student's, in order; None where both are the same.
      token: whether the student has a head of its own to learn from it.
      opened: where its weights are; None if they are at hand.
      rule: how classes were matched, for messages.
    """

    settings: DistillConfig
    model: ModelConfig
    preprocess: Preprocess
    columns: tuple[int, ...] | None = None
    token: bool = False
    opened: Opened | None = None
    rule: str = ""

    @classmethod
    def of(cls, settings: DistillConfig, opened: Opened, student: ModelCard) -> "Teacher":
        """The teacher of a student; its weights are not read yet.

        Raises:
          UserError: it has no classes, or lacks some of the student's, or outputs that are no
            distribution over them; images that it cannot see; or a head that would not learn.
        """
        name, card = f"distill.teacher {settings.teacher}", opened.card
        if not card.labels:
            raise UserError(f"{name} has no classes: name a model that was trained to classify")
        how = OBJECTIVES[card.objective]
        if how.masks or how.boxes:
            raise UserError(
                f"{name} is of objective {card.objective}, which tells "
                f"{'classes of pixels' if how.masks else 'boxes'}: name a model that was trained "
                "to classify"
            )
        if OBJECTIVES[card.objective].multi_label:
            raise UserError(
                f"{name} is of objective {card.objective}, which answers each class by itself: "
                "expected a model of objective softmax"
            )
        if card.preprocess.max_patches is not None:
            raise UserError(
                f"{name} takes images of any shape, and a teacher sees the student's images, all "
                "of one: expected a model without max_patches"
            )
        ours, theirs = student.config.in_channels, card.config.in_channels
        if ours != theirs and {ours, theirs} != {1, 3}:
            raise UserError(
                f"{name} takes images of {theirs} channels, and the model those of {ours}: "
                "expected as many, or 1 and 3"
            )
        token = getattr(student.config, "distillation", "none") == "head"
        if token and settings.weight == 1:
            raise UserError(
                "distill.weight is 1, but with model.distillation=head the class head learns from "
                "labels alone: lower it, such as to 0.5, or leave model.distillation out"
            )
        columns, rule = matched(name, student.labels, card.labels)
        model = dataclasses.replace(card.config, dtype=student.config.dtype)
        return cls(settings, model, card.preprocess, columns, token, opened, rule)

    def abstract(self, mesh: Mesh) -> Any:
        """Shapes, types and shardings of its parameters: placed as the student's are."""
        _, shapes = structure(self.model)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            placement(shapes, mesh),
        )

    def read(self, mesh: Mesh) -> tuple[Any, str]:
        """Reads its parameters onto the mesh; also returns a fingerprint of weights and classes."""
        card = self.opened.card
        seen = (card.labels, card.config.image_size, card.preprocess.mean, card.preprocess.std)
        digest = hashlib.blake2b(repr(seen).encode(), digest_size=8)

        def read(name: str) -> np.ndarray:
            value = self.opened.read(name)
            digest.update(np.ascontiguousarray(value))
            return value

        opened = dataclasses.replace(self.opened, read=read)
        params, _ = place(opened, self.model, shardings=lambda shapes: placement(shapes, mesh))
        return params, digest.hexdigest()

    def inputs(
        self, images: Float[Array, "b h w c"], preprocess: Preprocess
    ) -> Float[Array, "b th tw tc"]:
        """The student's images, normalised by its `preprocess`, as the teacher takes them.

        They are resized by antialiased bilinear interpolation where the sizes differ; grey becomes
        RGB by repetition, and RGB grey by luminance.
        """
        pixels, channels = preprocess.pixels_of(images), self.model.in_channels
        if channels != pixels.shape[-1]:
            grey = pixels if channels == 3 else (pixels * np.float32(_LUMINANCE)).sum(-1)[..., None]
            pixels = jnp.repeat(grey, channels, axis=-1)
        shape = (pixels.shape[0], *self.model.image_size, channels)
        return self.preprocess.normalise(jax.image.resize(pixels, shape, "linear"))

    def logits(
        self,
        params: Any,
        images: Float[Array, "b h w c"],
        preprocess: Preprocess,
        layout: Layout | None = None,
    ) -> Float[Array, "b k"]:
        """Its logits for the student's classes, of the student's images; without gradient."""
        graphdef, _ = structure(self.model)
        with jax.named_scope("teacher"):
            model = merged(graphdef, jax.lax.stop_gradient(params), layout)
            logits = model(self.inputs(images, preprocess), layout=layout)
            return logits if self.columns is None else logits[:, np.array(self.columns)]

    def loss(self, logits: Float[Array, "b k"], teacher: Float[Array, "b k"]) -> Float[Array, " b"]:
        """The loss of a student's logits against the teacher's, by `distill.kind`."""
        if self.settings.kind == "hard":
            return hard(logits, teacher)
        return soft(logits, teacher, self.settings.temperature)

    def combined(
        self, labels: Float[Array, " b"], teacher: Float[Array, " b"]
    ) -> Float[Array, " b"]:
        """The losses of labels and teacher, by `distill.weight`."""
        return (1 - self.settings.weight) * labels + self.settings.weight * teacher

    def __str__(self) -> str:
        facts, (h, w) = self.opened.facts, self.model.image_size
        variant = facts["variant"].removeprefix("custom, ")
        return f"{facts['file']}; {variant}, {h}x{w} pixels; {self.rule}"


def soft(
    logits: Float[Array, "b k"], teacher: Float[Array, "b k"], temperature: float
) -> Float[Array, " b"]:
    """T^2 KL(teacher || student), of the probabilities at temperature T (arXiv 1503.02531)."""
    ours, theirs = (
        jax.nn.log_softmax(each.astype(jnp.float32) / temperature) for each in (logits, teacher)
    )
    return temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)


def hard(logits: Float[Array, "b k"], teacher: Float[Array, "b k"]) -> Float[Array, " b"]:
    """Cross-entropy with the teacher's top class (arXiv 2012.12877, section 4)."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), teacher.argmax(axis=-1)
    )


def matched(
    name: str, labels: Sequence[str], theirs: Sequence[str]
) -> tuple[tuple[int, ...] | None, str]:
    """The teacher's class for each of the student's `labels` (see `classes.match`), and the rule.

    None is all of the teacher's, in order.

    Raises:
      UserError: a class that the teacher lacks or has twice; or numbers for names, of which a
        teacher of more classes may mean others.
    """
    counts = f"{name} has {len(theirs)} classes, the model {len(labels)}"
    try:
        found = classes.match(labels, theirs)
    except UserError:
        known = {classes.plain(each) for each in theirs}
        lacks = [each for each in labels if classes.plain(each) not in known]
        shown = ", ".join(map(repr, lacks[:3] or labels[:3]))
        shown += f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""
        what = "does not have" if lacks else "cannot be told from its names which are"
        raise UserError(
            f"{counts}, and it {what} {shown}, but {', '.join(map(repr, theirs[:3]))}"
            f"{', ...' if len(theirs) > 3 else ''}: fine-tune the teacher on the same classes"
        ) from None
    more = len(theirs) > len(labels)
    if more and all(each.isdecimal() for each in labels):
        raise UserError(
            f"{counts}, which are numbers, so that it is not known which of the teacher's they "
            "are: name the model's by data.train.classes=FILE"
        )
    if more:
        rule = f"{len(labels):,} of its {len(theirs):,} classes, {found.rule}"
    else:
        rule = f"{len(theirs):,} classes, {found.rule}"
    same = not more and found.classes == tuple(range(len(theirs)))
    return None if same else found.classes, rule if same or more else f"{rule}, reordered"


def open_teacher(
    settings: DistillConfig,
    opens: Callable[..., Opened],
    workdir: epath.PathLike | None = None,
) -> Opened | None:
    """Opens the teacher, if there is one.

    Args:
      workdir: of a run that began: a teacher of the same name is opened where the run found it,
        from whatever folder the command is given.

    Raises:
      UserError: there is no model there; or the run folder does not say what its teacher was.
    """
    if settings.teacher is None:
        return None
    where = settings.teacher
    if workdir is not None:
        record = _record(workdir)
        if record["teacher"] == where and epath.Path(record["place"]).exists():
            where = record["place"]
    try:
        return opens(where, only=settings.only, ignore=settings.ignore)
    except UserError as error:
        raise UserError(f"distill.teacher: {error}") from None


def write(workdir: epath.PathLike, teacher: Teacher, fingerprint: str) -> None:
    """Writes teacher.json: what the teacher of a run is, for `check`."""
    path, facts = teacher.settings.teacher, teacher.opened.facts
    local = os.path.abspath(os.path.expanduser(path))
    record = {
        "teacher": path,
        "place": local if os.path.exists(local) else path,
        "file": facts["file"],
        "step": teacher.opened.step,
        "variant": facts["variant"],
        "classes": teacher.rule,
        "fingerprint": fingerprint,
    }
    write_atomically(epath.Path(workdir) / FILE, json.dumps(record, indent=1))


def check(workdir: epath.PathLike, teacher: Teacher, fingerprint: str) -> None:
    """Raises a UserError unless the teacher is the one that the run began with."""
    before = _record(workdir)
    if before["fingerprint"] != fingerprint:
        raise UserError(
            f"distill.teacher {teacher.settings.teacher} changed since {os.fspath(workdir)} began "
            f"(from {before['file']}, fingerprint {before['fingerprint']}, to "
            f"{teacher.opened.facts['file']}, {fingerprint}): restore it, set distill.teacher to "
            "where the same weights are, such as RUN/checkpoints/STEP, or name another --workdir"
        )


def _record(workdir: epath.PathLike) -> Mapping[str, Any]:
    path = epath.Path(workdir) / FILE
    try:
        record = json.loads(path.read_text())
        if not all(isinstance(record[name], str) for name in _TEXTS):
            raise ValueError("expected texts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}, which says what the run's teacher was, is missing or damaged ({error!r}): "
            "restore it, or name another --workdir"
        ) from None
    return record
