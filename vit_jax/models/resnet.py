"""The ResNet that the paper compares with, and puts before its hybrids: BiT's, arXiv 1912.11370.

Group normalisation, and standardised convolutions (arXiv 1903.10520), in place of batch
normalisation. Parameters are float32; norms and kernels are standardised in float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from vit_jax.errors import UserError, nearest
from vit_jax.models.config import ModelConfig, ResNetConfig
from vit_jax.models.layers import Layout, Taps, check_images, run_block

CAPTURES = ("encoded", "pooled", "pre_logits")


class Style(NamedTuple):
    """What code bases do otherwise.

    Attributes:
      preact: whether norm and ReLU come before each convolution (arXiv 1603.05027) or behind it.
        The former pads both sides alike, and with zeros before the pooling; the latter as
        TensorFlow's SAME, which has an odd pixel below and on the right.
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


class StdConv(nnx.Module):
    """A convolution without a bias, whose kernel [h w i o] is standardised for each output."""

    def __init__(self, shape: tuple[int, ...], config: ModelConfig, rngs: nnx.Rngs):
        self.dtype, self.style = jnp.dtype(config.dtype), STYLES[config.resnet_style]
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))

    def __call__(self, x: Float[Array, "b h w i"], stride: int = 1) -> Float[Array, "b p q o"]:
        # First rounded, as a kernel is that a mesh gathers: the result is the same on every mesh.
        kernel = self.kernel[...].astype(self.dtype).astype(jnp.float32)
        kernel = kernel - kernel.mean(axis=(0, 1, 2))
        variance = jnp.square(kernel).mean(axis=(0, 1, 2))
        kernel = kernel / (jnp.sqrt(variance + self.style.var_eps) + self.style.std_eps)
        side = kernel.shape[0] // 2
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (stride, stride),
            [(side, side)] * 2 if self.style.preact else "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def group_norm(channels: int, config: ModelConfig, rngs: nnx.Rngs, scale: float = 1.0):
    """A GroupNorm of 32 groups, its statistics in float32."""
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
    """A bottleneck: 1x1, 3x3 (strided), 1x1 to four times as many channels, and a shortcut.

    The first unit of a stage strides and projects its shortcut, the others do neither.
    """

    def __init__(self, inputs: int, middle: int, config: ModelConfig, *, rngs: nnx.Rngs):
        outputs = 4 * middle
        self.preact, self.projects = STYLES[config.resnet_style].preact, inputs != outputs
        self.conv1 = StdConv((1, 1, inputs, middle), config, rngs)
        self.conv2 = StdConv((3, 3, middle, middle), config, rngs)
        self.conv3 = StdConv((1, 1, middle, outputs), config, rngs)
        if self.projects:
            self.conv_proj = StdConv((1, 1, inputs, outputs), config, rngs)
        if self.preact:
            channels = (inputs, middle, middle)
        else:
            channels = (middle, middle, outputs)
            if self.projects:
                self.norm_proj = group_norm(outputs, config, rngs)
        self.norm1 = group_norm(channels[0], config, rngs)
        self.norm2 = group_norm(channels[1], config, rngs)
        # The branch starts as nothing, as in Google's code.
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
    """Units of one resolution: the first one, and the others with stacked parameters."""

    def __init__(self, inputs: int, middle: int, units: int, config: ModelConfig, rngs: nnx.Rngs):
        self.config, self.units = config, units
        self.first = Unit(inputs, middle, config, rngs=rngs)
        if units > 1:
            keys = jax.random.split(rngs.params(), units - 1)
            self.rest = nnx.vmap(lambda k: Unit(4 * middle, middle, config, rngs=nnx.Rngs(k)))(keys)

    def __call__(
        self, x: Float[Array, "b h w i"], stride: int, layout: Layout | None
    ) -> Float[Array, "b p q o"]:
        def run(units, x, stride, depth=None):
            graphdef, params = nnx.split(units)

            def body(x, params, index):
                return nnx.merge(graphdef, params)(x, stride), ()

            params = nnx.to_pure_dict(params)
            return run_block(body, x, params, self.config, layout, depth=depth)[0]

        x = run(self.first, x, stride)
        return run(self.rest, x, 1, depth=self.units - 1) if self.units > 1 else x


class Backbone(nnx.Module):
    """From images to a feature map of 1/4 of their size, halved in each stage but the first."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config, width = config, config.resnet_width
        self.preact = STYLES[config.resnet_style].preact
        self.conv_root = StdConv((7, 7, config.in_channels, width), config, rngs)
        if not self.preact:
            self.norm_root = group_norm(width, config, rngs)
        inputs = width
        for index, units in enumerate(config.resnet):
            middle = width * 2**index
            setattr(self, f"stage{index + 1}", Stage(inputs, middle, units, config, rngs))
            inputs = 4 * middle
        if self.preact:
            self.norm = group_norm(inputs, config, rngs)

    def __call__(
        self, images: Float[Array | np.ndarray, "b h w c"], layout: Layout | None = None
    ) -> Float[Array, "b p q d"]:
        x = self.conv_root(jnp.asarray(images), 2)
        if self.preact:
            pool = [(0, 0), (1, 1), (1, 1), (0, 0)]
            x, padding = jnp.pad(x, pool), "VALID"
        else:
            x, padding = jax.nn.relu(self.norm_root(x)), "SAME"
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=padding)
        for index in range(len(self.config.resnet)):
            stage = getattr(self, f"stage{index + 1}")
            x = stage(x, 1 if index == 0 else 2, layout)
        return jax.nn.relu(self.norm(x)) if self.preact else x


class ResNet(nnx.Module):
    """A ResNet as a classifier. Weights load through `vit_jax.load`, new ones from `create`."""

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.resnet = Backbone(config, rngs=rngs)
        if config.num_classes:
            self.head = nnx.Linear(
                config.width,
                config.num_classes,
                dtype=jnp.dtype(config.dtype),
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
        layout: Layout | None = None,
    ) -> Float[Array, "b k"] | tuple[Float[Array, "b k"], dict[str, Any]]:
        """Classifies images, as `ViT.__call__` does; nothing of it is random, so `key` is unused.

        There are these intermediates: the feature map `encoded` [b n d], its positions in rows, and
        its mean over them, `pooled` [b d], which is `pre_logits` too.

        Raises:
          UserError: the images have another size or number of channels, or there is no such
            intermediate.
        """
        config, taps = self.config, Taps(capture)
        for name in taps.names - set(CAPTURES):
            raise UserError(f"a ResNet has no {name!r} to capture; {nearest(name, CAPTURES)}")
        check_images(images, config)
        x = self.resnet(images, layout)
        taps("encoded", lambda: x.reshape(x.shape[0], -1, x.shape[-1]))
        x = x.mean(axis=(1, 2))
        taps("pooled", lambda: x)
        taps("pre_logits", lambda: x)
        if config.num_classes:
            x = self.head(x)
        logits = x.astype(jnp.float32)
        return (logits, taps.values) if capture else logits
