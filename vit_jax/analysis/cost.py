"""Analytic lower bounds of a step's cost: FLOPs, and bytes sent between devices."""

import math

import jax
import jax.numpy as jnp

from vit_jax.models import pyramid
from vit_jax.models.config import ModelConfig, ResNetConfig, ViTConfig
from vit_jax.models.elementwise import kept_patches
from vit_jax.training.config import Config
from vit_jax.training.masking import num_corrupted
from vit_jax.training.program import Program


def flops_per_image(model: ModelConfig, *, training: bool = False) -> int:
    """FLOPs of the forward pass of one image, in its matrix products and convolutions.

    A multiply-add counts as 2. Norms, softmax, GELU and the optimiser are left out, as is usual.
    In training, patch dropout leaves fewer tokens.
    """
    macs = 0 if model.resnet is None else _resnet_macs(model)
    if isinstance(model, ResNetConfig):
        return 2 * (macs + model.width * model.num_classes)
    return 2 * (macs + _vit_macs(model, block_tokens(model, training)))


def block_tokens(vit: ViTConfig, training: bool) -> int:
    """The tokens of an image that blocks see."""
    patches = vit.num_patches
    if training and vit.patch_dropout:
        patches = kept_patches(patches, vit.patch_dropout)
    return vit.num_prefix_tokens + patches


def _resnet_macs(model: ModelConfig) -> int:
    """Multiply-adds of a ResNet up to its feature map: 7x7 root, and units of 1x1, 3x3 and 1x1."""
    width = model.resnet_width
    h, w = (math.ceil(side / 2) for side in model.image_size)
    macs = h * w * 49 * model.in_channels * width
    h, w = math.ceil(h / 2), math.ceil(w / 2)  # the pooling
    inputs = width
    for stage, units in enumerate(model.resnet):
        middle, before = width * 2**stage, h * w
        if stage:
            h, w = math.ceil(h / 2), math.ceil(w / 2)
        inside = h * w * (9 * middle * middle + middle * 4 * middle)
        macs += before * inputs * middle + inside + h * w * inputs * 4 * middle  # and the shortcut
        macs += (units - 1) * (h * w * 4 * middle * middle + inside)
        inputs = 4 * middle
    return macs


def _vit_macs(vit: ViTConfig, n: int) -> int:
    d, m = vit.width, vit.mlp_dim
    patches, pixels = vit.num_patches, math.prod(vit.patch_size)
    mlp, pool_mlp = (
        (3 if vit.mlp == "swiglu" else 2) * d * each for each in (m, vit.pool_mlp_dim or m)
    )
    block = (
        n * d * 3 * d  # Q, K and V
        + _attention_macs(vit, n)
        + n * d * d  # out
        + n * mlp
    )
    macs = patches * pixels * vit.patch_channels * d + vit.depth * block
    if vit.pool == "map":  # one query attends to n tokens
        macs += d * d + n * d * 2 * d + 2 * n * d + d * d + pool_mlp
    pooled = d * (2 if vit.pool == "token_gap" else 1)
    hidden = vit.representation_size
    heads = patches if vit.pool == "none" else 1
    if vit.pyramid:
        c, heads, pooled = vit.pyramid, 16 * patches, vit.pyramid
        macs += patches * 6 * d * d  # three convolutions that double the map: 2, 2 and 2
        maps = [h * w for h, w in pyramid.sizes(vit.grid)]
        for n, inputs in zip(maps, (d // 4, d // 2, d, d), strict=True):
            macs += n * (inputs * c + 9 * c * c)
    if vit.pool == "locations":  # two towers, and outputs of 3x3 convolutions
        return macs + sum(maps) * 9 * c * (2 * vit.towers * c + vit.num_classes + 5)
    macs += (pooled * hidden if hidden else 0) + heads * (hidden or pooled) * vit.num_classes
    if vit.patch_outputs:  # masked patch prediction: at the corrupted patches alone
        macs += num_corrupted(patches) * d * vit.patch_outputs
    return macs + (d * vit.num_classes if vit.distillation == "head" else 0)


def _attention_macs(vit: ViTConfig, n: int) -> int:
    """Multiply-adds of a block's products without a kernel: scores, weighted sum of values."""
    macs = 2 * n**2 * vit.width
    if vit.position == "relative":  # the queries of patches times the embeddings of all offsets
        patches = math.prod(vit.grid)
        macs += patches * (2 * patches - 1) * vit.width
    return macs


def step_flops(config: Config, model: ModelConfig, teacher: ModelConfig | None = None) -> int:
    """FLOPs of a training step: forward, backward (twice the forward), and `remat` recomputation.

    A teacher has a forward pass alone.

    The backward pass has two products of the same size for each product (the one that reads the
    image has only one, but is counted as two).
    """
    forward, attention = flops_per_image(model, training=True), 0
    if isinstance(model, ViTConfig):
        attention = 2 * model.depth * _attention_macs(model, block_tokens(model, True))
    repeated = {"none": 0, "dots": attention, "full": forward}[model.remat]
    taught = 0 if teacher is None else flops_per_image(teacher)
    return config.batch_size * (3 * forward + repeated + taught)


def least_traffic(
    program: Program, config: Config, model: ModelConfig, teacher: ModelConfig | None = None
) -> float:
    """Lower bound of the bytes that each device sends in a step, with the mesh's sharding.

    In each micro-batch every `fsdp`-sharded parameter is gathered twice, for the forward and the
    backward pass, and its gradient is reduce-scattered once, all in the compute dtype; gradient
    shards are summed over `data`, and unsharded gradients over all devices. Along `tensor`, each
    block sums activations twice in the forward and twice in the backward pass. A teacher has the
    forward pass alone.
    """
    data, fsdp, tensor = (program.mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    size, total = jnp.dtype(model.dtype).itemsize, 0.0

    def ring(n: int) -> float:
        return (n - 1) / n

    for leaf in jax.tree.leaves(program.state.params):
        part = math.prod(leaf.sharding.shard_shape(leaf.shape)) * size
        if "fsdp" in leaf.sharding.spec:
            total += 3 * part * fsdp * ring(fsdp) + 2 * part * ring(data)
        else:
            total += 2 * part * ring(data * fsdp)
    for leaf in jax.tree.leaves(program.teacher):
        if "fsdp" in leaf.sharding.spec:
            total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * size * fsdp * ring(fsdp)
    total *= config.optim.accumulate
    for each, sums in ((model, 4), (teacher, 2)):
        if isinstance(each, ViTConfig):  # a ResNet is not split by `tensor`
            rows = config.batch_size // (data * fsdp)
            activations = rows * block_tokens(each, each is model) * each.width * size
            total += each.depth * sums * 2 * activations * ring(tensor)
    return total
