"""Tiny weights of hybrids and ResNets, written down key by key, and what they are under our names.

The names are those of google-research/vision_transformer (models_resnet.py), of big_vision
(models/bit.py, called V1 here, and models/bit_paper.py, V2), of big_transfer's published files
(BiT) and of timm (resnetv2.py, vision_transformer_hybrid.py).
"""

import dataclasses

import dialects
import numpy as np

from vit_jax.models.config import ResNetConfig, ViTConfig

WIDTH, UNITS = 32, (2, 1)
# A unit's arrays: ours, V1's and V2's, BiT's, timm's. What stands last only a first unit has, and
# the norm of its shortcut only V1 (and timm's hybrids).
STD = "standardized_conv2d/kernel"
KERNELS = [
    ("conv1", (1, 1, "in", "mid"), "conv1/kernel", f"a/{STD}", "conv1.weight"),
    ("conv2", (3, 3, "mid", "mid"), "conv2/kernel", f"b/{STD}", "conv2.weight"),
    ("conv3", (1, 1, "mid", "out"), "conv3/kernel", f"c/{STD}", "conv3.weight"),
    (
        "conv_proj",
        (1, 1, "in", "out"),
        "conv_proj/kernel",
        f"a/proj/{STD}",
        "downsample.conv.weight",
    ),
]
NORMS = [
    ("norm1", "gn1", "a/group_norm", "norm1"),
    ("norm2", "gn2", "b/group_norm", "norm2"),
    ("norm3", "gn3", "c/group_norm", "norm3"),
    ("norm_proj", "gn_proj", None, "downsample.norm"),
]
LEAVES = {
    "v1": "/scale /bias",
    "v2": "/scale /bias",
    "bit": "/gamma /beta",
    "timm": ".weight .bias",
}
COLUMN = {"v1": 0, "v2": 0, "bit": 1, "timm": 2}
UNIT = {
    "v1": lambda stage, unit: f"block{stage}/unit{unit}/",
    "v2": lambda stage, unit: f"block{stage}/unit{unit:02}/",
    "bit": lambda stage, unit: f"block{stage}/unit{unit:02}/",
    "timm": lambda stage, unit: f"stages.{stage - 1}.blocks.{unit - 1}.",
}
ENDS = {
    "v1": ("conv_root/kernel", "gn_root"),
    "v2": ("root_block/conv_root/kernel", "norm-pre-head"),
    "bit": (f"root_block/{STD}", "group_norm"),
    "timm": ("stem.conv.weight", "norm"),
}


class Writer:
    """Random arrays under their names, and under ours as the model is to have them."""

    def __init__(self, names, preact, rank, seed):
        self.names, self.preact, self.rank = names, preact, rank
        self.random, self.theirs, self.ours = np.random.default_rng(seed), {}, {}

    def draw(self, *shape):
        return (self.random.integers(-127, 128, shape) / 64).astype(np.float32)

    def kernel(self, ours, theirs, *shape):
        self.ours[f"{ours}/kernel"] = kernel = self.draw(*shape)
        self.theirs[theirs] = kernel.transpose(3, 2, 0, 1) if self.names == "timm" else kernel

    def norm(self, ours, theirs, channels):
        for mine, leaf in zip(("scale", "bias"), LEAVES[self.names].split(), strict=True):
            self.ours[f"{ours}/{mine}"] = array = self.draw(channels)
            self.theirs[f"{theirs}{leaf}"] = array.reshape((1,) * (self.rank - 1) + (-1,))

    def unit(self, ours, theirs, inputs, middle, first):
        sizes = {"in": inputs, "mid": middle, "out": 4 * middle}
        for name, shape, *spelt in KERNELS if first else KERNELS[:3]:
            shape = [sizes.get(n, n) for n in shape]
            self.kernel(f"{ours}/{name}", theirs + spelt[COLUMN[self.names]], *shape)
        channels = (inputs, middle, middle) if self.preact else (middle, middle, 4 * middle)
        if first and not self.preact:
            channels = (*channels, 4 * middle)
        for (name, *spelt), count in zip(NORMS, channels, strict=False):
            self.norm(f"{ours}/{name}", theirs + spelt[COLUMN[self.names]], count)

    def resnet(self, units):
        """The ResNet; the units of a stage behind its first one are stacked in ours."""
        root, norm = ENDS[self.names]
        self.kernel("resnet/conv_root", root, 7, 7, 3, WIDTH)
        inputs = WIDTH
        for stage, count in enumerate(units, 1):
            middle, stacks = WIDTH * 2 ** (stage - 1), {}
            for unit in range(1, count + 1):
                mine = f"resnet/stage{stage}/{'first' if unit == 1 else 'rest'}"
                before, self.ours = self.ours, {}
                self.unit(mine, UNIT[self.names](stage, unit), inputs, middle, unit == 1)
                for name, array in self.ours.items():
                    stacks.setdefault(name, []).append(array)
                self.ours, inputs = before, 4 * middle
            for name, arrays in stacks.items():
                self.ours[name] = np.stack(arrays) if "/rest/" in name else arrays[0]
        if self.preact:
            self.norm("resnet/norm", norm, inputs)
        else:
            norm = "stem.norm" if self.names == "timm" else norm
            self.norm("resnet/norm_root", norm, WIDTH)
        return inputs

    def head(self, inputs):
        names = {
            "bit": "head/conv2d/kernel head/conv2d/bias",
            "timm": "head.fc.weight head.fc.bias",
        }
        kernel, bias = names.get(self.names, "head/kernel head/bias").split()
        array = self.ours["head/kernel"] = self.draw(inputs, dialects.CLASSES)
        if self.names == "timm":
            array = array.T[:, :, None, None]
        self.theirs[kernel] = array[None, None] if self.names == "bit" else array
        self.ours["head/bias"] = self.theirs[bias] = self.draw(dialects.CLASSES)


@dataclasses.dataclass(frozen=True)
class Example(dialects.Example):
    """Of which `expected` are the parameters, by our paths, in a model of `kind`."""

    expected: dict = dataclasses.field(default_factory=dict)
    kind: type = ResNetConfig

    def params(self):
        return self.expected


def prefixed(prefix, arrays):
    return {prefix + name: array for name, array in arrays.items()}


def a_resnet(names, prefix, format, style, rank=1, spelt=lambda key: key):
    """A file whose norms have `rank` axes; it is written with the axes that its code base has."""

    def write(prefix, rank):
        file = Writer(names, style in ("v2", "timm_v2"), rank, seed=3)
        file.head(file.resnet(UNITS))
        return prefixed(prefix, file.theirs), file.ours

    arrays, expected = write(prefix, rank)
    usual = {"big_vision": "params/", "google": "resnet/"}.get(format, "")
    return Example(
        f"{names} {prefix} {rank}",
        format,
        {spelt(key): array for key, array in arrays.items()},
        dict(resnet=UNITS, resnet_width=WIDTH, resnet_style=style, num_classes=5),
        canonical=write(usual, 4 if names == "v2" else 1)[0],
        expected=expected,
    )


def a_hybrid(base, prefix="", units=UNITS, rank=1):
    """A ViT's file with patches of a feature map, and a ResNet's arrays beside its own."""
    vit = dialects.examples()[base]
    timm, patch = vit.format == "timm", 1 if units else 2

    def write(prefix, rank, arrays):
        file = Writer("timm" if timm else "v1", False, rank, seed=4)
        kernel = file.draw(patch, patch, file.resnet(units), dialects.D)
        beside = prefixed("patch_embed.backbone." if timm else prefix, file.theirs)
        if timm and not units:  # a root alone is not wrapped in a network
            beside = {name.replace("backbone.stem.", "backbone."): v for name, v in beside.items()}
        name = "patch_embed.proj.weight" if timm else f"{prefix}embedding/kernel"
        stem = {name: kernel.transpose(3, 2, 0, 1) if timm else kernel}
        return {**arrays, **stem, **beside}, {"patch_embed/kernel": kernel, **file.ours}

    arrays, ours = write(prefix, rank, vit.arrays)
    fields = dict(resnet=units, resnet_width=WIDTH, patch_size=patch)
    fields |= dict(image_size=dialects.GRID * patch * 4 * 2 ** max(len(units) - 1, 0))
    fields |= dict(resnet_style="timm_v1") if timm else {}
    copied = {f.name: getattr(vit, f.name) for f in dataclasses.fields(vit)}
    changes = dict(
        name=f"hybrid {base} {units} {rank}",
        arrays=arrays,
        canonical=write("", 1, vit.arrays if vit.canonical is None else vit.canonical)[0],
        config=vit.config | fields,
        expected=dialects.ours(vit.arrays, dialects.HEADS)[0] | ours,
        kind=ViTConfig,
    )
    return Example(**copied | changes)


def numbered(key):
    """As some published files have it, which were written where layers are counted."""
    return key.replace("standardized_conv2d/", f"standardized_conv2d_{len(key) % 30}/")


EXAMPLES = {
    example.name: example
    for example in [
        a_resnet("v1", "params/", "big_vision", "v1"),
        a_resnet("v1", "opt/target/", "big_vision", "v1", rank=4),
        a_resnet("v2", "params/", "big_vision", "v2", rank=4),
        a_resnet("v2", "", "big_vision", "v2"),
        a_resnet("bit", "resnet/", "google", "v2", spelt=numbered),
        a_resnet("bit", "resnet/", "google", "v2", rank=2),
        a_resnet("timm", "", "timm", "timm_v2"),
        a_resnet("timm", "model.", "timm", "timm_v2", rank=3),
        a_hybrid("google paper"),
        a_hybrid("google opt/target", "opt/target/", rank=4),
        a_hybrid("google linen gap", units=(1, 1, 2), rank=2),
        a_hybrid("google paper", units=()),
        a_hybrid("timm plain"),
        a_hybrid("timm plain", units=(), rank=3),
    ]
}
