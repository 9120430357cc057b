"""Weight name tables of transformers' AIMv2, InternVL's vision tower and Sapiens 2."""

from vit_jax.checkpoints.rows import (
    Dialect,
    Row,
    conv_rows,
    linear_rows,
    norm_rows,
    torch_attention,
)
from vit_jax.checkpoints.tables_eva import gated_rows, shared_rows


def _apart(layer: str) -> list[str]:
    return [f"{layer}.{name}_proj." for name in "qkv"]


_AIM = "encoder.layers.{}"
# huggingface/transformers: models/aimv2 (the vision tower)
HF_AIMV2 = Dialect(
    "hf",
    ("embeddings.rms_norm.weight",),
    (
        *conv_rows("embeddings.patch_embed"),
        *norm_rows("patch_embed/norm", "embeddings.rms_norm"),
        Row("pos_embed", ("embeddings.position_embedding.weight",), "n d -> n d"),
        *norm_rows("blocks/norm1", f"{_AIM}.rms_norm1"),
        *torch_attention(
            "blocks/attention", _apart(f"{_AIM}.attention"), f"{_AIM}.attention.out_proj"
        ),
        *norm_rows("blocks/norm2", f"{_AIM}.rms_norm2"),
        *gated_rows((f"{_AIM}.ffn.gate_proj", f"{_AIM}.ffn.up_proj")),
        *linear_rows("blocks/mlp/fc2", f"{_AIM}.ffn.down_proj"),
        *norm_rows("norm", "rms_norm"),
    ),
    leftover=(r"text_model\.", r"logit_scale$", r"(visual|text)_projection\."),
    prefixes=("", "vision_model."),
)

_INTERN = "encoder.layer.{}"
# huggingface/transformers: models/internvl (the vision tower)
HF_INTERNVL = Dialect(
    "hf",
    ("encoder.layer.0.attention.projection_layer.weight",),
    (
        *conv_rows("embeddings.patch_embeddings.projection"),
        Row("cls_token", ("embeddings.cls_token",), "1 1 d -> 1 1 d"),
        Row("pos_embed", ("embeddings.position_embeddings",), "1 n d -> n d"),
        *norm_rows("blocks/norm1", f"{_INTERN}.layernorm_before"),
        *torch_attention(
            "blocks/attention",
            _apart(f"{_INTERN}.attention"),
            f"{_INTERN}.attention.projection_layer",
        ),
        *norm_rows("blocks/attention/q_norm", f"{_INTERN}.attention.q_norm"),
        *norm_rows("blocks/attention/k_norm", f"{_INTERN}.attention.k_norm"),
        Row("blocks/scale1", (f"{_INTERN}.lambda_1",), "d -> d"),
        *norm_rows("blocks/norm2", f"{_INTERN}.layernorm_after"),
        *linear_rows("blocks/mlp/fc1", f"{_INTERN}.mlp.fc1"),
        *linear_rows("blocks/mlp/fc2", f"{_INTERN}.mlp.fc2"),
        Row("blocks/scale2", (f"{_INTERN}.lambda_2",), "d -> d"),
        *norm_rows("norm", "layernorm"),
    ),
    leftover=(r"embeddings\.mask_token$",),
)


def _sapiens2(layer: str, qkv: list[str], parts: dict[str, str]) -> list[Row]:
    """The rows of a block: the published files have other names than transformers."""
    return [
        *norm_rows("blocks/norm1", f"{layer}.{parts['norm1']}"),
        *shared_rows([f"{layer}.{name}" for name in qkv]),
        *torch_attention("blocks/attention", [""], f"{layer}.{parts['out']}")[2:],
        *norm_rows("blocks/attention/q_norm", f"{layer}.{parts['attention']}.q_norm"),
        *norm_rows("blocks/attention/k_norm", f"{layer}.{parts['attention']}.k_norm"),
        Row("blocks/scale1", (f"{layer}.{parts['scale']}",), "d -> d"),
        *norm_rows("blocks/norm2", f"{layer}.{parts['norm2']}"),
        *linear_rows("blocks/mlp/fc2", f"{layer}.{parts['fc2']}"),
    ]


_SAPIENS, _SAPIENS_HF = "blocks.{}", "model.layer.{}"
# huggingface/transformers: models/sapiens2, and the names of facebookresearch/sapiens2
HF_SAPIENS2 = Dialect(
    "hf",
    ("blocks.0.attn.gamma.weight", "model.layer.0.attention.q_norm.weight"),
    (
        *conv_rows("patch_embed.projection"),
        *conv_rows("embeddings.patch_embeddings"),
        Row("cls_token", ("cls_token",), "1 1 d -> 1 1 d"),
        Row("cls_token", ("embeddings.cls_token",), "1 1 d -> 1 1 d"),
        Row("registers", ("storage_tokens",), "1 r d -> 1 r d"),
        Row("registers", ("embeddings.register_tokens",), "1 r d -> 1 r d"),
        *_sapiens2(
            _SAPIENS,
            [f"attn.w{name}." for name in "qkv"],
            dict(norm1="ln1", norm2="ln2", attention="attn", out="attn.proj", fc2="ffn.w3")
            | dict(scale="attn.gamma.weight"),
        ),
        *linear_rows("blocks/mlp/fc1", f"{_SAPIENS}.ffn.w12"),
        *_sapiens2(
            _SAPIENS_HF,
            [f"attention.{name}_proj." for name in "qkv"],
            dict(norm1="norm1", norm2="norm2", attention="attention", out="attention.o_proj")
            | dict(scale="layer_scale1.lambda1", fc2="mlp.down_proj"),
        ),
        *gated_rows((f"{_SAPIENS_HF}.mlp.gate_proj", f"{_SAPIENS_HF}.mlp.up_proj")),
        *norm_rows("norm", "ln1"),
        *norm_rows("norm", "norm"),
    ),
    leftover=(r"(embeddings\.)?mask_token$",),
)
