"""The Vision Transformer (arXiv 2010.11929), in forward order."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from vit_jax.errors import UserError
from vit_jax.models import layers, posembed
from vit_jax.models.config import ViTConfig, variant


class ViT(nnx.Module):
    """A plain Vision Transformer. Weights load through `vit_jax.load`, new ones from `create`.

    The parameters of all blocks are stacked: every leaf under `blocks` has a leading depth axis,
    whether the depth is scanned or looped over (`config.scan`).
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.patch_embed = layers.PatchEmbed(config, rngs=rngs)
        if config.num_prefix_tokens:
            self.cls_token = nnx.Param(jnp.zeros((1, 1, width)))
        if config.position == "learned":
            normal = nnx.initializers.normal(0.02)
            self.pos_embed = nnx.Param(normal(rngs.params(), (config.num_tokens, width)))
        keys = jax.random.split(rngs.params(), config.depth)
        self.blocks = nnx.vmap(lambda key: layers.Block(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = layers.layer_norm(config, rngs)
        if config.pool == "map":
            self.attention_pool = layers.AttentionPool(config, rngs=rngs)
        if config.representation_size:
            self.pre_logits = nnx.Linear(width, config.representation_size, dtype=dtype, rngs=rngs)
        if config.num_classes:
            self.head = nnx.Linear(
                config.representation_size or width,
                config.num_classes,
                dtype=dtype,
                kernel_init=nnx.initializers.zeros,
                bias_init=nnx.initializers.constant(config.head_bias),
                rngs=rngs,
            )

    def __call__(
        self,
        images: Float[Array | np.ndarray, "b h w c"],
        *,
        key: Key[Array, ""] | None = None,
        capture: str | tuple[str, ...] = (),
    ) -> Float[Array, "b k"] | tuple[Float[Array, "b k"], dict[str, Any]]:
        """Classifies images.

        Args:
          images: normalised as the model's preprocessing says, of exactly `config.image_size`.
          key: switches dropout and stochastic depth on; without it the model is deterministic.
          capture: names of intermediates to return beside the logits: `patches` [b n d], `tokens`
            after each block [depth b n d], `attention` weights [depth b heads n n] (float32),
            `encoded` [b n d], `pooled` [b d], `pre_logits` [b r].

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
        if config.num_prefix_tokens:
            token = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, config.width))
            x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
        x = x + self.positions().astype(x.dtype)
        x = layers.dropout(x, config.dropout, embedding_key)

        x = self.encode(x, block_key, taps)  # Eq. 2 and 3, `depth` times
        x = self.norm(x)
        taps("encoded", lambda: x)

        if config.pool == "token":  # Eq. 4
            x = x[:, 0]
        elif config.pool == "gap":
            x = x[:, config.num_prefix_tokens :].mean(axis=1)
        else:
            x = self.attention_pool(x)
        taps("pooled", lambda: x)

        if config.representation_size:  # the hidden layer of the pre-training head
            x = jnp.tanh(self.pre_logits(x))
        taps("pre_logits", lambda: x)
        if config.num_classes:
            x = self.head(x)
        logits = x.astype(jnp.float32)
        return (logits, taps.values) if capture else logits

    def positions(self) -> Float[Array, "n d"]:
        """What is added to the tokens, the prefix tokens' rows first."""
        config = self.config
        if config.position == "learned":
            return self.pos_embed[...]
        table = np.zeros((config.num_tokens, config.width), np.float32)
        if config.position == "sincos2d":
            table[config.num_prefix_tokens :] = posembed.sincos2d(config.grid, config.width)
        return jnp.asarray(table)

    def encode(
        self, x: Float[Array, "b n d"], key: Key[Array, ""] | None, taps: layers.Taps
    ) -> Float[Array, "b n d"]:
        """Runs the blocks, as one scanned body or as a loop over slices of the same parameters."""
        graphdef, stacked = nnx.split(self.blocks)
        depth = self.config.depth

        def body(x, inputs):
            params, index = inputs
            inner = layers.Taps(taps.names)
            x = nnx.merge(graphdef, params)(
                x,
                depth_fraction=index / max(depth - 1, 1),
                key=None if key is None else jax.random.fold_in(key, index),
                taps=inner,
            )
            inner("tokens", lambda: x)
            return x, inner.values

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


def _layer(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda parameter: parameter[index], stacked)


def structure(config: ViTConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Returns what `nnx.merge` takes beside parameters, and their shapes; allocates nothing."""
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
