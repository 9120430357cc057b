"""Models of timm's vision_transformer.py that are no plain ViTs: AIMv2, InternViT, RADIO, ..."""

import re

import pytest
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn

import vit_jax
from parity.references import (
    agree,
    assert_same_models,
    assert_true,
    assert_written_for_others,
    expected_of,
    load,
    randomise,
    same_tensors,
    truth_of_timm,
)
from parity.timm_cases import Case, built

SMALL = dict(embed_dim=48, num_heads=3)
CASES = {
    "aimv2": Case("AIMv2", "aimv2_large_patch14_224", SMALL, writes=("timm", "hf")),
    "aimv2_head": Case(
        "AIMv2, a head and biases",
        "aimv2_huge_patch14_336",
        SMALL | dict(num_classes=7, qkv_bias=True, proj_bias=True),
    ),
    "intern": Case("InternViT", "vit_intern300m_patch14_448", SMALL),
    "radio": Case("C-RADIO v3, LayerScale", "vit_large_patch16_radio_v3", SMALL),
    "radio_giant": Case("C-RADIO v3", "vit_giant_patch16_radio_v3", SMALL),
    "behind": Case(
        "ViT, norms behind the branches", "vit_base_patch16_rpn_224", SMALL | dict(num_classes=7)
    ),
    "map_prefix": Case(
        "attention pooling of registers, too", "test_vit3", SMALL | dict(num_classes=7)
    ),
    "differential": Case(
        "differential attention",
        "vit_dwee_patch16_reg1_gap_256",
        SMALL | dict(num_classes=7, depth=3),
    ),
    "parallel": Case(
        "parallel attention and MLP", "vit_pwee_patch16_reg1_gap_256", SMALL | dict(num_classes=7)
    ),
    "parallel_xp": Case(
        "parallel attention and MLP, RMSNorm of queries and keys",
        "vit_base_patch16_xp_224",
        SMALL | dict(num_classes=7),
    ),
    "parallel_differential": Case(
        "parallel differential attention and MLP",
        "vit_dpwee_patch16_reg1_gap_256",
        SMALL | dict(num_classes=7),
    ),
    "beside": Case(
        "two blocks on the same tokens, 18x2",
        "vit_small_patch16_18x2_224",
        SMALL | dict(num_classes=7, depth=3),
    ),
    "beside_map": Case(
        "two blocks on the same tokens, norms of queries and keys",
        "vit_base_patch16_18x2_224",
        SMALL
        | dict(num_classes=0, init_values=None, qk_norm=True, global_pool="map", reg_tokens=1),
    ),
    "rms": Case(
        "ViT GAP, RMSNorm, norms of queries and keys",
        "vit_base_patch16_224",
        SMALL | dict(num_classes=7, norm_layer="rmsnorm", qk_norm=True, proj_bias=False),
    ),
}
model_of = built(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_the_hub(name, folders, record):
    model = model_of(name)
    vit = load(folders(name))
    assert_true(vit.config, model)
    assert not set(vit.report.assumed) - {"labels"}, vit.report.assumed
    worst = agree(vit, expected_of(model, vit))
    record(CASES[name].family, CASES[name].reference, "folder", worst)


@pytest.mark.parametrize("name", CASES)
def test_written_for_timm(name, folders, record, tmp_path):
    model, vit = model_of(name), load(folders(name))
    vit_jax.save(vit, tmp_path, format="timm")
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    same_tensors(back.state_dict(), model.state_dict())
    assert truth_of_timm(back) == truth_of_timm(model)
    worst = agree(vit, expected_of(back, vit))
    record(CASES[name].family, CASES[name].reference, "written for timm", worst)
    again = load(tmp_path)
    assert_same_models(again, vit)
    assert again.preprocess == vit.preprocess


@pytest.mark.parametrize("name", CASES)
def test_written_for_others(name, folders, tmp_path):
    vit = load(folders(name))
    assert_written_for_others(vit, CASES[name].writes, tmp_path)
    vit_jax.save(vit, tmp_path / "ours.safetensors", format="vit_jax")
    assert_same_models(load(tmp_path / "ours.safetensors"), vit)


@pytest.mark.parametrize("chunks", [None, 2])
@pytest.mark.parametrize("start", ["small_patch14_reg4", "small_patch14", "giant_patch14_reg4"])
def test_dinov2s_own_release(start, chunks, tmp_path, record):
    """Random weights under the release's names, which timm converts to its own, and we read."""
    name = f"vit_{start}_dinov2"
    model = timm.create_model(name, embed_dim=192, num_heads=3, depth=3, img_size=56)
    own, gated = {"mask_token": torch.zeros(1, 192)}, "giant" in name
    for key, value in randomise(model).state_dict().items():
        if gated:
            key = key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        if key == "pos_embed" and "reg4" in name:  # the release's has a row of the class token
            value = torch.cat([torch.randn(1, 1, 192) * 0.02, value], dim=1)
        if chunks and key.startswith("blocks."):
            key = f"blocks.{int(key.split('.')[1]) // chunks}.{key.removeprefix('blocks.')}"
        own[key.replace("reg_token", "register_tokens")] = value.contiguous()
    safetensors.torch.save_file(own, tmp_path / "release.safetensors")
    whole = {re.sub(r"blocks\.\d+\.(?=\d)", "blocks.", key): own[key] for key in own}
    model.load_state_dict(checkpoint_filter_fn(dict(whole), model))
    vit = load(tmp_path / "release.safetensors")
    assert "pool" not in vit.report.assumed
    worst = agree(vit, expected_of(model, vit))
    what = f"{start}, {'chunks' if chunks else 'whole'}"
    record("DINOv2's own release", f"timm {timm.__version__} conversion", what, worst)
