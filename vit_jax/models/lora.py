"""Low-rank adaptation (LoRA, arXiv 2106.09685): small trainable products beside frozen kernels."""

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from vit_jax.errors import UserError, nearest
from vit_jax.models.linear import linear

HEADS = ("head", "head_dist", "patch_head", "pyramid", "detector")
# Layers that take an adapter, and how many axes of their kernels are inputs.
LAYERS = {"qkv": 1, "out": 2, "fc1": 1, "fc2": 1}


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (LoRA, arXiv 2106.09685): a kernel W acts as W + alpha / rank A B.

    The model that it starts from is frozen, but for its head. A is normal with a variance of 1 /
    inputs, and B zero, so that a run begins at the model that it starts from.

    Attributes:
      rank: the rank of each adapter: A is [inputs rank] and B [rank outputs]. Q, K and V have one
        each, as in the paper.
      alpha: scale of the adapters, divided by the rank; None is the rank, a scale of 1.
      targets: the layers with an adapter: `qkv`, `out`, `fc1`, `fc2`, or patterns of their names in
        which * is any text, such as blocks/mlp/*. By default all four matrices of attention, the
        best choice in the paper's section 7.1.

    Raises:
      UserError: a value of another type, or out of range.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = ("qkv", "out")

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise UserError(f"model.lora.rank is {self.rank!r}; expected a whole number from 1 up")
        alpha = self.alpha
        if alpha is not None and (type(alpha) not in (int, float) or not 0 < alpha < math.inf):
            raise UserError(f"model.lora.alpha is {alpha!r}; expected a positive number")
        names = self.targets
        if not isinstance(names, tuple) or not all(isinstance(n, str) for n in names):
            raise UserError(f"model.lora.targets is {names!r}; expected names such as qkv, out")
        if not names:
            raise UserError("model.lora.targets names no layer: leave it out, or model.lora=None")

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank


def is_adapter(name: str) -> bool:
    """Whether a parameter of this path is of an adapter."""
    return name.endswith(("/lora_a", "/lora_b"))


def learns(name: str) -> bool:
    """Whether a parameter of a model with adapters learns: those of the adapters and the head."""
    return is_adapter(name) or name.startswith(tuple(f"{module}/" for module in HEADS))


def add_adapters(model: nnx.Module, lora: Lora, rngs: nnx.Rngs) -> None:
    """Gives adapters to the layers of a new model that `lora.targets` names.

    A kernel [d 3 heads k] has A [d 3 rank] and B [3 rank heads k], others [*inputs *outputs] have A
    [*inputs rank] and B [rank *outputs]; those of blocks have a leading depth axis.

    Raises:
      UserError: a target that names no layer, or a rank larger than a kernel's side.
    """
    layers = dict(_layers(model))
    chosen = {name for target in lora.targets for name in _matched(target, layers)}
    for name in sorted(chosen):
        layer, stacked = layers[name], int(name.startswith("blocks/"))
        depth, kernel = layer.kernel.shape[:stacked], layer.kernel.shape[stacked:]
        count, is_qkv = LAYERS[_last(name)], _last(name) == "qkv"
        inputs, parts, outputs = kernel[:count], kernel[1 : 1 + is_qkv], kernel[count + is_qkv :]
        sides = math.prod(inputs), math.prod(outputs)
        if lora.rank > min(sides):
            raise UserError(
                f"model.lora.rank is {lora.rank}, but the kernels of {name} are {sides[0]} x "
                f"{sides[1]}: the rank is at most the smaller side"
            )
        drawn = jax.random.normal(rngs.params(), (*depth, *inputs, *parts, lora.rank))
        layer.lora_a = nnx.Param(drawn * sides[0] ** -0.5)
        layer.lora_b = nnx.Param(jnp.zeros((*depth, *parts, lora.rank, *outputs)))
        layer.lora_scale = lora.scale


def _layers(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """The layers that can have an adapter, by path."""
    for path, module in nnx.iter_modules(model):
        name = "/".join(map(str, path))
        if _last(name) in LAYERS and hasattr(module, "kernel"):
            yield name, module


def _matched(target: str, layers: Mapping[str, Any]) -> list[str]:
    found = [n for n in layers if _last(n) == target or fnmatch.fnmatchcase(n, target)]
    if not found:
        raise UserError(
            f"model.lora.targets has {target!r}, which matches no layer; "
            f"{nearest(target, [*LAYERS, *layers])}"
        )
    return found


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def adapted(
    y: Float[Array, "b n *outputs"], x: Float[Array, "b n *inputs"], layer: Any
) -> Float[Array, "b n *outputs"]:
    """Adds the adapter of a layer, if it has one, to its output y for x: y + scale x A B."""
    if not hasattr(layer, "lora_a"):
        return y
    a, b = layer.lora_a[...].astype(x.dtype), layer.lora_b[...].astype(x.dtype)
    return y + linear(linear(x, a) * layer.lora_scale, b)


def adapted_qkv(
    parts: tuple[Float[Array, "b _ heads k"], ...],
    x: Float[Array, "b n d"],
    query: Float[Array, "b m d"] | None,
    layer: Any,
) -> tuple[Float[Array, "b _ heads k"], ...]:
    """`adapted` for Q, K and V, which have an adapter each; Q is of `query`, if given."""
    if not hasattr(layer, "lora_a"):
        return parts
    a, b = layer.lora_a[...].astype(x.dtype), layer.lora_b[...].astype(x.dtype)
    low = linear(x, a) * layer.lora_scale  # [b n 3 r]
    first = low if query is None else linear(query, a) * layer.lora_scale
    lows = (first, low, low)
    return tuple(y + linear(lows[i][:, :, i], b[i]) for i, y in enumerate(parts))


def merged(
    params: Mapping[str, Float32[np.ndarray, "..."]], lora: Lora
) -> dict[str, Float32[np.ndarray, "..."]]:
    """Adds adapters to their kernels: the parameters of the plain model, by path."""
    plain = {name: value for name, value in params.items() if not is_adapter(name)}
    for name, a in params.items():
        if name.endswith("/lora_a"):
            layer = name.removesuffix("/lora_a")
            kernel = plain[f"{layer}/kernel"]
            added = _product(layer, a, params[f"{layer}/lora_b"]).reshape(kernel.shape)
            plain[f"{layer}/kernel"] = kernel + np.float32(lora.scale) * added
    return plain


def _product(
    layer: str, a: Float32[np.ndarray, "..."], b: Float32[np.ndarray, "..."]
) -> Float32[np.ndarray, "..."]:
    """A B, as matrices of each block."""
    blocks = a.shape[:1] if layer.startswith("blocks/") else ()
    rank = a.shape[-1]
    if _last(layer) == "qkv":  # [*blocks 3 d r] and [*blocks 3 r heads*k]
        parts = a.shape[-2]
        product = np.swapaxes(a, -3, -2) @ b.reshape(*blocks, parts, rank, -1)
        return np.swapaxes(product, -3, -2)
    return a.reshape(*blocks, -1, rank) @ b.reshape(*blocks, rank, -1)
