"""Models of other libraries with random weights, and how far ours is from what they compute."""

import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from flax import nnx
from timm.models import vision_transformer_relpos as relpos
from timm.models._hub import save_config_for_hf

import vit_jax
from vit_jax.checkpoints.convert import interpret
from vit_jax.checkpoints.files import Weights
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.models.relative import RelativeBias
from vit_jax.models.rotary import Rotary

TOLERANCE = 2e-5  # float32 rounding over a few blocks; another GELU is 1e-3 off


def randomise(model, seed=0):
    """Draws every parameter anew, so that no bias, scale or token is a neutral element."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("rope.freqs"):
                noise *= 0.5
            small = ("patch_embed", "pos_embed", "cls_token", "dist_token", "reg_token")
            if any(word in name for word in (*small, "embeddings", "register_tokens")):
                # Tokens of a variance near 1e-3: an epsilon of 1e-5 is 1% of it, not 1e-5.
                noise *= 0.02 / max(noise[0].numel(), 1) ** 0.5 if noise.ndim == 4 else 0.02
            elif noise.ndim == 2:
                noise *= noise.shape[1] ** -0.5
            elif noise.ndim == 1:
                noise = 0.2 * noise + (0 if name.endswith("bias") else 1)
            parameter.copy_(noise)
    return model.eval()


def pixels(config, seed=0):
    """Two images as our model takes them, [b h w c]."""
    shape = (2, *config.image_size, config.in_channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def _program(config):
    graphdef = structure(config)[0]
    capture = (*(("tokens",) if isinstance(config, ViTConfig) else ()), "encoded", "pooled")
    return jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, capture=capture))


def ours(vit):
    """What our model makes of `pixels`: tokens [depth b n d] of a ViT, encoded, pooled, output."""
    output, captured = _program(vit.config)(nnx.state(vit.model), pixels(vit.config))
    return {"output": output, **captured}


def theirs(config, blocks, call):
    """The same of a torch model: its `blocks` are listened to while `call` runs it on [b c h w].

    `call` returns an output, or a dict of outputs by our names.
    """
    tokens = []

    def listen(_module, _inputs, output):
        tokens.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(listen) for block in blocks]
    with torch.no_grad():
        found = call(torch.from_numpy(pixels(config).transpose(0, 3, 1, 2).copy()))
    for handle in handles:
        handle.remove()
    found = found if isinstance(found, dict) else {"output": found}
    found |= {"tokens": torch.stack(tokens)} if len(blocks) else {}
    return {name: value.numpy() for name, value in found.items() if value is not None}


def error(found, expected):
    """max |a - b| / max |b|."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def agree(vit, expected, tolerance=TOLERANCE):
    """The largest relative error of all that is `expected`, block by block; raises above."""
    found = ours(vit)
    errors = {}
    if "tokens" in expected:
        blocks = zip(found["tokens"], expected["tokens"], strict=True)
        errors = {f"block {i}": error(*each) for i, each in enumerate(blocks)}
    errors |= {name: error(found[name], expected[name]) for name in expected if name != "tokens"}
    worst = max(errors.values())
    print("ERR", {k: f"{v:.1e}" for k, v in errors.items()})
    assert worst < tolerance, {name: f"{value:.1e}" for name, value in errors.items()}
    return worst


def same_tensors(found, expected, leave=()):
    """The same keys, but for those that start with `leave`, and bit for bit the same values."""
    expected = {key: value for key, value in expected.items() if not key.startswith(leave)}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def expected_of(model, vit):
    """What a timm model makes of the images of its reference, with every block."""
    return theirs(vit.config, model.blocks, model)


def assert_true(config, model):
    """Our config says what the modules of a timm model are."""
    expected = truth_of_timm(model)
    assert {name: getattr(config, name) for name in expected} == expected


def assert_written_for_others(vit, writes, folder, **known):
    """The formats that hold a model read back as the same; the others are refused by name.

    `known` is what their files alone do not say.
    """
    for format, ending in (("google", "npz"), ("big_vision", "npz"), ("hf", "safetensors")):
        path = folder / f"{format}.{ending}"
        if format in writes:
            vit_jax.save(vit, path, format=format)
            assert_same_models(load(path, **known), vit)
        else:
            with pytest.raises(UserError, match=rf"{format} has no models with model\."):
                vit_jax.save(vit, path, format=format)


def _of_every_kind(model):
    """What all models of timm with a patch embedding say in the same words."""
    return {
        "has_class_token": model.cls_token is not None,
        "num_prefix_tokens": model.num_prefix_tokens,
        "patch_size": tuple(model.patch_embed.patch_size),
        "grid": tuple(model.patch_embed.grid_size),
        "depth": len(model.blocks),
        "norm_after_pool": not isinstance(model.fc_norm, torch.nn.Identity),
        "num_classes": model.num_classes,
    }


def truth_of_timm(model):
    """What a model of timm is, read off its modules, by the names of our config."""
    if isinstance(model, timm.models.eva.Eva):
        return truth_of_eva(model)
    if isinstance(model, (timm.models.beit.Beit, relpos.VisionTransformerRelPos)):
        return truth_of_relative(model)
    if isinstance(model, timm.models.naflexvit.NaFlexVit):
        return truth_of_naflex(model)
    block = model.blocks[0]
    parallel = hasattr(block, "in_proj")  # attention and MLP have no modules of their own
    branches = getattr(block, "num_parallel", 1)
    if branches > 1:
        block = SimpleNamespace(
            attn=block.attns[0].attn, norm1=block.attns[0].norm, mlp=block.ffns[0].mlp
        )
    act = block.mlp_act if parallel else block.mlp.act
    gelus = {"GELU": "erf", "QuickGELU": "quick", "GELUTanh": "tanh", "SiLU": None}
    found = _of_every_kind(model) | {
        "num_heads": (block if parallel else block.attn).num_heads,
        "layernorm_eps": (block.in_norm if parallel else block.norm1).eps,
        "gelu": gelus[type(act).__name__],
        "parallel": parallel,
        "branches": branches,
        "depth": branches * len(model.blocks),
        "pool": {"token": "token", "avg": "gap", "map": "map"}[model.global_pool],
        "registers": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, torch.nn.Identity),
        "norm_after_branch": type(block).__name__ == "ResPostBlock",
    }
    if not parallel and block.attn.__class__.__name__ == "Attention":
        found["attention_norm"] = not isinstance(block.attn.norm, torch.nn.Identity)
        found["mlp_norm"] = not isinstance(block.mlp.norm, torch.nn.Identity)
    if model.pos_embed is not None:
        found["num_position_prefix"] = 0 if model.no_embed_class else model.num_prefix_tokens
    return {name: value for name, value in found.items() if value is not None}


def truth_of_relative(model):
    """The same of a model of timm's beit.py or vision_transformer_relpos.py."""
    block, positions = model.blocks[0], getattr(model, "pos_embed", None)
    found = _of_every_kind(model) | {
        "num_heads": block.attn.num_heads,
        "layernorm_eps": block.norm1.eps,
        "gelu": {"GELU": "erf"}[type(block.mlp.act).__name__],
        "pool": {"token": "token", "avg": "gap"}[model.global_pool],
        "position": "relative_bias" if positions is None else "learned",
        "norm_after_branch": isinstance(block, relpos.ResPostRelPosBlock),
    }
    if isinstance(model, timm.models.beit.Beit):
        shared, own = model.rel_pos_bias, block.attn.relative_position_bias_table
        if (shared, own) == (None, None):
            return found | {"relative_bias": None}
        return found | {"relative_bias": RelativeBias(shared=shared is not None)}
    bias, fields = block.attn.rel_pos or model.shared_rel_pos, {}
    if isinstance(bias, timm.layers.RelPosMlp):
        fields = {"kind": "mlp", "hidden": bias.mlp.fc1.out_features}
        fields["coordinates"] = {"cr": "log", "swin": "swin"}[bias.mode]
    shared = model.shared_rel_pos is not None
    return found | {"relative_bias": RelativeBias(shared=shared, **fields)}


def truth_of_naflex(model):
    """The same of a model of timm's naflexvit.py."""
    block, embeds = model.blocks[0], model.embeds
    factorized = embeds.pos_embed_type == "factorized"
    method = "bilinear" if factorized else embeds.pos_embed_interp_mode
    method += "_antialias" if embeds.pos_embed_antialias and not factorized else ""
    assert not embeds.pos_embed_use_grid_sample
    if embeds.pos_embed_align_corners:
        assert method == "bilinear"
        method = "zoom"
    return {
        "num_heads": block.attn.num_heads,
        "layernorm_eps": block.norm1.eps,
        "gelu": {"GELU": "erf", "GELUTanh": "tanh"}[type(block.mlp.act).__name__],
        "pool": {"token": "token", "avg": "gap", "map": "map"}[model.global_pool],
        "registers": model.num_reg_tokens,
        "final_norm": not all(
            isinstance(n, torch.nn.Identity) for n in (model.norm, model.fc_norm)
        ),
        "has_class_token": embeds.cls_token is not None,
        "num_prefix_tokens": model.num_prefix_tokens,
        "patch_size": tuple(embeds.patch_size),
        "grid": tuple(embeds.pos_embed_grid_size),
        "depth": len(model.blocks),
        "mlp_dim": block.mlp.fc1.out_features,
        "norm_after_pool": not isinstance(model.fc_norm, torch.nn.Identity),
        "num_classes": model.num_classes,
        "num_position_prefix": 0,
        "position": "learned2d_added" if factorized else "learned",
        "native_resize": method + ("_aspect" if embeds.pos_embed_ar_preserving else ""),
    }


def truth_of_eva(model):
    """The same of a model of timm's eva.py."""
    block, rope = model.blocks[0], model.rope
    registers = 0 if model.reg_token is None else model.reg_token.shape[1]
    found = _of_every_kind(model) | {
        "num_heads": block.attn.num_heads,
        "layernorm_eps": block.norm1.eps,
        "pool": {"token": "token", "avg": "gap", "map": "map"}[model.global_pool],
        "registers": registers,
        "position": "rope" if model.pos_embed is None else "learned",
        "mlp_dim": block.mlp.fc2.in_features,
        "pre_norm": not isinstance(model.norm_pre, torch.nn.Identity),
        "rotary": None,
    }
    norms = (model.norm, model.fc_norm)
    found["final_norm"] = not all(isinstance(norm, torch.nn.Identity) for norm in norms)
    if model.attn_pool is not None:
        found |= {"pool_heads": model.attn_pool.num_heads, "pool_prefix": True}
    if model.pos_embed is not None:
        found["num_position_prefix"] = 0 if model.no_embed_class else model.num_prefix_tokens
    if isinstance(rope, timm.layers.RotaryEmbeddingDinoV3):
        found["rotary"] = Rotary("centred", rope.temperature)
        assert (rope.normalize_coords, rope.grid_offset, rope.grid_indexing) == (
            "separate",
            0,
            "ij",
        )
        assert block.attn.rotate_half
    elif isinstance(rope, timm.layers.RotaryEmbeddingMixed):
        axes = {"ij": "yx", "xy": "xy"}[rope.grid_indexing]
        found["rotary"] = Rotary(
            "index", float(rope.temperature), axes=axes, layout="pairs", learned=True
        )
    elif rope is not None:
        reference = None if rope.ref_feat_shape is None else tuple(rope.ref_feat_shape)
        axes = {"ij": "yx", "xy": "xy"}[rope.grid_indexing]
        base, offset = float(rope.temperature), float(rope.grid_offset)
        found["rotary"] = Rotary("index", base, reference, offset, axes, layout="pairs")
        assert rope.grid_type == "index" and not block.attn.rotate_half
    return found


def interpreted(model, folder=None, **known):
    """Our config of it, from names, shapes and the config.json that timm writes."""
    weights = Weights(type(model).__name__)
    for name, parameter in model.state_dict().items():
        weights.add(name, parameter.shape, "float32")
    if folder is not None:
        save_config_for_hf(model, folder / "config.json")
        weights.config = json.loads((folder / "config.json").read_text())
    return interpret(weights, **known).config


def save(model, path):
    """The model's parameters by the names that they have in memory."""
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, path)
    return str(path)


def assert_same_models(a, b):
    """Two models of ours with the same config and bit-identical parameters."""
    assert a.config == b.config
    left, right = (jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(v.model))) for v in (a, b))
    for (path, x), (_, y) in zip(left, right, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def load(path, **known):
    return vit_jax.load(str(path), **known)
