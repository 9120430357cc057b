"""`ModelCard`, the metadata saved with weights, and `Report`, how a model was loaded."""

import dataclasses
import functools
import html
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.special
from etils import epath

from vit_jax.data.masks import Palette
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError, nearest
from vit_jax.models import posembed
from vit_jax.models.config import FAMILIES, SECTIONS, ModelConfig, ViTConfig, check_fields, pair
from vit_jax.writing import write_atomically

# Errors that malformed JSON may raise while a card is read.
BROKEN = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the outputs of a model trained with an objective mean.

    Attributes:
      probabilities: logits [k], float64 -> the probability of each of the k classes; None if the
        model has no classes, as in masked patch prediction.
      multi_label: whether each class is a question of its own, so that an image may have several.
      masks: whether each pixel has a class, and each patch logits.
      boxes: whether objects have boxes: each location of a pyramid has logits, distances to the
        edges of a box and one logit of its centre (see `checkpoints/detect.py`).
    """

    probabilities: Callable[[np.ndarray], np.ndarray] | None = None
    multi_label: bool = False
    masks: bool = False
    boxes: bool = False


# By name. Losses are in training/objectives.py, those of masks in training/segmentation.py, of
# boxes in training/detection.py, of corrupted patches in training/masking.py.
OBJECTIVES = {
    "softmax": Objective(scipy.special.softmax),
    "sigmoid": Objective(scipy.special.expit, multi_label=True),
    "distill": Objective(scipy.special.softmax),
    "segmentation": Objective(functools.partial(scipy.special.softmax, axis=-1), masks=True),
    "detection": Objective(scipy.special.expit, boxes=True),
    "masked_colour": Objective(),
    "masked_small": Objective(),
    "masked_pixels": Objective(),
}
_FAMILY_NAMES = {kind: name for name, kind in FAMILIES.items()}


def typed_config(fields: Mapping[str, Any], family: Any = "vit") -> ModelConfig:
    """Builds a config from JSON or a user's values, converting each value to its field's type.

    Raises:
      UserError: an unknown field, a value of another type, or sizes that do not fit together.
    """
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"family {family!r}; {nearest(str(family), FAMILIES)}")
    kind = FAMILIES[family]
    check_fields(kind, fields)
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    return kind(**{name: _typed(name, types[name], value) for name, value in fields.items()})


def family_of(config: ModelConfig) -> str:
    """The name under which a card stores the class of a config."""
    return _FAMILY_NAMES[type(config)]


def _typed(name: str, kind: Any, value: Any) -> Any:
    parts = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(part, int) and abs(part) >= 2**31 for part in parts):
        raise UserError(f"model.{name} is beyond all sizes")
    if name in ("image_size", "patch_size"):
        return pair(value, name)
    kind, _, optional = str(getattr(kind, "__name__", kind)).partition(" | ")
    if optional and value is None:
        return None
    if name == "resnet":
        return value  # of JSON, a list: checked and made a tuple by the config
    if name in SECTIONS:
        return _section(name, value)
    if kind == "float" and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value).__name__ != kind:
        raise UserError(f"model.{name} is {value!r}; expected {kind}")
    return value


def _section(name: str, value: Any) -> Any:
    """A field that is a dataclass itself, of JSON: `lora`, `rotary`."""
    kind = SECTIONS[name]
    if isinstance(value, kind):
        return value
    fields = {field.name: field for field in dataclasses.fields(kind)}
    needed = {key for key, field in fields.items() if field.default is dataclasses.MISSING}
    if not isinstance(value, Mapping) or not needed <= set(value) <= set(fields):
        raise UserError(
            f"model.{name} is {str(value)[:80]!r}; expected {', '.join(sorted(fields))}"
        )
    return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in value.items()})


def numbers(values: Any) -> Any:
    """Converts a JSON number, or nested lists of them, to floats; raises TypeError otherwise."""
    if isinstance(values, (list, tuple)):
        return tuple(numbers(value) for value in values)
    if type(values) not in (int, float):
        raise TypeError(f"{values!r} is no number")
    return float(values)


def _palette(values: Any, k: int) -> Palette | None:
    """Reads a palette from JSON; raises a ValueError if it is no colour for each class."""
    if values is None:
        return None
    levels = range(256)
    if len(values) != k or not all(
        len(colour) == 3 and all(type(x) is int and x in levels for x in colour)
        for colour in values
    ):
        raise ValueError("a palette that is no colour of 0 to 255 for each class")
    return tuple(tuple(colour) for colour in values)


def _category_ids(values: Any, k: int) -> tuple[int, ...] | None:
    """Reads ids from JSON; raises a ValueError if they are not one of its own for each class."""
    if values is None:
        return None
    if not all(type(value) is int for value in values) or not len({*values}) == len(values) == k:
        raise ValueError("category_ids that are not one number for each class")
    return tuple(values)


class Line(NamedTuple):
    """How one array was treated; `name` is our parameter, or the file's key if it was dropped."""

    name: str
    shape: tuple[int, ...]
    status: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """How a model was loaded or saved; `print` shows it as a table.

    Attributes:
      lines: one for each parameter, then one for each unused key of the file.
      facts: about the model: dialect, variant, grid, prefix tokens, pooling, GELU, ...
      assumed: what the file does not say, with the value assumed and why.
    """

    lines: tuple[Line, ...]
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    assumed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        text = [f"{name + ':':16}{value}" for name, value in self.facts.items()]
        text += [f"{'assumed:':16}{name} {value}" for name, value in self.assumed.items()]
        text.append("")
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True))
            text.append("  ".join(cells).rstrip())
        return "\n".join(text)

    def _repr_html_(self) -> str:
        """The same in a notebook, with the parameters folded."""
        head, *rows = [[html.escape(cell) for cell in row] for row in self._rows()]
        facts = {**self.facts, **{f"assumed {name}": what for name, what in self.assumed.items()}}
        summary = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(what))}</td></tr>"
            for name, what in facts.items()
        )
        heads = "".join(f"<th>{cell}</th>" for cell in head)
        body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
        return (
            f"<table>{summary}</table><details><summary>{len(rows)} parameters</summary>"
            f"<table><tr>{heads}</tr>{body}</table></details>"
        )

    def _rows(self) -> list[tuple[str, str, str, str]]:
        rows = [(n, "x".join(map(str, s)) or "()", status, key) for n, s, status, key in self.lines]
        return [("parameter", "shape", "status", "in the file"), *rows]


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """Metadata of weights: the model's config, preprocessing and class names.

    `position_resize` is how the family resizes position embeddings (see models/posembed.py).
    `multi_label` is whether it was trained on images with any number of labels. `palette` has the
    colour (r, g, b) of each class of masks, and `category_ids` COCO's id of each class of boxes, if
    the data had some.
    """

    config: ModelConfig
    preprocess: Preprocess
    labels: tuple[str, ...]
    fingerprint: str = ""
    objective: str = "softmax"
    position_resize: str = "zoom"
    multi_label: bool = False
    palette: Palette | None = None
    category_ids: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Converts to plain values; adds grid and prefix tokens for other readers."""
        fields = {"family": family_of(self.config)}
        if isinstance(self.config, ViTConfig):
            fields |= {
                "grid": self.config.grid,
                "num_prefix_tokens": self.config.num_prefix_tokens,
            }
        return {**dataclasses.asdict(self), **fields}

    @classmethod
    def from_json(cls, card: Mapping[str, Any]) -> "ModelCard":
        """Reads a card from JSON; raises one of `BROKEN` if it is not a valid card."""
        config = typed_config(card["config"], card.get("family", "vit"))
        labels = card["labels"]
        if not isinstance(labels, (list, tuple)) or not all(isinstance(x, str) for x in labels):
            raise ValueError("labels that are no list of texts")
        if len(labels) != config.num_classes:
            raise ValueError(f"{len(labels)} label names for {config.num_classes} classes")
        fingerprint, objective = card["fingerprint"], card["objective"]
        method = card.get("position_resize", "zoom")
        for value, known in {objective: OBJECTIVES, method: posembed.RESIZE_METHODS}.items():
            if value not in known:
                raise ValueError(f"{value!r}; {nearest(value, known)}")
        if not isinstance(fingerprint, str):
            raise ValueError(f"fingerprint {fingerprint!r}")
        several = card.get("multi_label", False)
        if not isinstance(several, bool):
            raise ValueError(f"multi_label {several!r}")
        fields = {**card["preprocess"], "image_size": config.image_size}
        if fields.get("in_channels") != config.in_channels:
            raise ValueError("preprocessing for another number of channels")
        for name in ("crop", "mean", "std"):
            if name in fields:
                fields[name] = numbers(fields[name])
        return cls(
            config,
            Preprocess(**fields),
            tuple(labels),
            fingerprint,
            objective,
            method,
            several,
            _palette(card.get("palette"), len(labels)),
            _category_ids(card.get("category_ids"), len(labels)),
        )

    def write(self, workdir: epath.PathLike) -> None:
        """Writes WORKDIR/model/model.json."""
        path = epath.Path(workdir) / "model" / "model.json"
        write_atomically(path, json.dumps(self.to_json(), indent=1))

    @classmethod
    def read(cls, workdir: epath.PathLike) -> "ModelCard":
        """Reads WORKDIR/model/model.json.

        Raises:
          UserError: there is none, or it is damaged.
        """
        path = epath.Path(workdir) / "model" / "model.json"
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{workdir} is no run folder: it has no model/model.json. Expected the --workdir "
                "of a training run"
            ) from None
        except BROKEN as error:
            raise UserError(f"{path} is damaged or of another version: {error!r}") from None
