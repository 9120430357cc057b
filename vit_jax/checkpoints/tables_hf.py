"""Weight name tables of transformers' AIMv2 and InternVL's vision tower."""

from vit_jax.checkpoints.rows import (
    Dialect,
    Row,
    conv_rows,
    linear_rows,
    norm_rows,
    torch_attention,
)
from vit_jax.checkpoints.tables_eva import gated_rows


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
