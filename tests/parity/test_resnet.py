"""Hybrids and ResNets: of timm, and of Google's two code bases as linen computes them, both ways.

What timm computes in float32 is itself up to 1e-5 off: the rounding of each of a ResNet's dozens of
convolutions is amplified by all that follow. So both references compute in float64, and the
tolerance is all ours.
"""

import functools
import json
import math

import numpy as np
import PIL.Image
import pytest
import timm
import timm.data
import torch
from flax.training.checkpoints import convert_pre_linen
from flax.traverse_util import flatten_dict, unflatten_dict
from timm.layers import StdConv2d
from timm.models._hub import save_for_hf
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer_hybrid import checkpoint_filter_fn

import vit_jax
from parity.linen_resnet import Classifier, compute, draw
from parity.references import (
    agree,
    assert_same_models,
    interpreted,
    load,
    pixels,
    same_tensors,
    save,
    theirs,
)
from parity.timm_cases import Case
from vit_jax.checkpoints.convert import shapes_of
from vit_jax.checkpoints.opened import open_model
from vit_jax.checkpoints.sidecars import timm_files
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ResNetConfig, pair
from vit_jax.models.variants import variant

# -- timm ----------------------------------------------------------------------------------------

NARROW = dict(depth=2, num_classes=7, embed_dim=64, num_heads=4)
HEADS = dict(num_heads=4)
OBLONG = (64, 96)
CASES = {
    "R+Ti/16": Case("R+Ti/16", "vit_tiny_r_s16_p8_224", {}),
    "R26+S/32": Case(
        "R26+S/32, 64x96 pixels",
        "vit_small_r26_s32_224",
        dict(depth=2, num_classes=7, img_size=OBLONG),
    ),
    "R26+B/32": Case(
        "R26+B/32, narrow, one channel, mean of the patches",
        "vit_base_r26_s32_224",
        dict(NARROW, img_size=64, in_chans=1, global_pool="avg", class_token=False, fc_norm=False),
        HEADS,
    ),
    "R50+B/16": Case("R50+B/16, narrow", "vit_base_r50_s16_224", dict(NARROW, img_size=64), HEADS),
    "R50+L/32": Case(
        "R50+L/32, narrow",
        "vit_large_r50_s32_224",
        dict(NARROW, img_size=64),
        HEADS,
    ),
    "R50x1": Case("BiT R50x1", "resnetv2_50x1_bit", dict(num_classes=7)),
    "R101x1": Case("BiT R101x1, no head", "resnetv2_101x1_bit", dict(num_classes=0)),
}
HYBRIDS = [name for name in CASES if "+" in name]
RESNETS = [name for name in CASES if "x" in name]
# Sizes that its strides do not divide: how they are padded then counts.
ODD = (45, 67)


def drawn(model, seed=0):
    """Random parameters: branches that count, and kernels that their epsilon counts beside."""
    generator = torch.Generator().manual_seed(seed)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                norm = name.endswith("weight")
                noise = 0.1 * noise + (0.4 if norm else 0)
                noise *= 0.3 if "norm3" in name else 1
            elif "conv" in name:
                noise *= 3e-4
            elif parameter.ndim == 3:
                noise *= 0.2
            else:
                noise *= noise[0].numel() ** -0.5
            parameter.copy_(noise)
    return model.eval()


@functools.cache
def model_of(case):
    return drawn(timm.create_model(CASES[case].name, device="meta", **CASES[case].changes))


def in_float64(model, config):
    """What timm computes of our images, without float32's rounding."""
    model.double()

    def call(x):
        x = model.forward_features(x.double())
        if isinstance(config, ResNetConfig):
            return {
                "encoded": x.flatten(2).transpose(1, 2),
                "pooled": x.mean((2, 3)),
                "output": model.forward_head(x),
            }
        return {"encoded": x, "output": model.forward_head(x)}

    found = theirs(config, getattr(model, "blocks", ()), call)
    model.float()
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each case, as timm pushes it to the hub."""

    @functools.cache
    def folder(case):
        path = tmp_path_factory.mktemp("folder")
        save_for_hf(model_of(case), path, safe_serialization=True)
        return path

    return folder


@functools.cache
def loaded(folder, **changes):
    return load(folder, **changes)


def size_of(case):
    """What the size of its images is changed to: of a ResNet, as it has none of its own."""
    return {"image_size": ODD} if case in RESNETS else {}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_timm(case, folders, record):
    """Nothing is assumed that the names leave open, and the preprocessing is timm's own."""
    model, folder = model_of(case), folders(case)
    vit = loaded(folder, **size_of(case))
    assert not set(vit.report.assumed) - {"labels", "num_heads"}, vit.report.assumed
    worst = agree(vit, in_float64(model, vit.config))
    record(CASES[case].family, CASES[case].reference, "folder", worst)

    if model.in_chans == 3:
        config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
        config = timm.data.resolve_data_config(pretrained_cfg=config)
        picture = np.random.default_rng(0).integers(0, 256, (91, 120, 3), np.uint8)
        picture = PIL.Image.fromarray(picture)
        expected = timm.data.create_transform(**config)(picture).permute(1, 2, 0)
        preprocess = open_model(folder).card.preprocess
        np.testing.assert_allclose(preprocess(picture), expected, atol=1e-5)


@pytest.mark.parametrize("case", ["R+Ti/16", "R26+B/32", "R50+B/16", "R50x1"])
def test_written_for_timm(case, folders, tmp_path, record):
    model, vit = model_of(case), loaded(folders(case), **size_of(case))
    vit_jax.save(vit, tmp_path, format="timm")
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    same_tensors(back.state_dict(), model.state_dict())
    images = torch.from_numpy(pixels(vit.config)).permute(0, 3, 1, 2)[:1]
    with torch.no_grad():
        assert torch.equal(back(images), model(images))
    record(CASES[case].family, CASES[case].reference, "written for timm", 0.0)
    again = load(tmp_path)
    assert_same_models(again, vit)
    assert (again.preprocess, again.labels) == (vit.preprocess, vit.labels)


WIDTHS = {
    "one unit": dict(layers=[1], channels=[128], stem_chs=32),
    "two stages": dict(layers=[3, 1], channels=[384, 768], stem_chs=96, in_chans=2),
    "four stages": dict(layers=[1, 2, 1, 1], channels=[64, 128, 256, 512], width_factor=2),
}


@functools.cache
def narrow_of(name):
    """A ResNet of sizes that timm has no name for."""
    sizes = {"stem_chs": 16, **WIDTHS[name]}
    conv = functools.partial(StdConv2d, eps=1e-8)
    return drawn(ResNetV2(**sizes, num_classes=5, stem_type="fixed", conv_layer=conv))


@pytest.mark.parametrize("name", WIDTHS)
def test_a_resnet_of_other_sizes(name, record, tmp_path):
    model = narrow_of(name)
    vit = load(save(model, tmp_path / "model.safetensors"), image_size=ODD)
    units = tuple(WIDTHS[name]["layers"])
    assert (vit.config.resnet, vit.config.in_channels) == (units, model.in_chans)
    worst = agree(vit, in_float64(model, vit.config))
    record("BiT, narrow", f"timm {timm.__version__} ResNetV2", "file", worst)


def test_another_style_would_be_seen(folders, tmp_path):
    case, name = "R26+B/32", "two stages"
    vit = loaded(folders(case), resnet_style="v1")
    with pytest.raises(AssertionError, match=r"block 0.*e-0[1-4]'"):
        agree(vit, in_float64(model_of(case), vit.config))
    path = save(narrow_of(name), tmp_path / "model.safetensors")
    vit = load(path, image_size=ODD, resnet_style="v2")
    with pytest.raises(AssertionError, match=r"encoded.*e-0[1-4]'"):
        agree(vit, in_float64(narrow_of(name), vit.config))


@pytest.mark.parametrize("case, size", [("R50+B/16", (96, 48))])
def test_another_image_size(case, size, folders, record):
    vit = loaded(folders(case), image_size=size)
    model = timm.create_model(
        CASES[case].name, device="meta", **{**CASES[case].changes, "img_size": size}
    )
    state = checkpoint_filter_fn(model_of(case).state_dict(), model)
    model.load_state_dict(state, assign=True)
    worst = agree(vit, in_float64(model.eval(), vit.config))
    record(CASES[case].family, CASES[case].reference, "resized", worst)


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize(
    "case, stem", [("R+Ti/16", "patch_embed.backbone.conv"), ("R50x1", "stem.conv")]
)
def test_another_number_of_channels(case, stem, channels, folders):
    vit = loaded(folders(case), in_channels=channels)
    kernel = model_of(case).state_dict()[f"{stem}.weight"]
    expected = timm.models.adapt_input_conv(channels, kernel).permute(2, 3, 1, 0)
    found = vit.model.resnet.conv_root.kernel[...]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", ["R+Ti/16", "R50+B/16", "R50x1"])
def test_timm_reads_what_we_write_in_googles_names(case, folders, tmp_path):
    """By its own reader of Google's .npz files, of both kinds."""
    path = tmp_path / "model.npz"
    vit_jax.save(loaded(folders(case), **size_of(case)), path, format="google")
    back = timm.create_model(CASES[case].name, device="meta", **CASES[case].changes)
    back = drawn(back, seed=1)
    back.load_pretrained(str(path))
    same_tensors(back.state_dict(), model_of(case).state_dict())


@pytest.mark.parametrize("format", ["google", "big_vision", "timm", "vit_jax"])
@pytest.mark.parametrize("case", ["R+Ti/16", "R26+B/32", "R50x1"])
def test_there_and_back(case, format, folders, tmp_path):
    """Whatever holds the model gives back the same bits, and its record the same config."""
    vit = loaded(folders(case), **size_of(case))
    ending = "npz" if format in ("google", "big_vision") else "safetensors"
    path = tmp_path / f"model.{ending}"
    if format == "big_vision" and case in HYBRIDS:
        with pytest.raises(UserError, match=r"big_vision has no models with model\.resnet"):
            vit_jax.save(vit, path, format=format)
        return
    vit_jax.save(vit, path, format=format)
    assert_same_models(load(path), vit)


VARIANTS = {
    "vit_tiny_r_s16_p8_224": "R+Ti/16",
    "vit_tiny_r_s16_p8_384": "R+Ti/16",
    "vit_small_r26_s32_224": "R26+S/32",
    "vit_small_r26_s32_384": "R26+S/32",
    "vit_base_r26_s32_224": "R26+B/32",
    "vit_base_r50_s16_224": "R50+B/16",
    "vit_base_r50_s16_384": "R50+B/16",
    "vit_large_r50_s32_224": "R50+L/32",
    "vit_large_r50_s32_384": "R50+L/32",
    **{f"resnetv2_{name[1:]}_bit": name for name in ("R50x1", "R50x3", "R101x1", "R101x3")},
    **{f"resnetv2_{name[1:]}_bit": name for name in ("R152x2", "R152x4")},
}
LOOK_ALIKES = [*timm.list_models("resnetv2_*"), *timm.list_models("vit_*_resnet*")]


@pytest.mark.parametrize("name", sorted({*VARIANTS, *LOOK_ALIKES}))
def test_names_and_shapes_of_every_one_in_timm(name, tmp_path):
    """At their real sizes, without numbers: read as what they are, or refused."""
    model = timm.create_model(name, device="meta")
    if name not in VARIANTS:
        with pytest.raises(UserError):
            interpreted(model, tmp_path)
        return
    config = interpreted(model, tmp_path)
    changes = dict(image_size=config.image_size, num_classes=config.num_classes)
    assert shapes_of(variant(VARIANTS[name], **changes)) == shapes_of(config)
    assert config.image_size == model.default_cfg["input_size"][1:]
    assert config.resnet_style == ("timm_v1" if "+" in VARIANTS[name] else "timm_v2")
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert sum(map(math.prod, shapes_of(config).values())) == expected

    files = timm_files(config, Preprocess(config.image_size), ("",) * config.num_classes)
    written = files["config.json"]
    args = {"num_classes": written["num_classes"], **written["model_args"]}
    again = timm.create_model(written["architecture"], device="meta", **args)
    shapes = [{k: v.shape for k, v in each.state_dict().items()} for each in (model, again)]
    assert shapes[0] == shapes[1]


# -- linen ---------------------------------------------------------------------------------------

LINEN = {
    "hybrid": ("google", Classifier((2, 1), patches=(1, 1)), (48, 80)),
    "hybrid, hidden layer": ("google", Classifier((1, 1, 2), patches=(1, 2), hidden=24), (48, 64)),
    "hybrid, mean of the patches": ("google", Classifier((1,), patches=(4, 4), token=False), 48),
    "hybrid, root alone": ("google", Classifier((), patches=(4, 4)), (64, 48)),
    "models/bit.py": ("big_vision", Classifier((2, 1, 1, 1)), ODD),
    "models/bit_paper.py": ("big_vision", Classifier((2, 1, 1, 3), v2=True), ODD),
}


def with_axes(arrays):
    """GroupNorm's parameters [c] as [1 1 1 c], which is how linen once kept them."""
    norms = {name for name in arrays if "gn" in name or "norm-pre-head" in name}
    return arrays | {name: arrays[name].reshape(1, 1, 1, -1) for name in norms}


@pytest.mark.parametrize("name", LINEN)
def test_what_linen_computes(name, tmp_path, record):
    """Google's hybrids and big_vision's ResNets: read, and written so that they are read there."""
    format, model, size = LINEN[name]
    arrays = draw(model, pair(size, "image_size"))
    np.savez(tmp_path / "in.npz", **arrays)
    np.savez(tmp_path / "axes.npz", **with_axes(arrays))
    vit = load(tmp_path / "in.npz", image_size=size)
    assert_same_models(vit, load(tmp_path / "axes.npz", image_size=size))
    expected = compute(model, arrays, pixels(vit.config))
    worst = agree(vit, {"output": expected})
    record(f"{format}, {name}", "linen, float64", "file", worst)

    vit_jax.save(vit, tmp_path / "out.npz", format=format)
    with np.load(tmp_path / "out.npz") as file:
        back = {key.removeprefix("params/"): array for key, array in file.items()}
    # What Google's code does to the older names of its published files.
    back = flatten_dict(convert_pre_linen(unflatten_dict(back, sep="/")), sep="/")
    np.testing.assert_array_equal(compute(model, back, pixels(vit.config)), expected)


def test_the_border_of_the_pooling(tmp_path):
    """Where bit_paper.py is not the code of the published weights, ours is the latter's."""
    _, model, size = LINEN["models/bit_paper.py"]
    arrays = draw(model, size)
    np.savez(tmp_path / "in.npz", **arrays)
    vit = load(tmp_path / "in.npz", image_size=size)
    expected = compute(model.clone(border=-np.inf), arrays, pixels(vit.config))
    with pytest.raises(AssertionError, match=r"output.*e-0[1-4]'"):
        agree(vit, {"output": expected})
