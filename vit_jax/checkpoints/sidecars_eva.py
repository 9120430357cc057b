"""The config.json of models of timm's eva.py, and of transformers' DINOv3."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from vit_jax.checkpoints import families_eva
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.rotary import Rotary

# Rotary positions, and whether keys have a bias and there is a last LayerNorm -> an architecture
# that has them, with the epsilon of its LayerNorms. All else is given as arguments.
_ARCHITECTURES: dict[tuple[Rotary | None, bool, bool], tuple[str, float]] = {
    (families_eva.DINOV3, False, True): ("vit_base_patch16_dinov3", 1e-5),
    (families_eva.EVA02, False, True): ("eva02_base_patch14_224", 1e-6),
    (families_eva.AXIAL, True, True): ("vit_base_patch16_rope_224", 1e-6),
    (families_eva.MIXED, True, True): ("vit_base_patch16_rope_mixed_224", 1e-6),
    (None, False, True): ("eva_giant_patch14_224", 1e-6),
    (families_eva.perception(14, 1.0), True, True): ("vit_pe_core_base_patch16_224", 1e-5),
    (families_eva.perception(24, 1.0), True, True): ("vit_pe_core_large_patch14_336", 1e-5),
    (families_eva.perception(32, 0.0), True, True): ("vit_pe_core_gigantic_patch14_448", 1e-5),
    (families_eva.perception(32, 1.0), True, False): ("vit_pe_spatial_large_patch14_448", 1e-5),
    (families_eva.perception(32, 0.0), True, False): ("vit_pe_lang_gigantic_patch14_448", 1e-5),
}


def is_eva(vit: ViTConfig) -> bool:
    """Whether a model has what only timm's eva.py has."""
    norms = (vit.attention_norm or vit.mlp_norm) and vit.mlp == "swiglu"  # BEiT-3's MLP is not
    parts = norms or not vit.mlp_scale
    return vit.rotary is not None or not vit.key_bias or parts


def _rotary(vit: ViTConfig) -> Rotary | None:
    """Rotary positions as they are after training."""
    return None if vit.rotary is None else vit.rotary.plain


def is_sapiens2(vit: ViTConfig) -> bool:
    """Whether a model has the blocks of Sapiens 2, with any sizes."""
    dinov3 = _rotary(vit) == families_eva.DINOV3 and vit.position == "rope"
    return dinov3 and vit.norm == "rmsnorm" and vit.final_norm and vit.key_bias


def timm_eva(vit: ViTConfig) -> tuple[str, float] | None:
    """An architecture of eva.py that its arguments turn into this model, and its epsilon."""
    # Without any bias, both classes of attention that timm has there are the same.
    if is_sapiens2(vit):
        return ("vit_base_patch16_sapiens2", 1e-6)
    if vit.norm == "rmsnorm":
        return None
    if vit.norm_after_branch:
        fits = vit.rotary is None and vit.final_norm and not (vit.qkv_bias and vit.key_bias)
        return ("eva02_enormous_patch14_clip_224", 1e-6) if fits else None
    fits = (True, False) if not vit.qkv_bias else (vit.key_bias,)
    found = (_ARCHITECTURES.get((_rotary(vit), bias, vit.final_norm)) for bias in fits)
    return next(filter(None, found), None)


def cannot(vit: ViTConfig) -> Iterator[tuple[str, Any]]:
    """Yields config fields (with values) that no model of eva.py has."""
    found = timm_eva(vit)
    if found is None:
        other = (_rotary(vit), not vit.key_bias, vit.final_norm) in _ARCHITECTURES
        field = "key_bias" if other else "rotary"
        if vit.norm != "layernorm" or vit.norm_after_branch:
            field = "norm" if vit.norm != "layernorm" else "norm_after_branch"
        yield field, getattr(vit, field)
    allowed: dict[str, tuple[Any, ...]] = {"patch_bias": (not vit.pre_norm,)}
    allowed["pool"] = ("token", "gap")
    if found is not None and "_pe_core_" in found[0]:
        allowed["pool"] = ("token", "gap", "map")
    if vit.pool == "map":
        allowed |= {"pool_heads": (8,), "pool_prefix": (True,), "mlp": ("gelu",)}
    allowed |= {"resnet": (None,), "distillation": ("none",), "representation_size": (None,)}
    allowed |= {"qk_norm": ("none", "head"), "patch_norm": (False,), "proj_bias": (True,)}
    if not is_sapiens2(vit):
        allowed["mlp_scale"] = (True,)
    if vit.norm_after_branch:  # which has no scales of its own
        allowed |= {"layer_scale": (None,), "qk_norm": ("none",)}
    allowed["gelu"] = (vit.gelu,) if vit.mlp == "swiglu" else ("erf",)
    if vit.mlp_norm:  # the models with this norm are gated
        allowed |= {"mlp": ("swiglu",), "key_bias": (False, not vit.qkv_bias)}
    for field, values in allowed.items():
        if getattr(vit, field) not in values:
            yield field, getattr(vit, field)


def timm_sizes(vit: ViTConfig) -> dict[str, Any]:
    """The sizes of a model under the names of timm's arguments."""
    square = vit.patch_size[0] == vit.patch_size[1]
    return {
        "img_size": list(vit.image_size),
        "patch_size": vit.patch_size[0] if square else list(vit.patch_size),
        "in_chans": vit.in_channels,
        "embed_dim": vit.width,
        "depth": vit.depth // vit.branches,
        "num_heads": vit.num_heads,
    }


def timm_args(vit: ViTConfig) -> tuple[str, dict[str, Any]]:
    """A timm architecture, and the arguments that turn it into this model."""
    found = timm_eva(vit)
    if found is None:
        raise UserError(f"timm has no model with model.rotary={vit.rotary!r}")
    gated, pool_mlp = vit.mlp == "swiglu", vit.pool_mlp_dim or vit.mlp_dim
    return found[0], {
        **timm_sizes(vit),
        "mlp_ratio": (vit.mlp_dim + 0.5) / vit.width,
        "swiglu_mlp": gated,
        # Their alignment gives the gate a kernel of its own, as DINOv3 has it.
        "swiglu_align_to": int(gated and vit.position == "rope" and vit.norm == "layernorm"),
        "scale_mlp": vit.mlp_norm,
        "scale_attn_inner": vit.attention_norm,
        "qkv_bias": vit.qkv_bias,
        "qkv_fused": not vit.mlp_norm and vit.mlp_scale,
        "init_values": vit.layer_scale,
        "class_token": vit.has_class_token,
        "num_reg_tokens": vit.registers,
        "use_abs_pos_emb": vit.position == "learned",
        "no_embed_class": vit.num_position_prefix == 0,
        "global_pool": {"token": "token", "gap": "avg", "map": "map"}[vit.pool],
        "use_fc_norm": vit.norm_after_pool,
        "use_pre_transformer_norm": vit.pre_norm,
        **_sapiens2_args(vit),
    } | ({"attn_pool_mlp_ratio": (pool_mlp + 0.5) / vit.width} if vit.pool == "map" else {})


def _sapiens2_args(vit: ViTConfig) -> dict[str, Any]:
    """Arguments where only Sapiens 2 has them; keys have as many heads as queries."""
    if not is_sapiens2(vit):
        return {"qk_norm": True} if vit.qk_norm == "head" else {}
    return {
        "qk_norm": vit.qk_norm == "head",
        "attn_only_layer_scale": not vit.mlp_scale,
        "num_kv_heads": vit.num_heads,
    }


def hf_config(vit: ViTConfig) -> dict[str, Any]:
    """What the config.json of a DINOv3ViTModel has besides the sizes."""
    return {
        "hidden_act": "silu" if vit.mlp == "swiglu" else "gelu",
        "use_gated_mlp": vit.mlp == "swiglu",
        "num_register_tokens": vit.registers,
        "layerscale_value": vit.layer_scale,
        "query_bias": vit.qkv_bias,
        "key_bias": vit.qkv_bias and vit.key_bias,
        "value_bias": vit.qkv_bias,
        "rope_theta": vit.rotary.base if vit.rotary is not None else 100.0,
    }


def is_dinov3(vit: ViTConfig) -> bool:
    """Whether a model rotates as DINOv3, with any base."""
    rotary = vit.rotary
    return rotary is not None and rotary.plain == dataclasses.replace(
        families_eva.DINOV3, base=rotary.base
    )
