"""`vit_jax.load`: from a path to a model, its preprocessing and its label names.

A run folder carries in `model/model.json` what its weights mean, written before the first step;
the weights are those of its newest checkpoint.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.store import Store, write_atomically
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models import posembed
from vit_jax.models.config import ViTConfig, pair
from vit_jax.models.vit import ViT, init_params, structure

Report = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class ModelRecord:
    """What weights mean: the model, its preprocessing, the names of its classes."""

    config: ViTConfig
    preprocess: Preprocess
    labels: tuple[str, ...]
    fingerprint: str = ""
    objective: str = "softmax"

    def write(self, workdir: epath.PathLike) -> None:
        """Writes WORKDIR/model/model.json. Grid and prefix tokens stand in it for other readers."""
        record = {
            **dataclasses.asdict(self),
            "grid": self.config.grid,
            "num_prefix_tokens": self.config.num_prefix_tokens,
        }
        folder = epath.Path(workdir) / "model"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "model.json", json.dumps(record, indent=1))

    @classmethod
    def read(cls, workdir: epath.PathLike) -> "ModelRecord":
        path = epath.Path(workdir) / "model" / "model.json"
        try:
            record = json.loads(path.read_text())
            return cls(
                ViTConfig(**record["config"]),
                Preprocess(
                    **{**record["preprocess"], "image_size": tuple(record["config"]["image_size"])}
                ),
                tuple(record["labels"]),
                record["fingerprint"],
                record["objective"],
            )
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{workdir} is no run folder: it has no model/model.json. Expected the --workdir "
                "of a training run"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged or of another version: {error!r}") from None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that is ready to use.

    Attributes:
      model: a `ViT`; `model(images)` takes [b h w c] of what `preprocess` returns.
      config: its ViTConfig.
      preprocess: a path, a Pillow image or uint8 pixels -> float32 [h w c].
      labels: the name of each class.
      report: what became of every parameter: (name, "kept"), "resized ..." or "fresh ...".
      step: of the checkpoint that the weights are from.
    """

    model: ViT
    config: ViTConfig
    preprocess: Preprocess
    labels: tuple[str, ...]
    report: Report
    step: int
    objective: str = "softmax"

    @functools.cached_property
    def _forward(self) -> Callable[[Any, Any], jax.Array]:
        graphdef = nnx.graphdef(self.model)
        return jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))

    def predict(self, images: Iterable[Any], topk: int = 5) -> Iterator[list[tuple[str, float]]]:
        """Yields the likeliest classes of each image, the first one first: [(name, probability)].

        Args:
          images: anything that `preprocess` takes.
          topk: how many classes to name; all of them, where there are fewer.
        """
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


def load(
    path: epath.PathLike,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    dtype: str | None = None,
) -> Loaded:
    """Loads a run folder: its newest whole checkpoint, and of that the running average, if any.

    Args:
      path: the --workdir of a training run.
      image_size: another (h, w) in pixels, or one number for a square: the position embedding is
        resized to its grid, as the paper does (section 3.2).
      num_classes: a fresh zero head for so many classes, in place of the trained one.
      dtype: what to compute in: "float32" or "bfloat16".

    Raises:
      UserError: no such folder, no checkpoint in it, or sizes that do not fit the model.
    """
    record, params, step = read_model(path)
    changes: dict[str, Any] = {}
    if image_size is not None:
        changes["image_size"] = pair(image_size, "image_size")
    if num_classes is not None:
        changes |= {"num_classes": num_classes, "representation_size": None}
    if dtype is not None:
        changes["dtype"] = dtype
    config = dataclasses.replace(record.config, **changes)
    head = "keep" if num_classes is None else "fresh"
    params, report = adapt(params, record.config, config, head=head)
    preprocess = dataclasses.replace(record.preprocess, image_size=config.image_size)
    names = record.labels if num_classes is None else tuple(str(i) for i in range(num_classes))
    model = nnx.merge(structure(config)[0], jax.tree.map(jnp.asarray, params))
    return Loaded(model, config, preprocess, names, report, step, record.objective)


def read_model(path: epath.PathLike) -> tuple[ModelRecord, dict[str, Any], int]:
    """Reads a run folder into its record, its parameters as NumPy arrays, and their step."""
    workdir = epath.Path(path)
    if not workdir.exists():
        raise UserError(f"there is no {os.fspath(path)!r} to load a model from")
    record = ModelRecord.read(workdir)
    store = Store(workdir)
    while True:
        step = store.newest()
        if step is None:
            raise UserError(f"{workdir} holds no checkpoint yet: the run has not saved one")
        try:
            weights = "ema" if "ema" in store.names(step) else "params"
            target = {weights: structure(record.config)[1]}
            return record, store.restore(step, target)[weights], step
        except (OSError, ValueError):
            if step in store.steps():
                raise
            # The run that is still training has replaced it meanwhile: there is a newer one.


def adapt(
    params: dict[str, Any],
    old: ViTConfig,
    new: ViTConfig,
    *,
    head: str = "keep",
    method: str = "zoom",
    seed: int = 0,
) -> tuple[dict[str, Any], Report]:
    """Fits parameters to another resolution or another head (paper, section 3.2 and B.1.1).

    Args:
      params: nested dict of NumPy arrays of the model `old`.
      head: `fresh` drops the head, and the hidden layer before it, for a zero linear layer;
        `keep` keeps both where the classes agree.
      method: how position embeddings are resized (see `posembed.resize`).
      seed: of parameters that the old model does not have.

    Returns:
      The new parameters, and what became of each.

    Raises:
      UserError: a parameter that is neither head nor position embedding has another shape.
    """
    flat_old = flatten_dict(params, sep="/")
    flat_new = flatten_dict(structure(new)[1], sep="/")
    replaced = ("head/", "pre_logits/") if head == "fresh" or _heads_differ(old, new) else ()
    fresh: dict[str, Any] | None = None
    out, report = {}, []
    for name, shape in flat_new.items():
        value = flat_old.get(name)
        if value is not None and not name.startswith(replaced):
            if name == "pos_embed" and old.grid != new.grid:
                prefix = old.num_prefix_tokens
                if prefix != new.num_prefix_tokens:
                    raise UserError(f"{prefix} prefix tokens became {new.num_prefix_tokens}")
                value = posembed.resize(value, old.grid, new.grid, prefix, method)
                fate = "resized {}x{} -> {}x{} ({})".format(*old.grid, *new.grid, method)
            else:
                fate = "kept"
            if value.shape != shape.shape:
                raise UserError(
                    f"parameter {name} is {list(value.shape)} in the checkpoint and "
                    f"{list(shape.shape)} in the model: only image_size and the head may change"
                )
        else:
            if fresh is None:
                fresh = flatten_dict(jax.jit(lambda: init_params(new, seed))(), sep="/")
            value, fate = np.asarray(fresh[name]), f"fresh {list(shape.shape)}"
        out[name] = value
        report.append((name, fate))
    report += [(name, "dropped") for name in flat_old if name not in flat_new]
    return unflatten_dict(out, sep="/"), report


def _heads_differ(old: ViTConfig, new: ViTConfig) -> bool:
    return (old.num_classes, old.representation_size) != (new.num_classes, new.representation_size)
