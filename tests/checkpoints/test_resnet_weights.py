"""Weights of hybrids and ResNets: read, adapted and written back, against files written by hand."""

import dataclasses
import functools
import re

import dialects
import numpy as np
import pytest
from conftest import fails
from resnet_dialects import EXAMPLES, STD, WIDTH
from test_dialects import assert_same, changed, load, of, parameters, refused

import vit_jax
from vit_jax.__main__ import main
from vit_jax.checkpoints.opened import inspect, open_model
from vit_jax.errors import UserError
from vit_jax.models.config import ResNetConfig, ViTConfig

V1, V2, BIT = EXAMPLES["v1 params/ 1"], EXAMPLES["v2 params/ 4"], EXAMPLES["bit resnet/ 1"]
TIMM, GOOGLE = EXAMPLES["timm  1"], EXAMPLES["hybrid google paper (2, 1) 1"]
TIMM_HYBRID = EXAMPLES["hybrid timm plain (2, 1) 1"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Loads an example, once for all tests."""
    return functools.cache(lambda name: load(EXAMPLES[name], tmp_path_factory.mktemp("example")))


@pytest.mark.parametrize("name", EXAMPLES)
def test_read_and_written_back(name, loaded, tmp_path):
    """Norms of one to four axes: linen once kept [1 1 1 c]."""
    example, vit = EXAMPLES[name], loaded(name)
    assert_same(parameters(vit.model), example.params())
    expected = example.kind(**example.config)
    if example.kind is ViTConfig:  # whose open fields the file fills in
        expected = dataclasses.replace(expected, position_prefix=vit.config.position_prefix)
    assert vit.config == expected
    statuses = {line.name: line.status for line in vit.report.lines}
    assert {name for name, status in statuses.items() if status != "kept"} == set(example.leftover)

    path = tmp_path / f"out{example.ending}"
    vit_jax.save(vit, path, format=example.format)
    written = dialects.read(path)
    assert_same(written, example.written_back())
    for key, array in written.items():
        assert array.shape == example.written_back()[key].shape, key
    again = vit_jax.load(path)
    assert_same(parameters(again.model), example.params())
    assert (again.config, again.preprocess) == (vit.config, vit.preprocess)


@pytest.mark.parametrize(
    "example, to",
    [(V1, "x.safetensors"), (TIMM, "x"), (GOOGLE, "x.safetensors"), (TIMM_HYBRID, "x")],
)
def test_in_our_own_names(example, to, loaded, tmp_path):
    vit = loaded(example.name)
    vit_jax.save(vit, tmp_path / to)
    card = dialects.read_record(tmp_path / to)
    assert card["family"] == {ResNetConfig: "resnet", ViTConfig: "vit"}[example.kind]
    assert_same(dialects.read(tmp_path / to), example.params())
    again = open_model(tmp_path / to).card
    assert (again.config, again.labels) == (vit.config, vit.labels)


@pytest.mark.parametrize("example", [TIMM, GOOGLE], ids=lambda example: example.name)
def test_another_head_channels_and_size(example, tmp_path):
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
    statuses = {line.name: line.status for line in vit.report.lines}
    assert (
        statuses["resnet/conv_root/kernel"] == "3 -> 1 channels"
        and statuses["head/bias"] == "fresh"
    )


def test_patches_of_a_feature_map(tmp_path):
    """Those of a hybrid are resampled as any others; a ResNet has none."""
    path = EXAMPLES["hybrid google paper () 1"].write(tmp_path)
    vit = vit_jax.load(path, patch_size=(4, 2), image_size=(32, 16))
    assert vit.model.patch_embed.kernel.shape == (4, 2, WIDTH, dialects.D)
    assert vit.config.grid == (2, 2)
    refused("unknown model field 'patch_size' of a ResNet", TIMM.write(tmp_path), patch_size=8)
    path = GOOGLE.write(tmp_path)
    for told in (None, 3, (1,)):
        message = r"resnet .* does not fit its keys, which are of \(2, 1\)"
        refused(message, path, resnet=told, image_size=GOOGLE.known.get("image_size"))


def test_a_key_that_is_missing(tmp_path):
    for example, key in [
        (V1, "params/gn_root/scale"),
        (V1, "params/block1/unit2/conv2/kernel"),
        (V2, "params/norm-pre-head/bias"),
        (BIT, f"resnet/block2/unit01/a/proj/{STD}"),
        (TIMM, "stages.0.blocks.1.norm3.weight"),
        (TIMM, "head.fc.bias"),
        (GOOGLE, "block1/unit1/gn_proj/bias"),
        (TIMM_HYBRID, "patch_embed.backbone.stages.1.blocks.0.conv3.weight"),
    ]:
        plain = {re.sub(r"conv2d_\d+", "conv2d", each): each for each in example.arrays}
        path = changed(example, {plain[key]: None}).write(tmp_path)
        refused(f"the key {re.escape(key)} .*is missing", path, **example.known)


def test_what_is_amiss_is_named(tmp_path):
    def zeros(*shape):
        return np.zeros(shape, np.float32)

    def stage_3(unit):
        return {f"{unit}/conv1/kernel": zeros(1, 1, 256, 128), f"{unit}/gn1/scale": zeros(128)}

    for example, change, message in [
        # Too many.
        (V1, {"params/block1/unit2/conv9/kernel": zeros(1)}, "block1/unit2/conv9/kernel"),
        (GOOGLE, {"block1/unit2/conv_proj/kernel": zeros(1)}, "unit2/conv_proj"),
        (TIMM, {"stages.0.blocks.1.norm4.bias": zeros(64)}, "norm4.bias"),
        # Another shape.
        (V2, {"params/block1/unit02/gn2/bias": zeros(33)}, r"unit02/gn2/bias.*\[33\]"),
        (TIMM, {"stages.1.blocks.0.conv2.weight": zeros(64, 64, 3, 1)}, "conv2"),
        (GOOGLE, {"gn_root/bias": zeros(2, 32)}, r"gn_root/bias.*\[2, 32\]"),
        # A stage without its first unit.
        (V1, stage_3("params/block3/unit2"), "block3/unit1/"),
        (GOOGLE, stage_3("block3/unit2"), "block3/unit1/"),
        # A gap in the units, or in the stages.
        (V1, ("unit2", "unit3"), "block1/unit2/"),
        (TIMM, ("stages.0.blocks.1", "stages.0.blocks.2"), "stages.0.blocks.1"),
        (V1, ("block2", "block3"), "block2/unit1/"),
    ]:
        arrays = example.arrays
        if isinstance(change, tuple):
            arrays = {name.replace(*change): value for name, value in arrays.items()}
        else:
            arrays = arrays | change
        path = dataclasses.replace(example, arrays=arrays).write(tmp_path)
        refused(message, path, **example.known)


def test_what_cannot_hold_it_says_so(loaded, tmp_path):
    for example, to, message in [
        (V1, "hf", "hf has no ResNets of style v1"),
        (V1, "google", "google has no ResNets of style v1"),
        (V1, "timm", "timm has no ResNets of style v1"),
        (BIT, "hf", "hf has no ResNets of style v2"),
        (GOOGLE, "hf", r"hf has no models with model\.resnet=\(2, 1\)"),
        (GOOGLE, "big_vision", r"big_vision has no models with model\.resnet=\(2, 1\)"),
        # timm builds only what it has a name for.
        (TIMM, "timm folder", r"timm has no architecture .*\(2, 1\) units"),
        (TIMM_HYBRID, "timm folder", r"timm has no architecture .*\(2, 1\) units"),
    ]:
        format, *folder = to.split()
        ending = "" if folder else ".npz" if format in ("google", "big_vision") else ".safetensors"
        with pytest.raises(UserError, match=message):
            vit_jax.save(loaded(example.name), tmp_path / f"out{ending}", format=format)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("units", [(1, 1), (2, 1, 1)])
def test_a_hybrid_before_normalising_has_no_file_of_others(units, tmp_path):
    """What normalises before its convolutions stands alone in all code bases."""
    sizes = dialects.SIZES | dict(patch_size=1, image_size=32)
    vit = of(ViTConfig(**sizes, num_classes=5, resnet=units, resnet_width=32, resnet_style="v2"))
    for format, ending in {"google": "npz", "timm": "safetensors"}.items():
        with pytest.raises(UserError, match=r"model\.resnet_style='v2'"):
            vit_jax.save(vit, tmp_path / f"out.{ending}", format=format)
    vit_jax.save(vit, tmp_path / "ours.safetensors")
    again = vit_jax.load(tmp_path / "ours.safetensors")
    assert_same(parameters(again.model), parameters(vit.model))


def test_another_style_is_said_and_kept_in_the_record(loaded, tmp_path):
    for example, format, said in [
        (GOOGLE, "timm", "v1, where timm's code has timm_v1"),
        (TIMM_HYBRID, "google", "timm_v1, where google's code has v1"),
        (TIMM, "google", "timm_v2, where google's code has v2"),
        (TIMM, "big_vision", "timm_v2, where big_vision's code has v2"),
        (BIT, "timm", "v2, where timm's code has timm_v2"),
        (BIT, "big_vision", None),
    ]:
        vit = loaded(example.name)
        path = tmp_path / ("out.safetensors" if format == "timm" else "out.npz")
        report = vit_jax.save(vit, path, format=format)
        assert report.assumed.get("resnet_style") == said
        again = vit_jax.load(path)
        assert again.config == vit.config
        assert_same(parameters(again.model), example.params())
    assert "bit_paper.py has none" in report.assumed["pooling"]  # the border of big_vision's


@pytest.mark.parametrize("example", [BIT, TIMM_HYBRID], ids=lambda example: example.name)
def test_from_the_shell(example, tmp_path, capsys):
    src, flags = str(example.write(tmp_path)), []
    for field, value in example.known.items():
        flags += ["--set", f"{field}={value}"]
    assert main(["inspect", src, *flags]) == 0
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
    told = "image_size=64" if example is BIT else "resnet_style=timm_v1"
    assert main(["convert", src, str(dst), "--format=google", *flags, "--set", told]) == 0
    assert "arrays in google's names" in capsys.readouterr().out
    assert_same(parameters(vit_jax.load(dst).model), example.params())
    assert "hf has no" in fails(capsys, "convert", src, tmp_path / "x", "--format=hf", *flags)
    assert inspect(dst).facts["ResNet"].startswith("(2, 1) units")
