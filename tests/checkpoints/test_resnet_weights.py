"""Weights of hybrids and ResNets, against tiny files that are written down key by key.

The names are those of google-research/vision_transformer (models_resnet.py), of big_vision
(models/bit.py, called V1 here, and models/bit_paper.py, V2), of big_transfer's published files
(BiT) and of timm (resnetv2.py, vision_transformer_hybrid.py).
"""

import dataclasses
import functools
import re

import dialects
import numpy as np
import pytest

import vit_jax
from test_dialects import assert_same, changed, fails, of, parameters
from vit_jax.__main__ import main
from vit_jax.checkpoints.load import inspect
from vit_jax.errors import UserError
from vit_jax.models.config import ResNetConfig, ViTConfig

WIDTH, UNITS, STRIDE = 32, (2, 1), 8
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
    fields |= dict(image_size=dialects.GRID * patch * (STRIDE if units else 4))
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
        a_hybrid("google linen gap", units=(1, 1, 2)),
        a_hybrid("google paper", units=()),
        a_hybrid("timm plain"),
        a_hybrid("timm plain", units=()),
    ]
}
V1, V2, BIT = EXAMPLES["v1 params/ 1"], EXAMPLES["v2 params/ 4"], EXAMPLES["bit resnet/ 1"]
TIMM, GOOGLE = EXAMPLES["timm  1"], EXAMPLES["hybrid google paper (2, 1) 1"]
TIMM_HYBRID = EXAMPLES["hybrid timm plain (2, 1) 1"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Loads an example, once for all tests."""

    @functools.cache
    def load(example_name):
        example = EXAMPLES[example_name]
        return vit_jax.load(example.write(tmp_path_factory.mktemp("example")), **example.known)

    return load


@pytest.mark.parametrize("name", EXAMPLES)
def test_parameters_and_config(name, loaded):
    example, vit = EXAMPLES[name], loaded(name)
    assert_same(parameters(vit.model), example.params())
    expected = example.kind(**example.config)
    if example.kind is ViTConfig:  # whose open fields the file fills in
        expected = dataclasses.replace(expected, position_prefix=vit.config.position_prefix)
    assert vit.config == expected
    fates = {line.name: line.fate for line in vit.report.lines}
    assert {name for name, fate in fates.items() if fate != "kept"} == set(example.leftover)


@pytest.mark.parametrize("name", EXAMPLES)
def test_round_trip(name, loaded, tmp_path):
    example, vit = EXAMPLES[name], loaded(name)
    path = tmp_path / f"out{example.ending}"
    vit_jax.save(vit, path, format=example.format)
    written = dialects.read(path)
    assert_same(written, example.written_back())
    for key, array in written.items():
        assert array.shape == example.written_back()[key].shape, key
    again = vit_jax.load(path)
    assert_same(parameters(again.model), example.params())
    assert (again.config, again.preprocess) == (vit.config, vit.preprocess)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["resnet", "hybrid"])
def test_norms_of_every_rank(kind, rank, tmp_path):
    """linen once kept [1 1 1 c]; no other number of axes than 1 to 4 is known."""
    if kind == "resnet":
        example = a_resnet("bit", "resnet/", "google", "v2", rank=rank)
    else:
        example = a_hybrid("google paper", rank=rank)
    found = parameters(vit_jax.load(example.write(tmp_path)).model)
    assert_same(found, example.params())


@pytest.mark.parametrize("name", [V1.name, TIMM.name, GOOGLE.name, TIMM_HYBRID.name])
@pytest.mark.parametrize("to", ["file.safetensors", "folder"])
def test_in_our_own_names(name, to, loaded, tmp_path):
    vit = loaded(name)
    vit_jax.save(vit, tmp_path / to)
    record = dialects.read_record(tmp_path / to)
    assert record["family"] == {ResNetConfig: "resnet", ViTConfig: "vit"}[EXAMPLES[name].kind]
    assert_same(dialects.read(tmp_path / to), EXAMPLES[name].params())
    again = vit_jax.load(tmp_path / to)
    assert (again.config, again.labels) == (vit.config, vit.labels)


@pytest.mark.parametrize("name", [TIMM.name, GOOGLE.name])
def test_another_head_channels_and_size(name, tmp_path):
    example = EXAMPLES[name]
    path, size = example.write(tmp_path), (32, 48)
    vit = vit_jax.load(path, num_classes=3, in_channels=1, image_size=size, **example.known)
    found, expected = parameters(vit.model), dict(example.params())
    assert (vit.config.num_classes, vit.config.in_channels) == (3, 1)
    assert vit.config.image_size == vit.preprocess.image_size == size
    root = expected.pop("resnet/conv_root/kernel").sum(axis=2, keepdims=True)
    np.testing.assert_allclose(found.pop("resnet/conv_root/kernel"), root, rtol=1e-6)
    assert not any(found.pop(f"head/{leaf}").any() for leaf in ("kernel", "bias"))
    for leaf in ("head/kernel", "head/bias", "pos_embed"):
        expected.pop(leaf, None)
    if example.kind is ViTConfig:
        assert found.pop("pos_embed").shape == (1 + 4 * 6, dialects.D)
    assert_same(found, expected)
    fates = {line.name: line.fate for line in vit.report.lines}
    assert fates["resnet/conv_root/kernel"] == "3 -> 1 channels" and fates["head/bias"] == "fresh"


def test_patches_of_a_feature_map(loaded, tmp_path):
    """Those of a hybrid are resampled as any others; a ResNet has none."""
    path = EXAMPLES["hybrid google paper () 1"].write(tmp_path)
    vit = vit_jax.load(path, patch_size=(4, 2), image_size=(32, 16))
    assert vit.model.patch_embed.kernel.shape == (4, 2, WIDTH, dialects.D)
    assert vit.config.grid == (2, 2)
    with pytest.raises(UserError, match="unknown model field 'patch_size' of a ResNet"):
        vit_jax.load(TIMM.write(tmp_path), patch_size=8)


ABSENT = {
    "v1 root norm": (V1, r"params/gn_root/scale"),
    "v1 unit": (V1, r"params/block1/unit2/conv2/kernel"),
    "v2 norm": (V2, r"params/norm-pre-head/bias"),
    "bit projection": (BIT, f"resnet/block2/unit01/a/proj/{STD}"),
    "timm unit": (TIMM, "stages.0.blocks.1.norm3.weight"),
    "timm head": (TIMM, "head.fc.bias"),
    "hybrid unit": (GOOGLE, "block1/unit1/gn_proj/bias"),
    "timm hybrid": (TIMM_HYBRID, "patch_embed.backbone.stages.1.blocks.0.conv3.weight"),
}


@pytest.mark.parametrize("name", ABSENT)
def test_a_key_that_is_missing(name, tmp_path):
    example, key = ABSENT[name]
    aliased = example is BIT
    arrays = {k: v for k, v in example.arrays.items() if (renamed(k) if aliased else k) != key}
    assert len(arrays) == len(example.arrays) - 1
    path = dataclasses.replace(example, arrays=arrays).write(tmp_path)
    with pytest.raises(UserError, match=f"the key {re.escape(key)} .*is missing"):
        vit_jax.load(path, **example.known)


def renamed(key):
    return re.sub(r"conv2d_\d+", "conv2d", key)


def zeros(*shape):
    return np.zeros(shape, np.float32)


STAGE_3 = {
    "conv1/kernel": zeros(1, 1, 256, 128),
    "gn1/scale": zeros(128),
}
AMISS = {
    "too many": (V1, {"params/block1/unit2/conv9/kernel": zeros(1)}, "block1/unit2/conv9/kernel"),
    "too many, hybrid": (GOOGLE, {"block1/unit2/conv_proj/kernel": zeros(1)}, "unit2/conv_proj"),
    "too many, timm": (TIMM, {"stages.0.blocks.1.norm4.bias": zeros(64)}, "norm4.bias"),
    "shape": (V2, {"params/block1/unit02/gn2/bias": zeros(33)}, r"unit02/gn2/bias.*\[33\]"),
    "shape of a kernel": (TIMM, {"stages.1.blocks.0.conv2.weight": zeros(64, 64, 3, 1)}, "conv2"),
    "norm with another axis": (GOOGLE, {"gn_root/bias": zeros(2, 32)}, r"gn_root/bias.*\[2, 32\]"),
    "stage without its first unit": (
        V1,
        {f"params/block3/unit2/{name}": array for name, array in STAGE_3.items()},
        "block3/unit1/",
    ),
    "stage without its first unit, hybrid": (
        GOOGLE,
        {f"block3/unit2/{name}": array for name, array in STAGE_3.items()},
        "block3/unit1/",
    ),
    "gap in the units": (V1, "unit2", "unit3", "block1/unit2/"),
    "gap in the units, timm": (TIMM, "stages.0.blocks.1", "stages.0.blocks.2", "stages.0.blocks.1"),
    "gap in the stages": (V1, "block2", "block3", "block2/unit1/"),
}


@pytest.mark.parametrize("name", AMISS)
def test_what_is_amiss_is_named(name, tmp_path):
    example, *change, message = AMISS[name]
    if len(change) == 2:
        example = dataclasses.replace(
            example, arrays={k.replace(*change): v for k, v in example.arrays.items()}
        )
    else:
        example = changed(example, change[0])
    with pytest.raises(UserError, match=message):
        vit_jax.load(example.write(tmp_path), **example.known)


@pytest.mark.parametrize(
    "name, format, message",
    [
        (V1.name, "hf", "hf has no ResNet of style v1"),
        (V1.name, "google", "google has no ResNet of style v1"),
        (V1.name, "timm", "timm has no ResNet of style v1"),
        (BIT.name, "hf", "hf has no ResNet of style v2"),
        (GOOGLE.name, "hf", r"hf has no models with model\.resnet=\(2, 1\)"),
        (GOOGLE.name, "big_vision", r"big_vision has no models with model\.resnet=\(2, 1\)"),
    ],
)
def test_what_cannot_hold_it_says_so(name, format, message, loaded, tmp_path):
    ending = "npz" if format in ("google", "big_vision") else "safetensors"
    with pytest.raises(UserError, match=message):
        vit_jax.save(loaded(name), tmp_path / f"out.{ending}", format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [TIMM.name, TIMM_HYBRID.name])
def test_timm_builds_only_what_it_has_a_name_for(name, loaded, tmp_path):
    with pytest.raises(UserError, match=r"timm has no architecture .*\(2, 1\) units"):
        vit_jax.save(loaded(name), tmp_path / "folder", format="timm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("units", [(1, 1), (2, 1, 1)])
def test_a_hybrid_before_normalising_has_no_file_of_others(units, tmp_path):
    """What normalises before its convolutions stands alone in all code bases."""
    sizes = dialects.SIZES | dict(patch_size=1, image_size=32)
    config = ViTConfig(**sizes, num_classes=5, resnet=units, resnet_width=32, resnet_style="v2")
    for format in ("google", "timm"):
        ending = "npz" if format == "google" else "safetensors"
        with pytest.raises(UserError, match=r"model\.resnet_style='v2'"):
            vit_jax.save(of(config), tmp_path / f"out.{ending}", format=format)


@pytest.mark.parametrize(
    "name, format, said",
    [
        (GOOGLE.name, "timm", "v1, where timm's code has timm_v1"),
        (TIMM_HYBRID.name, "google", "timm_v1, where google's code has v1"),
        (TIMM.name, "google", "timm_v2, where google's code has v2"),
        (TIMM.name, "big_vision", "timm_v2, where big_vision's code has v2"),
        (BIT.name, "timm", "v2, where timm's code has timm_v2"),
        (BIT.name, "big_vision", None),
    ],
)
def test_another_style_is_said_and_kept_in_the_record(name, format, said, loaded, tmp_path):
    path = tmp_path / ("out.safetensors" if format == "timm" else "out.npz")
    report = vit_jax.save(loaded(name), path, format=format)
    assert report.assumed.get("resnet_style") == said
    again = vit_jax.load(path)
    assert again.config == loaded(name).config
    assert_same(parameters(again.model), EXAMPLES[name].params())


@pytest.mark.parametrize("name", [BIT.name, TIMM_HYBRID.name])
def test_from_the_shell(name, tmp_path, capsys):
    example = EXAMPLES[name]
    src, flags = example.write(tmp_path), []
    for field, value in example.known.items():
        flags += ["--set", f"{field}={value}"]
    assert main(["inspect", str(src), *flags]) == 0
    out = capsys.readouterr().out
    total = sum(array.size for array in example.params().values())
    for pattern in [
        rf"variant: +custom, {total:,} parameters\n",
        rf"ResNet: +\(2, 1\) units, width 32, style {example.config['resnet_style']}\n",
        r"head: +5 classes\n",
        r"resnet/stage1/rest/conv2/kernel +1x3x3x32x32 +as it is +\S+\n",
    ]:
        assert re.search(pattern, out), f"{pattern} is not in\n{out}"
    dst = tmp_path / "out.npz"
    argv = ["convert", str(src), str(dst), "--format=google", *flags]
    assert (
        main([*argv, "--set", "resnet_style=timm_v1" if "hybrid" in name else "image_size=64"]) == 0
    )
    assert "arrays in google's names" in capsys.readouterr().out
    assert_same(parameters(vit_jax.load(dst).model), example.params())
    assert "hf has no" in fails(capsys, "convert", src, tmp_path / "x", "--format=hf", *flags)
    assert inspect(dst).facts["ResNet"].startswith("(2, 1) units")
