"""What names of timm's eva.py say that their weights do not: rotary positions, epsilon, pooling."""

import re
from typing import Any

from vit_jax.models.rotary import Rotary

DINOV3 = Rotary("centred", base=100.0, layout="halves")
EVA02 = Rotary("index", base=10_000.0, reference=(16, 16), layout="pairs")
AXIAL = Rotary("index", base=100.0, axes="xy", layout="pairs")
MIXED = Rotary("index", base=10.0, axes="xy", layout="pairs", learned=True)


def perception(side: int, offset: float) -> Rotary:
    """The Perception Encoder's; its grid was side x side."""
    return Rotary("index", 10_000.0, (side, side), offset, axes="xy", layout="pairs")


# Its pooling reads all tokens, with heads of its own; some of its models have no last LayerNorm.
_CORE = dict(pool="map", pool_heads=8, pool_prefix=True, layernorm_eps=1e-5)
_REST = dict(pool="gap", final_norm=False, layernorm_eps=1e-5)
_DINOV3 = dict(rotary=DINOV3, layernorm_eps=1e-5)
_SAPIENS2 = dict(rotary=DINOV3, norm="rmsnorm")
# A pattern of names, and the fields of their models.
_FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"vit_\w+_dinov3(_qkvb)?", dict(pool="gap", image_size=256, **_DINOV3)),
    (r"vit_\w+_lingbot", dict(pool="token", image_size=512, **_DINOV3)),
    (
        r"vit_\w+_sapiens2",
        dict(rotary=DINOV3, pool="token", image_size=(1024, 768), norm="rmsnorm"),
    ),
    (r"eva02_enormous_\w+", dict(rotary=None, pool="token", norm_after_branch=True)),
    (r"eva02_\w+_clip_\d+", dict(rotary=EVA02, pool="token")),
    (r"eva02_\w+", dict(rotary=EVA02, pool="gap")),
    (r"eva_giant_patch14_clip_224", dict(rotary=None, pool="token")),
    (r"eva_giant_\w+", dict(rotary=None, pool="gap")),
    (r"vit_\w+_rope_reg\d_gap_\d+", dict(rotary=EVA02, pool="gap", image_size=256)),
    (r"vit_\w+_rope_mixed(_ape)?_\d+", dict(rotary=MIXED, pool="token")),
    (r"vit_\w+_rope(_ape)?_\d+", dict(rotary=AXIAL, pool="token")),
    (r"vit_pe_core_base_patch16_224", dict(rotary=perception(14, 1.0), **_CORE)),
    (r"vit_pe_core_gigantic_patch14_448", dict(rotary=perception(32, 0.0), **_CORE)),
    (r"vit_pe_core_\w+", dict(rotary=perception(24, 1.0), **_CORE)),
    (r"vit_pe_\w+_gigantic_patch14_448", dict(rotary=perception(32, 0.0), **_REST)),
    (r"vit_pe_\w+", dict(rotary=perception(32, 1.0), **_REST)),
)
# Heads that are not as many as in other models of that width.
_HEADS = {"vit_huge_plus": 20, "vit_7b": 32, "eva02_enormous": 16}
_HEADS |= {"vit_giant_patch16_sapiens2": 24, "vit_5b": 32}


def said(name: str) -> dict[str, Any]:
    """The config fields of a timm architecture of eva.py; {} for a name of another file.

    The image size is that of timm's weights, where they have no table of positions that shows it.
    """
    for pattern, fields in _FAMILIES:
        if re.fullmatch(pattern, name):
            heads = [n for start, n in _HEADS.items() if f"{name}_".startswith(f"{start}_")]
            heads = {"num_heads": heads[0]} if heads else {}
            return {"layernorm_eps": 1e-6, **fields, **heads}
    return {}
