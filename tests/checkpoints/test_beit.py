"""Weights of models with a position bias, under names written down from timm and transformers."""

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from test_eva import (
    CLASSES,
    DEPTH,
    FUSED,
    GRID,
    HEADS,
    IMAGE,
    MLP,
    SCALES,
    TWO,
    D,
    draw,
    layer,
    norm,
    put,
    timm,
)

import vit_jax
from vit_jax.checkpoints.card import typed_config
from vit_jax.checkpoints.opened import open_model
from vit_jax.errors import UserError
from vit_jax.models.relative import RelativeBias

OFFSETS = 3 * 3  # of 2 x 2 patches
TABLE = (OFFSETS + 3, HEADS)
FC1 = layer("mlp.fc1", D, MLP)
QKV = layer("attn.qkv", D, 3 * D)
LS = {"ls1.gamma": (D,), "ls2.gamma": (D,)}
RELPOS = layer("attn.rel_pos.mlp.fc1", 2, 6) | layer("attn.rel_pos.mlp.fc2", 6, HEADS)
SHARED = layer("shared_rel_pos.mlp.fc1", 2, 6) | {"shared_rel_pos.mlp.fc2.weight": (HEADS, 6)}
TOKEN = {"cls_token": (1, 1, D)}
MLP_BIAS = RelativeBias("mlp", hidden=6)
# The name, its arrays, and what its model is; one file a row of what timm has.
FILES = {
    "beit_base_patch16_224": (
        timm(
            FUSED | TWO | FC1 | SCALES | {"attn.relative_position_bias_table": TABLE},
            norm("fc_norm"),
        ),
        dict(relative_bias=RelativeBias(), pool="gap", key_bias=False, layer_scale=1e-5),
    ),
    "beit_large_patch16_224": (
        timm(
            FUSED | TWO | FC1 | SCALES,
            norm("norm")
            | {"rel_pos_bias.relative_position_bias_table": TABLE, "pos_embed": (1, 1 + GRID, D)},
        ),
        dict(relative_bias=RelativeBias(shared=True), pool="gap", position="learned"),
    ),
    "vit_relpos_base_patch16_clsgap_224": (
        timm(QKV | FC1 | LS | RELPOS, norm("fc_norm")),
        dict(relative_bias=MLP_BIAS, pool="gap", norm_after_branch=False, norm_after_pool=True),
    ),
    "vit_relpos_medium_patch16_cls_224": (
        timm(QKV | FC1 | LS, norm("norm") | SHARED),
        dict(relative_bias=RelativeBias("mlp", True, 6, "swin"), pool="token"),
    ),
    "vit_relpos_medium_patch16_rpn_224": (
        timm(QKV | FC1 | {"attn.rel_pos.relative_position_bias_table": TABLE}, norm("norm")),
        dict(relative_bias=RelativeBias(), pool="gap", norm_after_branch=True, layer_scale=None),
    ),
    "beit3_base_patch16_224": (
        timm(
            QKV | FC1 | norm("attn.norm") | norm("mlp.norm", MLP),
            norm("fc_norm") | {"pos_embed": (1, 1 + GRID, D)},
        ),
        dict(relative_bias=None, layernorm_eps=1e-5, attention_norm=True, mlp_norm=True),
    ),
}
CONFIG = dict(num_classes=CLASSES, model_args=dict(img_size=IMAGE, num_heads=HEADS))


def parameters(vit):
    return nnx.to_pure_dict(nnx.state(vit.model))


@pytest.mark.parametrize("name", FILES)
def test_read_and_written_back(name, tmp_path):
    arrays, fields = FILES[name]
    vit = vit_jax.load(put(tmp_path / "in", arrays, CONFIG | {"architecture": name}))
    assert {key: getattr(vit.config, key) for key in fields} == fields
    assert (vit.config.grid, vit.config.num_heads) == ((2, 2), HEADS)
    bias = fields["relative_bias"]
    assert (str(bias) in vit.report.facts["positions"]) == (bias is not None)
    vit_jax.save(vit, str(tmp_path / "out"), format="timm")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == arrays.keys()
    assert all((found[key] == value).all() for key, value in arrays.items())
    again = vit_jax.load(str(tmp_path / "out"))
    assert again.config == vit.config and again.preprocess == vit.preprocess
    for format, ending in (("google", "npz"), ("big_vision", "npz")):
        with pytest.raises(UserError, match=rf"{format} has no models with model\."):
            vit_jax.save(vit, str(tmp_path / f"x.{ending}"), format=format)


def test_where_the_numbers_go(tmp_path):
    arrays, _ = FILES["beit_base_patch16_224"]
    bias = parameters(vit_jax.load(put(tmp_path, arrays)))["blocks"]["attention"]["relative_bias"]
    for i in range(DEPTH):
        name = f"blocks.{i}.attn.relative_position_bias_table"
        np.testing.assert_array_equal(bias["table"][i], arrays[name])
    arrays, _ = FILES["vit_relpos_medium_patch16_cls_224"]
    bias = parameters(vit_jax.load(put(tmp_path, arrays)))["relative_bias"]
    np.testing.assert_array_equal(bias["fc1"]["kernel"], arrays["shared_rel_pos.mlp.fc1.weight"].T)


def test_a_file_alone_says_what_its_keys_show(tmp_path):
    """A table its grid, BEiT's what it is; where norms stand only together with LayerScale."""
    for name in ("beit_base_patch16_224", "vit_relpos_base_patch16_clsgap_224"):
        arrays, fields = FILES[name]
        size = {} if "beit" in name else {"image_size": IMAGE}
        config = open_model(put(tmp_path, arrays), **size).card.config
        assert {key: getattr(config, key) for key in fields} == fields and config.grid == (2, 2)
    arrays, fields = FILES["vit_relpos_medium_patch16_rpn_224"]
    with pytest.raises(UserError, match=r"before or behind each branch.*architecture="):
        open_model(put(tmp_path, arrays))
    config = open_model(put(tmp_path, arrays), norm_after_branch=True).card.config
    assert config.norm_after_branch and config.relative_bias == RelativeBias()
    table = "blocks.{}.attn.relative_position_bias_table"
    oblong = {table.format(i): np.zeros((3 * 5 + 3, HEADS), np.float32) for i in range(DEPTH)}
    path = put(tmp_path, FILES["beit_base_patch16_224"][0] | oblong)
    with pytest.raises(UserError, match="18 offsets is of no square grid: give the image_size"):
        open_model(path)
    assert open_model(path, image_size=(8, 12)).card.config.grid == (2, 3)
    arrays = FILES["beit_base_patch16_224"][0] | draw({"rel_pos_bias." + table[15:]: TABLE})
    with pytest.raises(UserError, match="belongs to no part of a ViT"):  # both kinds at once
        open_model(put(tmp_path, arrays))


def block(i, data2vec):
    """A block's names: those of the hub and of Data2VecVision, or those of transformers 5."""
    if data2vec:
        attention, start = f"encoder.layer.{i}.attention.attention", f"encoder.layer.{i}"
        q, k, v = (f"{attention}.{name}" for name in ("query", "key", "value"))
        out, fc1, fc2 = "attention.output.dense", "intermediate.dense", "output.dense"
        table = f"{attention}.relative_position_bias.relative_position_bias_table"
    else:
        start = f"layers.{i}"
        q, k, v = (f"{start}.attention.{name}_proj" for name in "qkv")
        out, fc1, fc2 = "attention.o_proj", "mlp.fc1", "mlp.fc2"
        table = f"{start}.relative_position_bias.relative_position_bias_table"
    found = layer(q, D, D) | layer(v, D, D) | {f"{k}.weight": (D, D), table: TABLE}
    found |= layer(f"{start}.{out}", D, D) | layer(f"{start}.{fc1}", D, MLP)
    found |= layer(f"{start}.{fc2}", MLP, D) | norm(f"{start}.layernorm_before")
    found |= norm(f"{start}.layernorm_after")
    return found | {f"{start}.lambda_1": (D,), f"{start}.lambda_2": (D,)}


@pytest.mark.parametrize("prefix", ["beit.", "data2vec_vision."])
@pytest.mark.parametrize("old", [False, True])
def test_transformers(prefix, old, tmp_path):
    shapes = {
        "embeddings.cls_token": (1, 1, D),
        "embeddings.mask_token": (1, 1, D),
        **layer("pooler.layernorm", 1, D),
        "embeddings.patch_embeddings.projection.weight": (D, 3, 4, 4),
        "embeddings.patch_embeddings.projection.bias": (D,),
    }
    shapes["pooler.layernorm.weight"] = (D,)
    for i in range(DEPTH):
        shapes |= block(i, old)
    shapes = {prefix + name: shape for name, shape in shapes.items()} | layer("classifier", D, 5)
    arrays = draw(shapes)
    index = "relative_position_bias.relative_position_index"  # as older files have it
    index = f"{prefix}encoder.layer.0.attention.attention.{index}"
    arrays[index] = np.zeros((1 + GRID, 1 + GRID), np.int64)
    kind = prefix.replace("_", "-")[:-1]
    config = dict(model_type=kind, image_size=IMAGE, use_mean_pooling=True, hidden_act="gelu")
    vit = vit_jax.load(put(tmp_path / "in", arrays, config))
    left = {line.name for line in vit.report.lines if line.status == "left over"}
    assert left == {index, f"{prefix}embeddings.mask_token"}
    assert (vit.config.pool, vit.config.norm_after_pool) == ("gap", True)
    assert vit.config.layernorm_eps == 1e-12 and not vit.config.key_bias
    assert vit.config.relative_bias == RelativeBias() and vit.position_resize == "bilinear"
    name = "attention.attention.query.weight" if old else "attention.q_proj.weight"
    name = f"{prefix}{'encoder.layer' if old else 'layers'}.1.{name}"
    kernel = parameters(vit)["blocks"]["attention"]["qkv"]["kernel"][1, :, 0]
    np.testing.assert_array_equal(kernel.reshape(D, D), arrays[name].T)
    vit_jax.save(vit, str(tmp_path / "out"), format="hf")
    found = load_file(tmp_path / "out" / "model.safetensors")
    start = "beit.encoder.layer.1.attention.attention."
    np.testing.assert_array_equal(found[f"{start}query.weight"], arrays[name])
    assert f"{start}relative_position_bias.relative_position_bias_table" in found
    again = vit_jax.load(str(tmp_path / "out"))
    assert again.config == vit.config and again.preprocess == vit.preprocess


@pytest.mark.parametrize("kind", ["beit_base_patch16_224", "vit_relpos_medium_patch16_rpn_224"])
def test_the_index_of_older_files_is_left_over(kind, tmp_path):
    arrays, fields = FILES[kind]
    name = "attn.rel_pos" if "relpos" in kind else "attn"
    index = {f"blocks.0.{name}.relative_position_index": np.zeros((5, 5), np.int64)}
    path = put(tmp_path, arrays | index, CONFIG | {"architecture": kind})
    opened = open_model(path)
    assert set(opened.leftover) == set(index)
    assert opened.card.config.relative_bias == fields["relative_bias"]


def test_odd_values_of_the_section_are_refused_with_a_sentence(as_users_have_it):
    """As they may stand in the record of a model."""
    sizes = dict(width=8, depth=1, mlp_dim=8, num_heads=2, position="relative_bias")
    odd = [None, [], {}, "x", -1, 0, 1.5, [1, 2], {"a": 1}, float("nan")]
    sections = [
        {key: value} for value in odd for key in ("kind", "shared", "hidden", "coordinates")
    ]
    for section in (*sections, *(value for value in odd if value not in (None, {}))):
        with pytest.raises(UserError, match=r"model\.relative_bias.* is .*(: known:|; expected) "):
            typed_config({**sizes, "relative_bias": section})
    for section in (None, {}, {"kind": "mlp", "hidden": 3}):
        config = typed_config({**sizes, "relative_bias": section})
        assert config.relative_bias == RelativeBias(**section or {})


def test_resized_by_the_method_of_the_family_or_the_users(tmp_path):
    path = put(tmp_path, FILES["beit_base_patch16_224"][0])
    found = {}
    for method in (None, "geometric", "zoom"):
        vit = vit_jax.load(path, image_size=(16, 12), position_resize=method)
        lines = {line.name: line.status for line in vit.report.lines}
        status = lines["blocks/attention/relative_bias/table"]
        assert status == f"resized 2x2 -> 4x3 ({method or 'geometric'})"
        found[method] = parameters(vit)["blocks"]["attention"]["relative_bias"]["table"]
        assert found[method].shape == (DEPTH, 7 * 5 + 3, HEADS)
    np.testing.assert_array_equal(found[None], found["geometric"])
    assert np.abs(found["zoom"] - found["geometric"]).max() > 0.01
