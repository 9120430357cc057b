"""What keys of NaFlex models do not say: their patches, and how they resize positions."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vit_jax.checkpoints import sidecars_eva
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig, pair
from vit_jax.models.posembed import ASPECT

# Patterns of timm's names, and the fields of their models.
_RADIO = dict(pool="token", final_norm=False)
_FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"naflexvit_(base|huge)_\w+_radio_v3", _RADIO | dict(native_resize="zoom_aspect")),
    (r"naflexvit_\w+_radio_v\d", _RADIO | dict(native_resize="bilinear_aspect")),
    (r"naflexvit_\w+_siglip", dict(pool="map", gelu="tanh", native_resize="bilinear_antialias")),
    (r"naflexvit_\w+_map", dict(pool="map", native_resize="bicubic_antialias")),
    (r"naflexvit_\w+_par_gap", dict(pool="gap", native_resize="bicubic_antialias_aspect")),
    (r"naflexvit_\w+_parfac_gap", dict(pool="gap", native_resize="bilinear_aspect")),
    (r"naflexvit_\w+_gap", dict(pool="gap", native_resize="bicubic_antialias")),
)
_METHODS = {  # mode, antialias and align_corners of timm -> a method of `posembed.resize`
    ("bilinear", False, True): "zoom",
    ("bilinear", False, False): "bilinear",
    ("bicubic", False, False): "bicubic",
    ("bilinear", True, False): "bilinear_antialias",
    ("bicubic", True, False): "bicubic_antialias",
}
_RESIZE = "pos_embed_interp_mode", "pos_embed_antialias", "pos_embed_align_corners"


def said(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields of a timm architecture of naflexvit.py; {} for a name of another file.

    Raises:
      UserError: a way to resize positions that we do not have.
    """
    fields = next((each for pattern, each in _FAMILIES if re.fullmatch(pattern, name)), None)
    if fields is None:
        return {}
    method, aspect = fields["native_resize"].removesuffix(ASPECT), "pos_embed_ar_preserving"
    keeps = settings.get(aspect, fields["native_resize"].endswith(ASPECT))
    factorized = settings.get("pos_embed", "factorized" if "_parfac_" in name else "learned")
    if factorized == "factorized":
        how = ("bilinear", False, False)
    else:
        usual = "bicubic_antialias" if "_parfac_" in name else method
        defaults = next(key for key, each in _METHODS.items() if each == usual)
        how = tuple(settings.get(key, value) for key, value in zip(_RESIZE, defaults, strict=True))
    if how not in _METHODS:
        told = ", ".join(f"{key}={value!r}" for key, value in zip(_RESIZE, how, strict=True))
        raise UserError(f"config.json: positions are not resized here by {told}")
    patch = re.search(r"_patch(\d+)", name)
    return {
        "layernorm_eps": 1e-6,
        "gelu": "erf",
        **fields,
        "native_resize": _METHODS[how] + (ASPECT if keeps else ""),
        "patch_size": pair(settings.get("patch_size", int(patch[1])), "patch_size"),
    }


def patches(
    pixels: int,
    given: Mapping[str, Any],
    path: str,
    assumed: dict[str, str],
) -> dict[str, Any]:
    """The patch size and channels of a linear patch embedding of `pixels` numbers a patch.

    Raises:
      UserError: they cannot be told.
    """
    if "patch_size" in given:
        ph, pw = pair(given["patch_size"], "patch_size")
        if pixels % (ph * pw) == 0:
            return {"patch_size": (ph, pw), "in_channels": pixels // (ph * pw)}
    elif (side := math.isqrt(pixels // 3)) and 3 * side**2 == pixels:
        assumed["patch_size"] = "square patches of RGB images: the file has them flattened"
        return {"patch_size": (side, side), "in_channels": 3}
    known = f" of {given['patch_size']} pixels" if "patch_size" in given else " of an RGB image"
    raise UserError(
        f"{path}: the patch embedding takes {pixels} numbers, which are no patch{known}"
    )


def positions(
    found: Mapping[str, Any],
    grid: tuple[int, int] | None,
    axis: Callable[[str, str], int],
    fields: Mapping[str, Any],
    path: str,
) -> dict[str, Any]:
    """The position embedding, and the image size of its grid, which has a row for patches alone.

    Raises:
      UserError: a table that is no grid, or one that timm would resize though the grid is its own.
    """
    ph, pw = fields["patch_size"]
    position = "learned"
    if "pos_embed_row" in found:
        position = "learned2d_added"
        grid = axis("pos_embed_row", "n"), axis("pos_embed_column", "n")
        if grid[0] != grid[1] and str(fields.get("native_resize")).endswith(ASPECT):
            raise UserError(
                f"{path}: tables of {grid[0]} rows and {grid[1]} columns, of which timm keeps the "
                "aspect, are resized even for images of that grid: only square ones are read here"
            )
    elif "pos_embed" not in found:
        position, grid = "none", (max(224 // ph, 1), max(224 // pw, 1))
    elif grid is None:  # SigLIP 2, where it is square
        rows = axis("pos_embed", "n")
        grid = (math.isqrt(rows),) * 2
        if grid[0] ** 2 != rows:
            raise UserError(f"{path}: a position embedding of {rows} rows is no square of patches")
    size = {"image_size": (grid[0] * ph, grid[1] * pw), "position": position}
    tokens = "cls_token" in found or fields.get("registers")
    return size | ({"position_prefix": 0} if tokens else {})


def cannot(vit: ViTConfig) -> Iterator[tuple[str, Any]]:
    """Yields config fields (with values) that no model of naflexvit.py has."""
    allowed: dict[str, tuple[Any, ...]] = {
        "pool": ("token", "gap", "map"),
        "patch_bias": (not vit.pre_norm,),
        "resnet": (None,),
        "distillation": ("none",),
        "representation_size": (None,),
        "mlp": ("gelu",),
        "position": ("learned", "learned2d", "learned2d_added", "none"),
    }
    if vit.pool == "map":  # whose attention always has them
        allowed["qkv_bias"] = (True,)
    if vit.position == "learned2d_added":
        allowed["native_resize"] = ("bilinear", "bilinear" + ASPECT)
        if vit.grid[0] != vit.grid[1]:
            allowed["native_resize"] = ("bilinear",)
    for field, values in allowed.items():
        if getattr(vit, field) not in values:
            yield field, getattr(vit, field)


def timm_args(vit: ViTConfig) -> tuple[str, dict[str, Any]]:
    """A timm architecture, and the arguments that turn it into this model."""
    method = vit.native_resize.removesuffix(ASPECT)
    how = next(key for key, each in _METHODS.items() if each == method)
    kinds = {"learned": "learned", "learned2d_added": "factorized", "none": "none"}
    sizes = sidecars_eva.timm_sizes(vit)
    del sizes["img_size"]
    return "naflexvit_base_patch16_gap", {
        **sizes,
        "mlp_ratio": (vit.mlp_dim + 0.5) / vit.width,
        "class_token": vit.has_class_token,
        "reg_tokens": vit.registers,
        "global_pool": {"token": "token", "gap": "avg", "map": "map"}[vit.pool],
        "fc_norm": vit.norm_after_pool,
        "qkv_bias": vit.qkv_bias,
        "init_values": vit.layer_scale,
        "pre_norm": vit.pre_norm,
        "final_norm": vit.final_norm,
        "act_layer": {"erf": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu"}[vit.gelu],
        "pos_embed": kinds[vit.position],
        "pos_embed_grid_size": list(vit.grid),
        **dict(zip(_RESIZE, how, strict=True)),
        "pos_embed_ar_preserving": vit.native_resize.endswith(ASPECT),
    }


def is_siglip2(vit: ViTConfig) -> bool:
    """Whether a model pools and resizes as transformers' Siglip2VisionModel does."""
    return vit.pool == "map" and vit.native_resize == "bilinear_antialias"


def is_big_vision(vit: ViTConfig) -> bool:
    """Whether a model has the tokens and positions of big_vision's naflex_vit.py."""
    square = vit.grid[0] == vit.grid[1]
    resized = square and vit.native_resize == "bilinear_antialias"
    return resized and vit.position.startswith("learned") and not vit.num_prefix_tokens
