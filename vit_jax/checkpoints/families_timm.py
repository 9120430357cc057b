"""What names of timm's vision_transformer.py say that their weights do not, beside plain ViTs."""

import re
from typing import Any

# A pattern of names, and the fields of their models.
_FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"aimv2_\w+", dict(pool="gap", norm="rmsnorm", layernorm_eps=1e-5)),
    (r"vit_intern300m_patch14_448", dict(pool="token", final_norm=False)),
    (r"vit_\w+_radio_v\d", dict(pool="token", final_norm=False)),
    (r"vit_base_patch16_rpn_224", dict(pool="gap", norm_after_branch=True)),
    (r"vit_\w+_xp_224", dict(norm="rmsnorm")),
    (r"test_vit3", dict(pool_prefix=True)),
    (r"test_vit4", dict(norm="rmsnorm")),
)
# Heads that are not as many as in other models of that width.
_HEADS = {
    "aimv2_large": 8,
    "aimv2_huge": 12,
    "aimv2_1b": 16,
    "aimv2_3b": 24,
    "vit_giant_patch16_radio": 24,
    "naflexvit_giant_patch16_radio": 24,
    "test_vit3": 3,
    "test_vit4": 3,
    "test_vit": 2,
    "test_vit2": 2,
    "vit_base_patch16_gap_224": 16,
}


def said(name: str) -> dict[str, Any]:
    """The config fields of a timm architecture of vision_transformer.py that no key shows."""
    found = next((f for pattern, f in _FAMILIES if re.fullmatch(pattern, name)), {})
    heads = [n for start, n in _HEADS.items() if re.fullmatch(rf"{start}(_.+)?", name)]
    return {**found, **({"num_heads": heads[0]} if heads else {})}
