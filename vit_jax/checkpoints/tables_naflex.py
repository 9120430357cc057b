"""Weight name tables of NaFlex models: timm's naflexvit.py, and transformers' SigLIP 2.

Their patch embedding is a linear layer of flattened patches, channels last; all else is as in the
same code base's models of one size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoints.files import Weights
from vit_jax.checkpoints.rows import Dialect, Row, linear_rows
from vit_jax.checkpoints.tables import HF_SIGLIP, TIMM

_KERNEL = "d (p q c) -> p q c d"
_TABLE = "embeds.pos_embed"  # [1 h w d], where rows have [1 n d]


def _stem(theirs: str) -> list[Row]:
    kernel, bias = linear_rows("patch_embed", theirs)
    return [dataclasses.replace(kernel, layout=_KERNEL), dataclasses.replace(bias, layout="d -> d")]


# huggingface/pytorch-image-models: timm/models/naflexvit.py
TIMM_NAFLEX = Dialect(
    "timm",
    ("embeds.proj.weight",),
    (
        *_stem("embeds.proj"),
        Row("cls_token", ("embeds.cls_token",), "1 1 d -> 1 1 d"),
        Row("registers", ("embeds.reg_token",), "1 r d -> 1 r d"),
        Row("pos_embed", (_TABLE,), "1 n d -> n d"),
        Row("pos_embed_row", ("embeds.pos_embed_y",), "1 n d -> n d"),
        Row("pos_embed_column", ("embeds.pos_embed_x",), "1 n d -> n d"),
        *(
            row
            for row in TIMM.rows
            if row.ours.startswith(("blocks/", "attention_pool/", "pre_norm/", "norm/", "head/"))
        ),
    ),
)

# huggingface/transformers: models/siglip2 (the vision tower)
HF_SIGLIP2 = dataclasses.replace(
    HF_SIGLIP,
    rows=(
        *_stem("embeddings.patch_embedding"),
        *(row for row in HF_SIGLIP.rows if not row.ours.startswith("patch_embed/")),
    ),
)
NAFLEX = (TIMM_NAFLEX, HF_SIGLIP2)


def told_apart(weights: Weights, dialect: Dialect, prefix: str) -> Dialect:
    """SigLIP 2's dialect where keys are SigLIP's, and the patch embedding is a linear layer."""
    if dialect is HF_SIGLIP and len(weights.shapes[prefix + HF_SIGLIP.markers[0]]) == 2:
        return HF_SIGLIP2
    return dialect


def flattened(weights: Weights) -> tuple[Weights, tuple[int, int] | None]:
    """The weights with the table of positions as rows [1 n d], and its grid (h, w), if any."""
    shape = weights.shapes.get(_TABLE, ())
    if len(shape) != 4:
        return weights, None
    _, h, w, d = shape
    return weights.reshaped(_TABLE, (1, h * w, d)), (h, w)


def on_grid(arrays: Mapping[str, Any], grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """The inverse of `flattened`, for arrays to be written."""
    return {
        key: value.reshape(1, *grid, -1) if key == _TABLE else value
        for key, value in arrays.items()
    }
