"""Models of images of any shape: timm's naflexvit.py, and transformers' SigLIP 2."""

import json

import numpy as np
import PIL.Image
import pytest
import timm
import torch
import transformers
from timm.data.naflex_transforms import Patchify, ResizeToSequence

import vit_jax
from parity.references import (
    TOLERANCE,
    assert_same_models,
    error,
    load,
    randomise,
    same_tensors,
    save,
)
from vit_jax.errors import UserError
from vit_jax.models import native

MOST = 40
SMALL = dict(embed_dim=48, num_heads=3, depth=2, num_classes=7, pos_embed_grid_size=(5, 5))
CASES = {
    "gap": ("NaFlexViT, mean", "naflexvit_base_patch16_gap", {}),
    "par": ("NaFlexViT, positions of one aspect", "naflexvit_base_patch16_par_gap", {}),
    "parfac": (
        "NaFlexViT, positions of rows and columns",
        "naflexvit_base_patch16_parfac_gap",
        {},
    ),
    "map": ("NaFlexViT, attention pooling", "naflexvit_base_patch16_map", {}),
    "reg1": (
        "NaFlexViT, no QKV bias",
        "naflexvit_so150m2_patch16_reg1_gap",
        dict(num_classes=0, pos_embed_grid_size=(4, 6)),
    ),
    "radio": ("C-RADIO v3 NaFlex", "naflexvit_base_patch16_radio_v3", dict(num_classes=0)),
    "radio_large": ("C-RADIO v3 L NaFlex", "naflexvit_large_patch16_radio_v3", dict(num_classes=0)),
    "radio_huge": ("C-RADIO v3 H NaFlex", "naflexvit_huge_patch16_radio_v3", dict(num_classes=0)),
    "radio_v4": ("C-RADIO v4 NaFlex", "naflexvit_so400m_patch16_radio_v4", dict(num_classes=0)),
    "siglip": ("SigLIP 2 NaFlex", "naflexvit_so400m_patch16_siglip", dict(num_classes=0)),
}
PICTURES = [
    PIL.Image.fromarray(np.random.default_rng(h).integers(0, 256, (h, w, 3), np.uint8))
    for h, w in ((60, 80), (200, 30), (80, 80), (40, 250))
]
MODELS = {}


def model_of(name):
    if name not in MODELS:
        _, architecture, changes = CASES[name]
        model = timm.create_model(architecture, **SMALL | changes)
        MODELS[name] = randomise(model)
    return MODELS[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each case, with the config.json that the hub would have."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            model, (_, architecture, changes) = model_of(name), CASES[name]
            save(model, made[name] / "model.safetensors")
            sizes = SMALL | changes
            config = {
                "architecture": architecture,
                "num_classes": sizes.pop("num_classes"),
                "global_pool": model.global_pool,
                "model_args": sizes,
                "pretrained_cfg": {
                    **{k: v for k, v in model.pretrained_cfg.items() if v is not None},
                    "num_classes": model.num_classes,
                },
            }
            (made[name] / "config.json").write_text(json.dumps(config))
        return made[name]

    return folder


def ours(vit, pictures=PICTURES):
    """The patches of pictures, padded, and what the model makes of them."""
    packed = native.packed([vit.preprocess(picture) for picture in pictures], vit.config)
    output, found = vit.model(packed, capture=("tokens", "pooled"))
    return packed, {"output": output, **found}


def coordinates(grid):
    """timm's: the row and column of each patch, [b n 2], and which are no padding."""
    coord, valid = np.zeros((len(grid), MOST, 2), np.int64), np.zeros((len(grid), MOST), bool)
    for row, (h, w) in enumerate(grid):
        coord[row, : h * w] = np.stack(np.mgrid[:h, :w], -1).reshape(-1, 2)
        valid[row, : h * w] = True
    return torch.from_numpy(coord), torch.from_numpy(valid)


def agree(vit, blocks, call, prefix=0):
    """The largest error of every block's real tokens, the pooled output and the last one."""
    packed, found = ours(vit)
    tokens = []

    def listen(_module, _inputs, output):
        tokens.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(listen) for block in blocks]
    with torch.no_grad():
        expected = call(torch.from_numpy(packed.pixels), packed.grid)
    for handle in handles:
        handle.remove()
    errors = {name: error(found[name], value.numpy()) for name, value in expected.items()}
    for block, each in enumerate(tokens):
        for row, (h, w) in enumerate(packed.grid):
            real = slice(0, prefix + h * w)
            pair = found["tokens"][block][row, real], each[row, real].numpy()
            errors[f"block {block}, image {row}"] = error(*pair)
    assert max(errors.values()) < TOLERANCE, {name: f"{v:.1e}" for name, v in errors.items()}
    return max(errors.values())


def agrees_with_timm(vit, model):
    def call(pixels, grid):
        coord, valid = coordinates(grid)
        output = model({"patches": pixels, "patch_coord": coord, "patch_valid": valid})
        return {"output": output}

    return agree(vit, model.blocks, call, model.num_prefix_tokens)


def siglip2(model):
    """A call of transformers' vision tower."""

    def call(pixels, grid):
        _, valid = coordinates(grid)
        shapes = torch.from_numpy(grid).long()
        found = model(pixel_values=pixels, pixel_attention_mask=valid.int(), spatial_shapes=shapes)
        return {"output": found.pooler_output, "pooled": found.pooler_output}

    return call


@pytest.mark.parametrize("name", CASES)
def test_from_timm(name, folders, record):
    """At their native sizes, and at one size, with timm's own preprocessing."""
    model, folder = model_of(name), folders(name)
    vit = load(folder, max_patches=MOST)
    assert not set(vit.report.assumed) - {"labels"}, vit.report.assumed
    record(CASES[name][0], f"timm {timm.__version__}", "native", agrees_with_timm(vit, model))

    for picture in PICTURES:
        resized = ResizeToSequence(16, MOST, interpolation="bicubic")(picture)
        pixels = np.asarray(resized, np.float32)
        mean, std = (np.float32(model.pretrained_cfg[each]) for each in ("mean", "std"))
        wanted = (pixels / 255 - mean) / std
        np.testing.assert_allclose(vit.preprocess(picture), wanted, atol=1e-5)
        cut = Patchify(16)(torch.from_numpy(wanted.transpose(2, 0, 1).copy()))["patches"]
        packed = native.packed([wanted], vit.config)
        np.testing.assert_array_equal(packed.pixels[0, : len(cut)], cut)


@pytest.mark.parametrize("name", CASES)
def test_one_size(name, folders, record):
    model = model_of(name)
    for size in (None, (48, 112)):
        vit = load(folders(name), image_size=size)
        x = np.random.default_rng(0).normal(size=(1, *vit.config.image_size, 3))
        with torch.no_grad():
            wanted = model(torch.from_numpy(x.astype(np.float32).transpose(0, 3, 1, 2).copy()))
        worst = error(vit.model(x.astype(np.float32)), wanted.numpy())
        assert worst < TOLERANCE
        record(CASES[name][0], f"timm {timm.__version__}", "of one size", worst)


@pytest.mark.parametrize("name", CASES)
def test_written_for_timm(name, folders, record, tmp_path):
    model = model_of(name)
    vit = load(folders(name), max_patches=MOST)
    vit_jax.save(vit, tmp_path, format="timm")
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    same_tensors(back.state_dict(), model.state_dict())
    worst = agrees_with_timm(vit, back)
    record(CASES[name][0], f"timm {timm.__version__}", "written for timm", worst)
    again = load(tmp_path / "model.safetensors", max_patches=MOST)
    assert_same_models(again, vit)


@pytest.mark.parametrize("method", ["zoom", "bilinear", "bicubic_antialias_aspect"])
def test_our_own_written_for_timm(method, record, tmp_path):
    """A class token with a position, whose row is added to it, and every way to resize."""
    model = vit_jax.create(
        "Ti/16", image_size=(64, 80), width=48, depth=2, mlp_dim=96, num_heads=3, num_classes=5
    )
    vit_jax.save(model, tmp_path / "own.safetensors")
    vit = vit_jax.load(tmp_path / "own.safetensors", max_patches=MOST, position_resize=method)
    vit_jax.save(vit, tmp_path / "timm", format="timm")
    back = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        weight = torch.randn(back.head.weight.shape, generator=torch.manual_seed(0))
        back.head.weight.copy_(weight)
    vit.model.head.kernel[...] = weight.numpy().T
    record("ViT at native sizes", "timm NaFlexVit", method, agrees_with_timm(vit, back))


@pytest.mark.parametrize("tower", [False, True])
def test_siglip2_of_transformers(tower, record, tmp_path):
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3)
    sizes |= dict(num_patches=25, patch_size=16)
    if tower:
        text = sizes | dict(vocab_size=99, projection_size=48)
        del text["num_patches"], text["patch_size"]
        config = transformers.Siglip2Config(vision_config=sizes, text_config=text)
        whole = randomise(transformers.Siglip2Model(config))
        model = whole.vision_model
    else:
        whole = model = randomise(
            transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes))
        )
    whole.save_pretrained(tmp_path)
    vit = load(tmp_path, max_patches=MOST)
    assert vit.config.native_resize == "bilinear_antialias" and vit.config.gelu == "tanh"

    family, reference = "SigLIP 2 NaFlex", f"transformers {transformers.__version__}"
    record(family, reference, "native", agree(vit, model.encoder.layers, siglip2(model)))
    vit_jax.save(vit, tmp_path / "back", format="hf")
    back = transformers.Siglip2VisionModel.from_pretrained(tmp_path / "back").eval()
    same_tensors(back.state_dict(), model.state_dict())
    record(family, reference, "written", agree(vit, back.encoder.layers, siglip2(back)))
    assert_same_models(load(tmp_path / "back", max_patches=MOST), vit)


def test_a_file_alone_has_to_be_named(tmp_path):
    path = save(model_of("par"), tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match=r"naflexvit\.py, whose way to resize.*architecture="):
        load(path)
    vit = load(path, architecture="naflexvit_base_patch16_par_gap.some_tag", num_heads=3)
    assert vit.config.native_resize == "bicubic_antialias_aspect"


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(rope_type="axial"), "rope_type='axial' may change"),
        (dict(pos_embed_use_grid_sample=True), "pos_embed_use_grid_sample=True may change"),
        (dict(pos_embed_interp_mode="nearest"), "pos_embed_interp_mode='nearest'"),
        (
            dict(pos_embed="factorized", pos_embed_ar_preserving=True, pos_embed_grid_size=(4, 6)),
            "only square ones",
        ),
    ],
)
def test_what_is_not_held_is_refused(changes, reason, tmp_path):
    model = timm.create_model("naflexvit_base_patch16_gap", **SMALL | changes)
    save(model, tmp_path / "model.safetensors")
    config = {"architecture": "naflexvit_base_patch16_gap", "model_args": SMALL | changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=reason):
        load(tmp_path)
