"""Models of timm: their files and folders in, what we write back out, and what is refused."""

import copy
import json

import numpy as np
import PIL.Image
import pytest
import timm
import timm.data
import torch
from timm.models import vision_transformer

import vit_jax
from parity.references import (
    agree,
    assert_same_models,
    assert_true,
    error,
    expected_of,
    load,
    ours,
    pixels,
    randomise,
    same_tensors,
    save,
    truth_of_timm,
)
from parity.timm_cases import CASES, model_of
from vit_jax.errors import UserError

LABELS = [f"class {i}" for i in range(21)]


@pytest.mark.parametrize("case", CASES)
def test_a_file_alone(case, record, tmp_path):
    model = model_of(case)
    vit = load(save(model, tmp_path / "alone.safetensors"), **CASES[case].known)
    assert vit.report.assumed["architecture"].startswith("is not named")
    assert_true(vit.config, model)
    worst = agree(vit, expected_of(model, vit))
    record(CASES[case].family, CASES[case].reference, "file", worst)


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_the_hub(case, folders, record):
    """Nothing is assumed, and the preprocessing is timm's own."""
    model, folder = model_of(case), folders(case)
    vit = load(folder / "model.safetensors")
    assert_true(vit.config, model)
    assert not set(vit.report.assumed) - {"num_heads", "position"}, vit.report.assumed
    worst = agree(vit, expected_of(model, vit))
    record(CASES[case].family, CASES[case].reference, "folder", worst)
    assert vit.labels == tuple(LABELS[: model.num_classes])

    if model.in_chans == 3:
        config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
        config = timm.data.resolve_data_config(pretrained_cfg=config)
        picture = np.random.default_rng(0).integers(0, 256, (91, 120, 3), np.uint8)
        picture = PIL.Image.fromarray(picture)
        transformed = timm.data.create_transform(**config)(picture).permute(1, 2, 0)
        np.testing.assert_allclose(vit.preprocess(picture), transformed, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_written_for_timm(case, folders, record, tmp_path):
    model = model_of(case)
    vit = load(folders(case) / "model.safetensors")
    vit_jax.save(vit, tmp_path, format="timm")
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    same_tensors(back.state_dict(), model.state_dict())
    assert truth_of_timm(back) == truth_of_timm(model)
    worst = agree(vit, expected_of(back, vit))
    record(CASES[case].family, CASES[case].reference, "written for timm", worst)
    again = load(tmp_path / "model.safetensors")
    assert_same_models(again, vit)
    assert again.preprocess == vit.preprocess and again.labels == vit.labels


@pytest.mark.parametrize("format", ["google", "big_vision", "hf"])
@pytest.mark.parametrize("case", CASES)
def test_written_for_others(case, format, folders, tmp_path):
    """Whatever can be written in another code base's names comes back as it was."""
    vit = load(folders(case) / "model.safetensors")
    path = tmp_path / ("weights.safetensors" if format == "hf" else "weights.npz")
    if format not in CASES[case].writes:
        with pytest.raises(UserError, match=format):
            vit_jax.save(vit, path, format=format)
        return
    moved = [name for name in vit_jax.save(vit, path, format=format).assumed if name == "pos_embed"]
    again = load(path)
    if moved:
        expected = expected_of(model_of(case), vit)
        agree(again, expected)
    else:
        assert_same_models(again, vit)


def test_at_its_real_size(tmp_path, record):
    model = randomise(timm.create_model("vit_tiny_patch16_224"))
    vit = load(save(model, tmp_path / "tiny.safetensors"))
    assert vit.report.facts["variant"].startswith("Ti/16, ")
    worst = agree(vit, expected_of(model, vit))
    record("ViT Ti/16, 12 blocks", f"timm {timm.__version__} vit_tiny_patch16_224", "file", worst)


@pytest.mark.parametrize("wrong", [dict(gelu="tanh"), dict(layernorm_eps=1e-5), dict(num_heads=6)])
def test_a_wrong_model_would_be_seen(wrong, tmp_path):
    model = model_of("plain")
    vit = load(save(model, tmp_path / "wrong.safetensors"), **wrong)
    with pytest.raises(AssertionError, match=r"block 0.*e-0[1-4]'"):
        agree(vit, expected_of(model, vit))


@pytest.mark.parametrize(
    "case, size",
    [
        ("plain", (48, 80)),
        ("plain", (128, 96)),
        ("gap", (96, 96)),
        ("distilled", (32, 96)),
        ("flexivit", (80, 96)),
        ("siglip", (128, 64)),
        ("dinov2_reg4", (42, 98)),
    ],
)
def test_another_image_size(case, size, folders, record):
    vit = load(folders(case) / "model.safetensors", image_size=size)
    model = CASES[case].build(img_size=size)
    state = vision_transformer.checkpoint_filter_fn(model_of(case).state_dict(), model)
    model.load_state_dict(state)
    worst = agree(vit, expected_of(model, vit))
    record(CASES[case].family, CASES[case].reference, "resized", worst)


@pytest.mark.parametrize("patch", [8, 12, 20, (8, 20)], ids=str)
def test_another_patch_size(patch, folders, record):
    """FlexiViT's pseudo-inverse, of the plain bilinear resize."""
    h, w = patch if isinstance(patch, tuple) else (patch, patch)
    size = (4 * h, 4 * w)
    vit = load(folders("plain") / "model.safetensors", image_size=size, patch_size=(h, w))
    model = CASES["plain"].build(img_size=size, patch_size=(h, w))
    state = vision_transformer.checkpoint_filter_fn(
        model_of("plain").state_dict(), model, interpolation="bilinear", antialias=False
    )
    model.load_state_dict(state)
    worst = agree(vit, expected_of(model, vit))
    record(CASES["plain"].family, CASES["plain"].reference, "other patch sizes", worst)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_another_number_of_channels(channels, folders, record):
    vit = load(folders("plain") / "model.safetensors", in_channels=channels)
    model, state = CASES["plain"].build(in_chans=channels), model_of("plain").state_dict()
    stem = "patch_embed.proj.weight"
    state = {**state, stem: timm.models.adapt_input_conv(channels, state[stem])}
    model.load_state_dict(state)
    worst = agree(vit, expected_of(model, vit))
    record(CASES["plain"].family, CASES["plain"].reference, "other channels", worst)


@pytest.mark.parametrize("case", ["plain", "gap", "siglip", "swiglu", "deit3"])
def test_bfloat16_is_about_as_close_as_timms_own(case, folders):
    """To timm in float64, beside timm under autocast: eight bits are steps of 0.004."""
    model = model_of(case)
    vit = load(folders(case) / "model.safetensors", dtype="bfloat16")
    x = torch.from_numpy(pixels(vit.config).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double()).numpy()
        with torch.autocast("cpu", torch.bfloat16):
            timms = error(model(x).float().numpy(), exact)
    found = error(ours(vit)["output"], exact)
    assert 1e-3 < found < min(0.02, 3 * timms)
