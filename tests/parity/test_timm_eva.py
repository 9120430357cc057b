"""Models of timm's eva.py: EVA, EVA-02, DINOv3, and those with axial rotary positions."""

import copy
import dataclasses
import json

import numpy as np
import PIL.Image
import pytest
import timm
import timm.data
import torch
import transformers
from timm.models import eva
from timm.models._hub import save_for_hf

import vit_jax
from parity import test_transformers
from parity.references import (
    agree,
    assert_same_models,
    assert_true,
    assert_written_for_others,
    error,
    expected_of,
    interpreted,
    load,
    ours,
    pixels,
    same_tensors,
    save,
    truth_of_timm,
)
from parity.timm_cases import Case, built
from vit_jax.errors import UserError

SMALL = dict(embed_dim=48, num_heads=3)
CASES = {
    "dinov3": Case("DINOv3", "vit_small_patch16_dinov3", SMALL),
    "dinov3_qkvb": Case(
        "DINOv3, biases of Q and V",
        "vit_small_patch16_dinov3_qkvb",
        SMALL | dict(num_classes=7, global_pool="token"),
    ),
    "dinov3_plus": Case(
        "DINOv3, SwiGLU",
        "vit_small_plus_patch16_dinov3_qkvb",
        SMALL | dict(img_size=(32, 64), num_classes=0, global_pool="token"),
        writes=("timm", "hf"),
    ),
    "lingbot": Case("LingBot-Vision", "vit_small_patch16_lingbot", SMALL, writes=("timm", "hf")),
    "eva02": Case("EVA-02, tiny and small", "eva02_tiny_patch14_224", SMALL),
    "eva02_norm": Case(
        "EVA-02, LayerNorm in the MLP", "eva02_base_patch14_224", SMALL | dict(num_classes=7)
    ),
    "eva02_clip": Case(
        "EVA-02 CLIP, LayerNorm behind the heads",
        "eva02_base_patch16_clip_224",
        SMALL | dict(num_classes=0),
    ),
    "eva": Case("EVA, giant", "eva_giant_patch14_224", SMALL | dict(num_classes=7)),
    "enormous": Case(
        "EVA-02 CLIP, enormous, norms behind the branches",
        "eva02_enormous_patch14_clip_224",
        SMALL | dict(num_classes=7),
    ),
    "sapiens2": Case(
        "Sapiens 2",
        "vit_base_patch16_sapiens2",
        SMALL | dict(num_kv_heads=3),
        writes=("timm", "hf"),
    ),
    "rope_gap": Case(
        "ViT with axial RoPE, registers",
        "vit_base_patch16_rope_reg1_gap_256",
        SMALL | dict(num_classes=7),
    ),
    "rope_no_bias": Case(
        "ViT with axial RoPE, no QKV bias",
        "vit_mediumd_patch16_rope_reg1_gap_256",
        SMALL | dict(num_classes=0),
    ),
    "rope": Case(
        "ViT with axial RoPE",
        "vit_small_patch16_rope_224",
        SMALL | dict(num_classes=7, img_size=(48, 32)),
    ),
    "rope_ape": Case(
        "ViT with axial RoPE and a table",
        "vit_small_patch16_rope_ape_224",
        SMALL | dict(num_classes=7),
    ),
    "mixed": Case(
        "ViT with learned RoPE",
        "vit_small_patch16_rope_mixed_224",
        SMALL | dict(num_classes=7, img_size=(48, 32)),
    ),
    "mixed_ape": Case(
        "ViT with learned RoPE and a table",
        "vit_small_patch16_rope_mixed_ape_224",
        SMALL | dict(num_classes=7),
    ),
    "pe_core": Case(
        "Perception Encoder, core",
        "vit_pe_core_small_patch16_384",
        SMALL | dict(num_classes=7),
    ),
    "pe_core_giant": Case(
        "Perception Encoder, core, no class token",
        "vit_pe_core_gigantic_patch14_448",
        SMALL | dict(num_classes=7),
    ),
    "pe_lang": Case(
        "Perception Encoder, language, LayerScale",
        "vit_pe_lang_large_patch14_448",
        SMALL | dict(img_size=(28, 56)),
    ),
    "pe_spatial": Case("Perception Encoder, spatial", "vit_pe_spatial_tiny_patch16_512", SMALL),
}
model_of = built(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_the_hub(name, folders, record):
    """Nothing is assumed, and the preprocessing is timm's own."""
    model, folder = model_of(name), folders(name)
    vit = load(folder / "model.safetensors")
    assert_true(vit.config, model)
    assert not set(vit.report.assumed) - {"labels"}, vit.report.assumed
    worst = agree(vit, expected_of(model, vit))
    record(CASES[name].family, CASES[name].reference, "folder", worst)

    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    size = {"input_size": (3, *model.patch_embed.img_size)}  # DINOv3 takes any
    config = timm.data.resolve_data_config(size, pretrained_cfg=config)
    picture = np.random.default_rng(0).integers(0, 256, (91, 120, 3), np.uint8)
    picture = PIL.Image.fromarray(picture)
    transformed = timm.data.create_transform(**config)(picture).permute(1, 2, 0)
    np.testing.assert_allclose(vit.preprocess(picture), transformed, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov3", "eva02_norm", "eva", "rope", "pe_core"])
def test_a_file_alone_has_to_be_named(name, tmp_path):
    """Most of these names go with several kinds of rotary positions, and with none."""
    model = model_of(name)
    path = save(model, tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match=r"names of timm's eva\.py.*rotary.*architecture="):
        load(path)
    known = dict(num_heads=3, image_size=model.patch_embed.img_size, pool=None)
    known["pool"] = {"token": "token", "avg": "gap", "map": "map"}[model.global_pool]
    vit = load(path, architecture=f"{CASES[name].name}.some_tag", **known)
    assert_true(vit.config, model)
    agree(vit, expected_of(model, vit))


@pytest.mark.parametrize("name", CASES)
def test_written_for_timm(name, folders, record, tmp_path):
    model = model_of(name)
    vit = load(folders(name) / "model.safetensors")
    vit_jax.save(vit, tmp_path, format="timm")
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    same_tensors(back.state_dict(), model.state_dict())
    assert truth_of_timm(back) == truth_of_timm(model)
    worst = agree(vit, expected_of(back, vit))
    record(CASES[name].family, CASES[name].reference, "written for timm", worst)
    again = load(tmp_path / "model.safetensors")
    assert_same_models(again, vit)
    assert again.preprocess == vit.preprocess


@pytest.mark.parametrize("name", CASES)
def test_written_for_others(name, folders, tmp_path):
    """DINOv3's class token is what transformers reads; nothing else is read but by timm."""
    vit = load(folders(name) / "model.safetensors")
    assert_written_for_others(vit, CASES[name].writes, tmp_path)
    vit_jax.save(vit, tmp_path / "ours.safetensors", format="vit_jax")
    assert_same_models(load(tmp_path / "ours.safetensors"), vit)


@pytest.mark.parametrize("name", ["lingbot", "dinov3_plus"])
def test_from_timm_to_transformers(name, folders, record, tmp_path):
    """The class token's output of timm's model, in transformers' DINOv3ViTModel."""
    vit = load(folders(name) / "model.safetensors")
    if vit.config.image_size[0] != vit.config.image_size[1]:
        with pytest.raises(UserError, match="square"):
            vit_jax.save(vit, tmp_path, format="hf")
        return
    vit_jax.save(vit, tmp_path, format="hf")
    back = test_transformers.read_back(tmp_path, transformers.DINOv3ViTModel)
    case = dataclasses.replace(test_transformers.CASES["dinov3"], config=back.config)
    worst = agree(vit, test_transformers.expected_of(case, back, vit.config))
    record(CASES[name].family, f"timm {timm.__version__}", f"written for {case.reference}", worst)


@pytest.mark.parametrize(
    "name, size",
    [
        *(("dinov3", (48, 96)), ("eva02", (84, 42)), ("eva02_clip", (96, 80))),
        *(("rope_gap", (96, 48)), ("rope", (32, 80)), ("rope_ape", (80, 48)), ("eva", (70, 84))),
        *(("pe_core", (96, 48)), ("mixed", (64, 80)), ("mixed_ape", (48, 80))),
    ],
)
def test_another_image_size(name, size, folders, record):
    """The angles are those of the new grid, scaled to the family's own where it has one."""
    vit = load(folders(name) / "model.safetensors", image_size=size)
    model = CASES[name].build(img_size=size)
    model.load_state_dict(eva.checkpoint_filter_fn(model_of(name).state_dict(), model))
    worst = agree(vit, expected_of(model, vit))
    record(CASES[name].family, CASES[name].reference, "resized", worst)


@pytest.mark.parametrize("name", ["dinov3_qkvb", "eva02_norm"])
def test_bfloat16_is_about_as_close_as_timms_own(name, folders):
    model = model_of(name)
    vit = load(folders(name) / "model.safetensors", dtype="bfloat16")
    x = torch.from_numpy(pixels(vit.config).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double()).numpy()
        with torch.autocast("cpu", torch.bfloat16):
            timms = error(model(x).float().numpy(), exact)
    found = error(ours(vit)["output"], exact)
    assert 1e-3 < found < min(0.02, 3 * timms)


def test_keys_and_values_of_fewer_heads_are_repeated(record, tmp_path):
    """Grouped queries; written again, every query has a key and a value of its own."""
    case = CASES["sapiens2"]
    model = case.build(num_heads=6, num_kv_heads=(6, 2))
    save_for_hf(model, tmp_path / "a", model_config={}, safe_serialization=True)
    vit = load(tmp_path / "a")
    assert "repeated" in vit.report.assumed["keys and values"]
    worst = agree(vit, expected_of(model, vit))
    record(case.family, case.reference, "grouped queries", worst)
    vit_jax.save(vit, tmp_path / "b", format="timm")
    back = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
    assert [block.attn.num_kv_heads for block in back.blocks] == [6, 6]
    agree(vit, expected_of(back, vit))


@pytest.mark.parametrize("name", ["dinov3", "eva02", "rope"])
def test_other_rotations_would_be_seen(name, folders):
    vit = load(folders(name) / "model.safetensors")
    wrong = dataclasses.replace(vit.config.rotary, base=50.0)
    vit = load(folders(name) / "model.safetensors", rotary=wrong)
    with pytest.raises(AssertionError, match=r"block 0.*e-0[1-4]'"):
        agree(vit, expected_of(model_of(name), vit))


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("vit_small_patch16_dinov3", dict(rope_temperature=50.0), "rope_temperature=50.0 may"),
        ("eva02_tiny_patch14_224", dict(ref_feat_shape=(4, 4)), r"ref_feat_shape=.* may change"),
        ("vit_base_patch16_sapiens2", dict(rope_type="cat"), "rope_type='cat' may change"),
    ],
)
def test_other_rotations_are_refused(name, changes, reason, tmp_path):
    model = timm.create_model(name, device="meta", **changes)
    with pytest.raises(UserError, match=reason):
        interpreted(model, tmp_path)
