"""Settings that weights do not show: activation, epsilon, heads, preprocessing, label names.

timm and Hugging Face store them in the config.json of a folder, Google's code bases only in their
code. This module reads them, or falls back to each family's defaults; sidecars.py writes them.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoints import (
    architectures,
    families_eva,
    families_hf,
    families_naflex,
    families_relative,
    families_timm,
)
from vit_jax.checkpoints.card import numbers
from vit_jax.checkpoints.rows import Dialect
from vit_jax.data.labels import imagenet_labels
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError, nearest
from vit_jax.models.config import ModelConfig, ResNetConfig, ViTConfig
from vit_jax.models.rotary import Rotary
from vit_jax.models.variants import VARIANTS, variant_kind

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
HALF = {"mean": 0.5, "std": 0.5}

_HF_GELU = {
    "gelu": "erf",
    "gelu_python": "erf",
    "gelu_pytorch_tanh": "tanh",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "quick_gelu": "quick",
}
# Sizes that only SigLIP 2 has; SigLIP's other models have the same names and compute erf.
_TIMM_TANH = re.compile(r"giantopt|(base_patch32|so400m_patch16)_siglip|large\w*_siglip\w*_512")
_TIMM_GELU = {"gelu": "erf", "gelu_tanh": "tanh", "quick_gelu": "quick"}
# Arguments that are read in these cases alone.
_TIMM_IF: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "norm_layer": lambda args: args["norm_layer"] in ("layernorm", "rmsnorm"),
    "pool_include_prefix": lambda args: args.get("global_pool") == "map",
}
# PIL.Image.Resampling, with the nearest match for methods that we do not have.
_RESAMPLE = {2: "bilinear_antialias", 3: "bicubic_antialias"}
_NEAREST_RESAMPLE = {
    0: ("nearest", "bilinear_antialias"),
    1: ("lanczos", "bicubic_antialias"),
    4: ("box", "bilinear_antialias"),
    5: ("hamming", "bilinear_antialias"),
}
_TIMM_RESIZE = {"bicubic": "bicubic_antialias", "bilinear": "bilinear_antialias"}
# Class counts of models that were pre-trained on more than ImageNet-1k.
_MANY = {21841: "ImageNet-21k", 21843: "ImageNet-21k", 11821: "ImageNet-12k"}
_MANY |= {11221: "ImageNet-21k-P", 10450: "ImageNet-21k-P"}
_TIMM_NEAREST = {name: method for name, method in _NEAREST_RESAMPLE.values()}


def hints(dialect: Dialect, config: Mapping[str, Any], architecture: str | None) -> dict[str, Any]:
    """Returns the ViTConfig or ResNetConfig fields in a config.json, {} if there is none.

    Args:
      architecture: the result of `architectures.named`.

    Raises:
      UserError: a setting that our models do not support, or a value of another type.
    """
    if not config and architecture is None:
        return {}
    try:
        if dialect.name == "timm":
            config = {**config, "architecture": architecture or ""}
        if dialect.family == "resnet":
            return _timm_size(config) if dialect.name == "timm" else {}
        return {"timm": _timm_hints, "hf": _hf_hints}.get(dialect.name, lambda config: {})(config)
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"config.json is damaged: {error!r}") from None


def _hf_hints(config: Mapping[str, Any]) -> dict[str, Any]:
    config = config.get("vision_config") or config
    found: dict[str, Any] = {}
    if config.get("model_type") == "vit_msn":
        found["layernorm_eps"] = 1e-6  # where the others have 1e-12
    if config.get("pooler_act", "tanh") != "tanh":
        raise UserError(f"config.json: pooler_act {config['pooler_act']!r}; expected 'tanh'")
    if config.get("model_type") in ("beit", "data2vec-vision"):
        found["pool"] = "gap" if config.get("use_mean_pooling", True) else "token"
    if config.get("model_type") == "dinov3_vit":
        found |= {"layernorm_eps": 1e-5, "position": "rope"}
        found["rotary"] = Rotary(base=float(config.get("rope_theta", 100.0)))
        if config.get("use_gated_mlp") and config.get("hidden_act") != "silu":
            raise UserError(
                f"config.json: use_gated_mlp with hidden_act {config.get('hidden_act')!r}; "
                "expected 'silu'"
            )
    found |= families_hf.hints(config)
    gated = config.get("model_type") in ("aimv2_vision_model", "sapiens2")
    gated = gated or config.get("use_swiglu_ffn") or config.get("use_gated_mlp")
    if "hidden_act" in config and not gated:
        act = config["hidden_act"]
        if act not in _HF_GELU:
            raise UserError(f"config.json: hidden_act {act!r}; {nearest(act, _HF_GELU)}")
        found["gelu"] = _HF_GELU[act]
    names = {
        "num_attention_heads": "num_heads",
        "layer_norm_eps": "layernorm_eps",
        "rms_norm_eps": "layernorm_eps",
        "image_size": "image_size",
        **({"patch_size": "patch_size"} if "num_patches" in config else {}),  # flattened
        "hidden_size": "width",
        "num_hidden_layers": "depth",
    }
    found |= {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    return found


def _timm_hints(config: Mapping[str, Any]) -> dict[str, Any]:
    name = str(config.get("architecture", ""))
    settings = {**config, **(config.get("model_args") or {})}
    eva = name in architectures.TIMM_EVA
    known = architectures.arguments(name)
    for arg, value in (config.get("model_args") or {}).items():
        # None, False and "" are timm's unset values.
        if not eva and arg in _TIMM_IF and _TIMM_IF[arg](settings):
            continue
        if arg not in known and value not in (None, False, ""):
            raise UserError(
                f"config.json: model_args {arg}={value!r} may change what is computed, and no key "
                "shows it"
            )
    found: dict[str, Any] = {}
    if "act_layer" in settings:
        act = settings["act_layer"]
        if act == "silu" and name.startswith("aimv2_"):
            act = "gelu"  # which gated layers do not compute
        if act not in _TIMM_GELU:
            raise UserError(f"config.json: act_layer {act!r}; {nearest(act, _TIMM_GELU)}")
        found["gelu"] = _TIMM_GELU[act]
    elif "quickgelu" in name:
        found["gelu"] = "quick"
    elif name:
        found["gelu"] = "tanh" if _TIMM_TANH.search(name) else "erf"
    if name:
        found["layernorm_eps"] = 1e-5 if "_clip_" in name else 1e-6
        of_files = (families_eva, families_relative, families_timm)
        found |= next(filter(None, (each.said(name) for each in of_files)), {})
        found |= families_naflex.said(name, settings)
    if "num_heads" in settings:
        found["num_heads"] = settings["num_heads"]
    elif "giantopt" in name:
        found["num_heads"] = 16
    if settings.get("final_norm") is False:
        found["final_norm"] = False
    if settings.get("norm_layer"):
        found["norm"] = settings["norm_layer"]
    elif name:
        found.setdefault("norm", "layernorm")
    if settings.get("pool_include_prefix"):
        found["pool_prefix"] = True
    pools = {"token": "token", "avg": "gap", "map": "map"}
    if settings.get("global_pool") in pools:
        found["pool"] = pools[settings["global_pool"]]
    elif settings.get("global_pool"):
        raise UserError(
            f"config.json: global_pool {settings['global_pool']!r}; {nearest('', pools)}"
        )
    return {**found, **_timm_size(settings)}


def _timm_size(settings: Mapping[str, Any]) -> dict[str, Any]:
    size = settings.get("img_size") or (settings.get("pretrained_cfg") or {}).get("input_size")
    if size is None:
        return {}
    return {"image_size": tuple(size[-2:]) if isinstance(size, (list, tuple)) else size}


def position_resize(dialect: str, vit: ModelConfig) -> str:
    """How a family resizes position embeddings (see models/posembed.py)."""
    bias = getattr(vit, "relative_bias", None)
    if bias is not None and dialect in ("timm", "hf"):
        return "geometric" if dialect == "timm" else "bilinear"
    if method := getattr(vit, "native_resize", None):
        return method
    if dialect in ("hf", "dinov2") and isinstance(vit, ViTConfig):
        return "bicubic_antialias" if vit.registers else "bicubic"
    return "bicubic_antialias" if dialect == "timm" else "zoom"


def default_heads(width: int, mlp: str, rotary: bool = False) -> int | None:
    """Number of heads of the known models with this width; else width / 64, or None if unclear.

    `rotary` are DINOv3's, where heads have 64 channels, and 128 in its largest.
    """
    if rotary and width % 64 == 0:
        return 32 if width == 4096 else width // 64
    known = {v["width"]: v["num_heads"] for v in VARIANTS.values() if "width" in v}
    if width == 1536:
        return 24 if mlp == "swiglu" else 16  # DINOv2's giant, SigLIP 2's
    if width in known:
        return known[width]
    return width // 64 if width % 64 == 0 else None


def default_gelu_eps(dialect: str, fields: Mapping[str, Any]) -> tuple[str, float]:
    """Default activation and LayerNorm epsilon of a code base's models, given the known fields."""
    if dialect == "dinov2":
        return "erf", 1e-6
    if dialect == "timm":
        # Also BEiT-3.
        clip = fields.get("pre_norm") or fields.get("patch_norm") or fields.get("attention_norm")
        return "erf", 1e-5 if clip else 1e-6
    if dialect == "hf":
        if fields.get("pre_norm"):
            return "quick", 1e-5
        if fields["pool"] == "map":
            return "tanh", 1e-6
        if fields.get("norm") == "rmsnorm":
            return "erf", 1e-5 if fields.get("patch_norm") else 1e-6
        if fields.get("position") == "rope":
            return "erf", 1e-5
        if not fields.get("key_bias", True):  # BEiT's
            return "erf", 1e-12
        return "erf", 1e-6 if fields.get("layer_scale") else 1e-12
    return "tanh", 1e-6


def fitted_preprocess(preprocess: Preprocess, vit: ModelConfig) -> Preprocess:
    """Sets the model's size and channels; for other channel counts, means and stds are averaged.

    A model of images of any shape takes them whole.
    """
    changes: dict[str, Any] = {"image_size": vit.image_size, "max_patches": None}
    if getattr(vit, "max_patches", None) is not None:
        changes |= {"max_patches": vit.max_patches, "patch_size": vit.patch_size}
        changes |= {"aspect": "squash", "crop": 1.0}
    if preprocess.in_channels != vit.in_channels:
        changes["in_channels"] = vit.in_channels
        changes |= {name: float(np.mean(getattr(preprocess, name))) for name in ("mean", "std")}
    return dataclasses.replace(preprocess, **changes)


def read_preprocess(
    dialect: str,
    vit: ModelConfig,
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    assumed: dict[str, str],
) -> Preprocess:
    """Returns the evaluation preprocessing of a family; adds guesses to `assumed`.

    Raises:
      UserError: a setting that we do not support, or of another type.
    """
    base = {"image_size": vit.image_size, "in_channels": vit.in_channels}
    try:
        if dialect == "timm" and isinstance(config.get("pretrained_cfg"), Mapping):
            found = _timm_preprocess(config["pretrained_cfg"], assumed)
        elif dialect == "hf" and preprocessor:
            found = _hf_preprocess(preprocessor, assumed)
        else:
            found = _usual(dialect, vit)
            assumed["preprocess"] = "as usual for such models of this code base"
        for name in ("mean", "std"):
            if isinstance(found[name], tuple) and len(found[name]) != vit.in_channels:
                found[name] = sum(found[name]) / len(found[name])
        return Preprocess(**base, **found)
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the preprocessing beside the weights is damaged: {error!r}") from None


def _usual(dialect: str, vit: ModelConfig) -> dict[str, Any]:
    """Default preprocessing in each family's code, used if no file says it."""
    if dialect == "google":  # vit_jax/input_pipeline.py; for ResNets, big_transfer's
        return {"resize": "bilinear", "resize_dtype": "float32", "jpeg": "fast", **HALF}
    if dialect == "big_vision" and getattr(vit, "native_resize", None) is not None:
        # value_range(-1, 1)|resize_to_sequence(P, N), which casts nothing
        return {"resize": "bilinear_antialias", "resize_dtype": "float32", "jpeg": "fast", **HALF}
    if dialect == "big_vision":  # resize(S)|value_range(-1, 1)
        return {"resize": "bilinear", "resize_dtype": "truncated", "jpeg": "fast", **HALF}
    if isinstance(vit, ResNetConfig):
        return {"resize": "bilinear_antialias", "aspect": "keep", "crop": 0.875, **HALF}
    if vit.rotary is not None and vit.rotary.coordinates == "centred":  # DINOv3's
        if dialect == "hf":
            return {"resize": "bilinear_antialias", "resize_dtype": "float32", **IMAGENET}
        return {"resize": "bicubic_antialias", "aspect": "keep", **IMAGENET}
    biased = vit.relative_bias is not None  # BEiT's, preprocessed like AugReg's
    if vit.attention_norm and vit.key_bias and vit.mlp == "gelu":  # BEiT-3's
        return {"resize": "bicubic_antialias", "aspect": "keep", **IMAGENET}
    # CLIP's, AIMv2's, and EVA's:
    if (vit.pre_norm or vit.patch_norm or not vit.key_bias) and not biased:
        return {"resize": "bicubic_antialias", "aspect": "keep", **CLIP}
    if vit.pool == "map":
        return {"resize": "bicubic_antialias", **HALF}
    if (vit.distillation != "none" or vit.layer_scale is not None) and not biased:
        return {"resize": "bicubic_antialias", "aspect": "keep", "crop": 0.875, **IMAGENET}
    if dialect == "timm":  # AugReg's, and BEiT's
        return {"resize": "bicubic_antialias", "aspect": "keep", "crop": 0.9, **HALF}
    return {"resize": "bilinear_antialias", **HALF}


def _timm_preprocess(cfg: Mapping[str, Any], assumed: dict[str, str]) -> dict[str, Any]:
    mode = cfg.get("crop_mode") or "center"
    interpolation = cfg.get("interpolation") or "bicubic"
    if mode == "border":
        assumed["crop_mode"] = "squashed, where timm adds borders"
        mode = "squash"
    if interpolation == "random":  # which is how it was trained
        assumed["interpolation"] = "bicubic, timm's usual one: the config says 'random'"
        interpolation = "bicubic"
    elif interpolation in _TIMM_NEAREST:
        assumed["interpolation"] = _instead(interpolation, _TIMM_NEAREST[interpolation])
    methods = {**_TIMM_RESIZE, **_TIMM_NEAREST}
    for name, value, known in (
        ("crop_mode", mode, ("center", "squash", "border")),
        ("interpolation", interpolation, (*methods, "random")),
    ):
        if value not in known:
            raise UserError(f"pretrained_cfg: {name} {value!r}; {nearest(value, known)}")
    return {
        "resize": methods[interpolation],
        "aspect": "keep" if mode == "center" else "squash",
        "crop": numbers(cfg.get("crop_pct") or 0.875),
        "mean": numbers(cfg.get("mean", IMAGENET["mean"])),
        "std": numbers(cfg.get("std", IMAGENET["std"])),
    }


def _instead(name: str, method: str) -> str:
    return f"{method}, the nearest to {name!r}, which there is not"


def _hf_preprocess(cfg: Mapping[str, Any], assumed: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"mean": 0.0, "std": 1.0}
    if "DINOv3" in str(cfg.get("image_processor_type", "")):
        found["resize_dtype"] = "float32"  # it resizes after the division by 255
    resample = cfg.get("resample", 2)
    if type(resample) is not int or not 0 <= resample <= 5:
        raise UserError(f"preprocessor_config.json: resample {resample!r}; expected 0 to 5")
    if resample in _NEAREST_RESAMPLE:
        name, found["resize"] = _NEAREST_RESAMPLE[resample]
        assumed["resample"] = _instead(name, found["resize"])
    else:
        found["resize"] = _RESAMPLE[resample]
    if cfg.get("do_normalize", True):
        found["mean"] = numbers(cfg.get("image_mean", 0.5))
        found["std"] = numbers(cfg.get("image_std", 0.5))
    scale = cfg.get("rescale_factor", 1 / 255)
    if not cfg.get("do_rescale", True) or not math.isclose(scale, 1 / 255, rel_tol=1e-6):
        raise UserError(f"preprocessor_config.json: pixels are scaled by {scale}, not by 1/255")
    size, box = cfg.get("size", 224), cfg.get("crop_size")
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else None
    if shortest:
        found["aspect"] = "keep"
    if cfg.get("do_center_crop") and box:
        side = shortest or (size["height"] if isinstance(size, Mapping) else size)
        inner = box["height"] if isinstance(box, Mapping) else box
        found["crop"] = inner / side
    return found


def read_labels(
    vit: ModelConfig, config: Mapping[str, Any], assumed: dict[str, str]
) -> tuple[str, ...]:
    """Class names from config.json: all of them or none.

    Without names in the file, 1,000 classes get ImageNet's and others get numbers; names that do
    not match the head's size are replaced by numbers. `assumed` notes it.
    """
    count = vit.num_classes
    if not count:
        return ()
    numbered = tuple(str(i) for i in range(count))
    for key in ("id2label", "label_names"):
        names = config.get(key)
        if isinstance(names, Mapping):
            if set(names) != set(numbered):
                assumed["labels"] = f"numbers: {key} has {len(names)} other than 0 to {count - 1}"
                return numbered
            names = [names[i] for i in numbered]
        elif names is None or names == []:
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            assumed["labels"] = f"numbers: {key} is no list of texts"
            return numbered
        if len(names) != count:
            assumed["labels"] = f"numbers: {key} has {len(names)}, the head {count}"
            return numbered
        blank = [i for i, name in enumerate(names) if name in (f"LABEL_{i}", "")]
        if len(blank) == count:
            continue  # what transformers writes where nobody said anything
        if blank:
            assumed["labels"] = f"numbers: {key} has no name for class {blank[0]}"
            return numbered
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            places = [i for i, name in enumerate(names) if name == twice]
            assumed["labels"] = f"as {key} has them: classes {places} are all called {twice!r}"
        return tuple(names)
    if count == 1000:
        assumed["labels"] = "ImageNet-1k's, as there are 1,000 classes"
        return imagenet_labels()
    assumed["labels"] = "numbers: nothing says what they are"
    if count in _MANY:
        assumed["labels"] += f" (as many as in {_MANY[count]}, whose names are not here)"
    return numbered


def variant_name(config: ModelConfig) -> str:
    """The name of the variant with these sizes, such as "B/16" or "R50x1", or "custom"."""
    for name, sizes in VARIANTS.items():
        fields = {"resnet": None, **sizes}
        if variant_kind(sizes) is type(config) and all(
            getattr(config, field) == value for field, value in fields.items()
        ):
            if fields["resnet"] is not None:
                return name
            return f"{name}/" + "x".join(str(side) for side in dict.fromkeys(config.patch_size))
    return "custom"
