"""Weight name tables of models with a relative position bias: BEiT's, and timm's vit_relpos_*."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from vit_jax.checkpoints.rows import (
    Dialect,
    Row,
    conv_rows,
    linear_rows,
    norm_rows,
    torch_attention,
)

_OWN, _SHARED = "blocks/attention/relative_bias", "relative_bias"
_TABLE = "relative_position_bias_table"
INDEX = r"(.*\.)?relative_position_index$"  # of offsets by pairs of tokens, which older files hold


def _as(rows: Iterable[Row], **says: Any) -> list[Row]:
    return [dataclasses.replace(row, says=says) for row in rows]


def _table(ours: str, theirs: str) -> Row:
    return Row(f"{ours}/table", (f"{theirs}.{_TABLE}",), "o h -> o h")


# huggingface/pytorch-image-models: timm/models/beit.py, beside the rows of eva.py
TIMM_BEIT_BIAS = (_table(_OWN, "blocks.{}.attn"), _table(_SHARED, "rel_pos_bias"))

# huggingface/pytorch-image-models: timm/layers/pos_embed_rel.py, in vision_transformer_relpos.py
TIMM_RELPOS_BIAS = tuple(
    row
    for ours, theirs in ((_OWN, "blocks.{}.attn.rel_pos"), (_SHARED, "shared_rel_pos"))
    for row in (
        _table(ours, theirs),
        *linear_rows(f"{ours}/fc1", f"{theirs}.mlp.fc1"),
        *linear_rows(f"{ours}/fc2", f"{theirs}.mlp.fc2"),
    )
)

_OLD, _NEW = "encoder.layer.{}", "layers.{}"


def _block() -> Iterator[Row]:
    """The rows of a block: first the names on the hub, and of Data2VecVision in memory."""
    old = [f"{_OLD}.attention.attention.{part}." for part in ("query", "key", "value")]
    new = [f"{_NEW}.attention.{part}_proj." for part in "qkv"]
    for apart, out in ((old, f"{_OLD}.attention.output.dense"), (new, f"{_NEW}.attention.o_proj")):
        kernel, _, *rest = torch_attention("blocks/attention", apart, out)
        biases = (f"{apart[0]}bias", f"{apart[2]}bias")
        yield from (kernel, *rest)
        yield from _as(
            [Row("blocks/attention/qkv/bias", biases, "(t h k) -> t h k")], key_bias=False
        )
    for layer in (_OLD, _NEW):
        yield from norm_rows("blocks/norm1", f"{layer}.layernorm_before")
        yield from norm_rows("blocks/norm2", f"{layer}.layernorm_after")
        yield Row("blocks/scale1", (f"{layer}.lambda_1",), "d -> d")
        yield Row("blocks/scale2", (f"{layer}.lambda_2",), "d -> d")
    for fc, old, new in (
        ("fc1", "intermediate.dense", "mlp.fc1"),
        ("fc2", "output.dense", "mlp.fc2"),
    ):
        yield from linear_rows(f"blocks/mlp/{fc}", f"{_OLD}.{old}")
        yield from linear_rows(f"blocks/mlp/{fc}", f"{_NEW}.{new}")
    yield _table(_OWN, f"{_OLD}.attention.attention.relative_position_bias")
    yield _table(_OWN, f"{_NEW}.relative_position_bias")


# huggingface/transformers: models/beit, data2vec (modeling_data2vec_vision.py)
HF_BEIT = Dialect(
    "hf",
    (
        *("encoder.layer.0.lambda_1", "layers.0.lambda_1"),
        f"encoder.layer.0.attention.attention.relative_position_bias.{_TABLE}",
        f"encoder.relative_position_bias.{_TABLE}",
        *(f"layers.0.relative_position_bias.{_TABLE}", f"shared_position_bias.{_TABLE}"),
    ),
    (
        *conv_rows("embeddings.patch_embeddings.projection"),
        Row("cls_token", ("embeddings.cls_token",), "1 1 d -> 1 1 d"),
        Row("pos_embed", ("embeddings.position_embeddings",), "1 n d -> n d"),
        _table(_SHARED, "encoder.relative_position_bias"),
        _table(_SHARED, "shared_position_bias"),
        *_block(),
        *_as(norm_rows("norm", "layernorm"), norm_after_pool=False),
        *_as(norm_rows("norm", "pooler.layernorm"), norm_after_pool=True),
        *linear_rows("head", "/classifier"),
    ),
    leftover=(r"(\w+\.)?embeddings\.mask_token$", INDEX),
    prefixes=("", "beit.", "data2vec_vision."),
)
