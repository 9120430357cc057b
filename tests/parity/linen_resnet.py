"""ResNets and hybrids in flax's linen, which names their parameters as Google's files do.

What google-research/vision_transformer (vit_jax/models_resnet.py, models_vit.py) and
google-research/big_vision (models/bit.py, which is called V1 here, and models/bit_paper.py, V2)
compute. Nothing here imports vit_jax.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


class StdConv(nn.Module):
    """linen's convolution of a standardised kernel; V2's is padded alike on both sides."""

    width: int
    side: int = 1
    stride: int = 1
    v2: bool = False

    @nn.compact
    def __call__(self, x):
        shape = (self.side, self.side, x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        kernel -= kernel.mean((0, 1, 2))
        variance = jnp.square(kernel).mean((0, 1, 2))
        kernel /= jnp.sqrt(variance + 1e-10) if self.v2 else jnp.sqrt(variance) + 1e-5
        conv = nn.Conv(
            self.width,
            (self.side, self.side),
            self.stride,
            self.side // 2 if self.v2 else "SAME",
            use_bias=False,
            parent=None,
        )
        return conv.apply({"params": {"kernel": kernel}}, x)


class GroupNormV2(nn.Module):
    """Of 32 groups, with another epsilon than linen's, and parameters of four axes."""

    @nn.compact
    def __call__(self, x):
        shape = (1, 1, 1, x.shape[-1])
        groups = x.reshape(*x.shape[:3], 32, -1)
        groups -= groups.mean((1, 2, 4), keepdims=True)
        groups /= jnp.sqrt(jnp.square(groups).mean((1, 2, 4), keepdims=True) + 1e-5)
        scale = self.param("scale", nn.initializers.ones, shape)
        return groups.reshape(x.shape) * scale + self.param("bias", nn.initializers.zeros, shape)


class Unit(nn.Module):
    width: int
    stride: int
    v2: bool

    @nn.compact
    def __call__(self, x):
        norm = GroupNormV2 if self.v2 else nn.GroupNorm
        conv = functools.partial(StdConv, v2=self.v2)
        shortcut, outputs = x, 4 * self.width
        projects = x.shape[-1] != outputs or self.stride > 1
        if self.v2:
            x = nn.relu(norm(name="gn1")(x))
        if projects:
            shortcut = conv(outputs, 1, self.stride, name="conv_proj")(x if self.v2 else shortcut)
        if projects and not self.v2:
            shortcut = norm(name="gn_proj")(shortcut)
        x = conv(self.width, name="conv1")(x)
        x = nn.relu(norm(name="gn2" if self.v2 else "gn1")(x))
        x = conv(self.width, 3, self.stride, name="conv2")(x)
        x = nn.relu(norm(name="gn3" if self.v2 else "gn2")(x))
        x = conv(outputs, name="conv3")(x)
        return shortcut + x if self.v2 else nn.relu(shortcut + norm(name="gn3")(x))


class Stage(nn.Module):
    units: int
    width: int
    stride: int
    v2: bool

    @nn.compact
    def __call__(self, x):
        for i in range(1, self.units + 1):
            stride = self.stride if i == 1 else 1
            x = Unit(self.width, stride, self.v2, name=f"unit{i:0{2 if self.v2 else 1}}")(x)
        return x


class RootBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return StdConv(self.width, 7, 2, True, name="conv_root")(x)


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(40)(x))  # the tanh approximation
        return nn.Dense(x.shape[-1])(hidden)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x += nn.MultiHeadDotProductAttention(num_heads=4)(y, y)
        return x + MlpBlock()(nn.LayerNorm()(x))


class Positions(nn.Module):
    @nn.compact
    def __call__(self, x):
        table = self.param("pos_embedding", nn.initializers.normal(), (1, *x.shape[1:]))
        return x + table


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Positions(name="posembed_input")(x)
        for i in range(2):
            x = Block(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class Classifier(nn.Module):
    """A ResNet of 32 channels, and if there are `patches` an encoder behind it.

    `border` is what V2's pooling is padded with: zeros in google-research/big_transfer, which the
    published weights are from, and in timm; what no maximum sees (-inf) in bit_paper.py.
    """

    units: tuple
    v2: bool = False
    patches: tuple = ()
    token: bool = True
    hidden: int = 0
    border: float = 0.0

    @nn.compact
    def __call__(self, x):
        if self.v2:
            x = RootBlock(32, name="root_block")(x)
            x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=self.border)
        else:
            x = nn.relu(nn.GroupNorm(name="gn_root")(StdConv(32, 7, 2, name="conv_root")(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "VALID" if self.v2 else "SAME")
        for i, units in enumerate(self.units):
            x = Stage(units, 32 * 2**i, 1 + (i > 0), self.v2, name=f"block{i + 1}")(x)
        if self.v2:
            x = nn.relu(GroupNormV2(name="norm-pre-head")(x))
        if self.patches:
            x = nn.Conv(32, self.patches, self.patches, "VALID", name="embedding")(x)
            x = x.reshape(len(x), -1, 32)
            if self.token:
                token = self.param("cls", nn.initializers.zeros, (1, 1, 32))
                x = jnp.concatenate([jnp.repeat(token, len(x), 0), x], axis=1)
            x = Transformer(name="Transformer")(x)
            x = x[:, 0] if self.token else x.mean(1)
        else:
            x = x.mean((1, 2))
        if self.hidden:
            x = jnp.tanh(nn.Dense(self.hidden, name="pre_logits")(x))
        return nn.Dense(5, name="head")(x)


def draw(model, size):
    """Random arrays by the names that linen gives them; branches count, and so do epsilons."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))["params"]
    rng, arrays = np.random.default_rng(0), {}
    for name, leaf in flatten_dict(shapes, sep="/").items():
        noise = rng.standard_normal(leaf.shape)
        if name.endswith("scale"):
            noise = (0.4 + 0.1 * noise) * (0.3 if "gn3" in name else 1)
        elif name.endswith(("bias", "cls", "pos_embedding")):
            noise *= 0.1
        else:
            noise *= 3e-4 if "conv" in name else np.prod(leaf.shape[:-1]) ** -0.5
        arrays[name] = noise.astype(np.float32)
    return arrays


@functools.cache
def _program(model):
    return jax.jit(model.apply)


def compute(model, arrays, images):
    """What the model makes of such arrays, in float64."""
    with jax.enable_x64(True):
        arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
        variables = {"params": unflatten_dict(arrays, sep="/")}
        return np.asarray(_program(model)(variables, images.astype(np.float64)))
