"""Infers the model config from a weight file's names and shapes, and from given settings."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from vit_jax.checkpoints import families, families_naflex, families_relative
from vit_jax.checkpoints.files import Weights
from vit_jax.checkpoints.rows import Dialect, Found
from vit_jax.checkpoints.tables import (
    BIG_VISION,
    FLAX_CLIP,
    FLAX_DINOV2,
    GOOGLE,
    HF_DINOV2,
    HF_SIGLIP,
    RESNET_PAPER,
    TIMM,
    TIMM_BESIDE,
    TIMM_PARALLEL,
)
from vit_jax.checkpoints.tables_dinov2 import DINOV2
from vit_jax.checkpoints.tables_eva import HF_DINOV3, TIMM_EVA
from vit_jax.checkpoints.tables_hf import HF_AIMV2, HF_INTERNVL, HF_SAPIENS2
from vit_jax.checkpoints.tables_naflex import BIG_VISION_NAFLEX, NAFLEX, TIMM_NAFLEX
from vit_jax.checkpoints.tables_relative import HF_BEIT
from vit_jax.errors import UserError
from vit_jax.models.config import pair, resnet_stride


def infer(
    weights: Weights,
    dialect: Dialect,
    found: Mapping[str, Found],
    given: Mapping[str, Any],
    file_size: tuple[int, int] | None,
    assumed: dict[str, str],
    grid: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Infers the fields of the model's config from names, shapes, `given` settings and defaults.

    `grid` is that of the position table, where the file shows it.
    """
    axis = _axes(weights, dialect, found)
    if dialect.family == "resnet":
        return _classifier(dialect, found, given, file_size, axis, assumed)
    weights_prefix = next(iter(found.values())).prefix if found else ""
    fields: dict[str, Any] = {}
    if dialect in NAFLEX:
        shape = found["patch_embed/kernel"].shapes[0]
        pixels = math.prod(shape) // axis("patch_embed/kernel", "d")
        fields |= families_naflex.patches(pixels, given, weights.path, assumed)
    else:
        fields["patch_size"] = (axis("patch_embed/kernel", "p"), axis("patch_embed/kernel", "q"))
        fields["in_channels"] = axis("patch_embed/kernel", "c")
    if any(ours.startswith("resnet/") for ours in found):
        fields |= _resnet(dialect, found, axis)
    fields["width"] = width = axis("patch_embed/kernel", "d")
    fc1, fc2 = (axis("blocks/mlp/fc1/kernel", "o"), axis("blocks/mlp/fc2/kernel", "i"))
    fields["mlp_dim"] = fc2
    swiglu = (TIMM, TIMM_EVA, HF_DINOV2, HF_DINOV3, HF_AIMV2, HF_SAPIENS2, FLAX_DINOV2, DINOV2)
    gated = dialect in swiglu and fc1 == 2 * fc2
    fields["mlp"] = "swiglu" if gated else "gelu"
    first = found["blocks/mlp/fc1/kernel"]
    fields["depth"] = first.depth if first.row.per_block else first.shapes[0][0]
    fields["num_classes"] = axis("head/kernel", "o") if "head/kernel" in found else 0
    if "pre_logits/kernel" in found:
        fields["representation_size"] = axis("pre_logits/kernel", "o")
    if "registers" in found:
        fields["registers"] = axis("registers", "r")
    if "blocks/scale1" in found:
        fields["layer_scale"] = 1e-5
    fields["pre_norm"] = any(ours.startswith("pre_norm/") for ours in found)
    fields["patch_bias"] = "patch_embed/bias" in found
    fields["qkv_bias"] = "blocks/attention/qkv/bias" in found
    fields |= _norms_and_biases(found, width, axis)
    if dialect is TIMM_PARALLEL:
        fields |= {"parallel": True, "mlp_scale": True}
    if fields["norm"] == "rmsnorm" and "architecture" in assumed:
        assumed["norm"] = "as its norms have no bias"
    rotary = dialect in (HF_DINOV3, HF_SAPIENS2)
    if rotary:
        fields["position"] = "rope"
    if dialect is HF_INTERNVL:  # which has no last norm where it averages the patches
        given = {"pool": "token" if "norm/scale" in found else "gap", **given}
        fields["final_norm"] = "norm/scale" in found
    if "attention_pool/probe" in found:
        hidden = axis("attention_pool/mlp/fc1/kernel", "o")
        fields["pool_mlp_dim"] = None if hidden == fc2 else hidden
    bias = families_relative.shown(found, axis)
    fields["relative_bias"] = bias and bias[0]
    if (
        bias
        and dialect is TIMM
        and "blocks/scale1" not in found
        and "norm_after_branch" not in given
    ):
        raise UserError(
            f"{weights.path} has names of timm's vision_transformer_relpos.py, and no key shows "
            "whether its norms are before or behind each branch: say which of its models it is, "
            'architecture="NAME", or --set architecture=NAME'
        )
    # Of timm's models with these keys, the Perception Encoder alone has both.
    perception = dialect is TIMM and fields["pre_norm"] and "attention_pool/probe" in found
    eva = dialect is TIMM_EVA and bias is None  # BEiT's bias goes without
    if (eva or perception) and "rotary" not in given:
        raise UserError(
            f"{weights.path} has names of timm's eva.py, whose rotary positions no key shows: "
            'say which of its models it is, architecture="NAME", or --set architecture=NAME'
        )
    if dialect is TIMM_NAFLEX and "native_resize" not in given:
        raise UserError(
            f"{weights.path} has names of timm's naflexvit.py, whose way to resize positions no "
            'key shows: say which of its models it is, architecture="NAME", or --set '
            "architecture=NAME"
        )
    for ours, may_miss in {
        "patch_embed/bias": fields["pre_norm"],
        "blocks/attention/qkv/bias": dialect
        not in (GOOGLE, BIG_VISION, BIG_VISION_NAFLEX, HF_SIGLIP, FLAX_CLIP),
        "pos_embed": rotary
        or dialect in (BIG_VISION, TIMM, TIMM_PARALLEL, TIMM_BESIDE)
        or dialect in (TIMM_EVA, TIMM_NAFLEX, HF_BEIT),
    }.items():
        if ours not in found and not may_miss:
            row = next(row for row in dialect.rows if row.ours == ours)
            raise weights.missing(row.keys(weights_prefix)[0])
    if "dist_token" in found:
        fields["distillation"] = "head" if "head_dist/kernel" in found else "token"
    for each in found.values():
        fields |= each.row.says

    wide_head = "head/kernel" in found and axis("head/kernel", "i") == 2 * width
    pool = given.get("pool")
    if dialect is HF_BEIT and "norm/scale" not in found:  # a model that leaves the mean to others
        fields["final_norm"], pool = False, pool or "gap"
    fields["pool"] = _pool(weights, found, fields, wide_head, pool)
    if dialect is TIMM and "dist_token" in found and not fields["num_classes"]:
        assumed["pool"] = "alone, where timm's output without a head is the mean with dist_token"
    if ("cls_token" in found) != (fields["pool"] in ("token", "token_gap")):
        fields["class_token"] = "cls_token" in found

    qkv = found.get("blocks/attention/qkv/kernel")
    if qkv and qkv.row.heads_apart:
        fields["num_heads"] = axis("blocks/attention/qkv/kernel", "h")
    elif bias:
        fields["num_heads"] = bias[1]
    elif "num_heads" not in given:
        heads = families.default_heads(width, fields["mlp"], rotary)
        if heads is None:
            raise UserError(
                f"{weights.path}: the number of heads is not in the file, and no known model is "
                f"{width} wide: give num_heads="
            )
        fields["num_heads"] = heads
        assumed["num_heads"] = f"as in known models {width} wide"
    gelu, eps = families.default_gelu_eps(dialect.name, fields)
    for name, value in {"gelu": gelu, "layernorm_eps": eps}.items():
        if name not in given and (name, fields["mlp"]) != ("gelu", "swiglu"):
            fields[name] = value
            assumed[name] = f"as in {dialect.name}'s code"

    units = given.get("resnet", fields.get("resnet"))
    if (tuple(units) if isinstance(units, list) else units) != fields.get("resnet"):
        raise UserError(
            f"{weights.path}: resnet {units!r} does not fit its keys, which are of "
            f"{fields.get('resnet')}"
        )
    fields |= {k: v for k, v in given.items() if k not in ("image_size", "pool", "resnet")}
    fields["patch_size"] = pair(fields["patch_size"], "patch_size")
    if dialect in NAFLEX:
        fields.setdefault("native_resize", "bilinear_antialias")  # SigLIP 2's
        return fields | families_naflex.positions(found, grid, axis, fields, weights.path)
    fields |= _positions(weights, dialect, found, fields, given, file_size, axis, assumed)
    (h, w), (ph, pw) = fields["image_size"], fields["patch_size"]
    if dialect is HF_BEIT and bias and h // ph != w // pw:
        raise UserError(
            f"{weights.path}: its position bias is of a grid of {h // ph}x{w // pw}, and "
            "transformers' code mixes up both sides of one that is not square: it is not read"
        )
    return fields


def _norms_and_biases(
    found: Mapping[str, Found], width: int, axis: Callable[[str, str], int]
) -> dict[str, Any]:
    """Infers where norms are, of which kind, and which layers of a block have no bias."""
    fields: dict[str, Any] = {"norm": "layernorm"}
    for part in ("attention", "mlp"):
        fields[f"{part}_norm"] = f"blocks/{part}/norm/scale" in found
    if "blocks/norm1/scale" in found and "blocks/norm1/bias" not in found:
        fields["norm"] = "rmsnorm"
    fields["patch_norm"] = "patch_embed/norm/scale" in found
    if "blocks/attention/q_norm/scale" in found:
        size = axis("blocks/attention/q_norm/scale", "d")
        fields["qk_norm"] = "all" if size == width else "head"
    fields["differential"] = "blocks/attention/lambda_q1" in found
    layers = ("attention/out", "mlp/fc1", "mlp/fc2")
    fields["proj_bias"] = any(f"blocks/{layer}/bias" in found for layer in layers)
    fields["mlp_scale"] = "blocks/scale2" in found or "blocks/scale1" not in found
    return fields


def _classifier(dialect, found, given, file_size, axis, assumed) -> dict[str, Any]:
    """Infers the fields of a ResNetConfig."""
    fields = _resnet(dialect, found, axis)
    fields["num_classes"] = axis("head/kernel", "o") if "head/kernel" in found else 0
    fields |= given
    if dialect is RESNET_PAPER:
        assumed["resnet_style"] = "with zeros around what is pooled, as BiT; bit_paper.py has none"
    if file_size is not None:
        fields["image_size"] = file_size
    elif "image_size" not in given:
        fields["image_size"] = (224, 224)
        assumed["image_size"] = "not in the file: any size will do"
    return {**fields, "image_size": pair(fields["image_size"], "image_size")}


def _resnet(
    dialect: Dialect, found: Mapping[str, Found], axis: Callable[[str, str], int]
) -> dict[str, Any]:
    """Infers a ResNet's units a stage, width and input channels from the keys."""
    units = []
    for stage in range(1, 5):
        names = [ours for ours in found if ours.startswith(f"resnet/stage{stage}/")]
        if names:
            for number in range(1, stage + 1):  # raises where a first unit is missing
                axis(f"resnet/stage{number}/first/conv1/kernel", "o")
            units.append(1 + max(found[name].depth or 0 for name in names))
    return {
        "resnet": tuple(units),
        "resnet_width": axis("resnet/conv_root/kernel", "o"),
        "resnet_style": dialect.resnet_style,
        "in_channels": axis("resnet/conv_root/kernel", "i"),
    }


def _axes(
    weights: Weights, dialect: Dialect, found: Mapping[str, Found]
) -> Callable[[str, str], int]:
    """Returns a function (parameter, axis name of its layout) -> size of that axis in the file.

    It raises a UserError if the parameter is missing, or has another number of axes.
    """
    prefix = next(iter(found.values())).prefix if found else ""

    def axis(ours: str, name: str) -> int:
        if ours not in found or not found[ours].shapes:
            rows = [found[ours].row] if ours in found else dialect.rows
            keys = next(row.keys(prefix) for row in rows if row.ours == ours)
            raise weights.missing(next(k for k in keys if k not in weights.shapes))
        each = found[ours]
        shapes = each.shapes
        if each.row.in_stack and not each.row.per_block:
            shapes = [shape[1:] for shape in shapes]
        try:
            return each.row.axes(shapes)[name]
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{weights.path}: {each.row.keys(each.prefix)[0]} has the shape {list(shapes[0])}; "
                f"expected {error}"
            ) from None

    return axis


def _pool(
    weights: Weights,
    found: Mapping[str, Found],
    fields: Mapping[str, Any],
    wide_head: bool,
    given: str | None,
) -> str:
    """Infers the pooling: `given` if there is one, else the first kind that the keys allow."""
    if "attention_pool/probe" in found:
        possible = ("map",)
    elif "cls_token" not in found:
        possible = ("gap",)
    elif wide_head:
        possible = ("token_gap",)
    elif fields.get("norm_after_pool"):
        possible = ("gap", "token")
    else:
        possible = ("token", "gap", "token_gap") if not fields["num_classes"] else ("token", "gap")
    if given is not None and given not in possible:
        raise UserError(
            f"{weights.path}: pool {given!r} does not fit its keys, which are of {possible[0]!r}"
        )
    return given or possible[0]


def _positions(weights, dialect, found, fields, given, file_size, axis, assumed) -> dict[str, Any]:
    """Infers the grid, the position embedding's prefix rows, and from them the image size."""
    stride = resnet_stride(fields["resnet"]) if "resnet" in fields else 1
    ph, pw = (side * stride for side in fields["patch_size"])
    wanted = given.get("image_size")
    if wanted is not None:
        wanted = tuple(wanted) if isinstance(wanted, (list, tuple)) else (wanted, wanted)
        if len(wanted) != 2 or not all(isinstance(s, int) and s > 0 for s in wanted):
            raise UserError(f"{weights.path}: image_size {given['image_size']!r} is no (h, w)")
    if "pos_embed" not in found:
        position, bias = "sincos2d" if dialect is BIG_VISION else "none", fields["relative_bias"]
        if bias is not None:
            position = "relative_bias"
            given_grid = wanted and (wanted[0] // ph, wanted[1] // pw)
            grid = families_relative.grid_of(
                weights.path, bias, int("cls_token" in found), axis, given_grid
            )
            wanted = wanted if grid is None else (grid[0] * ph, grid[1] * pw)
        elif dialect in (HF_DINOV3, HF_SAPIENS2) or given.get("rotary") is not None:
            position = "rope"
        elif "position" in given:
            position = given["position"]
        else:
            assumed["position"] = "there is no position embedding in the file"
        if wanted is None and file_size is not None:
            wanted = file_size
        elif wanted is None:
            wanted = tuple(max(224 // p, 1) * p for p in (ph, pw))
            assumed["image_size"] = "not in the file"
        return {"position": position, "image_size": wanted}

    rows = axis("pos_embed", "n")
    prefix = (
        ("cls_token" in found)
        + (fields.get("distillation", "none") != "none")
        + fields.get("registers", 0)
    )
    without = prefix - fields.get("registers", 0)
    usual = {"big_vision": 0, "hf": without, "dinov2": without}.get(dialect.name, prefix)
    possible = range(prefix + 1)
    if given.get("position_prefix") is not None:
        usual = given["position_prefix"]
        possible = (usual,)
    # A given size is used if it fits the rows; a config.json may state another size.
    usable = None
    for size in (wanted, None if any(_side(rows - k) for k in possible) else file_size):
        if size is not None and rows - (size[0] // ph) * (size[1] // pw) in possible:
            usable = usable or size
    if usable is not None:
        grid = (usable[0] // ph, usable[1] // pw)
        count, size = rows - grid[0] * grid[1], (grid[0] * ph, grid[1] * pw)
    else:
        fits = [k for k in dict.fromkeys((usual, prefix, 1, 0)) if k in possible]
        fits = [k for k in fits if _side(rows - k)]
        if not fits:
            raise UserError(
                f"{weights.path}: a position embedding of {rows} rows, up to {prefix} of them for "
                "other tokens than patches, makes no square: give the image_size=(h, w) it is for"
            )
        count = fits[0]
        size = (_side(rows - count) * ph, _side(rows - count) * pw)
        if len(fits) > 1:
            assumed["position_prefix"] = f"{rows} rows could also have {fits[1]} for other tokens"
        elif count != usual:
            assumed["position_prefix"] = f"only so do {rows} rows make a square of patches"
    found = {"image_size": size}
    return found if count == prefix else {**found, "position_prefix": count}


def _side(count: int) -> int:
    """The side of a square of `count` patches, 0 if it is not a square number."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0
