"""Weights of hybrids and ResNets: read, adapted and written back, against files written by hand."""

import dataclasses
import functools
import re

import dialects
import numpy as np
import pytest
from resnet_dialects import EXAMPLES, STD, WIDTH, a_hybrid, a_resnet
from test_dialects import assert_same, changed, fails, of, parameters

import vit_jax
from vit_jax.__main__ import main
from vit_jax.checkpoints.opened import inspect
from vit_jax.errors import UserError
from vit_jax.models.config import ResNetConfig, ViTConfig

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
    card = dialects.read_record(tmp_path / to)
    assert card["family"] == {ResNetConfig: "resnet", ViTConfig: "vit"}[EXAMPLES[name].kind]
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
    "v1 root norm": (V1, "params/gn_root/scale"),
    "v1 unit": (V1, "params/block1/unit2/conv2/kernel"),
    "v2 norm": (V2, "params/norm-pre-head/bias"),
    "bit projection": (BIT, f"resnet/block2/unit01/a/proj/{STD}"),
    "timm unit": (TIMM, "stages.0.blocks.1.norm3.weight"),
    "timm head": (TIMM, "head.fc.bias"),
    "hybrid unit": (GOOGLE, "block1/unit1/gn_proj/bias"),
    "timm hybrid": (TIMM_HYBRID, "patch_embed.backbone.stages.1.blocks.0.conv3.weight"),
}


@pytest.mark.parametrize("name", ABSENT)
def test_a_key_that_is_missing(name, tmp_path):
    example, key = ABSENT[name]
    plain = {re.sub(r"conv2d_\d+", "conv2d", each): each for each in example.arrays}
    path = changed(example, {plain[key]: None}).write(tmp_path)
    with pytest.raises(UserError, match=f"the key {re.escape(key)} .*is missing"):
        vit_jax.load(path, **example.known)


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
        (V1.name, "hf", "hf has no ResNets of style v1"),
        (V1.name, "google", "google has no ResNets of style v1"),
        (V1.name, "timm", "timm has no ResNets of style v1"),
        (BIT.name, "hf", "hf has no ResNets of style v2"),
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
    vit = of(config)
    vit_jax.save(vit, tmp_path / "ours.safetensors")
    assert_same(
        parameters(vit_jax.load(tmp_path / "ours.safetensors").model), parameters(vit.model)
    )


@pytest.mark.parametrize("told", [None, 3, (1,)])
def test_another_resnet_than_the_keys_say(told, tmp_path):
    path = GOOGLE.write(tmp_path)
    with pytest.raises(UserError, match=r"resnet .* does not fit its keys, which are of \(2, 1\)"):
        vit_jax.load(path, resnet=told, image_size=GOOGLE.known.get("image_size"))


def test_big_visions_border_is_said_when_it_is_written(loaded, tmp_path):
    report = vit_jax.save(loaded(BIT.name), tmp_path / "out.npz", format="big_vision")
    assert "bit_paper.py has none" in report.assumed["pooling"]


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
