"""Weight name tables of timm's eva.py (EVA, EVA-02, DINOv3, ...) and of transformers' DINOv3."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from vit_jax.checkpoints.rows import (
    Dialect,
    Row,
    conv_rows,
    linear_rows,
    norm_rows,
    torch_attention,
)
from vit_jax.checkpoints.tables_relative import INDEX, TIMM_BEIT_BIAS


def _as(rows: Iterable[Row], only: dict[str, Any] | None = None, **says: Any) -> list[Row]:
    return [dataclasses.replace(row, says=says, only=only or {}) for row in rows]


def gated_rows(kernels: tuple[str, str]) -> list[Row]:
    """The first layer of a SwiGLU whose gate has a kernel of its own."""
    return [
        Row("blocks/mlp/fc1/kernel", tuple(f"{name}.weight" for name in kernels), "o i -> i o"),
        Row("blocks/mlp/fc1/bias", tuple(f"{name}.bias" for name in kernels), "o -> o"),
    ]


_ATTENTION = "blocks.{}.attn"
_APART = [f"{_ATTENTION}.{name}_proj." for name in "qkv"]
_GATE = ("blocks.{}.mlp.fc1_g", "blocks.{}.mlp.fc1_x")
_BIAS, _LAYOUT = "blocks/attention/qkv/bias", "(t h k) -> t h k"
# The models with a norm in their MLP have Q, K and V apart, too; DINOv3 has the gate apart.
_WITH_NORM = {"mlp_norm": True}
# So has Sapiens 2, whose keys and values may have fewer heads.
_SCALED_ONCE = {"mlp_scale": False}


def shared_rows(qkv: list[str]) -> list[Row]:
    """Q, K and V apart, kernels and biases, where several queries may share a key and a value."""
    rows = torch_attention("blocks/attention", qkv, "")[:2]
    return [dataclasses.replace(row, shared=True) for row in rows]


# huggingface/pytorch-image-models: timm/layers/attention_pool.py, AttentionPoolLatent
TIMM_POOL = (
    Row("attention_pool/probe", ("attn_pool.latent",), "1 1 d -> 1 1 d"),
    *torch_attention(
        "attention_pool/attention", ["attn_pool.q.", "attn_pool.kv."], "attn_pool.proj", (1, 2)
    ),
    *norm_rows("attention_pool/norm", "attn_pool.norm"),
    *linear_rows("attention_pool/mlp/fc1", "attn_pool.mlp.fc1"),
    *linear_rows("attention_pool/mlp/fc2", "attn_pool.mlp.fc2"),
)

# huggingface/pytorch-image-models: timm/models/eva.py, beit.py
TIMM_EVA = Dialect(
    "timm",
    (
        *("blocks.0.gamma_1", "blocks.0.attn.q_bias", "blocks.0.attn.q_proj.weight"),
        *("blocks.0.mlp.fc1_g.weight", *(row.keys("", 0)[0] for row in TIMM_BEIT_BIAS)),
    ),
    (
        *conv_rows("patch_embed.proj"),
        Row("cls_token", ("cls_token",), "1 1 d -> 1 1 d"),
        Row("registers", ("reg_token",), "1 r d -> 1 r d"),
        Row("pos_embed", ("pos_embed",), "1 n d -> n d"),
        *norm_rows("pre_norm", "norm_pre"),
        *norm_rows("blocks/norm1", "blocks.{}.norm1"),
        *_as(shared_rows(_APART)[:1], only=_SCALED_ONCE),
        *_as(
            torch_attention("blocks/attention", _APART, f"{_ATTENTION}.proj")[:1], only=_WITH_NORM
        ),
        *torch_attention("blocks/attention", [f"{_ATTENTION}.qkv."], f"{_ATTENTION}.proj")[:1],
        *torch_attention("blocks/attention", _APART, f"{_ATTENTION}.proj")[2:],
        *_as(shared_rows(_APART)[1:], only=_SCALED_ONCE, key_bias=True),
        *_as(
            [Row(_BIAS, (f"{_ATTENTION}.q_proj.bias", f"{_ATTENTION}.v_proj.bias"), _LAYOUT)],
            only=_WITH_NORM,
            key_bias=False,
        ),
        *_as(
            [Row(_BIAS, (f"{_ATTENTION}.q_bias", f"{_ATTENTION}.v_bias"), _LAYOUT)],
            key_bias=False,
        ),
        *_as([Row(_BIAS, (f"{_ATTENTION}.qkv.bias",), _LAYOUT)], key_bias=True),
        *norm_rows("blocks/attention/q_norm", f"{_ATTENTION}.q_norm"),
        *norm_rows("blocks/attention/k_norm", f"{_ATTENTION}.k_norm"),
        *norm_rows("blocks/attention/norm", f"{_ATTENTION}.norm"),
        Row("blocks/attention/rotary_freqs", ("rope.freqs",), "a l h k -> l a h k", whole=True),
        *TIMM_BEIT_BIAS,
        Row("blocks/scale1", ("blocks.{}.gamma_1",), "d -> d"),
        *norm_rows("blocks/norm2", "blocks.{}.norm2"),
        *_as(gated_rows(_GATE), only=_WITH_NORM, mlp="swiglu"),
        *_as(gated_rows(_GATE), only={"position": "rope", "norm": "layernorm"}, mlp="swiglu"),
        *linear_rows("blocks/mlp/fc1", "blocks.{}.mlp.fc1"),
        *norm_rows("blocks/mlp/norm", "blocks.{}.mlp.norm"),
        *linear_rows("blocks/mlp/fc2", "blocks.{}.mlp.fc2"),
        Row("blocks/scale2", ("blocks.{}.gamma_2",), "d -> d"),
        *_as(norm_rows("norm", "norm"), norm_after_pool=False),
        *_as(norm_rows("norm", "fc_norm"), norm_after_pool=True),
        *TIMM_POOL,
        *linear_rows("head", "head"),
    ),
    leftover=(r"mask_token$", INDEX),
    unless="patch_embed.norm.weight",  # AIMv2's
)


def _dinov3(layer: str) -> list[Row]:
    """The rows of a block: on the hub, layers have another name than in transformers 5."""
    apart = [f"{layer}.attention.{name}_proj." for name in "qkv"]
    kernel, _, *out = torch_attention("blocks/attention", apart, f"{layer}.attention.o_proj")
    biases = [f"{name}bias" for name in apart]
    fc2 = linear_rows("blocks/mlp/fc2", f"{layer}.mlp.down_proj")
    gate = (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
    return [
        *norm_rows("blocks/norm1", f"{layer}.norm1"),
        *(kernel, *out),
        *_as([Row(_BIAS, tuple(biases), _LAYOUT)], key_bias=True),
        *_as([Row(_BIAS, (biases[0], biases[2]), _LAYOUT)], key_bias=False),
        Row("blocks/scale1", (f"{layer}.layer_scale1.lambda1",), "d -> d"),
        *norm_rows("blocks/norm2", f"{layer}.norm2"),
        *_as(gated_rows(gate), mlp="swiglu"),
        *_as(linear_rows("blocks/mlp/fc1", f"{layer}.mlp.up_proj"), mlp="gelu"),
        *fc2,
        Row("blocks/scale2", (f"{layer}.layer_scale2.lambda1",), "d -> d"),
    ]


# huggingface/transformers: models/dinov3_vit
HF_DINOV3 = Dialect(
    "hf",
    ("layer.0.layer_scale1.lambda1", "model.layer.0.layer_scale1.lambda1"),
    (
        *conv_rows("embeddings.patch_embeddings"),
        Row("cls_token", ("embeddings.cls_token",), "1 1 d -> 1 1 d"),
        Row("registers", ("embeddings.register_tokens",), "1 r d -> 1 r d"),
        *_dinov3("layer.{}"),
        *_dinov3("model.layer.{}"),
        *norm_rows("norm", "norm"),
    ),
    leftover=(r"embeddings\.mask_token$",),
)
