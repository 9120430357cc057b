"""Analysis of a trained model as in the paper's section 4.5 and appendices D.7 and D.8.

plots.py draws the results. Filters and position embeddings need only the weights; attention is
measured on images (`inspect_attention`).
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vit_jax.checkpoints.load import Loaded
from vit_jax.data.transforms import resize
from vit_jax.errors import UserError
from vit_jax.models.config import ResNetConfig, ViTConfig
from vit_jax.models.create import Model
from vit_jax.models.native import check_one_grid
from vit_jax.models.resnet import STYLES, standardised

_AT_ONCE = 2**28  # bytes of attention weights in memory, or those of one image, if more

Weights = Float[Array | np.ndarray, "depth b heads n n"]


def embedding_filters(model: Model) -> Float[np.ndarray, "p q c d"]:
    """The filters that are applied to pixels: in a ViT, the patch embedding.

    In a hybrid, whose patches are cut from features, and in a ResNet, they are the kernel of the
    7x7 root after weight standardisation.
    """
    if model.config.resnet is None:
        return np.asarray(model.patch_embed.kernel[...])
    root = model.resnet.conv_root.kernel[...]
    return np.asarray(standardised(root, STYLES[model.config.resnet_style]))


def filter_components(
    kernel: Float[Array | np.ndarray, "p q c d"], count: int = 28
) -> Float[np.ndarray, "n p q c"]:
    """The principal components of d filters (Figure 7, left), by decreasing variance.

    The filters are the samples, and their mean is subtracted. Each component has length 1, and its
    sign, which is arbitrary, is chosen to make the largest value positive.

    Args:
      count: how many, at most the number of values in a filter, or d - 1.
    """
    samples = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]).T  # [d pqc]
    count = min(count, samples.shape[0] - 1, samples.shape[1])
    _, _, components = np.linalg.svd(samples - samples.mean(axis=0), full_matrices=False)
    components = components[:count]
    largest = np.abs(components).argmax(axis=1, keepdims=True)
    components = components * np.sign(np.take_along_axis(components, largest, axis=1))
    return components.reshape(-1, *kernel.shape[:3])


def position_similarity(model: Model) -> Float[np.ndarray, "gh gw gh gw"]:
    """Cosine similarity of each patch's position embedding to all others (Figure 7, centre).

    Prefix tokens are left out, and 2D tables are combined first. If each layer has its own
    embeddings, the first layer's are used. [i, j, k, l] compares row i, column j with row k,
    column l; the similarity of an all-zero embedding is 0.

    Raises:
      UserError: the model has no position embeddings, or only relative ones.
    """
    config = model.config
    if isinstance(config, ResNetConfig):
        raise UserError("a ResNet has no position embeddings to compare")
    if config.position == "none":
        raise UserError("this model has no position embeddings to compare: its position is 'none'")
    if config.position == "rope":
        raise UserError(
            "this model has no position embeddings to compare: its position is 'rope', which "
            "rotates queries and keys, and adds nothing to the tokens"
        )
    if config.position in ("relative", "relative_bias"):
        raise UserError(
            "this model has no position embeddings to compare: its position is "
            f"{config.position!r}, which embeds offsets between patches, not places"
        )
    table = model.positions()
    if config.position_at == "layers":
        table = table[0]
    table = np.asarray(table, np.float64)[config.num_prefix_tokens :]
    length = np.linalg.norm(table, axis=1, keepdims=True)
    table = table / np.maximum(length, np.finfo(np.float64).tiny)
    return (table @ table.T).reshape(*config.grid, *config.grid)


def attention_distance(
    weights: Weights,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    patch_pixels: tuple[int, int],
) -> Float[Array, "depth heads"]:
    """Mean attention distance in pixels (Figure 7, right; appendix D.7).

    The distance from the centre of the query's patch to that of the key's, weighted by attention,
    averaged over images and query patches. Prefix tokens have no position: they are left out as
    queries and as keys, and a query's remaining weights are renormalised (if none remain, the
    distance is 0).

    Args:
      grid: patches (down, across).
      patch_pixels: (h, w) of a patch; see `ViTConfig.patch_pixels`.
    """
    centres = np.indices(grid).reshape(2, -1).T * np.asarray(patch_pixels)  # but for a shift
    apart = np.linalg.norm(centres[:, None] - centres, axis=-1).astype(np.float32)
    paid = jnp.asarray(weights)[..., num_prefix_tokens:, num_prefix_tokens:]
    reach = jnp.einsum("lbhqk,qk->lbhq", paid, apart, precision="highest")
    reach = reach / jnp.maximum(paid.sum(axis=-1), np.finfo(np.float32).tiny)
    return reach.mean(axis=(1, 3))


def attention_maps(
    weights: Weights, grid: tuple[int, int], num_prefix_tokens: int, from_class_token: bool
) -> Float[Array, "depth b heads gh gw"]:
    """Attention weights from the output token to the patches, in each layer and head.

    The output is the class token, or else the mean of the patches (pooling `gap` and `map`).
    Prefix tokens are left out as keys, so a map may sum to less than 1.
    """
    output = _output(weights.shape[-1], num_prefix_tokens, from_class_token)
    maps = jnp.einsum("q,lbhqk->lbhk", output, weights, precision="highest")
    return maps[..., num_prefix_tokens:].reshape(*maps.shape[:-1], *grid)


def rollout(
    weights: Weights, grid: tuple[int, int], num_prefix_tokens: int, from_class_token: bool
) -> Float[Array, "b gh gw"]:
    """Attention rollout: attention to the patches through all layers (Figure 6; appendix D.8).

    As in arXiv 2005.00928, attention is averaged over heads, averaged with the identity, for the
    residual, and multiplied through the layers. Returns the output's row (see `attention_maps`).
    """
    share = _output(weights.shape[-1], num_prefix_tokens, from_class_token)
    share = jnp.broadcast_to(share, (weights.shape[1], weights.shape[-1]))  # [b n]
    # From the last layer backwards, only vectors are multiplied.
    for layer in weights.mean(axis=2)[::-1]:
        share = (share + jnp.einsum("bq,bqk->bk", share, layer, precision="highest")) / 2
    return share[:, num_prefix_tokens:].reshape(-1, *grid)


def _output(n: int, num_prefix_tokens: int, from_class_token: bool) -> Float[np.ndarray, "n"]:
    """The output's weights on the n tokens."""
    weights = np.zeros(n, np.float32)
    if from_class_token:
        weights[0] = 1
    else:
        weights[num_prefix_tokens:] = 1 / (n - num_prefix_tokens)
    return weights


def overlay(
    image: Float[np.ndarray, "h w c"], attention: Float[np.ndarray, "gh gw"]
) -> Float[np.ndarray, "h w c"]:
    """Darkens an image where attention is low (Figure 6).

    The map is resized bilinearly to the image and divided by its maximum.
    """
    mask = resize(np.asarray(attention, np.float32)[..., None], image.shape[:2], "bilinear")
    return image * (mask / max(mask.max(), np.finfo(np.float32).tiny))


@dataclasses.dataclass(frozen=True)
class Inspected:
    """Attention statistics of some images.

    Attributes:
      images: as the model saw them, resized and cropped, before normalisation: in [0, 1].
      distance: mean attention distance of each head in pixels (see `attention_distance`).
      maps: attention of the output, in each layer and head (see `attention_maps`).
      rollout: attention of the output through all layers (see `rollout`).
    """

    images: Float[np.ndarray, "b h w c"]
    distance: Float[np.ndarray, "depth heads"]
    maps: Float[np.ndarray, "depth b heads gh gw"]
    rollout: Float[np.ndarray, "b gh gw"]


def inspect_attention(vit: Loaded, images: Iterable[Any]) -> Inspected:
    """Runs a model on images, a few at a time, and summarises its attention weights.

    Args:
      vit: the result of `vit_jax.load`.
      images: anything that `vit.preprocess` takes.

    Raises:
      UserError: a model without attention, no images, or one that cannot be read.
    """
    config, preprocess = vit.config, vit.preprocess
    if isinstance(config, ResNetConfig):
        raise UserError("a ResNet has no attention to look at")
    check_one_grid(config)
    pixels = [preprocess.pixels(preprocess.read(image)) for image in images]
    if not pixels:
        raise UserError("expected at least one image to look at attention with")
    pixels, at_once = np.stack(pixels), _images_at_once(config)
    graphdef, params = nnx.split(vit.model)
    sums = jax.jit(lambda params, images: _sums(nnx.merge(graphdef, params), images))
    batches = np.split(pixels, range(at_once, len(pixels), at_once))
    found = [jax.device_get(sums(params, preprocess.normalise(batch))) for batch in batches]
    distance, maps, rollouts = zip(*found, strict=True)
    return Inspected(
        (pixels.astype(np.float32) / 255).clip(0, 1),
        np.average(distance, axis=0, weights=[len(batch) for batch in batches]),
        np.concatenate(maps, axis=1),
        np.concatenate(rollouts),
    )


def _sums(model: Model, images: Float[Array, "b h w c"]) -> tuple[Array, Array, Array]:
    config = model.config
    weights = model(images, capture="attention")[1]["attention"]
    grid, prefix = config.grid, config.num_prefix_tokens
    # A class token that the head does not read (MAE with mean pooling) is not the output.
    tokens = (grid, prefix, config.pools_class_token)
    return (
        attention_distance(weights, grid, prefix, config.patch_pixels),
        attention_maps(weights, *tokens),
        rollout(weights, *tokens),
    )


def _images_at_once(config: ViTConfig) -> int:
    weights = 4 * config.depth * config.num_heads * config.num_tokens**2
    return max(1, _AT_ONCE // weights)
