"""Variants and their parameter counts against published numbers, and what a config refuses."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

import vit_jax
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.variants import VARIANTS, variant

# 1000 classes, class token, 224 pixels, no representation layer; as timm counts them.
PUBLISHED_COUNTS = {
    "Ti/16": 5_717_416,
    "S/16": 22_050_664,
    "B/16": 86_567_656,
    "B/32": 88_224_232,
    "L/16": 304_326_632,
    "H/14": 632_045_800,
    "g/14": 1_012_611_432,
    "G/14": 1_844_440_680,
    # Hybrids, and BiT's ResNets: its resnetv2_*_bit.
    "R+Ti/16": 6_337_704,
    "R26+S/32": 36_431_912,
    "R50+B/16": 98_659_112,
    "R50+L/32": 328_994_856,
    "R50x1": 25_549_352,
    "R50x3": 217_319_080,
    "R101x1": 44_541_480,
    "R101x3": 387_934_888,
    "R152x2": 236_335_208,
    "R152x4": 936_533_224,
}


def count(name, **fields):
    model = nnx.eval_shape(lambda: vit_jax.create(name, **fields))
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}
    return sum(math.prod(leaf.shape) for leaf in leaves)


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    assert count(name) == PUBLISHED_COUNTS[name]


@pytest.mark.parametrize(
    "fields, expected",
    [
        # A layer [768 768] and its bias: 590,592 more.
        (dict(representation_size=768), 87_158_248),
        # [768 512] and bias in front, and a head [512 1000] and bias in place of [768 1000].
        (dict(representation_size=512), 86_567_656 + 393_728 - 769_000 + 513_000),
        # timm's B/16 without its classifier.
        (dict(num_classes=0), 85_798_656),
        (dict(num_classes=0, representation_size=768), 85_798_656 + 590_592),
        # Neither class token nor its row of the position embedding.
        (dict(pool="gap"), 86_567_656 - 2 * 768),
        # timm's vit_base_patch16_siglip_224, which has no classifier.
        (dict(pool="map", num_classes=0), 92_884_224),
        # No position parameters: 197 rows less.
        (dict(position="sincos2d"), 86_567_656 - 197 * 768),
        (dict(position="none"), 86_567_656 - 197 * 768),
        # Two tables of 14 rows, each of half or all of the width, and the class token's row.
        (dict(position="learned2d"), 86_567_656 - 196 * 768 + 28 * 384),
        (dict(position="learned2d_added"), 86_567_656 - 196 * 768 + 28 * 768),
        # A table for each of 12 layers, or the same one for all.
        (dict(position_at="layers"), 86_567_656 + 11 * 197 * 768),
        (dict(position_at="layers_shared"), 86_567_656),
        # 196 patches have 391 offsets, in each layer.
        (dict(position="relative"), 86_567_656 - 197 * 768 + 12 * 391 * 768),
        # 24 x 24 patches in place of 14 x 14.
        (dict(image_size=384), 86_567_656 + (576 - 196) * 768),
        (dict(in_channels=1), 86_567_656 - 2 * 16 * 16 * 768),
        # How it is computed changes no parameter.
        (dict(scan=False, dtype="bfloat16", attention="xla", dropout=0.1), 86_567_656),
    ],
    ids=str,
)
def test_parameter_counts_of_changed_fields(fields, expected):
    assert count("B/16", **fields) == expected


@pytest.mark.parametrize(
    "name, sizes",
    [  # paper, Table 1; Ti and S as DeiT's; g and G: "Scaling Vision Transformers", Table 2
        ("Ti", (192, 12, 768, 3)),
        ("S", (384, 12, 1536, 6)),
        ("B", (768, 12, 3072, 12)),
        ("L", (1024, 24, 4096, 16)),
        ("H", (1280, 32, 5120, 16)),
        ("g", (1408, 40, 6144, 16)),
        ("G", (1664, 48, 8192, 16)),
    ],
)
def test_variants_have_the_published_sizes(name, sizes):
    config = variant(f"{name}/14")
    assert (config.width, config.depth, config.mlp_dim, config.num_heads) == sizes
    assert config.head_dim == sizes[0] // sizes[3]


def test_defaults_are_the_papers():
    config = ViTConfig()
    assert config == variant("B/16")
    assert (config.image_size, config.num_classes, config.pool) == ((224, 224), 1000, "token")
    assert (config.gelu, config.layernorm_eps, config.position) == ("tanh", 1e-6, "learned")
    assert (config.dropout, config.drop_path, config.representation_size) == (0, 0, None)


def test_patch_size_is_read_from_the_name():
    assert variant("L/14").patch_size == (14, 14)
    config = variant("Ti/16x8", image_size=(64, 48), num_classes=7)
    assert config.patch_size == (16, 8)
    assert config.grid == (4, 6)
    assert (config.width, config.num_classes) == (192, 7)
    assert set(VARIANTS) >= {"mu", "Ti", "S", "B", "L", "H", "g", "G"}


@pytest.mark.parametrize("pool, prefix", [("token", 1), ("gap", 0), ("map", 0)])
def test_tokens_are_counted_with_the_class_token(pool, prefix):
    config = variant("B/16", pool=pool, image_size=(32, 80))
    assert config.num_prefix_tokens == prefix
    assert config.num_tokens == prefix + 2 * 5


def test_one_number_means_square_and_lists_become_hashable():
    config = variant("B/16", image_size=[384], patch_size=[16, 32])
    assert config.image_size == (384, 384)
    assert config.patch_size == (16, 32)
    same = variant("B/16x32", image_size=384)
    assert config == same and hash(config) == hash(same)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 1


@pytest.mark.parametrize(
    "name, fields, named",
    [
        ("Bb/16", {}, ["'Bb'", "did you mean 'B'?"]),
        ("Q/16", {}, ["'Q'", "known:", "Ti"]),
        ("B16", {}, ["'B16'", "B/16"]),
        ("B/", {}, ["'B/'"]),
        ("B/16x", {}, ["'B/16x'"]),
        ("B/16/2", {}, ["'B/16/2'"]),
        ("B/0", {}, ["patch_size"]),
        ("B/16", dict(imagesize=32), ["'imagesize'", "did you mean 'image_size'?"]),
        ("B/16", dict(drop_out=0.1), ["'drop_out'", "did you mean 'dropout'?"]),
        ("B/16", dict(image_size=225), ["225x225", "16x16", "224x224"]),
        ("B/16", dict(image_size=(224, 250)), ["224x250", "16x16", "224x240"]),
        ("B/16", dict(image_size=8), ["8x8", "16x16"]),
        ("B/16", dict(image_size=(1, 2, 3)), ["image_size", "(1, 2, 3)"]),
        ("B/16", dict(image_size=-16), ["image_size", "-16"]),
        ("B/16", dict(num_heads=7), ["768", "7 heads"]),
        ("B/16", dict(pool="tokens"), ["pool", "'tokens'", "did you mean 'token'?"]),
        ("B/16", dict(position="sincos"), ["position", "'sincos'", "'sincos2d'"]),
        ("B/16", dict(gelu="exact"), ["gelu", "'exact'", "erf"]),
        ("B/16", dict(dtype="float64"), ["dtype", "'float64'"]),
        ("B/16", dict(attention="flash"), ["attention", "'flash'"]),
        ("B/16", dict(dropout=1.0), ["dropout", "1.0"]),
        ("B/16", dict(drop_path=-0.1), ["drop_path", "-0.1"]),
        ("B/16", dict(depth=0), ["depth", "0"]),
        ("B/16", dict(in_channels=0), ["in_channels", "0"]),
        ("B/16", dict(position="sincos2d", width=18, num_heads=1), ["sincos2d", "18"]),
        ("B/16", dict(position="learned2d", width=15, num_heads=1), ["learned2d", "even", "15"]),
        ("B/16", dict(position_at="layer"), ["position_at", "'layer'", "'layers'"]),
        ("B/16", dict(position="sincos2d", position_at="layers"), ["'layers'", "'sincos2d'"]),
        ("B/16", dict(position="none", position_at="layers_shared"), ["'none'", "'input'"]),
        ("B/16", dict(position="relative", position_at="layers"), ["'relative'", "'input'"]),
        ("B/16", dict(position="relative", attention="cudnn"), ["'cudnn'", "'relative'", "'xla'"]),
        ("R50+B/16", dict(resnet=(0,)), ["resnet", "(0,)"]),
        ("R50x1", dict(resnet=(3, -1)), ["resnet", "(3, -1)"]),
        ("R50x1", dict(resnet=(1,) * 5), ["resnet", "(1, 1, 1, 1, 1)", "four stages"]),
        ("R50x1", dict(resnet=()), ["resnet", "()", "at least one"]),
        ("R50+B/16", dict(resnet_width=48), ["resnet_width", "48", "32, 64"]),
        ("R50x1", dict(resnet_width=0), ["resnet_width", "0"]),
        ("R50x1", dict(resnet_style="v3"), ["resnet_style", "'v3'", "'v2'"]),
        ("R50+B/16", dict(resnet_style="timmv1"), ["resnet_style", "'timm_v1'"]),
        ("R50+B/16", dict(image_size=(224, 232)), ["224x232", "16x16", "224x224"]),
        ("R+Ti/16", dict(image_size=240), ["240x240", "32x32", "224x224"]),
        ("R50x1", dict(dropout=0.1), ["'dropout'", "ResNet", "known:", "head_bias"]),
        ("R50x1", dict(imagesize=32), ["'imagesize'", "did you mean 'image_size'?"]),
        ("R50x1", dict(num_classes=-1), ["num_classes", "-1"]),
        ("R51+B/16", {}, ["'R51+B/16'", "did you mean 'R50+B/16'?"]),
        ("R50x9", {}, ["'R50x9'", "did you mean 'R50x"]),
        ("R50+B16", {}, ["'R50+B16'", "did you mean 'R50+B/16'?"]),
    ],
    ids=str,
)
def test_mistakes_raise_one_sentence_that_names_them(name, fields, named):
    with pytest.raises(UserError) as error:
        variant(name, **fields)
    message = str(error.value)
    assert all(part in message for part in named), message
    assert "\n" not in message
