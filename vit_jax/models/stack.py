"""Runs the blocks of a model: `lax.scan` or a loop, rematerialisation, captured intermediates."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from vit_jax.compiler import target
from vit_jax.errors import UserError, nearest
from vit_jax.models.config import ModelConfig

CAPTURES = ("patches", "tokens", "attention", "encoded", "pooled", "pre_logits")


class Captures:
    """Collects the intermediates that a caller asked for by name; others are never computed."""

    def __init__(self, names: Iterable[str] = ()):
        self.names = frozenset((names,) if isinstance(names, str) else names)
        self.values: dict[str, Array] = {}
        for name in self.names - set(CAPTURES):
            raise UserError(f"nothing named {name!r} to capture; {nearest(name, CAPTURES)}")

    def __call__(self, name: str, value: Callable[[], Array]) -> None:
        """Keeps `value()` under `name` if it was asked for."""
        if name in self.names:
            self.values[name] = value()


@runtime_checkable
class Layout(Protocol):
    """Where arrays are on a mesh of devices; all that a model knows about sharding."""

    def params(self, params: dict[str, Any]) -> dict[str, Any]:
        """Takes the parameters of one block as stored; returns them as used (gathered)."""

    def activations(self, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Constrains the sharding of the activations between blocks."""


# Cheap to recompute compared with the memory they take, and the parameters that a layout gathers
# for one block. Scanned, a block of Ti/16 keeps 15 MB for 8 images in place of 51.
_CHEAP = frozenset(
    "add sub mul div neg max min square integer_pow one_minus_square select_n tanh erf erfc "
    "logistic convert_element_type reshape broadcast_in_dim squeeze expand_dims transpose slice "
    "split concatenate pad copy sharding_constraint linear_call".split()
)


def _costly(primitive: Any, *_: Any, **params: Any) -> bool:
    """Remat policy: saves products, sums and exponentials, recomputes elementwise operations.

    A function with a custom derivative, which saves what it needs, is recomputed, too, unless it
    contains products.
    """
    inside = _inside(primitive, params)
    if inside is not None:
        return any(each.primitive.name == "dot_general" for each in inside)
    return primitive.name not in _CHEAP


def _products(primitive: Any, *args: Any, **params: Any) -> bool:
    """Remat policy: saves the results of products and convolutions with kernels."""
    inside = _inside(primitive, params)
    if inside is not None:
        return any(_products(each.primitive, **each.params) for each in inside)
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name == "conv_general_dilated" or dots(primitive, *args, **params)


def _inside(primitive: Any, params: dict[str, Any]) -> list[Any] | None:
    """The equations inside a function with a custom derivative; None for anything else."""
    jaxpr = params.get("call_jaxpr")
    own = primitive.name.startswith("custom_vjp_call") and jaxpr is not None
    return jaxpr.eqns if own else None


_REMAT = {
    "none": _costly,
    "dots": _products,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def run_block(
    body: Callable[..., tuple[Array, Any]],
    x: Float[Array, "b ..."],
    params: dict[str, Any],
    config: ModelConfig,
    layout: Layout | None,
    *,
    depth: int | None = None,
    frozen: int = 0,
) -> tuple[Float[Array, "b ..."], Any]:
    """Runs `body(x, params, index)` once, or `depth` times over the slices of stacked parameters.

    Applies the parameter layout and the rematerialisation of `config.remat` to each call. Returns
    the last x, and the body's second outputs, stacked along the depth. Of the first `frozen` slices
    no gradient is computed.
    """

    def step(x, inputs):
        params, index = inputs
        if layout is not None:
            params, x = layout.params(params), layout.activations(x)
        return body(x, params, index)

    scan = depth is not None and scanned(config.scan, depth)
    if scan or config.remat != "none" or layout is not None:  # else XLA sees all and can choose
        step = jax.checkpoint(step, policy=_REMAT[config.remat], prevent_cse=not scan)
    if depth is None:
        return step(x, (params, 0))
    if scan and 0 < frozen < depth:
        parts = []
        for first, last in ((0, frozen), (frozen, depth)):
            own = jax.tree.map(lambda leaf: leaf[first:last], params)  # noqa: B023
            own = own if first else jax.lax.stop_gradient(own)
            x, values = jax.lax.scan(step, x, (own, jnp.arange(first, last)))
            parts.append(values)
        return x, jax.tree.map(lambda *values: jnp.concatenate(values), *parts)
    if scan:
        return jax.lax.scan(step, x, (params, jnp.arange(depth)))
    # The gradient of split is one concatenation; that of indexing is a sum of padded arrays.
    slices = jax.tree.map(lambda leaf: jax.lax.split(leaf, (1,) * depth), params)
    beside = []
    for index in range(depth):
        own = jax.tree.map(lambda _, parts: parts[index][0], params, slices)  # noqa: B023
        own = jax.lax.stop_gradient(own) if index < frozen else own
        x, values = step(x, (own, index))
        beside.append(values)
    return x, jax.tree.map(lambda *values: jnp.stack(values), *beside)


def scanned(scan: bool | None, depth: int) -> bool:
    """Whether blocks are run by `lax.scan`; None chooses by device.

    A loop lets XLA optimise across blocks, but compiles longer: GPUs loop over up to 24 blocks.
    XLA's CPU backend recomputes a loop's residual stream again and again (see
    experiments/benchmarks), and on TPUs a loop takes minutes to compile.
    """
    return not (target() == "gpu" and depth <= 24) if scan is None else scan


def split_key(key: Key[Array, ""] | None, n: int) -> list[Key[Array, ""] | None]:
    """Splits a key into n; without a key, n times None, which means deterministic."""
    return [None] * n if key is None else list(jax.random.split(key, n))
