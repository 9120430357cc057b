"""The published variants, as one table, and their names."""

import re
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import UserError, nearest
from vit_jax.models.config import ModelConfig, ResNetConfig, ViTConfig, check_fields

# width, depth, mlp_dim, num_heads. L, B and H: paper, Table 1; Ti and S: DeiT and AugReg, Table 2;
# g and G: "Scaling Vision Transformers", Table 2; So400m: "Getting ViT in Shape", 2305.13035; 22B:
# as wide and deep as ViT-22B (2302.05442), with plain blocks; mu: big_vision's smallest, for tests.
VARIANTS = {
    "mu": dict(width=32, depth=1, mlp_dim=128, num_heads=2),
    "Ti": dict(width=192, depth=12, mlp_dim=768, num_heads=3),
    "S": dict(width=384, depth=12, mlp_dim=1536, num_heads=6),
    "B": dict(width=768, depth=12, mlp_dim=3072, num_heads=12),
    "L": dict(width=1024, depth=24, mlp_dim=4096, num_heads=16),
    "So400m": dict(width=1152, depth=27, mlp_dim=4304, num_heads=16),
    "H": dict(width=1280, depth=32, mlp_dim=5120, num_heads=16),
    "g": dict(width=1408, depth=40, mlp_dim=6144, num_heads=16),
    "G": dict(width=1664, depth=48, mlp_dim=8192, num_heads=16),
    "22B": dict(width=6144, depth=48, mlp_dim=24576, num_heads=48),
}
# Hybrids, which have their whole name in the table: the ResNet before the patches, and the patch
# size on its feature map. With /16 the paper's fourth stage is merged into the third (section
# 4.1). AugReg's R+Ti/16 has a stem of stride 4 and patches of 8: a grid of 7 x 7 at 224 pixels.
VARIANTS |= {
    f"R{name}+{size}": dict(VARIANTS[size.split("/")[0]], patch_size=(patch, patch), resnet=units)
    for name, size, patch, units in (
        ("", "Ti/16", 8, ()),
        ("26", "S/32", 1, (2, 2, 2, 2)),
        ("26", "B/32", 1, (2, 2, 2, 2)),
        ("50", "B/16", 1, (3, 4, 9)),
        ("50", "B/32", 1, (3, 4, 6, 3)),
        ("50", "L/16", 1, (3, 4, 9)),
        ("50", "L/32", 1, (3, 4, 6, 3)),
    )
}
# ResNets: the paper's Table 6 and BiT's, arXiv 1912.11370.
VARIANTS |= {
    f"R{depth}x{factor}": dict(resnet=units, resnet_width=64 * factor)
    for depth, units, factors in (
        (26, (2, 2, 2, 2), (1,)),
        (50, (3, 4, 6, 3), (1, 2, 3)),
        (101, (3, 4, 23, 3), (1, 3)),
        (152, (3, 8, 36, 3), (1, 2, 4)),
        (200, (3, 24, 36, 3), (3,)),
    )
    for factor in factors
}


def variant_fields(name: str) -> dict[str, Any]:
    """Returns the config fields of a variant such as "B/16", "Ti/16x8", "R50+B/16" or "R50x1".

    Raises:
      UserError: the name is neither in VARIANTS nor VARIANT/PATCH, or there is no such variant.
    """
    with_resnet = [each for each, fields in VARIANTS.items() if "resnet" in fields]
    if name in with_resnet:
        return dict(VARIANTS[name])
    match = re.fullmatch(r"([^/]+)/(\d+)(?:x(\d+))?", name)
    if match and match[1] in VARIANTS and match[1] not in with_resnet:
        return {"patch_size": (int(match[2]), int(match[3] or match[2])), **VARIANTS[match[1]]}
    if match and not match[1].startswith("R"):
        known = [each for each in VARIANTS if each not in with_resnet]
        hint = f"no variant {match[1]!r}; {nearest(match[1], known)}"
    else:
        hint = "expected VARIANT/PATCH, such as B/16 or Ti/16x8"
        if name.startswith("R"):
            hint += f", or a name with a ResNet; {nearest(name, with_resnet)}"
    raise UserError(f"model variant {name!r}: {hint}")


def variant(name: str, **fields: Any) -> ModelConfig:
    """Returns the config of a variant such as "B/16" or "R50x1", with `fields` changed.

    Raises:
      UserError: the variant or a field does not exist, or the fields do not fit together.
    """
    sizes = variant_fields(name)
    kind = variant_kind(sizes)
    check_fields(kind, fields)
    return kind(**{**sizes, **fields})


def variant_kind(sizes: Mapping[str, Any]) -> type[ModelConfig]:
    """The config class for an entry of VARIANTS."""
    return ViTConfig if "width" in sizes else ResNetConfig
