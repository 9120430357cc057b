"""The config.json of models of timm's vision_transformer.py that are no plain ViTs."""

from collections.abc import Iterator
from typing import Any

from vit_jax.models.config import ViTConfig


def is_aimv2(vit: ViTConfig) -> bool:
    """Whether a model has the blocks and the patch embedding of AIMv2, with any sizes."""
    return vit.norm == "rmsnorm" and vit.patch_norm and vit.mlp == "swiglu"


def is_plain(vit: ViTConfig) -> bool:
    """Whether a model has none of what is written here."""
    parts = (vit.norm, vit.qk_norm, vit.proj_bias, vit.final_norm, vit.pool_prefix)
    plain = parts == ("layernorm", "none", True, True, False)
    others = vit.patch_norm, vit.norm_after_branch, vit.differential, vit.parallel
    return plain and not any(others) and vit.branches == 1


def base(vit: ViTConfig) -> str | None:
    """A timm architecture that has what no argument gives; None if arguments are enough."""
    if is_aimv2(vit):
        return "aimv2_large_patch14_224"
    if vit.parallel:
        return f"vit_{'d' if vit.differential else ''}pwee_patch16_reg1_gap_256"
    if vit.differential:
        return "vit_dwee_patch16_reg1_gap_256"
    if vit.branches > 1:
        return "vit_base_patch16_18x2_224"
    return "vit_base_patch16_rpn_224" if vit.norm_after_branch else None


def epsilon(vit: ViTConfig) -> float:
    """That of the norms in timm's architecture for a model."""
    return 1e-5 if (vit.pre_norm and base(vit) is None) or is_aimv2(vit) else 1e-6


def args(vit: ViTConfig) -> dict[str, Any]:
    """Arguments beside those of a plain ViT, where they are not timm's defaults."""
    found: dict[str, Any] = {}
    if vit.norm == "rmsnorm" and not is_aimv2(vit):
        found["norm_layer"] = "rmsnorm"
    if vit.qk_norm != "none":
        found["qk_norm"] = True
    if not vit.proj_bias or is_aimv2(vit):
        found["proj_bias"] = vit.proj_bias
    if not vit.final_norm:
        found["final_norm"] = False
    if vit.pool_prefix:
        found["pool_include_prefix"] = True
    return found


def cannot(vit: ViTConfig) -> Iterator[tuple[str, Any]]:
    """Yields config fields (with values) that no model of vision_transformer.py has."""
    allowed: dict[str, tuple[Any, ...]] = {"qk_norm": ("none", "head"), "mlp_scale": (True,)}
    allowed["patch_norm"] = (is_aimv2(vit),)
    if vit.norm_after_branch:  # where the scales are those of the norms
        allowed |= {"layer_scale": (None,), "mlp": ("gelu",)}
    if vit.differential or vit.parallel or vit.branches > 1:
        allowed |= {"norm_after_branch": (False,), "patch_norm": (False,), "mlp": ("gelu",)}
    if base(vit) is not None:
        allowed |= {"resnet": (None,), "distillation": ("none",), "norm": ("rmsnorm", "layernorm")}
    elif vit.norm == "rmsnorm":
        allowed["mlp"] = ("gelu",)
    if vit.distillation != "none" or vit.resnet is not None:
        allowed["norm"] = ("layernorm",)
    for field, values in allowed.items():
        if getattr(vit, field) not in values:
            yield field, getattr(vit, field)
