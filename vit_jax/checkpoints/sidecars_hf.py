"""The config.json of transformers' AIMv2, InternVL's vision tower and Sapiens 2."""

from typing import Any

from vit_jax.checkpoints.sidecars_eva import is_dinov3
from vit_jax.checkpoints.sidecars_timm import is_aimv2
from vit_jax.models.config import ViTConfig

GELUS = {"erf": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}
# What their code has, whatever the config.json says.
_AIMV2 = {
    "norm": ("rmsnorm",),
    "patch_norm": (True,),
    "patch_bias": (True,),
    "mlp": ("swiglu",),
    "pool": ("gap",),
    "class_token": (None, False),
    "registers": (0,),
    "final_norm": (True,),
    "norm_after_pool": (False,),
    "layer_scale": (None,),
    "qk_norm": ("none",),
    "mlp_scale": (True,),
    "num_classes": (0,),
    "position": ("learned", "learned2d", "learned2d_added", "sincos2d"),
}
_INTERNVL = {
    "patch_bias": (True,),
    "patch_norm": (False,),
    "mlp": ("gelu",),
    "proj_bias": (True,),
    "registers": (0,),
    "norm_after_pool": (False,),
    "qk_norm": ("none", "all"),
    "mlp_scale": (True,),
    "num_classes": (0,),
    "position": ("learned", "learned2d", "learned2d_added", "sincos2d"),
}
_SAPIENS2 = {
    "patch_bias": (True,),
    "patch_norm": (False,),
    "mlp": ("swiglu",),
    "pool": ("token",),
    "class_token": (None, True),
    "final_norm": (True,),
    "norm_after_pool": (False,),
    "qk_norm": ("head",),
    "mlp_scale": (False,),
    "proj_bias": (True,),
    "num_classes": (0,),
    "position": ("rope",),
}
_ALL = {
    "attention_norm": (False,),
    "mlp_norm": (False,),
    "pre_norm": (False,),
    "distillation": ("none",),
    "representation_size": (None,),
    "norm_after_branch": (False,),
}


def is_internvl(vit: ViTConfig) -> bool:
    """Whether a model has what only InternVL's vision tower has in transformers."""
    return (
        (vit.rotary, vit.relative_bias, vit.key_bias) == (None, None, True)
        and vit.layer_scale is not None
        and (not vit.final_norm or vit.qk_norm == "all")
    )


def is_sapiens2(vit: ViTConfig) -> bool:
    """Whether a model rotates as Sapiens 2 and has its norms, with any sizes and base."""
    return is_dinov3(vit) and vit.norm == "rmsnorm"


def allowed(vit: ViTConfig) -> dict[str, tuple[Any, ...]]:
    """The values of config fields that AIMv2, Sapiens 2 or InternVL's tower has in transformers."""
    if is_aimv2(vit):
        return _AIMV2 | _ALL | {"proj_bias": (vit.proj_bias,), "qkv_bias": (vit.proj_bias,)}
    if is_sapiens2(vit):
        counts = {"registers": (vit.registers or 1,), "layer_scale": (vit.layer_scale or 1.0,)}
        return _SAPIENS2 | _ALL | counts
    fields = _INTERNVL | _ALL
    fields["class_token"] = (None, True) if vit.pool == "token" else (True,)
    fields["pool"] = ("gap",) if not vit.final_norm else ("token",)
    fields["norm"] = ("rmsnorm",) if vit.qk_norm == "all" else ("layernorm", "rmsnorm")
    if vit.final_norm:
        fields["norm"] = ("layernorm",)
    if vit.qk_norm == "all":
        fields["layernorm_eps"] = (1e-6,)
    return fields


def config(vit: ViTConfig) -> tuple[str, str, dict[str, Any]]:
    """model_type, class, and what config.json has besides the sizes."""
    if is_aimv2(vit):
        return (
            "aimv2_vision_model",
            "Aimv2VisionModel",
            {
                "rms_norm_eps": vit.layernorm_eps,
                "hidden_act": "silu",
                "qkv_bias": vit.qkv_bias,
                "mlp_bias": vit.proj_bias,
                "use_head": False,
                "is_native": False,
            },
        )
    if is_sapiens2(vit):
        return (
            "sapiens2",
            "Sapiens2Model",
            {
                "rms_norm_eps": vit.layernorm_eps,
                "hidden_act": "silu",
                "use_gated_mlp": True,
                "num_register_tokens": vit.registers,
                "layerscale_value": vit.layer_scale,
                "query_bias": vit.qkv_bias,
                "key_bias": vit.qkv_bias and vit.key_bias,
                "value_bias": vit.qkv_bias,
                "rope_theta": vit.rotary.base if vit.rotary is not None else 100.0,
                "num_key_value_heads_per_layer": [vit.num_heads] * vit.depth,
            },
        )
    return (
        "internvl_vision",
        "InternVLVisionModel",
        {
            "image_size": list(vit.image_size),
            "patch_size": list(vit.patch_size),
            "norm_type": {"layernorm": "layer_norm", "rmsnorm": "rms_norm"}[vit.norm],
            "attention_bias": vit.qkv_bias,
            "use_qk_norm": vit.qk_norm == "all",
            "use_mean_pooling": not vit.final_norm,
            "layer_scale_init_value": vit.layer_scale,
        },
    )
