"""The config.json of timm's BEiT, BEiT-3 and vit_relpos_*, and of transformers' BEiT."""

from collections.abc import Iterator
from typing import Any

from vit_jax.models.config import ViTConfig

# timm's architectures with norms behind each branch, which no argument says; by whether there is a
# position bias.
_RPN = {False: "vit_base_patch16_rpn_224", True: "vit_relpos_base_patch16_rpn_224"}


# What no model with such a bias has, or no argument of it gives.
_OF_NONE: dict[str, tuple[Any, ...]] = {
    **{"norm": ("layernorm",), "qk_norm": ("none",), "patch_norm": (False,), "parallel": (False,)},
    **{"differential": (False,), "proj_bias": (True,), "mlp_scale": (True,)},
}


def is_beit(vit: ViTConfig) -> bool:
    """Whether timm's beit.py has the model, and not its vision_transformer_relpos.py."""
    biased = vit.relative_bias is not None
    return biased and (vit.position != "relative_bias" or not vit.key_bias)


def is_beit3(vit: ViTConfig) -> bool:
    """Whether a model has what BEiT-3 has in timm beside a plain ViT."""
    return vit.attention_norm and vit.mlp_norm and vit.layernorm_eps == 1e-5 and not vit.pre_norm


def is_hf_beit(vit: ViTConfig) -> bool:
    """Whether the model is of transformers' BEiT, by the keys that it has there."""
    scaled = vit.layer_scale is not None and not vit.key_bias
    return vit.relative_bias is not None or (scaled and vit.rotary is None)


def cannot(vit: ViTConfig) -> Iterator[tuple[str, Any]]:
    """Yields config fields (with values) that no timm model with such a bias has."""
    allowed: dict[str, tuple[Any, ...]] = {"pool": ("token", "gap"), "gelu": ("erf",)}
    allowed |= {"mlp": ("gelu",), "resnet": (None,), "registers": (0,), "pre_norm": (False,)}
    allowed |= {"distillation": ("none",), "attention_norm": (False,), "mlp_norm": (False,)}
    allowed |= {"representation_size": (None,), "patch_bias": (True,), "final_norm": (True,)}
    allowed |= {"rotary": (None,), **_OF_NONE}
    if vit.norm_after_branch:
        allowed["layer_scale"] = (None,)
    if is_beit(vit):
        yield from _not_of_beit(vit)
    for field, values in allowed.items():
        if getattr(vit, field) not in values:
            yield field, getattr(vit, field)


def _not_of_beit(vit: ViTConfig) -> Iterator[tuple[str, Any]]:
    """What no BEiT has, in timm or in transformers."""
    bias = vit.relative_bias
    if bias is not None and bias.kind != "table":
        yield "relative_bias", bias
    if not vit.has_class_token:
        yield "class_token", False
    if vit.position not in ("relative_bias", "learned"):
        yield "position", vit.position
    if vit.position == "learned" and vit.num_position_prefix != 1:
        yield "position_prefix", vit.position_prefix
    if vit.norm_after_branch:
        yield "norm_after_branch", True
    if vit.qkv_bias and vit.key_bias:
        yield "key_bias", True


def hf_cannot(vit: ViTConfig) -> Iterator[tuple[str, Any]]:
    """Yields config fields (with values) that transformers' BEiT does not have."""
    yield from _not_of_beit(vit)
    if vit.grid[0] != vit.grid[1]:
        yield "image_size", vit.image_size
    allowed: dict[str, tuple[Any, ...]] = {"mlp": ("gelu",), "qkv_bias": (True,)}
    allowed |= {"pool": ("gap",) if vit.norm_after_pool or not vit.final_norm else ("token",)}
    allowed |= {"registers": (0,), "distillation": ("none",), "patch_bias": (True,)}
    allowed |= {"pre_norm": (False,), "representation_size": (None,), **_OF_NONE}
    if vit.num_classes:
        allowed["final_norm"] = (True,)
    for field, values in allowed.items():
        if getattr(vit, field) not in values:
            yield field, getattr(vit, field)


def timm_args(vit: ViTConfig, sizes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A timm architecture, and the arguments that turn it into this model with a bias.

    `sizes` are those of all of timm's models.
    """
    bias, pool = vit.relative_bias, {"token": "token", "gap": "avg"}[vit.pool]
    args = {
        **sizes,
        "mlp_ratio": (vit.mlp_dim + 0.5) / vit.width,
        "qkv_bias": vit.qkv_bias,
        "init_values": vit.layer_scale or 0.0,
        "global_pool": pool,
    }
    if is_beit(vit):
        return _named(vit), args | {
            "use_abs_pos_emb": vit.position == "learned",
            "use_rel_pos_bias": not bias.shared,
            "use_shared_rel_pos_bias": bias.shared,
            "use_fc_norm": vit.norm_after_pool,
        }
    kinds = {"table": "bias", "mlp": "mlp" if bias.coordinates == "log" else "mlp-swin"}
    name = _RPN[True] if vit.norm_after_branch else "vit_relpos_base_patch16_224"
    return name, args | {
        "class_token": vit.has_class_token,
        "fc_norm": vit.norm_after_pool,
        "rel_pos_type": kinds[bias.kind],
        "rel_pos_dim": bias.hidden if bias.kind == "mlp" else None,
        "shared_rel_pos": bias.shared,
    }


def _named(vit: ViTConfig) -> str:
    size = "large" if vit.width == 1024 else "base"
    return f"beit_{size}_patch16_224"


def timm_name(vit: ViTConfig, size: str | None) -> str | None:
    """timm's name of a ViT of a size ("base") with norms of its own, at its nearest resolution."""
    plain = vit.pool == "gap" and vit.position == "learned" and not vit.registers
    plain = plain and vit.patch_size[0] == vit.patch_size[1] and vit.layer_scale is None
    start = f"{size}_patch{vit.patch_size[0]}"
    if vit.norm_after_branch:
        found = plain and start == "base_patch16" and not vit.has_class_token
        return _RPN[False] if found else None
    if not (plain and is_beit3(vit) and vit.has_class_token and vit.norm_after_pool):
        return None
    sizes = {"base_patch16": (224,), "large_patch16": (224,), "giant_patch14": (224, 336)}
    near = min(sizes.get(start, ()), key=lambda side: abs(side - vit.image_size[0]), default=None)
    return f"beit3_{start}_{near}" if near else None


def timm_norms(vit: ViTConfig) -> tuple[str | None, dict[str, Any]]:
    """The architecture of a ViT with BEiT-3's norms or norms behind its branches, and arguments."""
    args = {"scale_attn_norm": vit.attention_norm, "scale_mlp_norm": vit.mlp_norm}
    args = {name: True for name, there in args.items() if there}
    if vit.norm_after_branch:
        return _RPN[False], args
    return ("beit3_base_patch16_224" if is_beit3(vit) else None), args


def hf_config(vit: ViTConfig) -> tuple[str, str, dict[str, Any]]:
    """The model type, the class, and what the config.json of a BEiT has besides the sizes."""
    bias = vit.relative_bias
    config = {
        "layer_scale_init_value": vit.layer_scale or 0.0,
        "use_mask_token": False,
        "use_absolute_position_embeddings": vit.position == "learned",
        "use_relative_position_bias": bias is not None and not bias.shared,
        "use_shared_relative_position_bias": bias is not None and bias.shared,
        "use_mean_pooling": vit.pool == "gap",
    }
    if not vit.final_norm:  # what BeitModel would have
        return "data2vec-vision", "Data2VecVisionModel", config
    return "beit", "BeitForImageClassification" if vit.num_classes else "BeitModel", config
