"""ResNets as in BiT (arXiv 1912.11370): the paper's baseline, and the stem of its hybrids.

Group normalisation and weight standardisation (arXiv 1903.10520) in place of batch normalisation;
both in float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from vit_jax.errors import UserError, nearest
from vit_jax.models.config import ModelConfig, ResNetConfig
from vit_jax.models.layers import check_images, zero_head
from vit_jax.models.stack import Captures, Layout, run_block

CAPTURES = ("encoded", "pooled", "pre_logits")


class Style(NamedTuple):
    """Details in which the code bases' ResNets differ.

    Attributes:
      preact: whether norm and ReLU come before each convolution (arXiv 1603.05027) or after it.
        Pre-activation pads both sides alike, and with zeros before the max pooling; the other
        style pads like TensorFlow's SAME, an odd pixel at the bottom and on the right.
      norm_eps: added to the variance of a group.
      std_eps, var_eps: added to a kernel's standard deviation, and to its variance.
    """

    preact: bool
    norm_eps: float
    std_eps: float
    var_eps: float


STYLES = {
    "v1": Style(False, 1e-6, 1e-5, 0.0),  # vit_jax models_resnet.py, big_vision models/bit.py
    "v2": Style(True, 1e-5, 0.0, 1e-10),  # big_transfer, big_vision models/bit_paper.py
    "timm_v1": Style(False, 1e-5, 0.0, 1e-8),  # timm vision_transformer_hybrid.py
    "timm_v2": Style(True, 1e-5, 0.0, 1e-8),  # timm resnetv2.py, its models ..._bit
}


class Conv(nnx.Module):
    """A convolution without bias, with a kernel [h w i o] that `run` has standardised."""

    def __init__(self, shape: tuple[int, ...], config: ModelConfig, rngs: nnx.Rngs):
        self.dtype, self.preact = jnp.dtype(config.dtype), STYLES[config.resnet_style].preact
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))

    def __call__(self, x: Float[Array, "b h w i"], stride: int = 1) -> Float[Array, "b p q o"]:
        side = self.kernel.shape[0] // 2
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            (stride, stride),
            [(side, side)] * 2 if self.preact else "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def standardised(
    kernel: Float[Array, "*depth h w i o"], style: Style
) -> Float[Array, "*depth h w i o"]:
    """Weight standardisation: kernels with mean 0 and standard deviation 1 for each output."""
    kernel = kernel - kernel.mean(axis=(-4, -3, -2), keepdims=True)
    variance = jnp.square(kernel).mean(axis=(-4, -3, -2), keepdims=True)
    return kernel / (jnp.sqrt(variance + style.var_eps) + style.std_eps)


def run(
    modules: dict[str, nnx.Module],
    forward: Callable[..., Array],
    x: Float[Array, "b ..."],
    config: ModelConfig,
    layout: Layout | None,
    depth: int | None = None,
) -> Float[Array, "b ..."]:
    """Runs `forward(x, **modules)` once, or `depth` times, with `stack.run_block`.

    Kernels are standardised first, while sharded: on a mesh each device standardises its share of
    all units' kernels, and the results are gathered.
    """
    split = {name: nnx.split(module) for name, module in modules.items()}
    style, dtype = STYLES[config.resnet_style], jnp.dtype(config.dtype)

    @jax.checkpoint  # cheap, and else more than the kernels would be kept for the way back
    def used(params):
        def each(path, leaf):
            return standardised(leaf, style).astype(dtype) if path[-1].key == "kernel" else leaf

        return jax.tree_util.tree_map_with_path(each, params)

    def body(x, params, index):
        merged = {name: nnx.merge(split[name][0], params[name]) for name in params}
        return forward(x, **merged), ()

    params = {name: nnx.to_pure_dict(state) for name, (_, state) in split.items()}
    return run_block(body, x, used(params), config, layout, depth=depth)[0]


def group_norm(channels: int, config: ModelConfig, rngs: nnx.Rngs, scale: float = 1.0):
    """Returns a GroupNorm of 32 groups, with statistics in float32."""
    return nnx.GroupNorm(
        channels,
        num_groups=32,
        epsilon=STYLES[config.resnet_style].norm_eps,
        dtype=jnp.dtype(config.dtype),
        use_fast_variance=False,
        scale_init=nnx.initializers.constant(scale),
        rngs=rngs,
    )


class Unit(nnx.Module):
    """Bottleneck unit: 1x1, 3x3 (strided), 1x1 to four times as many channels, and a shortcut.

    Only the first unit of a stage has a stride and a projection in its shortcut.
    """

    def __init__(self, inputs: int, middle: int, config: ModelConfig, *, rngs: nnx.Rngs):
        outputs = 4 * middle
        self.preact, self.projects = STYLES[config.resnet_style].preact, inputs != outputs
        self.conv1 = Conv((1, 1, inputs, middle), config, rngs)
        self.conv2 = Conv((3, 3, middle, middle), config, rngs)
        self.conv3 = Conv((1, 1, middle, outputs), config, rngs)
        if self.projects:
            self.conv_proj = Conv((1, 1, inputs, outputs), config, rngs)
        if self.preact:
            channels = (inputs, middle, middle)
        else:
            channels = (middle, middle, outputs)
            if self.projects:
                self.norm_proj = group_norm(outputs, config, rngs)
        self.norm1 = group_norm(channels[0], config, rngs)
        self.norm2 = group_norm(channels[1], config, rngs)
        # The residual branch starts at zero, as in Google's code.
        self.norm3 = group_norm(channels[2], config, rngs, scale=1.0 if self.preact else 0.0)

    def __call__(self, x: Float[Array, "b h w i"], stride: int = 1) -> Float[Array, "b p q o"]:
        if self.preact:
            y = jax.nn.relu(self.norm1(x))
            shortcut = self.conv_proj(y, stride) if self.projects else x
            y = jax.nn.relu(self.norm2(self.conv1(y)))
            y = jax.nn.relu(self.norm3(self.conv2(y, stride)))
            return shortcut + self.conv3(y)
        shortcut = self.norm_proj(self.conv_proj(x, stride)) if self.projects else x
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = jax.nn.relu(self.norm2(self.conv2(y, stride)))
        return jax.nn.relu(shortcut + self.norm3(self.conv3(y)))


class Stage(nnx.Module):
    """A stage: its first unit, and the other units with stacked parameters."""

    def __init__(self, inputs: int, middle: int, units: int, config: ModelConfig, rngs: nnx.Rngs):
        self.config, self.units = config, units
        self.first = Unit(inputs, middle, config, rngs=rngs)
        if units > 1:
            keys = jax.random.split(rngs.params(), units - 1)
            self.rest = nnx.vmap(lambda k: Unit(4 * middle, middle, config, rngs=nnx.Rngs(k)))(keys)

    def __call__(
        self, x: Float[Array, "b h w i"], stride: int, layout: Layout | None
    ) -> Float[Array, "b p q o"]:
        config = self.config
        x = run({"unit": self.first}, lambda x, unit: unit(x, stride), x, config, layout)
        if self.units == 1:
            return x
        rest, depth = {"unit": self.rest}, self.units - 1
        return run(rest, lambda x, unit: unit(x), x, config, layout, depth)


class Backbone(nnx.Module):
    """Maps images to a feature map of 1/4 of their size, halved in each stage but the first."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config, width = config, config.resnet_width
        self.preact = STYLES[config.resnet_style].preact
        self.conv_root = Conv((7, 7, config.in_channels, width), config, rngs)
        if not self.preact:
            self.norm_root = group_norm(width, config, rngs)
        inputs = width
        for index, units in enumerate(config.resnet):
            middle = width * 2**index
            setattr(self, f"stage{index + 1}", Stage(inputs, middle, units, config, rngs))
            inputs = 4 * middle
        if self.preact:
            self.norm = group_norm(inputs, config, rngs)

    @jax.named_scope("resnet")
    def __call__(
        self, images: Float[Array | np.ndarray, "b h w c"], layout: Layout | None = None
    ) -> Float[Array, "b p q d"]:
        def root(x, conv_root, norm_root=None):
            x = conv_root(x, 2)
            if self.preact:
                x, padding = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]), "VALID"
            else:
                x, padding = jax.nn.relu(norm_root(x)), "SAME"
            return nnx.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=padding)

        modules = {"conv_root": self.conv_root}
        if not self.preact:
            modules["norm_root"] = self.norm_root
        x = run(modules, root, jnp.asarray(images), self.config, layout)
        for index in range(len(self.config.resnet)):
            stage = getattr(self, f"stage{index + 1}")
            x = stage(x, 1 if index == 0 else 2, layout)
        return jax.nn.relu(self.norm(x)) if self.preact else x


class ResNet(nnx.Module):
    """A ResNet classifier. `vit_jax.load` loads weights, `create` initialises a new one."""

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.resnet = Backbone(config, rngs=rngs)
        if config.num_classes:
            self.head = zero_head(config.width, config, rngs)

    @jax.named_scope("resnet")
    def __call__(
        self,
        images: Float[Array | np.ndarray, "b h w c"],
        *,
        key: Key[Array, ""] | None = None,
        capture: str | tuple[str, ...] = (),
        layout: Layout | None = None,
    ) -> Float[Array, "b k"] | tuple[Float[Array, "b k"], dict[str, Any]]:
        """Classifies images, with the interface of `ViT.__call__`; `key` is unused.

        The intermediates to capture are the feature map `encoded` [b n d], flattened to rows, and
        its mean over positions, `pooled` [b d], which is also `pre_logits`.

        Raises:
          UserError: the images have another size or number of channels, or there is no such
            intermediate.
        """
        config, captures = self.config, Captures(capture)
        for name in captures.names - set(CAPTURES):
            raise UserError(f"a ResNet has no {name!r} to capture; {nearest(name, CAPTURES)}")
        check_images(images, config)
        x = self.resnet(images, layout)
        captures("encoded", lambda: x.reshape(x.shape[0], -1, x.shape[-1]))
        x = x.mean(axis=(1, 2))
        captures("pooled", lambda: x)
        captures("pre_logits", lambda: x)
        if config.num_classes:
            x = self.head(x)
        logits = x.astype(jnp.float32)
        return (logits, captures.values) if capture else logits

    def dense(
        self, images: Float[Array | np.ndarray, "b h w c"], *, layout: Layout | None = None
    ) -> Float[Array, "b gh gw d"]:
        """Returns the feature map before pooling.

        Raises:
          UserError: the images have another size or number of channels.
        """
        check_images(images, self.config)
        return self.resnet(images, layout)
