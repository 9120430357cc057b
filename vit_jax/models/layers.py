"""The layers of a Vision Transformer; parameters float32, computation in `config.dtype`."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from vit_jax.compiler import target
from vit_jax.errors import UserError, nearest
from vit_jax.models import positions
from vit_jax.models.attention import attend, attention_weights, backend_of, padding
from vit_jax.models.config import ModelConfig, ViTConfig
from vit_jax.models.elementwise import drop_path, dropout, gelu, normalised
from vit_jax.models.linear import linear, split_linear

CAPTURES = ("patches", "tokens", "attention", "encoded", "pooled", "pre_logits")


class Captures:
    """Collects the intermediates that a caller asked for by name; the others cost nothing."""

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
    """Puts things in their places on a mesh of devices, of which a model knows nothing else."""

    def params(self, params: dict[str, Any]) -> dict[str, Any]:
        """Takes the parameters of one block as they are kept; returns them as they are used."""

    def activations(self, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Returns what flows from block to block, in its place."""


# What costs next to nothing to compute anew beside the memory that keeping it takes, and what a
# layout gathered for one block. Scanned, a block of Ti/16 keeps 15 MB of 8 images instead of 51.
_CHEAP = frozenset(
    "add sub mul div neg max min square integer_pow one_minus_square select_n tanh erf erfc "
    "logistic convert_element_type reshape broadcast_in_dim squeeze expand_dims transpose slice "
    "split concatenate pad copy sharding_constraint linear_call".split()
)


def _costly(primitive: Any, *_: Any, **params: Any) -> bool:
    """Keeps products, sums and exponentials; what is element by element is computed anew.

    So is a function with a derivative of its own, which keeps what it needs, unless it multiplies.
    """
    inside = _inside(primitive, params)
    if inside is not None:
        return any(each.primitive.name == "dot_general" for each in inside)
    return primitive.name not in _CHEAP


def _products(primitive: Any, *args: Any, **params: Any) -> bool:
    """Keeps what kernels were multiplied with and convolved with."""
    inside = _inside(primitive, params)
    if inside is not None:
        return any(_products(each.primitive, **each.params) for each in inside)
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name == "conv_general_dilated" or dots(primitive, *args, **params)


def _inside(primitive: Any, params: dict[str, Any]) -> list[Any] | None:
    """The equations of a function with a derivative of its own; None of anything else."""
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
) -> tuple[Float[Array, "b ..."], Any]:
    """Runs `body(x, params, index)` once, or `depth` times over the slices of stacked parameters.

    Each time with its parameters where `layout` has them, and for the way back as `config.remat`
    says. Returns the last x, and what the body returns beside it, stacked along the depth.
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
    if scan:
        return jax.lax.scan(step, x, (params, jnp.arange(depth)))
    # Split, whose gradient is one concatenation: that of an index is a sum of padded arrays.
    slices = jax.tree.map(lambda leaf: jax.lax.split(leaf, (1,) * depth), params)
    beside = []
    for index in range(depth):
        own = jax.tree.map(lambda _, parts: parts[index][0], params, slices)  # noqa: B023
        x, values = step(x, (own, index))
        beside.append(values)
    return x, jax.tree.map(lambda *values: jnp.stack(values), *beside)


def scanned(scan: bool | None, depth: int) -> bool:
    """Whether blocks are run by `lax.scan`; None leaves it to the device.

    A loop lets XLA see across blocks, and takes it longer to compile: so on GPUs, up to 24 blocks
    are looped over. XLA's CPU backend computes a loop's residual stream again and again (see
    experiments/benchmarks), and for TPUs a loop compiles for minutes.
    """
    return not (target() == "gpu" and depth <= 24) if scan is None else scan


def check_images(images: Array | np.ndarray, config: ModelConfig) -> None:
    """Raises a UserError for images that are no floats, or of another size or layout."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"a model takes the normalised floats that .preprocess returns, not {images.dtype} "
            "images: run them through it"
        )
    expected = (*config.image_size, config.in_channels)
    if images.ndim == 4 and images.shape[1:] == expected:
        return
    hint = "run them through .preprocess, or load the model with another image_size"
    if images.shape == expected:
        hint = "one image is images[None]"
    elif images.shape[1:] == (expected[2], *expected[:2]):
        hint = "their channels come first, and images.transpose(0, 2, 3, 1) puts them last"
    elif images.ndim == 4 and images.shape[1:3] == expected[:2]:
        hint = "run them through .preprocess, or load the model with another in_channels"
    h, w, c = expected
    raise UserError(
        f"images of shape {images.shape} do not fit a model made for (b, {h}, {w}, {c}): {hint}"
    )


def split_key(key: Key[Array, ""] | None, n: int) -> list[Key[Array, ""] | None]:
    """Splits a key into n; no key gives n times None, which means deterministic everywhere."""
    return [None] * n if key is None else list(jax.random.split(key, n))


class LayerNorm(nnx.LayerNorm):
    """A LayerNorm over the last dimension, its statistics in float32."""

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """On GPUs with a derivative that one kernel computes, from x alone."""
        if target() != "gpu":
            return super().__call__(x)
        y = normalised(self.epsilon, x.astype(jnp.float32))
        return (y * self.scale[...] + self.bias[...]).astype(self.dtype)


def layer_norm(config: ViTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A LayerNorm over the width."""
    return LayerNorm(
        config.width,
        epsilon=config.layernorm_eps,
        dtype=jnp.dtype(config.dtype),
        use_fast_variance=False,  # which loses digits where the mean is large
        rngs=rngs,
    )


def zero_head(inputs: int, config: ModelConfig, rngs: nnx.Rngs) -> nnx.Linear:
    """A classifier that knows nothing yet: a zero kernel, and `config.head_bias`."""
    return nnx.Linear(
        inputs,
        config.num_classes,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.zeros,
        bias_init=nnx.initializers.constant(config.head_bias),
        rngs=rngs,
    )


class PatchEmbed(nnx.Module):
    """Cuts an image, or a feature map, into patches and projects each one linearly (E in Eq. 1).

    A convolution whose stride is its window, written as a reshape and one matrix product. The
    kernel keeps the convolution's shape [ph pw c d] and initialisation (LeCun normal).
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (*config.patch_size, config.patch_channels, config.width)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))
        if config.patch_bias:
            self.bias = nnx.Param(jnp.zeros(config.width))

    def __call__(self, images: Float[Array | np.ndarray, "b h w c"]) -> Float[Array, "b n d"]:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        (gh, gw), (ph, pw) = config.grid, config.patch_size
        x = jnp.asarray(images, dtype).reshape(-1, gh, ph, gw, pw, config.patch_channels)
        x = jnp.einsum("bipjqc,pqcd->bijd", x, self.kernel[...].astype(dtype))
        x = x.reshape(-1, gh * gw, config.width)
        return x + self.bias[...].astype(dtype) if config.patch_bias else x


class Corruption(NamedTuple):
    """What is done to the patches of each image before the blocks (paper, section 4.6).

    Attributes:
      where: the patches that are corrupted, and so to be predicted.
      source: of which patch of the image each one has the embedding; most have their own.
      masked: which have a learned [mask] embedding instead.
    """

    where: Int[Array, "b m"]
    source: Int[Array, "b n"]
    masked: Bool[Array, "b n"]

    def apply(
        self, x: Float[Array, "b n d"], mask_token: Float[Array | np.ndarray, "1 1 d"]
    ) -> Float[Array, "b n d"]:
        """Corrupts patch embeddings."""
        x = jnp.take_along_axis(x, self.source[..., None], axis=1)
        return jnp.where(self.masked[..., None], mask_token.astype(x.dtype), x)


class Attention(nnx.Module):
    """Multi-head attention (MSA in Eq. 2, appendix A) with one QKV kernel [d 3 heads head_dim].

    Q, K and V are initialised one by one, as Google's code does: Xavier over the fused kernel
    would give them a standard deviation of 0.0255 where theirs is 0.0361 (width 768).

    With `relative`, each offset between patches has an embedding, which adds to the logits what a
    query makes of it as a key (appendix D.4). XLA computes that: cuDNN is not asked for the bias.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, relative: bool = False):
        self.config = config
        d, heads, head_dim = config.width, config.num_heads, config.head_dim
        xavier = nnx.initializers.xavier_uniform()
        kernels = [xavier(rngs.params(), (d, d)).reshape(d, heads, head_dim) for _ in range(3)]
        qkv_bias = (3, heads, head_dim) if config.qkv_bias else None
        self.qkv = Affine(jnp.stack(kernels, axis=1), qkv_bias)
        self.out = Affine(xavier(rngs.params(), (d, d)).reshape(heads, head_dim, d), (d,))
        if relative:
            offsets = 2 * config.grid[0] * config.grid[1] - 1
            self.rel_embed = nnx.Param(positions.INIT(rngs.params(), (offsets, heads, head_dim)))

    def __call__(
        self,
        x: Float[Array, "b n d"],
        captures: Captures | None = None,
        *,
        query: Float[Array, "b m d"] | None = None,
        length: int | None = None,
    ) -> Float[Array, "b m d"]:
        """Attends from x, or from `query`, to x; to its first `length` tokens, if that is given."""
        dtype, length = jnp.dtype(self.config.dtype), length or x.shape[1]
        with jax.named_scope("qkv"):
            q, k, v = self._qkv(x, query)
        logits_bias = None
        if hasattr(self, "rel_embed"):
            embeddings = self.rel_embed[...].astype(dtype)
            logits_bias = positions.relative_logits(q, embeddings, self.config.num_prefix_tokens)
        if captures is not None:
            real = (q[:, :length], k[:, :length])
            captures("attention", lambda: attention_weights(*real, logits_bias))
        # cuDNN does not train with a single query.
        backend = backend_of(self.config) if query is None else "xla"
        with jax.named_scope("attend"):
            if backend == "xla" and target() != "tpu":  # which knows JAX's own, and fuses it
                y = attend(q, k, v, logits_bias)
            else:
                padded = padding(q, length) if query is None else {}
                y = jax.nn.dot_product_attention(
                    q, k, v, logits_bias, implementation=backend, **padded
                )
        with jax.named_scope("attention_out"):
            return affine(y, self.out, dtype)

    def _qkv(
        self, x: Float[Array, "b n d"], query: Float[Array, "b m d"] | None
    ) -> tuple[Float[Array, "b m h k"], Float[Array, "b n h k"], Float[Array, "b n h k"]]:
        dtype = jnp.dtype(self.config.dtype)
        kernel = self.qkv.kernel[...].astype(dtype)
        bias = self.qkv.bias[...].astype(dtype) if self.config.qkv_bias else None
        if query is not None:
            first, rest = (None, None) if bias is None else (bias[0], bias[1:])
            return linear(query, kernel[:, 0], first), *split_linear(x, kernel[:, 1:], rest)
        return split_linear(x, kernel, bias)


def affine(
    x: Float[Array, "b n *inputs"], layer: "Affine | nnx.Linear", dtype: Any
) -> Float[Array, "b n *outputs"]:
    """What a layer's kernel and bias make of tokens, in `dtype`."""
    return linear(x, layer.kernel[...].astype(dtype), layer.bias[...].astype(dtype))


class Affine(nnx.Module):
    """A kernel of any rank and its zero-initialised bias, if any."""

    def __init__(self, kernel: Float[Array, "..."], bias_shape: tuple[int, ...] | None):
        self.kernel = nnx.Param(kernel)
        if bias_shape is not None:
            self.bias = nnx.Param(jnp.zeros(bias_shape))


class Mlp(nnx.Module):
    """Two layers with a GELU between (Eq. 3); biases start at a spread of 1e-6, as in Google's.

    With `mlp="swiglu"` the first layer makes a gate and what it gates, each of `mlp_dim`
    (arXiv 2002.05202; DINOv2's giant), one after the other in the last dimension.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        linear = functools.partial(
            nnx.Linear,
            dtype=jnp.dtype(config.dtype),
            kernel_init=nnx.initializers.xavier_uniform(),
            bias_init=nnx.initializers.normal(1e-6),
            rngs=rngs,
        )
        self.fc1 = linear(config.width, config.mlp_dim * (2 if config.mlp == "swiglu" else 1))
        self.fc2 = linear(config.mlp_dim, config.width)

    @jax.named_scope("mlp")
    def __call__(
        self, x: Float[Array, "b n d"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b n d"]:
        dtype = jnp.dtype(self.config.dtype)
        x = affine(x, self.fc1, dtype)
        if self.config.mlp == "swiglu":
            gate, x = jnp.split(x, 2, axis=-1)
            x = jax.nn.silu(gate) * x
        else:
            x = gelu(self.config.gelu)(x)
        return affine(dropout(x, self.config.dropout, key), self.fc2, dtype)


class Block(nnx.Module):
    """One pre-LN encoder block (Eq. 2 and 3).

    Dropout follows every dense layer except the QKV projections (appendix B.1).
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.norm1 = layer_norm(config, rngs)
        self.attention = Attention(config, rngs=rngs, relative=config.position == "relative")
        self.norm2 = layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)
        if config.layer_scale is not None:
            self.scale1 = nnx.Param(jnp.full(config.width, config.layer_scale))
            self.scale2 = nnx.Param(jnp.full(config.width, config.layer_scale))
        if config.position_at == "layers":
            positions.add_tables(self, config, rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        depth_fraction: float | Float[Array, ""] = 0.0,
        key: Key[Array, ""] | None = None,
        captures: Captures | None = None,
        length: int | None = None,
    ) -> Float[Array, "b n d"]:
        """Runs the block on tokens, of which the first `length` count, if that is given.

        `depth_fraction` is 0 in the first block and 1 in the last: it scales drop_path.
        """
        attention_key, hidden_key, mlp_key, *path_keys = split_key(key, 5)

        def branch(y, scale, dropout_key, path_key):
            y = dropout(y, self.config.dropout, dropout_key)
            if scale is not None:  # LayerScale, arXiv 2103.17239
                y = y * scale[...].astype(y.dtype)
            if self.config.drop_path == 0:
                return y
            return drop_path(y, self.config.drop_path * depth_fraction, path_key)

        scale1, scale2 = getattr(self, "scale1", None), getattr(self, "scale2", None)
        y = self.attention(self.norm1(x), captures, length=length)
        x = x + branch(y, scale1, attention_key, path_keys[0])
        y = self.mlp(self.norm2(x), hidden_key)
        x = x + branch(y, scale2, mlp_key, path_keys[1])
        return x


class AttentionPool(nnx.Module):
    """Pools the tokens by attention from one learned query (`map`: big_vision's MAPHead)."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        xavier = nnx.initializers.xavier_uniform()
        self.probe = nnx.Param(xavier(rngs.params(), (1, 1, config.width)))
        self.attention = Attention(config, rngs=rngs)
        self.norm = layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        query = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        y = self.attention(x, query=query)
        return (y + self.mlp(self.norm(y)))[:, 0]
