"""DINOv2's own release: its names, against those of the same weights in transformers."""

import numpy as np
import pytest
from conftest import fails
from safetensors.numpy import save_file

import vit_jax
from vit_jax.checkpoints.opened import open_model

D, MLP, DEPTH, PATCH, GRID = 64, 48, 3, 14, 4
# A part of a name in transformers -> in the release; kernels of Q, K and V are joined.
NAMES = {
    "encoder.layer.": "blocks.",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "weights_in": "w12",
    "weights_out": "w3",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.": "",
    "layernorm": "norm",
}


def layer(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def transformers_of(registers, gated):
    """Random arrays under the names of transformers' DINOv2."""
    shapes = layer("layernorm", 1, D) | {"layernorm.weight": (D,)}
    shapes |= {"embeddings.cls_token": (1, 1, D), "embeddings.mask_token": (1, D)}
    shapes |= {"embeddings.position_embeddings": (1, 1 + GRID**2, D)}
    shapes |= {"embeddings.patch_embeddings.projection.weight": (D, 3, PATCH, PATCH)}
    shapes |= {"embeddings.patch_embeddings.projection.bias": (D,)}
    shapes |= {"embeddings.register_tokens": (1, 4, D)} if registers else {}
    for i in range(DEPTH):
        block = {f"norm{n}.{leaf}": (D,) for n in (1, 2) for leaf in ("weight", "bias")}
        block |= {f"layer_scale{n}.lambda1": (D,) for n in (1, 2)}
        for part in ("attention.query", "attention.key", "attention.value", "output.dense"):
            block |= layer(f"attention.{part}", D, D)
        first, last = ("weights_in", "weights_out") if gated else ("fc1", "fc2")
        block |= layer(f"mlp.{first}", D, 2 * MLP if gated else MLP)
        block |= layer(f"mlp.{last}", MLP, D)
        shapes |= {f"encoder.layer.{i}.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def released(arrays, chunks=None):
    """The same under the names of the release; in `chunks`, blocks keep their own numbers."""
    found, names = {}, ("query", "key", "value")
    for name, value in arrays.items():
        if "attention.attention.query" in name:
            value = np.concatenate([arrays[name.replace("query", part)] for part in names])
            name = name.replace("attention.attention.query", "attn.qkv")
        elif "attention.attention." in name:
            continue
        for theirs, own in NAMES.items():
            name = name.replace(theirs, own)
        if chunks and name.startswith("blocks."):
            number = int(name.split(".")[1])
            name = name.replace("blocks.", f"blocks.{number // chunks}.", 1)
        found[name] = value
    return found


@pytest.mark.parametrize(
    "registers, gated, chunks",
    [(False, False, None), (True, False, None), (True, True, None), (False, True, 2)],
)
def test_the_release_is_the_model_that_transformers_has(registers, gated, chunks, tmp_path):
    arrays = transformers_of(registers, gated)
    save_file(arrays, tmp_path / "hf.safetensors")
    theirs = open_model(tmp_path / "hf.safetensors")
    own = released(arrays, chunks)
    assert ("blocks.1.2.norm1.bias" in own) == (chunks is not None)
    save_file(own, tmp_path / "dinov2.safetensors")
    opened = open_model(tmp_path / "dinov2.safetensors")
    assert opened.facts["file"].startswith("dinov2, ")
    assert opened.card == theirs.card
    vit = opened.card.config
    assert (vit.registers, vit.mlp) == (4 * registers, "swiglu" if gated else "gelu")
    assert (vit.layernorm_eps, vit.image_size) == (1e-6, (56, 56))
    assert gated or vit.gelu == "erf"
    assert "position_prefix" not in opened.assumed
    assert opened.card.position_resize == ("bicubic_antialias" if registers else "bicubic")
    assert list(opened.leftover) == ["mask_token"] and sorted(opened.shapes) == sorted(
        theirs.shapes
    )
    for name in theirs.shapes:
        np.testing.assert_array_equal(opened.read(name), theirs.read(name), err_msg=name)


def test_of_a_training_checkpoint_the_backbone_is_chosen(tmp_path, capsys):
    arrays = released(transformers_of(True, False))
    whole = {f"teacher.backbone.{name}": value for name, value in arrays.items()}
    whole |= {"teacher.dino_head.last_layer.weight": np.zeros((4, 4), np.float32)}
    path = tmp_path / "teacher.safetensors"
    save_file(whole, path)
    said = fails(capsys, "inspect", path)
    assert "choose the model by only='teacher.backbone.*'" in said
    vit = vit_jax.load(path, only="teacher.backbone.*")
    np.testing.assert_array_equal(vit.model.registers[...], arrays["register_tokens"])
    said = fails(capsys, "inspect", path, "--only=teacher.backbone.*", "--set=architecture=x")
    assert "dinov2's code alone decides" in said
    del arrays["blocks.1.ls1.gamma"]
    save_file(arrays, path)
    assert "the key blocks.1.ls1.gamma" in fails(capsys, "inspect", path)
