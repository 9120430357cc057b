"""Weights under the names of timm's eva.py and of transformers' DINOv3, written down from both."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import vit_jax
from vit_jax.errors import UserError
from vit_jax.models.rotary import Rotary

D, MLP, HEADS, DEPTH, PATCH, CLASSES = 16, 12, 2, 2, 4, 5
IMAGE, GRID = 8, 4  # patches in all
TIMM = dict(num_classes=CLASSES, model_args=dict(img_size=IMAGE, num_heads=HEADS))
HF = dict(hidden_size=D, num_attention_heads=HEADS, image_size=IMAGE, model_type="dinov3_vit")


def draw(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def layer(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, size=D):
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def timm(block, rest):
    """The arrays of a file: those of each block, and what all models have."""
    shapes = {
        "cls_token": (1, 1, D),
        "patch_embed.proj.weight": (D, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (D,),
        **layer("head", D, CLASSES),
        **rest,
    }
    every = norm("norm1") | norm("norm2") | layer("attn.proj", D, D) | layer("mlp.fc2", MLP, D)
    for i in range(DEPTH):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in (every | block).items()}
    return draw(shapes)


SCALES = {"gamma_1": (D,), "gamma_2": (D,)}
APART = {f"attn.{name}_proj.weight": (D, D) for name in "qkv"}
APART |= {"attn.q_proj.bias": (D,), "attn.v_proj.bias": (D,)}
FUSED = {"attn.qkv.weight": (3 * D, D)}
TWO = {"attn.q_bias": (D,), "attn.v_bias": (D,)}
GATE = layer("mlp.fc1_g", D, MLP) | layer("mlp.fc1_x", D, MLP)
FILES = {
    "vit_small_plus_patch16_dinov3_qkvb": timm(
        FUSED | TWO | GATE | SCALES, norm("norm") | {"reg_token": (1, 4, D)}
    ),
    "vit_base_patch16_dinov3": timm(
        FUSED | SCALES | layer("mlp.fc1", D, MLP), norm("norm") | {"reg_token": (1, 4, D)}
    ),
    "eva02_tiny_patch14_224": timm(
        FUSED | TWO | layer("mlp.fc1", D, 2 * MLP),
        norm("fc_norm") | {"pos_embed": (1, 1 + GRID, D)},
    ),
    "eva02_base_patch16_clip_224": timm(
        APART | GATE | norm("mlp.norm", MLP) | norm("attn.norm"),
        norm("norm") | {"pos_embed": (1, 1 + GRID, D)},
    ),
    "eva_giant_patch14_224": timm(
        FUSED | TWO | layer("mlp.fc1", D, MLP),
        norm("fc_norm") | {"pos_embed": (1, 1 + GRID, D)},
    ),
    "vit_small_patch16_rope_224": timm(
        layer("attn.qkv", D, 3 * D) | SCALES | layer("mlp.fc1", D, MLP), norm("norm")
    ),
}


def put(folder, arrays, config=None):
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder if config is not None else folder / "model.safetensors")


def heads(kernel):
    """One projection [out in] as ours, [in heads head_dim]."""
    return kernel.T.reshape(D, HEADS, D // HEADS)


@pytest.mark.parametrize("name", FILES)
def test_read_and_written_back(name, tmp_path):
    arrays = FILES[name]
    vit = vit_jax.load(put(tmp_path / "in", arrays, TIMM | {"architecture": f"{name}.tag"}))
    assert "architecture" not in vit.report.assumed
    blocks = nnx.to_pure_dict(nnx.state(vit.model))["blocks"]
    for i in range(DEPTH):
        block = {k.removeprefix(f"blocks.{i}."): v for k, v in arrays.items()}
        parts = [block.get(f"attn.{part}_proj.weight") for part in "qkv"]
        if "attn.qkv.weight" in block:
            parts = np.split(block["attn.qkv.weight"], 3)
        kernel = np.stack([heads(part) for part in parts], axis=1)
        np.testing.assert_array_equal(blocks["attention"]["qkv"]["kernel"][i], kernel)
        ends = [f"attn.{p}{end}" for p in "qv" for end in ("_bias", "_proj.bias")]
        biases = [block[end].reshape(HEADS, -1) for end in ends if end in block]
        if biases:  # of queries and values
            np.testing.assert_array_equal(blocks["attention"]["qkv"]["bias"][i], biases)
            assert not vit.config.key_bias
        if "mlp.fc1_g.weight" in block:
            both = np.concatenate([block["mlp.fc1_g.weight"], block["mlp.fc1_x.weight"]])
            np.testing.assert_array_equal(blocks["mlp"]["fc1"]["kernel"][i], both.T)
    for path in ("out.safetensors", "folder"):
        vit_jax.save(vit, str(tmp_path / path), format="timm")
    for written in ("out.safetensors", "folder/model.safetensors"):
        found = load_file(tmp_path / written)
        assert found.keys() == arrays.keys()
        for key, value in arrays.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)
    (tmp_path / "folder" / "model.safetensors").unlink()
    assert vit_jax.load(put(tmp_path / "folder", arrays, told(tmp_path))).config == vit.config


def told(tmp_path):
    return json.loads((tmp_path / "folder" / "config.json").read_text())


EVA02 = Rotary("index", 10_000.0, reference=(16, 16), layout="pairs")


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "vit_small_plus_patch16_dinov3_qkvb",
            dict(rotary=Rotary(), position="rope", pool="gap", registers=4, mlp="swiglu")
            | dict(class_token=True, norm_after_pool=False, layernorm_eps=1e-5, mlp_dim=MLP),
        ),
        (
            "eva02_tiny_patch14_224",
            dict(rotary=EVA02, position="learned", pool="gap", mlp="swiglu", mlp_norm=False)
            | dict(norm_after_pool=True, layernorm_eps=1e-6, mlp_dim=MLP),
        ),
        (
            "eva02_base_patch16_clip_224",
            dict(rotary=EVA02, pool="token", mlp_norm=True, attention_norm=True, mlp_dim=MLP),
        ),
        ("eva_giant_patch14_224", dict(rotary=None, position="learned", key_bias=False)),
        (
            "vit_small_patch16_rope_224",
            dict(rotary=Rotary("index", axes="xy", layout="pairs"), pool="token", key_bias=True),
        ),
    ],
)
def test_the_name_says_what_no_key_shows(name, expected, tmp_path):
    """Alone, the file is refused; with its name, the model is whole."""
    path = put(tmp_path, FILES[name])
    with pytest.raises(UserError, match=r"eva\.py, whose rotary positions no key shows: say which"):
        vit_jax.load(path)
    config = vit_jax.load(path, architecture=name, num_heads=HEADS, image_size=IMAGE).config
    assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(architecture="vit_my_rope_224"), "which is not known"),
        (dict(architecture="vit_base_patch16_sapiens2"), "norm1.bias .* belongs to no part"),
        (
            dict(architecture="eva_giant_patch14_224", model_args=dict(rope_type="dinov3")),
            "rope_type='dinov3' may change what is computed",
        ),
    ],
    ids=str,
)
def test_other_models_of_eva_are_refused(config, message, tmp_path):
    with pytest.raises(UserError, match=message):
        vit_jax.load(put(tmp_path, FILES["eva_giant_patch14_224"], TIMM | config))


def dinov3(start, gated):
    """transformers' names; on the hub, layers are not under `model.`."""
    shapes = {"embeddings.cls_token": (1, 1, D), "embeddings.register_tokens": (1, 4, D)}
    shapes |= {"embeddings.mask_token": (1, 1, D), **norm("norm")}
    shapes |= {
        "embeddings.patch_embeddings.weight": (D, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.bias": (D,),
    }
    block = norm("norm1") | norm("norm2") | layer("attention.o_proj", D, D)
    block |= {f"attention.{part}_proj.weight": (D, D) for part in "qkv"}
    block |= {"attention.q_proj.bias": (D,), "attention.v_proj.bias": (D,)}
    block |= {"layer_scale1.lambda1": (D,), "layer_scale2.lambda1": (D,)}
    block |= layer("mlp.up_proj", D, MLP) | layer("mlp.down_proj", MLP, D)
    block |= layer("mlp.gate_proj", D, MLP) if gated else {}
    for i in range(DEPTH):
        shapes |= {f"{start}layer.{i}.{name}": shape for name, shape in block.items()}
    return draw(shapes)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("start", ["", "model."])
def test_dinov3_of_transformers(start, gated, tmp_path):
    arrays = dinov3(start, gated)
    config = HF | dict(use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", rope_theta=50)
    vit = vit_jax.load(put(tmp_path / "in", arrays, config))
    assert vit.config.rotary == Rotary(base=50.0) and vit.config.position == "rope"
    assert (vit.config.pool, vit.config.layernorm_eps) == ("token", 1e-5)
    blocks = nnx.to_pure_dict(nnx.state(vit.model))["blocks"]
    names = ("gate_proj", "up_proj") if gated else ("up_proj",)
    fc1 = np.concatenate([arrays[f"{start}layer.1.mlp.{name}.weight"] for name in names])
    np.testing.assert_array_equal(blocks["mlp"]["fc1"]["kernel"][1], fc1.T)
    biases = [arrays[f"{start}layer.1.attention.{part}_proj.bias"] for part in "qv"]
    np.testing.assert_array_equal(
        blocks["attention"]["qkv"]["bias"][1], np.stack(biases).reshape(2, HEADS, -1)
    )
    vit_jax.save(vit, str(tmp_path / "out"), format="hf")
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = {k.removeprefix("model."): v for k, v in arrays.items() if "mask_token" not in k}
    assert found.keys() == wanted.keys()
    assert all((found[key] == value).all() for key, value in wanted.items())
    assert vit_jax.load(str(tmp_path / "out")).config == vit.config
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "DINOv3ViTImageProcessor"
    assert vit_jax.load(str(tmp_path / "out")).preprocess.resize_dtype == "float32"


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_what_only_training_does_to_places_is_not_in_the_files_of_others(format, tmp_path):
    fields = dict(position="rope", registers=4, layer_scale=1e-5, layernorm_eps=1e-5, gelu="erf")
    fields |= dict(key_bias=False, width=D, num_heads=HEADS, mlp_dim=MLP, depth=1, image_size=32)
    model = vit_jax.create("S/16", **fields, num_classes=0, rotary=Rotary(rescale=2.0, shift=0.5))
    vit_jax.save(model, str(tmp_path / "out"), format=format)
    assert vit_jax.load(str(tmp_path / "out")).config == model.config  # our own metadata is beside
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    bare = vit_jax.load(put(tmp_path / "bare", arrays, told)).config
    assert dataclasses.replace(model.config, rotary=Rotary()) == bare


def test_what_others_cannot_hold_is_refused(tmp_path):
    name = "eva02_base_patch16_clip_224"
    vit = vit_jax.load(put(tmp_path / "in", FILES[name], TIMM | {"architecture": name}))
    for format, ending in (("google", "npz"), ("big_vision", "npz"), ("hf", "safetensors")):
        with pytest.raises(UserError, match=rf"{format} has no models with model\."):
            vit_jax.save(vit, str(tmp_path / f"x.{ending}"), format=format)
    rotary = Rotary(base=7.0)
    model = vit_jax.create(vit.config, seed=1, rotary=rotary)
    with pytest.raises(UserError, match=r"timm has no models with model\.rotary=Rotary\(.*7\.0"):
        vit_jax.save(model, str(tmp_path / "x.safetensors"), format="timm")
    vit_jax.save(model, str(tmp_path / "x.safetensors"))
    assert vit_jax.load(str(tmp_path / "x.safetensors")).config == model.config
