"""Weight name tables of NaFlex models: big_vision's, transformers' SigLIP 2, timm's naflexvit.py.

Their patch embedding is a linear layer of flattened patches, channels last; all else is as in the
same code base's models of one size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoints.files import Weights
from vit_jax.checkpoints.rows import Dialect, Row, linear_rows
from vit_jax.checkpoints.tables import BIG_VISION, HF_SIGLIP, TIMM

_KERNEL = "d (p q c) -> p q c d"


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
        Row("pos_embed", ("embeds.pos_embed",), "1 n d -> n d"),
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

# google-research/big_vision: models/proj/image_text/naflex_vit.py
BIG_VISION_NAFLEX = dataclasses.replace(
    BIG_VISION,
    rows=(
        Row("patch_embed/kernel", ("embedding/kernel",), "(p q c) d -> p q c d"),
        *(row for row in BIG_VISION.rows if row.ours not in ("patch_embed/kernel", "cls_token")),
    ),
)
NAFLEX = (TIMM_NAFLEX, HF_SIGLIP2, BIG_VISION_NAFLEX)


def told_apart(weights: Weights, dialect: Dialect, prefix: str) -> Dialect:
    """SigLIP 2's dialect where keys are SigLIP's, and the patch embedding is a linear layer."""
    for plain, flat in ((HF_SIGLIP, HF_SIGLIP2), (BIG_VISION, BIG_VISION_NAFLEX)):
        row = next(row for row in flat.rows if row.ours == "patch_embed/kernel")
        if dialect is plain and len(weights.shapes.get(row.keys(prefix)[0], ())) == 2:
            return flat
    return dialect


def _table(dialect: Dialect, prefix: str) -> tuple[str, int]:
    """The key of a table of positions that is on its grid, and how many axes it has."""
    if dialect is TIMM_NAFLEX:
        return f"{prefix}embeds.pos_embed", 4  # [1 h w d]
    if dialect is BIG_VISION_NAFLEX:
        return f"{prefix}pos_embedding", 3  # [h w d]
    return "", 0


def flattened(
    weights: Weights, dialect: Dialect, prefix: str
) -> tuple[Weights, tuple[int, int] | None]:
    """The weights with the table of positions as rows [1 n d], and its grid (h, w), if any."""
    key, axes = _table(dialect, prefix)
    shape = weights.shapes.get(key, ())
    if not shape or len(shape) != axes:
        return weights, None
    *_, h, w, d = shape
    return weights.reshaped(key, (1, h * w, d)), (h, w)


def on_grid(
    arrays: Mapping[str, Any], grid: tuple[int, int], dialect: Dialect, prefix: str
) -> dict[str, np.ndarray]:
    """The inverse of `flattened`, for arrays to be written."""
    key, axes = _table(dialect, prefix)
    return {
        name: value.reshape(*(1,) * (axes - 3), *grid, -1) if name == key else value
        for name, value in arrays.items()
    }
