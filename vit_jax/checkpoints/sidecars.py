"""Config files for timm and transformers, written by `save` next to the weights in a folder."""

import math
import re
from typing import Any

from vit_jax.checkpoints import (
    families_naflex,
    sidecars_eva,
    sidecars_hf,
    sidecars_relative,
    sidecars_timm,
)
from vit_jax.checkpoints.architectures import TIMM
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ModelConfig, ResNetConfig, ViTConfig
from vit_jax.models.variants import VARIANTS


def hf_files(vit: ViTConfig, pre: Preprocess, labels: tuple[str, ...]) -> dict[str, Any]:
    """The config.json and preprocessor_config.json for transformers.

    Without `labels` (their names are not known) it has those of transformers: LABEL_0, LABEL_1, ...
    """
    square = vit.image_size[0] == vit.image_size[1] and vit.patch_size[0] == vit.patch_size[1]
    if not square:
        raise UserError(f"transformers has square images and patches only, not {vit.image_size}")
    config: dict[str, Any] = {
        "hidden_act": sidecars_hf.GELUS[vit.gelu],
        "hidden_size": vit.width,
        "image_size": vit.image_size[0],
        "intermediate_size": vit.mlp_dim,
        "layer_norm_eps": vit.layernorm_eps,
        "num_attention_heads": vit.num_heads,
        "num_channels": vit.in_channels,
        "num_hidden_layers": vit.depth,
        "patch_size": vit.patch_size[0],
    }
    if vit.num_classes:
        labels = labels or tuple(f"LABEL_{i}" for i in range(vit.num_classes))
        config["id2label"] = {str(i): name for i, name in enumerate(labels)}
        config["label2id"] = {name: i for i, name in enumerate(labels)}
    head = vit.num_classes > 0
    others = (sidecars_hf.is_sapiens2, sidecars_hf.is_internvl, sidecars_timm.is_aimv2)
    if any(is_other(vit) for is_other in others):
        kind, name, other = sidecars_hf.config(vit)
        config |= other
    elif families_naflex.is_siglip2(vit):
        kind, name = "siglip2_vision_model", "Siglip2VisionModel"
        del config["image_size"]
        config["num_patches"] = math.prod(vit.grid)
    elif sidecars_eva.is_dinov3(vit):
        kind, name = "dinov3_vit", "DINOv3ViTModel"
        config |= sidecars_eva.hf_config(vit)
    elif sidecars_relative.is_hf_beit(vit):
        kind, name, beside = sidecars_relative.hf_config(vit)
        config |= beside
    elif vit.pool == "map":
        kind, name = "siglip_vision_model", "SiglipVisionModel"
    elif vit.pre_norm:
        kind, name = "clip_vision_model", "CLIPVisionModel"
    elif vit.layer_scale is not None:
        kind, name = "dinov2", "Dinov2"
        if vit.registers:
            kind, name = "dinov2_with_registers", "Dinov2WithRegisters"
            config["num_register_tokens"] = vit.registers
        name += "ForImageClassification" if head else "Model"
        config |= {"layerscale_value": vit.layer_scale, "qkv_bias": vit.qkv_bias}
        if not vit.registers:
            config["use_mask_token"] = False
        config["use_swiglu_ffn"] = vit.mlp == "swiglu"
        config["mlp_ratio"] = _hf_mlp_ratio(vit)
        del config["intermediate_size"]
    elif vit.distillation != "none":
        kind = "deit"
        name = "DeiTForImageClassification" if head else "DeiTModel"
        name += "WithTeacher" if vit.distillation == "head" else ""
    else:
        kind, name = "vit", "ViTForImageClassification" if head else "ViTModel"
        config["qkv_bias"] = vit.qkv_bias
    if vit.representation_size:
        config["pooler_output_size"] = vit.representation_size
    config |= {"model_type": kind, "architectures": [name], "dtype": "float32"}
    processor = _hf_processor(kind, pre)
    if kind == "siglip2_vision_model":
        for name in ("size", "do_center_crop", "crop_size"):
            processor.pop(name, None)
        processor["patch_size"] = vit.patch_size[0]
        processor["max_num_patches"] = vit.max_patches or math.prod(vit.grid)
    return {"config.json": config, "preprocessor_config.json": processor}


def _hf_mlp_ratio(vit: ViTConfig) -> int | float:
    """MLP ratio for DINOv2's config; SwiGLU's hidden size is 2/3 of it, up to a multiple of 8."""
    if vit.mlp == "gelu":
        return vit.mlp_dim / vit.width if vit.mlp_dim % vit.width else vit.mlp_dim // vit.width
    for ratio in range(1, 33):
        if (int(vit.width * ratio * 2 / 3) + 7) // 8 * 8 == vit.mlp_dim:
            return ratio
    raise UserError(
        f"transformers has no SwiGLU of {vit.mlp_dim} hidden units and {vit.width} wide"
    )


def _hf_processor(kind: str, pre: Preprocess) -> dict[str, Any]:
    h, w = pre.image_size
    classes = {
        "deit": "DeiTImageProcessor",
        "beit": "BeitImageProcessor",
        "data2vec-vision": "BeitImageProcessor",
        "dinov2": "BitImageProcessor",
        "dinov2_with_registers": "BitImageProcessor",
        "dinov3_vit": "DINOv3ViTImageProcessor",
        "siglip_vision_model": "SiglipImageProcessor",
        "siglip2_vision_model": "Siglip2ImageProcessor",
        "clip_vision_model": "CLIPImageProcessor",
    }
    found = {
        "image_processor_type": classes.get(kind, "ViTImageProcessor"),
        "do_resize": True,
        "resample": 3 if pre.resize.startswith("bicubic") else 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _per_channel(pre.mean, pre.in_channels),
        "image_std": _per_channel(pre.std, pre.in_channels),
    }
    outer = math.floor(h / pre.crop)
    found["size"] = (
        {"shortest_edge": outer}
        if pre.aspect != "squash"
        else {"height": outer, "width": math.floor(w / pre.crop)}
    )
    found["do_center_crop"] = pre.aspect != "squash" or pre.crop < 1
    if found["do_center_crop"]:
        found["crop_size"] = {"height": h, "width": w}
    return found


def _per_channel(value: Any, channels: int) -> list[float]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * channels


# timm's word for a width, depth, number of heads and mlp_dim.
_TIMM_SIZES = {
    (192, 12, 3, 768): "tiny",
    (256, 10, 4, 1024): "xsmall",
    (256, 14, 4, 1280): "wee",
    (320, 14, 5, 1792): "little",
    (384, 12, 6, 1536): "small",
    (512, 12, 8, 2048): "medium",
    (512, 20, 8, 2048): "mediumd",
    (640, 12, 10, 2560): "betwixt",
    (768, 12, 12, 3072): "base",
    (832, 21, 13, 2176): "so150m2",
    (896, 18, 14, 2304): "so150m",
    (1024, 24, 16, 4096): "large",
    (1152, 27, 16, 4304): "so400m",
    (1280, 32, 16, 5120): "huge",
    (1408, 40, 16, 6144): "giant",
    (1536, 40, 16, 6144): "giantopt",
    (1536, 40, 24, 4096): "giant",
    (1664, 48, 16, 8192): "gigantic",
}
# timm's hybrids and BiT ResNets, by units and width: how the name goes on, and one to change.
_TIMM_HYBRIDS = {
    ((), 64): ("r_s16_p8", "vit_tiny_r_s16_p8_224"),
    ((2, 2, 2, 2), 64): ("r26_s32", "vit_base_r26_s32_224"),
    ((3, 4, 9), 64): ("r50_s16", "vit_base_r50_s16_224"),
    ((3, 4, 6, 3), 64): ("r50_s32", "vit_large_r50_s32_224"),
}
_TIMM_RESNETS = {
    (VARIANTS[name]["resnet"], VARIANTS[name]["resnet_width"]): f"resnetv2_{name[1:]}_bit"
    for name in ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")
}


def timm_files(model: ModelConfig, pre: Preprocess, labels: tuple[str, ...]) -> dict[str, Any]:
    """The config.json for `timm.create_model("local-dir:FOLDER")`.

    timm has no argument for a LayerNorm epsilon: CLIP's architectures have 1e-5, the others 1e-6.
    Nor has it one for the units of a ResNet: only the named architectures can be built. Without
    `labels` (their names are not known) it has none.

    Raises:
      UserError: timm has no architecture for this model.
    """
    named = {"first_conv": "patch_embed.proj", "classifier": "head"}
    if isinstance(model, ResNetConfig):
        named = {"first_conv": "stem.conv", "classifier": "head.fc"}
        architecture = _timm_named(_TIMM_RESNETS, (model.resnet, model.resnet_width))
        args, pool = {"in_chans": model.in_channels}, "avg"
    else:
        architecture, args = _timm_vit(model)
        pool = args["global_pool"]
        if model.resnet is not None:
            stem = "backbone.stem" if model.resnet else "backbone"
            named["first_conv"] = f"patch_embed.{stem}.conv"
        if architecture.startswith("naflexvit"):
            named["first_conv"] = "embeds.proj"
        if model.distillation == "head":
            named["classifier"] = ["head", "head_dist"]
    methods = {"bicubic_antialias": "bicubic"}
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.width,
        "global_pool": pool,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [model.in_channels, *model.image_size],
            "fixed_input_size": isinstance(model, ViTConfig),
            "interpolation": methods.get(pre.resize, "bilinear"),
            "crop_pct": pre.crop,
            "crop_mode": "squash" if pre.aspect == "squash" else "center",
            "mean": _per_channel(pre.mean, pre.in_channels),
            "std": _per_channel(pre.std, pre.in_channels),
            "num_classes": model.num_classes,
            **named,
        },
    }
    if labels:
        config["label_names"] = list(labels)
    return {"config.json": config}


def timm_name(vit: ViTConfig) -> str | None:
    """timm's name of an architecture, at its nearest resolution; None if it has no such."""
    size = _TIMM_SIZES.get((vit.width, vit.depth, vit.num_heads, vit.mlp_dim))
    (patch, across), learned = vit.patch_size, vit.position == "learned"
    clip = vit.layernorm_eps == 1e-5
    if vit.relative_bias is not None or sidecars_eva.is_eva(vit) or vit.native_resize is not None:
        return None
    if vit.norm_after_branch or vit.attention_norm or vit.mlp_norm:
        return sidecars_relative.timm_name(vit, size)
    if not sidecars_timm.is_plain(vit):
        return None
    if size is None or patch != across or not learned or vit.pre_norm != clip:
        return None
    swiglu = size == "giant" and vit.width == 1536
    if (vit.mlp == "swiglu") != swiglu:
        return None
    scaled, count = vit.layer_scale is not None, vit.registers
    apart = vit.num_position_prefix == 0  # no position of the class token
    start, registers = f"vit_{size}_patch{patch}", f"_reg{count}" if count else ""
    token = vit.pool == "token"
    plain = vit.has_class_token and not scaled and not count and not apart
    if vit.resnet is not None:
        named = _timm_named(_TIMM_HYBRIDS, (vit.resnet, vit.resnet_width))[0]
        name = f"vit_{size}_{named}" if plain else None
    elif vit.distillation != "none":
        name = f"deit_{size}_distilled_patch{patch}"
    elif vit.pool == "map":
        name = None if scaled else f"{start}{registers}_{'map' if count else 'siglip'}"
    elif not vit.has_class_token:
        name = f"{start}{registers}_gap"
        if not scaled and not count and any(n.startswith(f"{start}_siglip_gap") for n in TIMM):
            name = f"{start}_siglip_gap"
    elif plain:
        name = start + ("_clip" if clip else "") + ("_quickgelu" if vit.gelu == "quick" else "")
    elif token and scaled and (count or not apart):
        name = f"{start}{registers}_{'tipsv2' if count == 1 else 'dinov2'}"
    elif token and not count:
        name = f"deit3_{size}_patch{patch}" if scaled else f"flexivit_{size}"
    else:
        name = None
    if name in TIMM:
        return name
    sizes = {int(n.removeprefix(f"{name}_")): n for n in TIMM if re.fullmatch(rf"{name}_\d+", n)}
    return sizes[min(sizes, key=lambda side: abs(side - vit.image_size[0]))] if sizes else None


def _timm_named(names: dict[Any, Any], sizes: tuple[tuple[int, ...], int]) -> Any:
    if sizes not in names:
        raise UserError(
            f"timm has no architecture with a ResNet of {sizes[0]} units and {sizes[1]} channels: "
            "write a FILE.safetensors, without a config"
        )
    return names[sizes]


def _timm_vit(vit: ViTConfig) -> tuple[str, dict[str, Any]]:
    """A timm architecture, and the arguments that turn it into this model."""
    if vit.relative_bias is not None:
        return sidecars_relative.timm_args(vit, sidecars_eva.timm_sizes(vit))
    if sidecars_eva.is_eva(vit):
        return sidecars_eva.timm_args(vit)
    if vit.native_resize is not None:
        return families_naflex.timm_args(vit)
    gelus = {"erf": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu"}
    args: dict[str, Any] = {
        **sidecars_eva.timm_sizes(vit),
        "mlp_ratio": (vit.mlp_dim * (2 if vit.mlp == "swiglu" else 1) + 0.5) / vit.width,
        "class_token": vit.has_class_token,
        "global_pool": {"token": "token", "gap": "avg", "map": "map"}[vit.pool],
        "fc_norm": vit.norm_after_pool,
        "qkv_bias": vit.qkv_bias,
        "init_values": vit.layer_scale,
        "reg_tokens": vit.registers,
        "no_embed_class": vit.num_position_prefix == 0,
        "pos_embed": "learn" if vit.position == "learned" else "none",
        "pre_norm": vit.pre_norm,
        "act_layer": gelus[vit.gelu],
        **sidecars_timm.args(vit),
    }
    if sidecars_timm.is_aimv2(vit):  # where nothing but the gate has an activation
        args |= {"act_layer": "silu", "mlp_ratio": (vit.mlp_dim + 0.5) / vit.width}
    other, norms = sidecars_relative.timm_norms(vit)
    args |= norms
    if other := other or sidecars_timm.base(vit):
        return other, args
    if name := timm_name(vit):
        if vit.mlp == "swiglu":
            del args["act_layer"]
        return name, args
    architecture = "vit_base_patch16_224"
    if vit.layernorm_eps == 1e-5:
        architecture = "vit_base_patch16_clip_224"
    if vit.mlp == "swiglu":
        architecture = "vit_giant_patch14_dinov2"
        del args["act_layer"]
    if vit.distillation != "none":
        architecture = "deit_base_distilled_patch16_224"
    if vit.resnet is not None:
        architecture = _timm_named(_TIMM_HYBRIDS, (vit.resnet, vit.resnet_width))[1]
    return architecture, args
