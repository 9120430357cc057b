"""The Vision Transformer (arXiv 2010.11929), in forward order."""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from vit_jax.errors import UserError
from vit_jax.models import layers, posembed
from vit_jax.models.config import ViTConfig, variant


@runtime_checkable
class Layout(Protocol):
    """Puts things in their places on a mesh of devices, of which the model knows nothing else."""

    def params(self, params: dict[str, Any]) -> dict[str, Any]:
        """Takes the parameters of one block as they are kept; returns them as they are used."""

    def tokens(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Returns what flows from block to block, in its place."""


class ViT(nnx.Module):
    """A plain Vision Transformer. Weights load through `vit_jax.load`, new ones from `create`.

    The parameters of all blocks are stacked: every leaf under `blocks` has a leading depth axis,
    whether the depth is scanned or looped over (`config.scan`).
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.patch_embed = layers.PatchEmbed(config, rngs=rngs)
        normal = nnx.initializers.normal(0.02)
        if config.has_class_token:
            self.cls_token = nnx.Param(jnp.zeros((1, 1, width)))
        if config.distillation != "none":
            self.dist_token = nnx.Param(normal(rngs.params(), (1, 1, width)))
        if config.registers:
            self.registers = nnx.Param(normal(rngs.params(), (1, config.registers, width)))
        if config.position == "learned":
            self.pos_embed = nnx.Param(normal(rngs.params(), (config.num_positions, width)))
        if config.pre_norm:
            self.pre_norm = layers.layer_norm(config, rngs)
        keys = jax.random.split(rngs.params(), config.depth)
        self.blocks = nnx.vmap(lambda key: layers.Block(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = layers.layer_norm(config, rngs)
        if config.pool == "map":
            self.attention_pool = layers.AttentionPool(config, rngs=rngs)
        pooled = width * (2 if config.pool == "token_gap" else 1)
        if config.representation_size:
            self.pre_logits = nnx.Linear(pooled, config.representation_size, dtype=dtype, rngs=rngs)
        if config.num_classes:
            linear = functools.partial(
                nnx.Linear,
                config.representation_size or pooled,
                config.num_classes,
                dtype=dtype,
                kernel_init=nnx.initializers.zeros,
                bias_init=nnx.initializers.constant(config.head_bias),
            )
            self.head = linear(rngs=rngs)
            if config.distillation == "head":
                self.head_dist = linear(rngs=rngs)

    def __call__(
        self,
        images: Float[Array | np.ndarray, "b h w c"],
        *,
        key: Key[Array, ""] | None = None,
        capture: str | tuple[str, ...] = (),
        layout: Layout | None = None,
    ) -> Float[Array, "b k"] | tuple[Float[Array, "b k"], dict[str, Any]]:
        """Classifies images.

        Args:
          images: normalised as the model's preprocessing says, of exactly `config.image_size`.
          key: switches dropout and stochastic depth on; without it the model is deterministic.
          capture: names of intermediates to return beside the logits: `patches` [b n d], `tokens`
            after each block [depth b n d], `attention` weights [depth b heads n n] (float32),
            `encoded` [b n d], `pooled` [b d], `pre_logits` [b r].
          layout: where things are on a mesh (see training/sharding.py).

        Returns:
          Logits [b num_classes] in float32 (the representation, where num_classes is 0), and with
          `capture` also a dict of the named arrays.

        Raises:
          UserError: the images have another size or number of channels.
        """
        config, taps = self.config, layers.Taps(capture)
        if images.shape[1:] != (*config.image_size, config.in_channels):
            raise UserError(
                f"images of shape {images.shape[1:]} (h, w, c) do not fit a model made for "
                f"{(*config.image_size, config.in_channels)}: run them through .preprocess, or "
                "load the model with another image_size"
            )
        embedding_key, block_key = layers.split_key(key, 2)

        x = self.patch_embed(images)  # Eq. 1, [b n d]
        taps("patches", lambda: x)
        x = jnp.concatenate([*self.prefix_tokens(x), x], axis=1)
        x = x + self.positions().astype(x.dtype)
        x = layers.dropout(x, config.dropout, embedding_key)
        if config.pre_norm:
            x = self.pre_norm(x)

        x = self.encode(x, block_key, taps, layout)  # Eq. 2 and 3, `depth` times
        if not config.norm_after_pool:
            x = self.norm(x)
        taps("encoded", lambda: x)

        x, x_dist = self.pooled(x)
        if config.norm_after_pool:
            x = self.norm(x)
        taps("pooled", lambda: x)

        if config.representation_size:  # the hidden layer of the pre-training head
            x = jnp.tanh(self.pre_logits(x))
        taps("pre_logits", lambda: x)
        if config.num_classes:
            x = self.head(x)
            if config.distillation == "head":
                x = (x + self.head_dist(x_dist)) / 2
        logits = x.astype(jnp.float32)
        return (logits, taps.values) if capture else logits

    def prefix_tokens(self, x: Float[Array, "b n d"]) -> list[Float[Array, "b k d"]]:
        """The tokens before the patches, one copy an image: class, distillation, registers."""
        tokens = [getattr(self, name, None) for name in ("cls_token", "dist_token", "registers")]
        return [
            jnp.broadcast_to(token[...], (x.shape[0], *token.shape[1:])).astype(x.dtype)
            for token in tokens
            if token is not None
        ]

    def positions(self) -> Float[Array, "n d"]:
        """What is added to the tokens, the prefix tokens' rows first, zero where they have none."""
        config = self.config
        if config.position == "learned":
            table, rows = self.pos_embed[...], config.num_position_prefix
            without = jnp.zeros((config.num_prefix_tokens - rows, config.width))
            return jnp.concatenate([table[:rows], without, table[rows:]])
        table = np.zeros((config.num_tokens, config.width), np.float32)
        if config.position == "sincos2d":
            table[config.num_prefix_tokens :] = posembed.sincos2d(config.grid, config.width)
        return jnp.asarray(table)

    def pooled(
        self, x: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b p"], Float[Array, "b d"] | None]:
        """What the head reads (the class token in Eq. 4), and the distillation token, if any."""
        config = self.config
        x_dist = x[:, 1] if config.distillation == "head" else None
        if config.pool == "token":
            return x[:, 0], x_dist
        if config.pool == "map":
            return self.attention_pool(x[:, config.num_prefix_tokens :]), None
        mean = x[:, config.num_prefix_tokens :].mean(axis=1)
        return (mean if config.pool == "gap" else jnp.concatenate([x[:, 0], mean], axis=1)), None

    def encode(
        self,
        x: Float[Array, "b n d"],
        key: Key[Array, ""] | None,
        taps: layers.Taps,
        layout: Layout | None = None,
    ) -> Float[Array, "b n d"]:
        """Runs the blocks, as one scanned body or as a loop over slices of the same parameters."""
        graphdef, stacked = nnx.split(self.blocks)
        stacked = nnx.to_pure_dict(stacked)
        depth = self.config.depth

        def body(x, inputs):
            params, index = inputs
            if layout is not None:
                params, x = layout.params(params), layout.tokens(x)
            inner = layers.Taps(taps.names)
            x = nnx.merge(graphdef, params)(
                x,
                depth_fraction=index / max(depth - 1, 1),
                key=None if key is None else jax.random.fold_in(key, index),
                taps=inner,
            )
            inner("tokens", lambda: x)
            return x, inner.values

        if self.config.remat != "none" or layout is not None:
            policy = _REMAT[self.config.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=not self.config.scan)
        if self.config.scan:
            x, captured = jax.lax.scan(body, x, (stacked, jnp.arange(depth)))
        else:
            captured = []
            for index in range(depth):
                x, values = body(x, (_layer(stacked, index), index))
                captured.append(values)
            captured = jax.tree.map(lambda *values: jnp.stack(values), *captured)
        taps.values.update(captured)
        return x


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps all for the way back but the parameters that a layout gathered for one block."""
    return primitive.name not in ("sharding_constraint", "linear_call")


_REMAT = {
    "none": _all_but_gathered,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _layer(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda parameter: parameter[index], stacked)


def structure(config: ViTConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Returns what `nnx.merge` takes beside parameters, and their shapes; allocates nothing."""
    graphdef, shapes = _structure(config)
    return graphdef, jax.tree.map(lambda leaf: leaf, shapes)  # the caller's own dict


@functools.lru_cache(maxsize=32)
def _structure(config: ViTConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(shapes)


def init_params(config: ViTConfig, seed: int) -> dict[str, Any]:
    """Fresh parameters as a nested dict of arrays, to be called inside `jax.jit`."""
    return nnx.to_pure_dict(nnx.state(ViT(config, rngs=nnx.Rngs(params=seed))))


def create(name: str | ViTConfig = "B/16", *, seed: int = 0, **fields: Any) -> ViT:
    """Returns a freshly initialised model, as Google's code initialises it.

    Args:
      name: a variant such as "B/16", or a ViTConfig.
      seed: of the initialisation.
      **fields: `ViTConfig` fields to change, such as image_size=384 or num_classes=10.

    Raises:
      UserError: no such variant or field, or sizes that do not fit together.
    """
    if isinstance(name, str):
        config = variant(name, **fields)
    else:
        config = dataclasses.replace(name, **fields)
    params = jax.jit(lambda: init_params(config, seed))()  # one program, not one a parameter
    return nnx.merge(structure(config)[0], params)
