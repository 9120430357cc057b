"""Layers of a Vision Transformer; parameters in float32, computation in `config.dtype`."""

import dataclasses
import functools
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from vit_jax.compiler import target
from vit_jax.errors import UserError
from vit_jax.models import differential, positions
from vit_jax.models.attention import attend, attention_weights, backend_of, padding
from vit_jax.models.config import ModelConfig, ViTConfig
from vit_jax.models.elementwise import drop_path, dropout, gelu
from vit_jax.models.linear import linear, split_linear
from vit_jax.models.lora import LAYERS, adapted, adapted_qkv
from vit_jax.models.norms import add_qk_norms, layer_norm, qk_normed
from vit_jax.models.relative import LogitBias
from vit_jax.models.rotary import mixed, rotate
from vit_jax.models.stack import Captures, split_key


def check_images(images: Array | np.ndarray, config: ModelConfig) -> None:
    """Raises a UserError for images that are not floats, or have the wrong size or layout."""
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


def zero_head(inputs: int, config: ModelConfig, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns a classifier with a kernel of zeros and biases of `config.head_bias`."""
    return nnx.Linear(
        inputs,
        config.num_classes,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.zeros,
        bias_init=nnx.initializers.constant(config.head_bias),
        rngs=rngs,
    )


class PatchEmbed(nnx.Module):
    """Cuts an image or a feature map into patches and projects each linearly (E in Eq. 1).

    Equivalent to a convolution with a stride equal to its window, written as a reshape and one
    matrix product. The kernel keeps a convolution's shape [ph pw c d] and initialisation (LeCun
    normal). Images may have been cut before, to [b n p]. With `patch_norm`, a norm follows.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (*config.patch_size, config.patch_channels, config.width)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))
        if config.patch_bias:
            self.bias = nnx.Param(jnp.zeros(config.width))
        if config.patch_norm:
            self.norm = layer_norm(config, rngs)

    def __call__(self, images: Float[Array | np.ndarray, "b ..."]) -> Float[Array, "b n d"]:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        cut = (images.shape[1], 1)
        (gh, gw), (ph, pw) = cut if images.ndim == 3 else config.grid, config.patch_size
        x = jnp.asarray(images, dtype).reshape(-1, gh, ph, gw, pw, config.patch_channels)
        x = jnp.einsum("bipjqc,pqcd->bijd", x, self.kernel[...].astype(dtype))
        x = x.reshape(-1, gh * gw, config.width)
        x = x + self.bias[...].astype(dtype) if config.patch_bias else x
        return self.norm(x) if config.patch_norm else x


class Attention(nnx.Module):
    """Multi-head attention (MSA in Eq. 2, appendix A) with one QKV kernel [d 3 heads head_dim].

    Q, K and V are initialised separately, as in Google's code: Xavier over the fused kernel would
    give them a standard deviation of 0.0255 in place of 0.0361 (width 768).

    With `relative`, each offset between patches has a learned embedding. The query's product with
    it is added to the logits (appendix D.4). This always runs on XLA, not on cuDNN, as does a
    `relative_bias`, of the block's own or shared. Where keys have no bias, that of the kernel is
    [2 heads head_dim], of Q and V.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, relative: bool = False):
        self.config = config
        d, heads, head_dim = config.width, config.num_heads, config.head_dim
        xavier = nnx.initializers.xavier_uniform()
        kernels = [xavier(rngs.params(), (d, d)).reshape(d, heads, head_dim) for _ in range(3)]
        qkv_bias = (3 if config.key_bias else 2, heads, head_dim) if config.qkv_bias else None
        self.qkv = Affine(jnp.stack(kernels, axis=1), qkv_bias)
        out = xavier(rngs.params(), (d, d)).reshape(heads, head_dim, d)
        self.out = Affine(out, (d,) if config.proj_bias else None)
        if config.qk_norm != "none":
            add_qk_norms(self, config, rngs)
        if config.differential:
            differential.add_parameters(self, config, rngs)
        if config.attention_norm:
            self.norm = layer_norm(config, rngs)
        if config.rotary is not None and config.rotary.learned:
            frequencies = config.rotary.frequencies(rngs.params(), heads, head_dim)
            self.rotary_freqs = nnx.Param(frequencies)
        if relative:
            offsets = 2 * config.grid[0] * config.grid[1] - 1
            self.rel_embed = nnx.Param(positions.INIT(rngs.params(), (offsets, heads, head_dim)))
        if config.relative_bias is not None and not config.relative_bias.shared:
            self.relative_bias = logit_bias(config, rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        captures: Captures | None = None,
        *,
        query: Float[Array, "b m d"] | None = None,
        length: int | None = None,
        rotation: Float[Array, "*b n c"] | None = None,
        index: int | float | Float[Array, ""] = 0,
        logits_bias: Float[Array, "#b #h #m l"] | None = None,
        counts: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b m d"]:
        """Attends from x, or from `query` if given, to x, or only to its first `length` tokens.

        `rotation` is the table of rotary positions, for all images or for each; with learned
        frequencies, the tokens' places [n 2]. `index` is the block's; `logits_bias` is added to
        the logits. cuDNN is given `counts` in its place: how many tokens of each image are real.
        """
        dtype, length = jnp.dtype(self.config.dtype), length or x.shape[1]
        with jax.named_scope("qkv"):
            q, k, v = self._qkv(x, query)
            if self.config.qk_norm != "none":
                q, k = qk_normed(self.q_norm, q), qk_normed(self.k_norm, k)
            if rotation is not None:
                q, k = self._rotated((q, k), rotation)
        if self.config.differential:
            if captures is not None:
                captures("attention", lambda: differential.weights(self, q, k, index))
            y = differential.attend(self, q, k, v, index)
            return affine(y, self.out, dtype)
        if hasattr(self, "relative_bias"):
            logits_bias = self.relative_bias()
        if hasattr(self, "rel_embed"):
            embeddings = self.rel_embed[...].astype(dtype)
            logits_bias = positions.relative_logits(q, embeddings, self.config.num_prefix_tokens)
        if captures is not None:
            both = (q[:, :length], k[:, :length])
            captures("attention", lambda: attention_weights(*both, logits_bias))
        # cuDNN does not train with a single query.
        backend = backend_of(self.config) if query is None else "xla"
        with jax.named_scope("attend"):
            if backend == "xla" and target() != "tpu":  # which knows JAX's own, and fuses it
                y = attend(q, k, v, logits_bias)
            else:
                bias, real = (logits_bias, length) if counts is None else (None, counts)
                padded = padding(q, real) if query is None else {}
                y = jax.nn.dot_product_attention(q, k, v, bias, implementation=backend, **padded)
        if self.config.attention_norm:
            y = self.norm(y.reshape(*y.shape[:2], -1)).reshape(y.shape)
        with jax.named_scope("attention_out"):
            return affine(y, self.out, dtype)

    def _rotated(
        self, parts: tuple[Float[Array, "b n h k"], ...], rotation: Float[Array, "*b n c"]
    ) -> list[Float[Array, "b n h k"]]:
        layout, table = self.config.rotary.layout, rotation[..., None, :]
        if self.config.rotary.learned:
            table = mixed(rotation, self.rotary_freqs[...])
        return [rotate(part, table, layout) for part in parts]

    def _qkv(
        self, x: Float[Array, "b n d"], query: Float[Array, "b m d"] | None
    ) -> tuple[Float[Array, "b m h k"], Float[Array, "b n h k"], Float[Array, "b n h k"]]:
        dtype = jnp.dtype(self.config.dtype)
        kernel = self.qkv.kernel[...].astype(dtype)
        bias = with_key(self.qkv.bias[...]).astype(dtype) if self.config.qkv_bias else None
        if query is not None:
            first, rest = (None, None) if bias is None else (bias[0], bias[1:])
            parts = linear(query, kernel[:, 0], first), *split_linear(x, kernel[:, 1:], rest)
        else:
            parts = split_linear(x, kernel, bias)
        return adapted_qkv(parts, x.astype(dtype), query, self.qkv)


def logit_bias(config: ViTConfig, rngs: nnx.Rngs) -> LogitBias:
    """The parameters of the model's `relative_bias`: of one block, or of all."""
    sizes = (config.grid, config.num_heads, config.num_prefix_tokens)
    return LogitBias(config.relative_bias, *sizes, rngs=rngs)


def with_key(bias: Float[Array, "parts h k"]) -> Float[Array, "3 h k"]:
    """The bias of Q, K and V: zeros for K where only Q and V have one."""
    if len(bias) == 3:
        return bias
    return jnp.stack([bias[0], jnp.zeros_like(bias[0]), bias[1]])


def affine(
    x: Float[Array, "b n *inputs"], layer: "Affine | nnx.Linear", dtype: Any
) -> Float[Array, "b n *outputs"]:
    """Applies a layer's kernel, bias and adapter, if any, to tokens, in `dtype`."""
    bias = getattr(layer, "bias", None)
    y = linear(
        x, layer.kernel[...].astype(dtype), None if bias is None else bias[...].astype(dtype)
    )
    return adapted(y, x, layer)


class Affine(nnx.Module):
    """The parameters of a linear layer: a kernel of any rank and, optionally, a zero bias."""

    def __init__(self, kernel: Float[Array, "..."], bias_shape: tuple[int, ...] | None):
        self.kernel = nnx.Param(kernel)
        if bias_shape is not None:
            self.bias = nnx.Param(jnp.zeros(bias_shape))


class Mlp(nnx.Module):
    """Two linear layers with a GELU between (Eq. 3); biases start at a deviation of 1e-6 (Google).

    With `mlp="swiglu"` the first layer outputs the gate and the gated value, `mlp_dim` channels
    each, concatenated in the last dimension (arXiv 2002.05202; DINOv2's giant). With `mlp_norm`, a
    LayerNorm is before the second layer.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        linear = functools.partial(
            nnx.Linear,
            dtype=jnp.dtype(config.dtype),
            kernel_init=nnx.initializers.xavier_uniform(),
            bias_init=nnx.initializers.normal(1e-6),
            use_bias=config.proj_bias,
            rngs=rngs,
        )
        self.fc1 = linear(config.width, config.mlp_dim * (2 if config.mlp == "swiglu" else 1))
        self.fc2 = linear(config.mlp_dim, config.width)
        if config.mlp_norm:
            self.norm = layer_norm(config, rngs, config.mlp_dim)

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
        x = dropout(x, self.config.dropout, key)
        if self.config.mlp_norm:
            x = self.norm(x)
        return affine(x, self.fc2, dtype)


class Block(nnx.Module):
    """One pre-LN encoder block (Eq. 2 and 3); with `norm_after_branch`, each norm ends its branch.

    With `parallel`, attention and MLP have one norm, one scale and one branch.

    Dropout follows every dense layer except the QKV projections (appendix B.1).
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.norm1 = layer_norm(config, rngs)
        self.attention = Attention(config, rngs=rngs, relative=config.position == "relative")
        if not config.parallel:
            self.norm2 = layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)
        if config.layer_scale is not None:
            self.scale1 = nnx.Param(jnp.full(config.width, config.layer_scale))
            if config.mlp_scale and not config.parallel:
                self.scale2 = nnx.Param(jnp.full(config.width, config.layer_scale))
        if config.position_at == "layers":
            positions.add_tables(self, config, rngs)

    def attended(
        self,
        x: Float[Array, "b n d"],
        keys: list[Key[Array, ""] | None],
        depth_fraction: float | Float[Array, ""],
        captures: Captures | None,
        **how: Any,
    ) -> Float[Array, "b n d"]:
        """The branch of attention, with `parallel` also the MLP's; `how` is for the attention."""
        attention_key, hidden_key, _, path_key, _ = keys
        index = depth_fraction * (self.config.depth - 1)
        x = x if self.config.norm_after_branch else self.norm1(x)
        y = self.attention(x, captures, index=index, **how)
        if self.config.parallel:
            y = y + self.mlp(x, hidden_key)
        return self._ended(y, "1", attention_key, depth_fraction, path_key)

    def transformed(
        self,
        x: Float[Array, "b n d"],
        keys: list[Key[Array, ""] | None],
        depth_fraction: float | Float[Array, ""],
    ) -> Float[Array, "b n d"]:
        """The branch of the MLP."""
        _, hidden_key, mlp_key, _, path_key = keys
        y = self.mlp(x if self.config.norm_after_branch else self.norm2(x), hidden_key)
        return self._ended(y, "2", mlp_key, depth_fraction, path_key)

    def _ended(self, y, name, key, depth_fraction, path_key):
        y = dropout(y, self.config.dropout, key)
        y = getattr(self, f"norm{name}")(y) if self.config.norm_after_branch else y
        if hasattr(self, f"scale{name}"):  # LayerScale, arXiv 2103.17239
            y = y * getattr(self, f"scale{name}")[...].astype(y.dtype)
        if self.config.drop_path == 0:
            return y
        return drop_path(y, self.config.drop_path * depth_fraction, path_key)


def run_blocks(
    blocks: list[Block],
    x: Float[Array, "b n d"],
    *,
    depth_fraction: float | Float[Array, ""] = 0.0,
    key: Key[Array, ""] | None = None,
    captures: Captures | None = None,
    **how: Any,
) -> Float[Array, "b n d"]:
    """Runs a block on tokens, or several on the same ones (`branches`, arXiv 2203.09795).

    `depth_fraction` is 0 in the first blocks and 1 in the last: it scales drop_path. `how` are
    arguments of the attention: the `length` of the tokens that are attended to, the `rotation`, and
    what is added to logits, `logits_bias`, where cuDNN is given `counts`.
    """
    own = [key] if len(blocks) == 1 else split_key(key, len(blocks))
    keys = [split_key(each, 5) for each in own]
    heads = [Captures(captures.names if captures else ()) for _ in blocks]
    each = list(zip(blocks, keys, heads, strict=True))
    x = x + _sum(block.attended(x, keys, depth_fraction, seen, **how) for block, keys, seen in each)
    if captures is not None:
        captures("attention", lambda: jnp.concatenate([h.values["attention"] for h in heads], 1))
    if blocks[0].config.parallel:
        return x
    return x + _sum(block.transformed(x, keys, depth_fraction) for block, keys, _ in each)


def _sum(parts: Iterable[Float[Array, "b n d"]]) -> Float[Array, "b n d"]:
    return functools.reduce(operator.add, parts)


class AttentionPool(nnx.Module):
    """Attention pooling with one learned query (`map`: big_vision's MAPHead)."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        config = dataclasses.replace(
            config,
            max_patches=None,
            rotary=None,
            relative_bias=None,
            position="none",
            position_at="input",
            key_bias=True,
            attention_norm=False,
            qk_norm="none",
            differential=False,
            proj_bias=True,
            mlp_norm=False,
            num_heads=config.pool_heads or config.num_heads,
            mlp_dim=config.pool_mlp_dim or config.mlp_dim,
        )
        xavier = nnx.initializers.xavier_uniform()
        self.probe = nnx.Param(xavier(rngs.params(), (1, 1, config.width)))
        self.attention = Attention(config, rngs=rngs)
        self.norm = layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d"], bias: Float[Array, "b 1 1 n"] | None = None
    ) -> Float[Array, "b d"]:
        query = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        y = self.attention(x, query=query, logits_bias=bias)
        return (y + self.mlp(self.norm(y)))[:, 0]


def folded(block: dict[str, Any], *, norms: bool = True) -> dict[str, Any]:
    """Folds the scales and biases of norms and LayerScales into the adjacent kernels.

    The block computes the same function. It saves time in the backward pass: the gradients of these
    vectors are sums over all tokens, while those of kernels are products, from which the former
    follow. A forward pass alone reads the kernels one more time for it. A block with adapters stays
    as it is: its norms are frozen. Norms behind their branches (`norms` False) stay, too, and so do
    the scales that follow them.
    """

    def fold(norm: dict[str, Any], layer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if "bias" in norm and "bias" not in layer:  # nowhere to move what the norm adds
            return norm, layer
        kernel, scale = layer["kernel"], norm["scale"]
        scaled = kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1))
        left, changed = {"scale": jnp.ones_like(scale)}, {"kernel": scaled.astype(kernel.dtype)}
        if "bias" in norm:
            bias = with_key(layer["bias"]) if kernel.ndim == 4 else layer["bias"]
            changed["bias"] = bias + jnp.tensordot(norm["bias"], kernel, axes=1)
            left["bias"] = jnp.zeros_like(scale)
        return left, {**layer, **changed}

    block, attention, mlp = dict(block), dict(block["attention"]), dict(block["mlp"])
    if not norms or any(
        "lora_a" in part.get(name, ()) for part in (attention, mlp) for name in LAYERS
    ):
        return block
    block["norm1"], attention["qkv"] = fold(block["norm1"], attention["qkv"])
    block["norm2"], mlp["fc1"] = fold(block["norm2"], mlp["fc1"])
    for name, part, layer in (("scale1", attention, "out"), ("scale2", mlp, "fc2")):
        if name in block:
            scale, old = block[name], part[layer]
            part[layer] = {"kernel": (old["kernel"] * scale).astype(old["kernel"].dtype)}
            if "bias" in old:
                part[layer]["bias"] = old["bias"] * scale
            block[name] = jnp.ones_like(scale)
    return {**block, "attention": attention, "mlp": mlp}
