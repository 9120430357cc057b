"""Which parameters learn, and how fast: frozen ones, layer-wise decay of the rate, groups."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.keys import parameters
from vit_jax.errors import UserError
from vit_jax.models.lora import HEADS, is_adapter, learns
from vit_jax.training.optim import OptimConfig, is_decayed

# Names for what is frozen most: all parameters but those of these modules.
BUT = {"all_but_head": HEADS, "backbone": (*HEADS, "pre_logits", "attention_pool")}


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The parameters that learn; the others are frozen.

    They are a nested dict like that of all parameters, without those that are frozen as a whole.
    Of a stacked parameter [depth ...] whose first blocks are frozen, they have the other rows.

    Attributes:
      frozen: by name, such as "blocks/mlp/fc1/kernel", how many leading rows are frozen; None is
        all of it. Names that are not there learn as a whole.
      blocks: the number of first blocks of which nothing learns.
    """

    frozen: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    blocks: int = 0

    def select(self, params: Any) -> Any:
        """What learns of a tree like the parameters'; scalars stand for all rows of a leaf."""
        if not self.frozen:
            return params
        flat = {}
        for name, leaf in flatten_dict(params, sep="/").items():
            rows = self.frozen.get(name, 0)
            if rows is not None:
                flat[name] = leaf[rows:] if rows and np.ndim(leaf) else leaf
        return unflatten_dict(flat, sep="/")

    def combine(self, params: Any, learned: Any) -> Any:
        """All parameters: `params`, with those that learn replaced by `learned`."""
        if not self.frozen:
            return learned
        flat, new = flatten_dict(params, sep="/"), flatten_dict(learned, sep="/")
        for name, leaf in new.items():
            rows = self.frozen.get(name, 0)
            old = jax.lax.stop_gradient(flat[name])
            flat[name] = jax.lax.dynamic_update_slice_in_dim(old, leaf, rows, 0) if rows else leaf
        return unflatten_dict(flat, sep="/")

    def optimizer(self, inner: optax.GradientTransformation) -> optax.GradientTransformation:
        """`inner`, the optimiser of what learns, made to initialise from all parameters."""
        return inner._replace(init=lambda params: inner.init(self.select(params)))

    def sizes(self, params: Any) -> tuple[int, int]:
        """The number of parameters that learn, and of all."""
        learned = jax.eval_shape(self.select, params)
        return tuple(
            sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
            for tree in (learned, params)
        )


def trainable(freeze: Sequence[str], params: Any) -> Trainable:
    """Reads `optim.freeze` for a model with these parameters (arrays or shapes).

    Each entry is a key of `BUT`, "blocks[:N]", or a pattern of names in which * is any text, such
    as "patch_embed/*". Of a model with adapters (LoRA) nothing but them and the head learns.

    Raises:
      UserError: an entry that matches no parameter, or nothing is left to learn.
    """
    leaves = flatten_dict(params, sep="/")
    frozen: dict[str, int | None] = {}
    if any(map(is_adapter, leaves)):
        frozen = {name: None for name in leaves if not learns(name)}
    for entry in freeze:
        for name, rows in _matched(entry, leaves):
            old = frozen.get(name, 0)
            frozen[name] = None if None in (rows, old) else max(rows, old)
    if set(frozen) == set(leaves) and not any(rows is not None for rows in frozen.values()):
        raise UserError(f"optim.freeze {tuple(freeze)} leaves nothing to learn: freeze less")
    stacked = [name for name in leaves if name.startswith("blocks/")]
    whole = [
        leaves[name].shape[0] if frozen.get(name, 0) is None else frozen.get(name, 0)
        for name in stacked
    ]
    return Trainable(frozen, min(whole, default=0))


def check_learns(config: OptimConfig, params: Any) -> None:
    """Raises a UserError if all adapters (LoRA), or all that a group names, are frozen."""
    leaves = flatten_dict(params, sep="/")
    fixed = {name for name, rows in trainable(config.freeze, params).frozen.items() if rows is None}
    adapters = set(filter(is_adapter, leaves))
    if adapters and adapters <= fixed:
        raise UserError(
            f"optim.freeze {config.freeze} freezes all adapters of model.lora: leave one of the "
            "two out"
        )
    for key, group in config.groups.items():
        if fixed.issuperset(parameters(f"optim.groups.{key}.match", group.match, leaves)):
            raise UserError(
                f"optim.groups.{key}.match is {group.match!r}, of which nothing learns with "
                f"{'model.lora' if adapters else 'optim.freeze'}: leave the group out"
            )


def _matched(entry: str, leaves: Mapping[str, Any]) -> Iterator[tuple[str, int | None]]:
    """The parameters that an entry of `optim.freeze` freezes, with the number of their rows."""
    if entry in BUT:
        kept = tuple(f"{module}/" for module in BUT[entry])
        yield from ((name, None) for name in leaves if not name.startswith(kept))
        return
    if entry.startswith("blocks["):
        stacked = {name: leaf for name, leaf in leaves.items() if name.startswith("blocks/")}
        found = re.fullmatch(r"blocks\[:(\d+)\]", entry)
        depth = next(iter(stacked.values())).shape[0] if stacked else 0
        if not found or not 0 < int(found[1]) <= depth:
            what = f"1 to {depth}, as the model has" if depth else "blocks; the model has none"
            raise UserError(f"optim.freeze has {entry!r}; expected blocks[:N] with N of {what}")
        rows = int(found[1])
        yield from ((name, None if rows == depth else rows) for name in stacked)
        return
    yield from ((name, None) for name in parameters("optim.freeze", entry, leaves, also=BUT))


def rates(config: OptimConfig, params: Any, branches: int = 1) -> tuple[Any, Any] | None:
    """Factors of the learning rate and weight decays, in two trees like the parameters'.

    A leaf is a number, or of a stacked parameter [depth 1 ...]; `branches` blocks are one layer.
    None where the config has neither layer_decay nor groups.

    Raises:
      UserError: layer_decay of a model without blocks, or a group that matches no parameter, or
        one of another group.
    """
    if config.layer_decay is None and not config.groups:
        return None
    leaves = flatten_dict(params, sep="/")
    stacked = [leaf.shape[0] for name, leaf in leaves.items() if name.startswith("blocks/")]
    if config.layer_decay is not None and not stacked:
        raise UserError("optim.layer_decay is for models with blocks: a ResNet has none")
    factors: dict[str, Any] = dict.fromkeys(leaves, 1.0)
    if config.layer_decay is not None:
        for name, leaf in leaves.items():
            distance = stacked[0] // branches + 1 - layer(name, stacked[0], branches)
            factor = np.float32(config.layer_decay) ** np.asarray(distance, np.float32)
            shape = (-1,) + (1,) * (len(leaf.shape) - 1) if factor.ndim else ()
            factors[name] = factor.reshape(shape)
    decays = {name: config.weight_decay * is_decayed(config, name) for name in leaves}
    owner: dict[str, str] = {}
    for key, group in config.groups.items():
        for name in parameters(f"optim.groups.{key}.match", group.match, leaves):
            if name in owner:
                raise UserError(f"optim.groups: {owner[name]} and {key} both match {name}")
            owner[name] = key
            factors[name] = factors[name] * np.float32(group.rate)
            if group.weight_decay is not None:
                decays[name] = group.weight_decay
    return unflatten_dict(factors, sep="/"), unflatten_dict(decays, sep="/")


def layer(name: str, depth: int, branches: int = 1) -> int | np.ndarray:
    """The layer of a parameter for `layer_decay`, as in BEiT and MAE.

    0 is the embedding, i + 1 block i (for a stacked parameter all of them, int [depth]), and
    depth + 1 what comes after the blocks, and a position bias that they share. Blocks of as many
    `branches` are one layer.
    """
    if name.startswith("blocks/"):
        return 1 + np.arange(depth) // branches
    last = ("norm", "relative_bias", "attention_pool", "pre_logits", *HEADS)
    return depth // branches + 1 if name.partition("/")[0] in last else 0
