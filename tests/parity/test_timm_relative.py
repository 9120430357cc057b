"""Models of timm with a relative position bias or norms of their own: BEiT, BEiT-3, vit_relpos."""

import json

import numpy as np
import PIL.Image
import pytest
import timm
import timm.data
from timm.models import beit, vision_transformer_relpos

import vit_jax
from parity.references import (
    agree,
    assert_same_models,
    assert_true,
    assert_written_for_others,
    expected_of,
    interpreted,
    load,
    same_tensors,
    save,
    truth_of_timm,
)
from parity.timm_cases import Case, built
from vit_jax.errors import UserError

SMALL = dict(embed_dim=48, num_heads=3, num_classes=7)
BEIT = "beit_base_patch16_224"
SHARED = dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True, use_abs_pos_emb=True)
RELPOS = "vit_relpos_base_patch16_224"
CASES = {
    "beit": Case("BEiT", BEIT, SMALL, writes=("timm", "hf")),
    "beit_shared": Case(
        "BEiT, shared bias, a table of positions, class token",
        BEIT,
        SMALL | SHARED | dict(global_pool="token", img_size=(48, 64)),
    ),
    "beitv2": Case(
        "BEiTv2, no head",
        "beitv2_large_patch16_224",
        SMALL | dict(num_classes=0),
        writes=("timm", "hf"),
    ),
    "relpos": Case("ViT with an MLP of offsets", RELPOS, SMALL | dict(img_size=(48, 64))),
    "srelpos": Case("the same, shared", "vit_srelpos_small_patch16_224", SMALL),
    "cls": Case("the same, class token", "vit_relpos_medium_patch16_cls_224", SMALL),
    "clsgap": Case(
        "the same, mean beside a class token", "vit_relpos_base_patch16_clsgap_224", SMALL
    ),
    "rpn": Case("the same, norms last", "vit_relpos_base_patch32_plus_rpn_256", SMALL),
    "table": Case(
        "ViT with a table of offsets, norms last",
        "vit_relpos_medium_patch16_rpn_224",
        SMALL | dict(rel_pos_type="bias", class_token=True),
    ),
    "qk_norm": Case(
        "the same, norms of queries and keys", RELPOS, SMALL | dict(qk_norm=True), writes=()
    ),
    "swin": Case(
        "ViT with Swin V2's MLP of offsets",
        "vit_relpos_base_patch16_cls_224",
        SMALL | dict(rel_pos_type="mlp-swin", img_size=(64, 48)),
    ),
    "beit3": Case("BEiT-3", "beit3_base_patch16_224", SMALL),
    "norms_last": Case("ViT, norms last", "vit_base_patch16_rpn_224", SMALL),
}
model_of = built(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_the_hub(name, folders, record):
    """Nothing is assumed, and the preprocessing is timm's own."""
    model, folder, case = model_of(name), folders(name), CASES[name]
    vit = load(folder / "model.safetensors")
    assert_true(vit.config, model)
    assert not set(vit.report.assumed) - {"labels"}, vit.report.assumed
    worst = agree(vit, expected_of(model, vit))
    record(case.family, case.reference, "folder", worst)

    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    config = timm.data.resolve_data_config({}, pretrained_cfg=config)
    config["input_size"] = (3, *model.patch_embed.img_size)
    picture = np.random.default_rng(0).integers(0, 256, (91, 120, 3), np.uint8)
    picture = PIL.Image.fromarray(picture)
    transformed = timm.data.create_transform(**config)(picture).permute(1, 2, 0)
    np.testing.assert_allclose(vit.preprocess(picture), transformed, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name != "qk_norm"])
def test_written_for_timm_and_others(name, folders, record, tmp_path):
    model, case = model_of(name), CASES[name]
    vit = load(folders(name) / "model.safetensors")
    vit_jax.save(vit, tmp_path / "timm", format="timm")
    back = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    same_tensors(back.state_dict(), model.state_dict())
    assert truth_of_timm(back) == truth_of_timm(model)
    worst = agree(vit, expected_of(back, vit))
    record(case.family, case.reference, "written for timm", worst)
    again = load(tmp_path / "timm" / "model.safetensors")
    assert_same_models(again, vit)
    assert again.preprocess == vit.preprocess
    # Of transformers' files, whose own epsilon is 1e-12.
    assert_written_for_others(vit, case.writes, tmp_path, layernorm_eps=1e-6)


@pytest.mark.parametrize(
    "name, size, module",
    [
        ("beit", (80, 112), beit),
        ("beit", (32, 48), beit),
        ("table", (112, 96), vision_transformer_relpos),
        ("relpos", (64, 80), vision_transformer_relpos),
        ("swin", (96, 64), vision_transformer_relpos),
    ],
)
def test_another_image_size(name, size, module, folders, record):
    """Tables by timm's geometric interpolation; MLPs see the offsets of the new grid."""
    vit = load(folders(name) / "model.safetensors", image_size=size)
    model = CASES[name].build(img_size=size)
    model.load_state_dict(module.checkpoint_filter_fn(model_of(name).state_dict(), model))
    worst = agree(vit, expected_of(model, vit))
    record(CASES[name].family, CASES[name].reference, "resized", worst)


@pytest.mark.parametrize("name", ["beit", "relpos", "cls", "rpn", "swin", "beit3"])
def test_a_file_alone(name, tmp_path):
    """Keys show the bias; of norms that may be at either end of a branch, a name tells."""
    model = model_of(name)
    path = save(model, tmp_path / "alone.safetensors")
    size = {} if name == "beit" else dict(image_size=model.patch_embed.img_size)
    known = dict(num_heads=3) if name == "beit3" else {}
    if name == "rpn":
        with pytest.raises(UserError, match=r"before or behind each branch.*architecture="):
            load(path, **size)
        known = dict(architecture=CASES[name].name)
    vit = load(path, **size, **known)
    assert_true(vit.config, model)
    agree(vit, expected_of(model, vit))


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        (BEIT, dict(use_shared_rel_pos_bias=True), "belongs to no part of a ViT"),
    ],
)
def test_what_is_no_such_model_is_refused(name, changes, reason, tmp_path):
    model = timm.create_model(name, device="meta", depth=2, **changes)
    with pytest.raises(UserError, match=reason):
        interpreted(model, tmp_path)
