"""Weight name table of DINOv2's own release (arXiv 2304.07193), which timm's names are near.

Registers and the kernels of the gated MLP are called otherwise, and in models trained in chunks
every block is under the number of its chunk: `blocks.1.7.attn.qkv.weight`.
"""

import dataclasses

from vit_jax.checkpoints.files import Weights
from vit_jax.checkpoints.rows import Dialect, Row, linear_rows
from vit_jax.checkpoints.tables import TIMM

_SHARED = ("patch_embed.proj.", "cls_token", "pos_embed", "norm.", "head.", "blocks.{}.norm")
_SHARED += ("blocks.{}.attn.qkv.", "blocks.{}.attn.proj.", "blocks.{}.ls", "blocks.{}.mlp.fc1.")
_SHARED += ("blocks.{}.mlp.fc2.",)
_CHUNK = r"blocks\.\d+\.(?=\d+\.)"

# facebookresearch/dinov2: dinov2/models/vision_transformer.py
DINOV2 = dataclasses.replace(
    TIMM,
    name="dinov2",
    rows=(
        *(row for row in TIMM.rows if all(each.startswith(_SHARED) for each in row.theirs)),
        Row("registers", ("register_tokens",), "1 r d -> 1 r d"),
        *linear_rows("blocks/mlp/fc1", "blocks.{}.mlp.w12"),
        *linear_rows("blocks/mlp/fc2", "blocks.{}.mlp.w3"),
    ),
    leftover=(r"mask_token$",),
    aliases=(_CHUNK, "blocks."),
)


def told_apart(weights: Weights, dialect: Dialect) -> Dialect:
    """DINOv2's dialect where keys are timm's, but for what its release alone has.

    Its mask token is an array [1 d], which no other code has of these names.
    """
    mask, keys = weights.shapes.get("mask_token", ()), weights.shapes
    own = len(mask) == 2 or "register_tokens" in keys or "blocks.0.mlp.w12.weight" in keys
    own = own or any(DINOV2.spelt(key) != key for key in keys)
    return DINOV2 if dialect is TIMM and own else dialect
