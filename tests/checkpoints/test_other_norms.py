"""Files of AIMv2, InternVL's vision tower and Sapiens 2, by the names of their code."""

import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import vit_jax
from tests.checkpoints.test_eva import (
    DEPTH,
    GRID,
    HEADS,
    IMAGE,
    MLP,
    PATCH,
    D,
    draw,
    heads,
    layer,
    norm,
    put,
)
from vit_jax.errors import UserError
from vit_jax.models.rotary import Rotary

SIZES = dict(hidden_size=D, num_attention_heads=HEADS, image_size=IMAGE, num_hidden_layers=DEPTH)
GATE = {f"mlp.fc1_{part}.weight": (MLP, D) for part in "gx"}


def rms(*names):
    return {f"{name}.weight": (D,) for name in names}


def file(start, block, rest):
    """The arrays of a file, with `start` before those of each block."""
    every = {f"{start}.{i}.{name}": shape for i in range(DEPTH) for name, shape in block.items()}
    return draw(rest | every)


def patches(name):
    return {f"{name}.weight": (D, 3, PATCH, PATCH), f"{name}.bias": (D,)}


def apart(names, sizes=(D, D, D), biases=False):
    shapes = {f"{name}.weight": (n, D) for name, n in zip(names, sizes, strict=True)}
    if biases:
        shapes |= {f"{name}.bias": (n,) for name, n in zip(names, sizes, strict=True)}
    return shapes


AIMV2 = file(
    "blocks",
    rms("norm1", "norm2")
    | GATE
    | {"attn.qkv.weight": (3 * D, D), "attn.proj.weight": (D, D), "mlp.fc2.weight": (D, MLP)},
    patches("patch_embed.proj") | rms("patch_embed.norm", "norm") | {"pos_embed": (1, GRID, D)},
)
HF_AIMV2 = file(
    "encoder.layers",
    rms("rms_norm1", "rms_norm2")
    | apart([f"attention.{part}_proj" for part in ("q", "k", "v", "out")], (D,) * 4)
    | {f"ffn.{part}_proj.weight": (MLP, D) for part in ("gate", "up")}
    | {"ffn.down_proj.weight": (D, MLP)},
    patches("embeddings.patch_embed")
    | rms("embeddings.rms_norm", "rms_norm")
    | {"embeddings.position_embedding.weight": (GRID, D)},
)
INTERN = file(
    "encoder.layer",
    rms("layernorm_before", "layernorm_after", "attention.q_norm", "attention.k_norm")
    | apart([f"attention.{part}_proj" for part in "qkv"])
    | layer("attention.projection_layer", D, D)
    | layer("mlp.fc1", D, MLP)
    | layer("mlp.fc2", MLP, D)
    | {"lambda_1": (D,), "lambda_2": (D,)},
    patches("embeddings.patch_embeddings.projection")
    | {"embeddings.cls_token": (1, 1, D), "embeddings.position_embeddings": (1, 1 + GRID, D)},
)
SAPIENS = file(
    "blocks",
    rms("ln1", "ln2")
    | apart([f"attn.w{part}" for part in "qkv"], biases=True)
    | {f"attn.{part}_norm.weight": (D // HEADS,) for part in "qk"}
    | layer("attn.proj", D, D)
    | {"attn.gamma.weight": (D,)}
    | layer("ffn.w12", D, 2 * MLP)
    | layer("ffn.w3", MLP, D),
    patches("patch_embed.projection")
    | rms("ln1")
    | {"cls_token": (1, 1, D), "storage_tokens": (1, 3, D)},
)
ARGS = dict(img_size=IMAGE, num_heads=HEADS)
FILES = {
    "aimv2": (
        "timm",
        AIMV2,
        dict(architecture="aimv2_large_patch14_224.apple_pt", num_classes=0, model_args=ARGS),
        dict(norm="rmsnorm", patch_norm=True, proj_bias=False, qkv_bias=False, pool="gap")
        | dict(mlp="swiglu", layernorm_eps=1e-5, norm_after_pool=False),
    ),
    "aimv2 of transformers": (
        "hf",
        HF_AIMV2,
        SIZES | dict(model_type="aimv2_vision_model", use_head=False, rms_norm_eps=1e-4),
        dict(norm="rmsnorm", patch_norm=True, proj_bias=False, qkv_bias=False, pool="gap")
        | dict(mlp="swiglu", layernorm_eps=1e-4),
    ),
    "internvl": (
        "hf",
        INTERN,
        SIZES | dict(model_type="internvl_vision", norm_type="rms_norm", use_qk_norm=True),
        dict(norm="rmsnorm", qk_norm="all", final_norm=False, pool="gap", class_token=True),
    ),
    "sapiens2": (
        "hf",
        SAPIENS,
        SIZES | dict(model_type="sapiens2", rms_norm_eps=1e-6, rope_theta=50.0),
        dict(norm="rmsnorm", qk_norm="head", mlp_scale=False, rotary=Rotary(base=50.0))
        | dict(pool="token", registers=3, mlp="swiglu"),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_read_and_written_back(name, tmp_path):
    format, arrays, config, expected = FILES[name]
    vit = vit_jax.load(put(tmp_path / "in", arrays, config))
    assert {field: getattr(vit.config, field) for field in expected} == expected
    assert not {"architecture", "norm"} & set(vit.report.assumed)
    assert ("queries and keys" in vit.report.facts.get("blocks", "")) == ("qk_norm" in expected)
    assert "RMSNorm eps" in vit.report.facts["GELU"]
    vit_jax.save(vit, str(tmp_path / "out"), format=format)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    again = vit_jax.load(str(tmp_path / "out"))
    assert again.config == vit.config and again.preprocess.image_size == (IMAGE, IMAGE)


def test_shared_keys_and_values_are_repeated(tmp_path):
    """Four heads of queries in the second block, two of keys and values: 0, 0, 1, 1."""
    arrays, size = dict(SAPIENS), D // 4
    config = FILES["sapiens2"][2] | dict(num_attention_heads=4)
    for i in range(DEPTH):
        for part in "qk":
            key = f"blocks.{i}.attn.{part}_norm.weight"
            arrays[key] = arrays[key][:size]
    for part in "kv":
        for leaf in ("weight", "bias"):
            key = f"blocks.1.attn.w{part}.{leaf}"
            arrays[key] = arrays[key][: 2 * size]
    vit = vit_jax.load(put(tmp_path, arrays, config))
    assert "repeated" in vit.report.assumed["keys and values"]
    qkv = nnx.to_pure_dict(nnx.state(vit.model))["blocks"]["attention"]["qkv"]
    key, value = arrays["blocks.1.attn.wk.weight"], arrays["blocks.1.attn.wv.bias"]
    for head, shared in enumerate((0, 0, 1, 1)):
        rows = slice(shared * size, (shared + 1) * size)
        np.testing.assert_array_equal(qkv["kernel"][1][:, 1, head], key[rows].T)
        np.testing.assert_array_equal(qkv["bias"][1][2, head], value[rows])
    whole = arrays["blocks.0.attn.wk.weight"].T.reshape(D, 4, size)
    np.testing.assert_array_equal(qkv["kernel"][0][:, 1], whole)
    arrays["blocks.1.attn.wk.weight"] = key[: size // 2]  # half a head
    with pytest.raises(UserError, match=r"blocks.1.attn.wk.weight has the shape \[2, 16\]"):
        vit_jax.load(put(tmp_path, arrays, config))


def test_a_bare_file_says_what_is_assumed(tmp_path):
    vit = vit_jax.load(put(tmp_path, HF_AIMV2), num_heads=HEADS)
    assert vit.report.assumed["norm"] == "rmsnorm as its norms have no bias"
    assert vit.config.layernorm_eps == 1e-5


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("aimv2 of transformers", dict(use_head=True), "use_head is true, and there is no such"),
        ("aimv2 of transformers", dict(is_native=True), "is_native is true"),
        ("internvl", dict(norm_type="batch"), "norm_type 'batch'; expected 'layer_norm' or"),
        ("internvl", dict(use_mean_pooling=False), "one kind for all"),
        ("internvl", dict(layer_norm_eps=1e-5), "epsilon 1e-6, so"),
        ("sapiens2", dict(use_gated_mlp=False), "a Sapiens 2 with 'no gate'; expected a gate"),
        ("aimv2", dict(architecture="vit_giant_patch14_dinov2"), "missing|belongs to no part"),
        ("aimv2", dict(model_args=ARGS | dict(norm_layer="simplenorm")), "'simplenorm' may change"),
    ],
)
def test_what_computes_otherwise_is_refused(name, changes, message, tmp_path):
    _, arrays, config, _ = FILES[name]
    with pytest.raises(UserError, match=message):
        vit_jax.load(put(tmp_path, arrays, config | changes))


def test_norms_behind_the_branches_are_named_by_no_key(tmp_path):
    """As a plain file, its name alone makes it another model; timm alone can hold it."""
    block = norm("norm1") | norm("norm2") | layer("attn.proj", D, D)
    block |= layer("mlp.fc1", D, MLP) | layer("mlp.fc2", MLP, D) | {"attn.qkv.weight": (3 * D, D)}
    rest = patches("patch_embed.proj") | norm("fc_norm") | {"pos_embed": (1, GRID, D)}
    arrays = file("blocks", block, rest | layer("head", D, 5))
    config = dict(architecture="vit_base_patch16_rpn_224", num_classes=5, model_args=ARGS)
    vit = vit_jax.load(put(tmp_path / "in", arrays, config))
    assert vit.config.norm_after_branch and vit.config.norm_after_pool
    for format, ending in (("google", "npz"), ("big_vision", "npz"), ("hf", "safetensors")):
        with pytest.raises(UserError, match=rf"{format} has no models with model\."):
            vit_jax.save(vit, str(tmp_path / f"x.{ending}"), format=format)
    vit_jax.save(vit, str(tmp_path / "out"), format="timm")
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["architecture"] == "vit_base_patch16_rpn_224"
    assert vit_jax.load(str(tmp_path / "out")).config == vit.config


@pytest.mark.parametrize("fused", [False, True])
def test_joint_arrays_of_parallel_blocks(fused, tmp_path):
    """The MLP's rows of in_proj are first; of out_proj, the columns of the attention."""
    block = norm("in_norm") | layer("in_proj", D, MLP + 3 * D) | {"ls.gamma": (D,)}
    name = "vit_pwee_patch16_reg1_gap_256"
    if fused:
        name = "vit_dpwee_patch16_reg1_gap_256"
        block |= layer("out_proj", D + MLP, D) | {"sub_norm.weight": (D // HEADS,)}
        block |= {f"lambda_{part}": (D // HEADS // 2,) for part in ("q1", "k1", "q2", "k2")}
    else:
        block |= layer("attn_out_proj", D, D) | layer("mlp_out_proj", MLP, D)
    rest = patches("patch_embed.proj") | norm("fc_norm") | {"pos_embed": (1, GRID, D)}
    arrays = file("blocks", block, rest | {"reg_token": (1, 1, D)})
    config = dict(architecture=name, num_classes=0, model_args=ARGS)
    vit = vit_jax.load(put(tmp_path / "in", arrays, config))
    assert vit.config.parallel and vit.config.differential == fused
    blocks = nnx.to_pure_dict(nnx.state(vit.model))["blocks"]
    assert "norm2" not in blocks and "scale2" not in blocks
    into = arrays["blocks.1.in_proj.weight"]
    np.testing.assert_array_equal(blocks["mlp"]["fc1"]["kernel"][1], into[:MLP].T)
    kernel = np.stack([heads(part) for part in np.split(into[MLP:], 3)], axis=1)
    np.testing.assert_array_equal(blocks["attention"]["qkv"]["kernel"][1], kernel)
    if fused:
        fc2 = arrays["blocks.1.out_proj.weight"][:, D:].T
        np.testing.assert_array_equal(blocks["mlp"]["fc2"]["kernel"][1], fc2)
        np.testing.assert_array_equal(blocks["mlp"]["fc2"]["bias"], 0)
    for path in ("out", "again"):
        vit_jax.save(vit, str(tmp_path / path), format="timm")
        found = load_file(tmp_path / path / "model.safetensors")
        assert found.keys() == arrays.keys()
        for key, value in arrays.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)
        vit = vit_jax.load(str(tmp_path / path))
    short = dict(arrays) | {"blocks.1.in_proj.weight": into[:-1]}
    with pytest.raises(UserError, match=r"blocks.1.in_proj.weight:\w+ has the shape"):
        vit_jax.load(put(tmp_path / "short", short, config))
