"""The Vision Transformer (arXiv 2010.11929), in forward order."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from vit_jax.compiler import target
from vit_jax.models import attention, elementwise, layers, native, positions, pyramid, resnet
from vit_jax.models.config import ViTConfig
from vit_jax.models.corruption import Corruption
from vit_jax.models.detector import Detector, rows
from vit_jax.models.stack import Captures, Layout, run_block, scanned, split_key


class ViT(nnx.Module):
    """A plain Vision Transformer. `vit_jax.load` loads weights, `create` initialises a new one.

    The parameters of all blocks are stacked: every leaf under `blocks` has a leading depth axis,
    whether the depth is scanned or looped over (`config.scan`).
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.width, jnp.dtype(config.dtype)
        if config.resnet is not None:
            self.resnet = resnet.Backbone(config, rngs=rngs)
        self.patch_embed = layers.PatchEmbed(config, rngs=rngs)
        normal = positions.INIT
        if config.has_class_token:
            self.cls_token = nnx.Param(jnp.zeros((1, 1, width)))
        if config.distillation != "none":
            self.dist_token = nnx.Param(normal(rngs.params(), (1, 1, width)))
        if config.registers:
            self.registers = nnx.Param(normal(rngs.params(), (1, config.registers, width)))
        if config.position_at != "layers":
            positions.add_tables(self, config, rngs)
        if config.relative_bias is not None and config.relative_bias.shared:
            self.relative_bias = layers.logit_bias(config, rngs)
        if config.pre_norm:
            self.pre_norm = layers.layer_norm(config, rngs)
        keys = jax.random.split(rngs.params(), config.depth)
        self.blocks = nnx.vmap(lambda key: layers.Block(config, rngs=nnx.Rngs(key)))(keys)
        if config.final_norm:
            self.norm = layers.layer_norm(config, rngs)
        if config.pool == "map":
            self.attention_pool = layers.AttentionPool(config, rngs=rngs)
        pooled = width * (2 if config.pool == "token_gap" else 1)
        if config.pyramid:
            self.pyramid, pooled = pyramid.Pyramid(config, rngs=rngs), config.pyramid
        if config.representation_size:
            self.pre_logits = nnx.Linear(pooled, config.representation_size, dtype=dtype, rngs=rngs)
        if config.pool == "locations":
            self.detector = Detector(config, rngs=rngs)
        elif config.num_classes:
            inputs = config.representation_size or pooled
            self.head = layers.zero_head(inputs, config, rngs)
            if config.distillation == "head":
                self.head_dist = layers.zero_head(inputs, config, rngs)
        if config.patch_outputs:
            self.mask_token = nnx.Param(normal(rngs.params(), (1, 1, width)))
            zeros = nnx.initializers.zeros
            self.patch_head = nnx.Linear(
                width, config.patch_outputs, dtype=dtype, kernel_init=zeros, rngs=rngs
            )

    def __call__(
        self,
        images: Float[Array | np.ndarray, "b h w c"] | native.Patches | list[Any],
        *,
        key: Key[Array, ""] | None = None,
        capture: str | tuple[str, ...] = (),
        corruption: Corruption | None = None,
        layout: Layout | None = None,
        frozen: int = 0,
    ) -> Float[Array, "b *k"] | tuple[Float[Array, "b *k"], dict[str, Any]]:
        """Classifies images, their patches or locations, or predicts corrupted patches.

        Args:
          images: normalised as the model's preprocessing says, of exactly `config.image_size`;
            with `config.max_patches`, `Patches`, or a list of images [h w c] of any shapes.
          key: enables dropout, patch dropout and stochastic depth; without it the model is
            deterministic, and sees all patches.
          capture: names of intermediates to return with the logits: `patches` [b n d], `tokens`
            after each block [depth b n d], `attention` weights [depth b heads n n] (float32),
            `encoded` [b n d], `pooled` [b p], and `pre_logits` [b r], the head's input, which is
            `pooled` without a representation_size. With `branches`, blocks that run on the same
            tokens are one of the depth, and have the heads of all. With pool `none` both of the
            last are [b gh gw d], and with `locations` they are that and [b n pyramid].
          corruption: of the patch embeddings, for a model with `patch_outputs`.
          layout: the sharding on a mesh (see training/sharding.py).
          frozen: the number of first blocks of which no gradient is computed.

        Returns:
          Logits [b num_classes] in float32 (the representation, where num_classes is 0), with pool
          `none` of each patch [b gh gw num_classes] (with a pyramid of each quarter, [b 4gh 4gw
          num_classes]), with pool `locations` of each location [b n num_classes + 5] (see
          `Detector`), or the predictions for corrupted patches [b m patch_outputs]; with `capture`,
          also a dict of the named arrays.

        Raises:
          UserError: the images have another size or number of channels.
        """
        config, captures = self.config, Captures(capture)
        images, sizes = native.opened(images, config)
        embedding_key, block_key = split_key(key, 2)

        x = images if config.resnet is None else self.resnet(images, layout)  # [b h w c]
        with jax.named_scope("patches"):
            x = self.patch_embed(x)  # Eq. 1, [b n d]
            captures("patches", lambda: x)
            if corruption is not None:
                x = corruption.apply(x, self.mask_token[...])
            x = jnp.concatenate([*self.prefix_tokens(x), x], axis=1)
            if config.position_at == "input":
                x = elementwise.row_major(x + self.positions(sizes).astype(x.dtype))
        x = elementwise.dropout(x, config.dropout, embedding_key)
        rotation = self.rotation(x, embedding_key, sizes)
        prefix = config.num_prefix_tokens
        x = elementwise.drop_patches(x, config.patch_dropout, prefix, embedding_key)
        if config.pre_norm:
            x = self.pre_norm(x)

        x = self.encode(
            x, block_key, captures, layout, frozen, rotation, sizes
        )  # Eq. 2 and 3, `depth` times
        with jax.named_scope("head"):
            x = self.classified(x, captures, corruption, sizes)
        logits = x.astype(jnp.float32)
        return (logits, captures.values) if capture else logits

    def classified(
        self,
        x: Float[Array, "b n d"],
        captures: Captures,
        corruption: Corruption | None = None,
        sizes: native.Sizes | None = None,
    ) -> Float[Array, "b *k"]:
        """Final norm, pooling and head: logits, or the predictions for corrupted patches."""
        config = self.config
        if config.final_norm and not config.norm_after_pool:
            x = self.norm(x)
        captures("encoded", lambda: x)
        if corruption is not None:
            return self.predicted(x, corruption)

        x, x_dist = self.pooled(x, sizes)
        if config.norm_after_pool:
            x = self.norm(x)
        captures("pooled", lambda: x)

        if config.pool == "locations":
            maps = self.pyramid.levels(x)
            captures("pre_logits", lambda: rows(maps))
            return self.detector(maps)
        if config.pyramid:
            x = self.pyramid(x)
        if config.representation_size:  # the hidden layer of the pre-training head
            x = jnp.tanh(self.pre_logits(x))
        captures("pre_logits", lambda: x)
        if config.num_classes:
            x = self.head(x)
            if config.distillation == "head":
                x = (x + self.head_dist(x_dist)) / 2
        return x

    def dense(
        self, images: Float[Array | np.ndarray, "b h w c"], *, layout: Layout | None = None
    ) -> Float[Array, "b gh gw d"]:
        """Dense features: the final patch tokens, on their grid.

        These are `encoded` without the prefix tokens. Where the last LayerNorm follows the pooling
        (`norm_after_pool`), it was trained on means, and is not applied to the tokens.

        Raises:
          UserError: as `__call__`, or the model takes images of any shape (`config.max_patches`).
        """
        native.check_one_grid(self.config)
        _, captured = self(images, capture="encoded", layout=layout)
        x = captured["encoded"][:, self.config.num_prefix_tokens :]
        return x.reshape(x.shape[0], *self.config.grid, x.shape[-1])

    def prefix_tokens(self, x: Float[Array, "b n d"]) -> list[Float[Array, "b k d"]]:
        """The prefix tokens, repeated for each image: class, distillation, registers."""
        tokens = [getattr(self, name, None) for name in ("cls_token", "dist_token", "registers")]
        return [
            jnp.broadcast_to(token[...], (x.shape[0], *token.shape[1:])).astype(x.dtype)
            for token in tokens
            if token is not None
        ]

    def positions(self, sizes: native.Sizes | None = None) -> Float[Array, "*depth n d"]:
        """The position embeddings added at the input or before each layer (`config.position_at`).

        Where layers have tables of their own, there is a leading depth axis; with `sizes`, one of
        images.
        """
        if sizes is not None:
            return sizes.positions(self)
        owner = self.blocks if self.config.position_at == "layers" else self
        return positions.composed(owner, self.config)

    def rotation(
        self,
        x: Float[Array, "b ..."],
        key: Key[Array, ""] | None,
        sizes: native.Sizes | None = None,
    ) -> Float[Array, "*b n c"] | None:
        """The table of rotary positions of all tokens; with patch dropout, of each image of x.

        Where layers learn frequencies, these are the places that they are multiplied by. With a
        key, places are moved as `config.rotary` says, by one draw for all images, and patch dropout
        keeps the same patches of them as of the tokens.
        """
        config, rotary, prefix = self.config, self.config.rotary, self.config.num_prefix_tokens
        if rotary is None:
            return None
        places = rotary.places(config.grid, prefix) if sizes is None else sizes.places
        if key is not None and rotary.augments:
            places = rotary.augmented(places, prefix, jax.random.fold_in(key, 2))
        if rotary.learned:
            table = jnp.asarray(places, jnp.float32)
        else:  # of what is known when compiling, in float64
            xp = np if isinstance(places, np.ndarray) else jnp
            table = jnp.asarray(rotary.turns(places, config.head_dim, xp), jnp.float32)
        if key is None or config.patch_dropout == 0:
            return table
        table = jnp.broadcast_to(table, (x.shape[0], *table.shape))
        return elementwise.drop_patches(table, config.patch_dropout, prefix, key)

    def pooled(
        self, x: Float[Array, "b n d"], sizes: native.Sizes | None = None
    ) -> tuple[Float[Array, "b *p"], Float[Array, "b d"] | None]:
        """The head's input (the class token in Eq. 4), and that of `head_dist`, if there is one."""
        config = self.config
        x_dist = x[:, 1] if config.distillation == "head" else None
        if config.pool == "token":
            return x[:, 0], x_dist
        if config.pool in ("none", "locations"):  # each patch, at its place
            x = x[:, config.num_prefix_tokens :]
            return x.reshape(x.shape[0], *config.grid, x.shape[-1]), None
        if config.pool == "map":
            first = 0 if config.pool_prefix else config.num_prefix_tokens
            bias = None if sizes is None else sizes.bias[..., first:]
            return self.attention_pool(x[:, first:], bias), None
        real = None if sizes is None else sizes.real[..., None]
        mean = x[:, config.num_prefix_tokens :].mean(axis=1, where=real)
        return (mean if config.pool == "gap" else jnp.concatenate([x[:, 0], mean], axis=1)), None

    def heads(
        self, encoded: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b k"], Float[Array, "b k"]]:
        """Logits of the class head and of the distillation head, in float32, of `encoded` tokens.

        Their mean is the model's output (DeiT, arXiv 2012.12877).
        """
        x, x_dist = self.pooled(encoded)
        x = self.norm(x) if self.config.norm_after_pool else x
        return self.head(x).astype(jnp.float32), self.head_dist(x_dist).astype(jnp.float32)

    def predicted(
        self, x: Float[Array, "b n d"], corruption: Corruption
    ) -> Float[Array, "b m outputs"]:
        """Predictions of the masked patch head for the corrupted patches, in float32."""
        index = self.config.num_prefix_tokens + corruption.where
        x = jnp.take_along_axis(x, index[..., None], axis=1)
        x = self.norm(x) if self.config.norm_after_pool else x
        return self.patch_head(x).astype(jnp.float32)

    def encode(
        self,
        x: Float[Array, "b n d"],
        key: Key[Array, ""] | None,
        captures: Captures,
        layout: Layout | None = None,
        frozen: int = 0,
        rotation: Float[Array, "*b n c"] | None = None,
        sizes: native.Sizes | None = None,
    ) -> Float[Array, "b n d"]:
        """Runs the blocks, scanned or looped over, on the same stacked parameters."""
        graphdef, stacked = nnx.split(self.blocks)
        at, beside = self.config.position_at, self.config.branches
        depth = self.config.depth // beside
        shared = self.positions() if at == "layers_shared" else None
        logits_bias = None if sizes is None else sizes.bias
        if hasattr(self, "relative_bias"):
            logits_bias = self.relative_bias()

        length, extra, counts = x.shape[1], 0, None
        if attention.backend_of(self.config) == "cudnn":  # which takes even numbers of tokens
            extra = attention.even(length) - length
            counts = None if sizes is None else sizes.counts

        def pad(x):  # [... n d]
            return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, extra), (0, 0)]) if extra else x

        rotation = None if rotation is None else pad(rotation)

        # On one GPU, norms are folded into the next kernels (see `layers.folded`); with a layout
        # that would gather sharded kernels. In a scan, the body folds: no copy of all blocks.
        fold = target() == "gpu" and layout is None
        fold_before = not scanned(self.config.scan, depth)

        other = self.config.norm_after_branch or self.config.parallel
        folded = functools.partial(layers.folded, norms=not other)

        def body(x, params, index):
            each = [params]
            if beside > 1:
                each = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(beside)]
            each = map(folded, each) if fold and not fold_before else each
            blocks, inner = [nnx.merge(graphdef, own) for own in each], Captures(captures.names)
            if at != "input":
                added = positions.composed(blocks[0], self.config) if shared is None else shared
                x = x + pad(added.astype(x.dtype))
            x = layers.run_blocks(
                blocks,
                x,
                depth_fraction=index / max(depth - 1, 1),
                key=None if key is None else jax.random.fold_in(key, index),
                captures=inner,
                length=length,
                rotation=rotation,
                logits_bias=logits_bias,
                counts=counts,
            )
            inner("tokens", lambda: x[:, :length])
            return x, inner.values

        stacked = nnx.to_pure_dict(stacked)
        if fold and fold_before:
            stacked = jax.vmap(folded)(stacked)
        if beside > 1:  # blocks that run on the same tokens are one layer
            stacked = jax.tree.map(
                lambda leaf: leaf.reshape(depth, beside, *leaf.shape[1:]), stacked
            )
        x, captured = run_block(
            body, pad(x), stacked, self.config, layout, depth=depth, frozen=frozen // beside
        )
        captures.values.update(captured)
        return x[:, :length]
