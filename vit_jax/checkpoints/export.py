"""`vit_jax.save`: exports weights to other code bases' formats, and checks that they read back."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import nnx
from flax.traverse_util import flatten_dict

from vit_jax.checkpoints import (
    families_naflex,
    programs,
    sidecars,
    sidecars_eva,
    sidecars_hf,
    sidecars_relative,
    sidecars_timm,
    tables_parallel,
)
from vit_jax.checkpoints.card import Line, Report
from vit_jax.checkpoints.convert import interpret, shapes_of
from vit_jax.checkpoints.files import Weights, write_weights
from vit_jax.checkpoints.load import Loaded
from vit_jax.checkpoints.opened import facts
from vit_jax.checkpoints.rows import Dialect, Row
from vit_jax.checkpoints.tables import (
    BIG_VISION,
    GOOGLE,
    HF_DINOV2,
    HF_SIGLIP,
    HF_VIT,
    RESNET_BIT,
    RESNET_PAPER,
    RESNET_TIMM,
    RESNET_V1,
    TIMM,
    TIMM_BESIDE,
    TIMM_PARALLEL,
    native,
)
from vit_jax.checkpoints.tables_eva import HF_DINOV3, TIMM_EVA
from vit_jax.checkpoints.tables_hf import HF_AIMV2, HF_INTERNVL, HF_SAPIENS2
from vit_jax.checkpoints.tables_naflex import (
    BIG_VISION_NAFLEX,
    HF_SIGLIP2,
    NAFLEX,
    TIMM_NAFLEX,
    on_grid,
)
from vit_jax.checkpoints.tables_relative import HF_BEIT
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError, nearest
from vit_jax.models import posembed, positions
from vit_jax.models.config import ModelConfig, ResNetConfig, ViTConfig
from vit_jax.models.create import Model
from vit_jax.models.lora import merged
from vit_jax.models.resnet import STYLES
from vit_jax.writing import check_own, write_atomically

_FLAX = (GOOGLE, BIG_VISION, BIG_VISION_NAFLEX)
_VISION_TRANSFORMER = (TIMM, TIMM_PARALLEL, TIMM_BESIDE)  # timm's file of that name
_RESPELT = (GOOGLE, TIMM, TIMM_BESIDE, HF_VIT, HF_DINOV2, HF_SIGLIP)  # which have no sincos2d
FORMATS = ("google", "big_vision", "timm", "hf", "vit_jax")
ADAPTER = "lora"  # not a format of whole models
# Endings of files: a path with one of them is not a folder.
_NO_FOLDERS = {
    *(".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".h5", ".hdf5", ".keras"),
    *(".msgpack", ".gguf", ".tflite", ".pb", ".pt2", ".npy", ".tar", ".zip", ".gz", ".json"),
}
# Fields that weights do not show in any format, only a config next to them does.
_SAID_ELSEWHERE = (
    *("gelu", "layernorm_eps", "layer_scale", "dropout", "drop_path", "patch_dropout"),
    *("head_bias", "dtype", "attention", "scan", "remat", "resnet_style"),
)


def choose(format: str, config: ModelConfig) -> Dialect:
    """Returns the dialect to write a model in."""
    if format not in FORMATS:
        raise UserError(f"format {format!r}: {nearest(format, [*FORMATS, ADAPTER])}")
    if format == "vit_jax":
        return native(shapes_of(config))
    if isinstance(config, ResNetConfig):
        if STYLES[config.resnet_style].preact:
            known = {"google": RESNET_BIT, "big_vision": RESNET_PAPER, "timm": RESNET_TIMM}
        else:
            known = {"big_vision": RESNET_V1}
        if format not in known:
            raise UserError(
                f"{format} has no ResNets of style {config.resnet_style}: "
                f"{nearest(format, [*known, 'vit_jax'])}"
            )
        return known[format]
    if format == "hf":
        if sidecars_hf.is_sapiens2(config):
            return HF_SAPIENS2
        if families_naflex.is_siglip2(config):
            return HF_SIGLIP2
        if sidecars_eva.is_dinov3(config):
            return HF_DINOV3
        if sidecars_timm.is_aimv2(config):
            return HF_AIMV2
        if sidecars_hf.is_internvl(config):
            return HF_INTERNVL
        if sidecars_relative.is_hf_beit(config):
            return HF_BEIT
        if config.pool == "map" or config.pre_norm:
            return HF_SIGLIP
        return HF_DINOV2 if config.layer_scale is not None else HF_VIT
    eva, biased = sidecars_eva.is_eva(config), config.relative_bias is not None
    timm = TIMM if config.native_resize is None else TIMM_NAFLEX
    timm = TIMM_EVA if (sidecars_relative.is_beit(config) if biased else eva) else timm
    timm = TIMM_BESIDE if config.branches > 1 else timm
    timm = TIMM_PARALLEL if config.parallel else timm
    big_vision = BIG_VISION_NAFLEX if families_naflex.is_big_vision(config) else BIG_VISION
    return {"google": GOOGLE, "big_vision": big_vision, "timm": timm}[format]


def to_names(
    params: Mapping[str, Any], config: ModelConfig, format: str
) -> tuple[dict[str, np.ndarray], ModelConfig, dict[str, str]]:
    """Renames and rearranges parameters into a code base's format.

    Args:
      params: arrays by our paths, "blocks/mlp/fc1/kernel".

    Returns:
      Arrays by the format's names; the config that reads them back, which may store prefix tokens
      and positions differently for the same function; and notes on such changes, by parameter.

    Raises:
      UserError: the format cannot hold the model.
    """
    dialect = choose(format, config)
    params, notes = {name: np.asarray(value) for name, value in params.items()}, {}
    if isinstance(config, ViTConfig):
        for field, value in _cannot(dialect, config):
            raise UserError(f"{format} has no models with model.{field}={value!r}")
        params, config, notes = _respell(params, config, dialect)
    prefix = _written_prefix(dialect, config)
    arrays: dict[str, np.ndarray] = {}
    for ours, value in params.items():
        row = _written_row(dialect, ours, config)
        if row is None:
            raise UserError(f"{format} files have no place for {ours} {list(value.shape)}")
        if row.per_block:
            for block in range(value.shape[0]):
                pieces = row.write(value[block])
                arrays |= zip(row.keys(prefix, block), pieces, strict=True)
        else:
            arrays |= zip(row.keys(prefix), row.write(value), strict=True)
    arrays = tables_parallel.joined(arrays) if dialect is TIMM_PARALLEL else arrays
    if dialect in NAFLEX:
        arrays = on_grid(arrays, config.grid, dialect, prefix)
    _read_back(arrays, config, dialect)
    return arrays, config, notes


def _cannot(dialect: Dialect, config: ViTConfig) -> Iterator[tuple[str, Any]]:
    """Yields config fields (with values) that the code base's own models do not support."""
    head = config.num_classes > 0
    allowed: dict[str, tuple[Any, ...]] = {}
    if dialect.name in ("big_vision", "hf"):
        allowed["resnet"] = (None,)
    elif config.resnet is not None and dialect.name != "vit_jax":
        allowed["resnet_style"] = tuple(name for name, style in STYLES.items() if not style.preact)
    if dialect in _FLAX:
        allowed |= {"qkv_bias": (True,), "patch_bias": (True,), "mlp": ("gelu",)}
        allowed["pool"] = ("token", "gap") if dialect is GOOGLE else ("token", "gap", "map")
    elif dialect in (TIMM, TIMM_EVA) and config.relative_bias is not None:
        yield from sidecars_relative.cannot(config)
    elif dialect is HF_BEIT:
        yield from sidecars_relative.hf_cannot(config)
    elif dialect in _VISION_TRANSFORMER:
        allowed |= {"pool": ("token", "gap", "map"), "patch_bias": (not config.pre_norm,)}
        allowed["distillation"] = ("none", "head" if head else "token")
        yield from sidecars_timm.cannot(config)
        if config.resnet is not None:
            allowed |= {"distillation": ("none",), "mlp": ("gelu",)}
        if config.norm_after_branch:  # which in timm is without these
            allowed |= {"layer_scale": (None,), "mlp": ("gelu",), "attention_norm": (False,)}
            allowed |= {"mlp_norm": (False,), "distillation": ("none",), "pre_norm": (False,)}
    elif dialect is TIMM_EVA:
        yield from sidecars_eva.cannot(config)
    elif dialect is TIMM_NAFLEX:
        yield from families_naflex.cannot(config)
    elif dialect is HF_DINOV3:
        allowed |= {"pool": ("token",), "class_token": (None, True), "num_classes": (0,)}
        allowed |= {"patch_bias": (True,), "distillation": ("none",), "pre_norm": (False,)}
        allowed |= {"position": ("rope",), "representation_size": (None,)}
        for field in ("layer_scale", "registers"):  # which its code always has
            if not getattr(config, field):
                yield field, getattr(config, field)
    elif dialect in (HF_AIMV2, HF_INTERNVL, HF_SAPIENS2):
        allowed |= sidecars_hf.allowed(config)
    elif dialect is HF_VIT:
        allowed |= {"pool": ("token",), "patch_bias": (True,), "mlp": ("gelu",)}
        allowed["representation_size"] = (None, *(() if head else (config.representation_size,)))
    elif dialect is HF_DINOV2:
        allowed |= {"pool": ("token_gap" if head else "token",), "patch_bias": (True,)}
    elif dialect in (HF_SIGLIP, HF_SIGLIP2):
        allowed |= {"patch_bias": (config.pool == "map",), "pre_norm": (config.pool != "map",)}
        allowed |= {"pool": ("map", "token"), "num_classes": (0,), "qkv_bias": (True,)}
        allowed["mlp"] = ("gelu",)
    if dialect.name != "vit_jax":
        if config.pool in ("none", "locations"):
            yield "pool", config.pool
        allowed["position_at"] = ("input",)
        allowed["branches"] = (2 if dialect is TIMM_BESIDE else 1,)
        if dialect not in (TIMM_EVA, HF_DINOV3, HF_SAPIENS2):
            allowed["rotary"] = (None,)
            allowed["key_bias"] = (True, dialect is not HF_BEIT)
        if dialect not in (TIMM, TIMM_EVA):
            allowed |= {"attention_norm": (False,), "mlp_norm": (False,)}
        if dialect not in (TIMM, TIMM_EVA, HF_BEIT):
            allowed["relative_bias"] = (None,)
        if dialect is not TIMM_EVA:
            allowed |= {"pool_heads": (None, config.num_heads)}
            allowed["pool_mlp_dim"] = (None, config.mlp_dim)
        if dialect not in (TIMM, TIMM_PARALLEL):
            allowed |= {"differential": (False,), "parallel": (False,)}
        if dialect not in (TIMM, TIMM_PARALLEL, TIMM_EVA):
            allowed |= {"norm_after_branch": (False,), "pool_prefix": (False,)}
        if (dialect.name == "hf" and dialect not in (HF_AIMV2, HF_INTERNVL, HF_SAPIENS2)) or (
            dialect in _FLAX
        ):
            allowed |= {"norm": ("layernorm",), "qk_norm": ("none",), "patch_norm": (False,)}
            allowed |= {"mlp_scale": (True,), "proj_bias": (True,)}
            allowed["final_norm"] = (True, dialect is not HF_BEIT)
    if config.position == "relative" and dialect.name != "vit_jax":
        yield "position", "relative"
    if dialect.name in ("google", "hf") and config.position == "none":
        yield "position", "none"
    if (
        dialect in (BIG_VISION, HF_SIGLIP, HF_SIGLIP2)
        and config.pool == "map"
        and config.has_class_token
    ):
        yield "class_token", True
    for field, values in allowed.items():
        if getattr(config, field) not in values:
            yield field, getattr(config, field)


def _written_row(dialect: Dialect, ours: str, config: ModelConfig) -> Row | None:
    return next(
        (
            row
            for row in dialect.rows
            if row.ours == ours
            and all(getattr(config, k) == v for k, v in (*row.says.items(), *row.only.items()))
        ),
        None,
    )


def _written_prefix(dialect: Dialect, config: ModelConfig) -> str:
    """Prefix of written names; Hugging Face puts a classifier's encoder under its family's name."""
    if dialect.name != "hf":
        return dialect.prefixes[0]
    if not config.num_classes:
        return ""
    if dialect is HF_VIT:
        return "vit." if config.distillation == "none" else "deit."
    if dialect is HF_BEIT:
        return "beit."
    if dialect is HF_DINOV2:
        return "dinov2_with_registers." if config.registers else "dinov2."
    return ""


def _respell(
    params: dict[str, np.ndarray], config: ViTConfig, dialect: Dialect
) -> tuple[dict[str, np.ndarray], ViTConfig, dict[str, str]]:
    """Converts positions to the form of the dialect: learned tables, rows for prefix tokens.

    A prefix token's position can be a row of the table or be added to the token itself; x + p is
    the same. A token without a row gets one of zeros where the dialect needs it.
    """
    done: list[str] = []
    factorized = dialect is TIMM_NAFLEX and config.position == "learned2d_added"
    if config.position == "sincos2d" and dialect in _RESPELT:
        table = posembed.sincos2d(config.grid, config.width)
        config = dataclasses.replace(config, position="learned", position_prefix=0)
        params["pos_embed"] = table
        done.append("sincos2d, written out as an embedding")
    elif config.position.startswith("learned2d") and dialect.name != "vit_jax" and not factorized:
        tables = {name: params.pop(name) for name in positions.table_shapes(config)}
        params["pos_embed"] = positions.one_table(tables, config)
        done.append(f"{config.position}, written out as one table")
        config = dataclasses.replace(config, position="learned")
    if config.position != "learned":
        return params, config, {}
    prefix, rows = config.num_prefix_tokens, config.num_position_prefix
    wanted = {
        "google": (prefix,),
        "big_vision": (0,),
        "timm": (0,) if dialect is TIMM_NAFLEX else (prefix, 0),
        "hf": (prefix - config.registers,),
    }.get(dialect.name, (rows,))
    if rows in wanted:
        return params, config, {"pos_embed": done[0]} if done else {}
    count = wanted[0] if rows < wanted[0] else max(w for w in wanted if w < rows)
    table = params["pos_embed"]
    if count > rows:
        zeros = np.zeros((count - rows, config.width), np.float32)
        params["pos_embed"] = np.concatenate([table[:rows], zeros, table[rows:]])
        done.append(f"{count - rows} prefix tokens got a row of zeros")
    else:
        offset = 0
        for name in ("cls_token", "dist_token", "registers"):
            if name in params:
                token = np.array(params[name])
                here = table[max(offset, count) : min(offset + token.shape[1], rows)]
                start = max(count - offset, 0)
                token[0, start : start + len(here)] += here
                params[name] = token
                offset += token.shape[1]
        params["pos_embed"] = np.concatenate([table[:count], table[rows:]])
        done.append(f"the rows of {rows - count} prefix tokens were added to them")
    config = dataclasses.replace(config, position_prefix=None if count == prefix else count)
    return params, config, {"pos_embed": ", ".join(done)}


def _read_back(arrays: Mapping[str, np.ndarray], config: ModelConfig, dialect: Dialect) -> None:
    """Raises unless the same model can be inferred from the names and shapes."""
    if dialect.name == "vit_jax":
        return
    weights = Weights(f"a file of {dialect.name}")
    for name, array in arrays.items():
        weights.add(name, array.shape, "float32")
    fields = [field.name for field in dataclasses.fields(config)]
    settings = {name: getattr(config, name) for name in _SAID_ELSEWHERE if name in fields}
    settings |= {
        name: getattr(config, name) for name in ("num_heads", "image_size") if name in fields
    }
    if dialect in (*_VISION_TRANSFORMER, TIMM_EVA, TIMM_NAFLEX):
        settings |= {"pool": config.pool, "norm_after_branch": config.norm_after_branch}
    if dialect in NAFLEX:
        settings |= {name: getattr(config, name) for name in ("native_resize", "patch_size")}
    if dialect in (*_VISION_TRANSFORMER, TIMM_EVA, HF_DINOV3, HF_SAPIENS2):
        settings["rotary"] = config.rotary
    told = ("pool", "final_norm") if dialect is HF_INTERNVL else ()
    told = ("final_norm",) if dialect is TIMM_NAFLEX else told
    if dialect in (*_VISION_TRANSFORMER, TIMM_EVA):
        told = ("pool_prefix", "final_norm", "norm_after_branch")
        told += ("pool_heads",) if dialect is TIMM_EVA else ()
    settings |= {name: getattr(config, name) for name in told}
    back = interpret(weights, **settings).config
    for field in dataclasses.fields(config):
        mine, theirs = getattr(config, field.name), getattr(back, field.name)
        if field.name in ("class_token", "position_prefix"):
            continue  # compared by what they amount to, below
        if field.name == "max_patches" or (field.name == "native_resize" and dialect not in NAFLEX):
            continue  # chosen when a file is loaded
        if mine != theirs:
            raise UserError(
                f"{dialect.name} files cannot say model.{field.name}={mine!r}: they would be read "
                f"as {theirs!r}"
            )
    if isinstance(config, ViTConfig) and (back.num_prefix_tokens, back.num_position_prefix) != (
        config.num_prefix_tokens,
        config.num_position_prefix,
    ):
        raise UserError(f"{dialect.name} files cannot say what tokens stand before the patches")


def caveats(config: ModelConfig, format: str) -> dict[str, str]:
    """Settings in which the model differs from the defaults that readers of the format assume."""
    found, dialect = {}, choose(format, config)
    mine, theirs = config.resnet_style, dialect.resnet_style
    if format != "vit_jax" and config.resnet is not None and mine != theirs:
        found["resnet_style"] = f"{mine}, where {format}'s code has {theirs}"
    if isinstance(config, ResNetConfig):
        if dialect is RESNET_PAPER:
            found["pooling"] = "zeros around it, as BiT has; big_vision's bit_paper.py has none"
        return found
    if format in ("google", "big_vision") and config.gelu != "tanh":
        found["gelu"] = f"{config.gelu}, where {format}'s code computes tanh"
    timm = 1e-5 if sidecars_relative.is_beit3(config) else sidecars_timm.epsilon(config)
    if dialect is TIMM_EVA:
        timm = (sidecars_eva.timm_eva(config) or ("", timm))[1]
        timm = 1e-6 if config.relative_bias is not None else timm
    if dialect is TIMM_NAFLEX:
        timm = 1e-6
    usual = {"google": 1e-6, "big_vision": 1e-6, "timm": timm}
    if config.layernorm_eps != usual.get(format, config.layernorm_eps):
        found["layernorm_eps"] = f"{config.layernorm_eps:g}, where {format} has {usual[format]:g}"
    if dialect.name != "vit_jax" and config.max_patches is not None:
        told = "which other readers are told when they load"
        if dialect not in NAFLEX:
            told = "where {}'s code takes images of {}x{}".format(format, *config.image_size)
        found["max_patches"] = f"{config.max_patches}, {told}"
    return found


def save(
    vit: Loaded | Model,
    path: epath.PathLike,
    *,
    format: str = "vit_jax",
    preprocess: bool = False,
) -> Report:
    """Saves a model in the format of a code base, with its metadata, or as a program.

    Missing parent folders are made.

    Args:
      vit: the result of `load`, or a bare model, which is saved with the default `Preprocess` and
        no names of classes.
      path: FILE.npz for google and big_vision (metadata in FILE.json), FILE.safetensors for the
        others (metadata in its header), or, for timm and hf, a folder that they can load:
        model.safetensors and the config files that they expect. FILE.stablehlo and FILE.onnx are
        programs with the weights inside, which run without this package (see programs.py).
      format: google, big_vision, timm, hf, or vit_jax, which holds every model; lora, of a model
        that was trained with `model.lora`, is its adapters and head alone (see `load`). Programs
        have no format.
      preprocess: of a program: it takes uint8 pixels [b h w c] and normalises them.

    Returns:
      A report on each parameter, with what other readers need to know under `assumed`.

    Raises:
      UserError: the format cannot hold the model, the path does not fit the format, or it is a
        folder that holds other things than such a model.
    """
    path = os.path.expanduser(path)
    suffix = os.path.splitext(path)[1].lower()
    program = suffix in programs.ENDINGS
    if program and format not in ("vit_jax", suffix[1:]):
        raise UserError(
            f"{path} is a program, not weights in the names of {format!r}: leave format out"
        )
    if preprocess and not program:
        raise UserError(f"preprocess is for programs ({' and '.join(programs.ENDINGS)}) alone")
    if format == ADAPTER:
        if isinstance(vit, Model) or vit.adapter is None:
            raise UserError(
                "format lora is for what a run with model.lora has learnt, as vit_jax.load(RUN) "
                "gives it, without another size, dtype or head"
            )
        if not path.endswith(".safetensors"):
            raise UserError(f"{path}: the name of a {format} file ends in .safetensors")
        return vit.adapter.write(path)
    if isinstance(vit, Model):
        usual = Preprocess(vit.config.image_size, vit.config.in_channels)
        names = tuple(str(i) for i in range(vit.config.num_classes))
        vit = Loaded(vit, vit.config, usual, names, Report(()), None)
    params = flatten_dict(nnx.to_pure_dict(nnx.state(vit.model)), sep="/")
    if (lora := getattr(vit.config, "lora", None)) is not None:
        params = merged({name: np.asarray(value) for name, value in params.items()}, lora)
        vit = dataclasses.replace(vit, config=dataclasses.replace(vit.config, lora=None))
    if program:
        arrays = {name: np.asarray(value) for name, value in params.items()}
        return programs.write(path, arrays, vit.card, preprocess=preprocess)
    arrays, config, notes = to_names(params, vit.config, format)
    ending = ".npz" if format in ("google", "big_vision") else ".safetensors"
    card = dataclasses.replace(vit.card, config=config)
    if path.endswith(ending):
        write_weights(path, arrays, card.to_json())
        if format in ("timm", "hf"):
            notes["config.json"] = f"not written beside a file: {format}'s own code loads a folder"
    elif suffix in (".npz", ".safetensors") or ending == ".npz":
        others = "google or big_vision" if suffix == ".npz" else "timm, hf or vit_jax"
        hint = f"; format {others} ends in {suffix}" if suffix in (".npz", ".safetensors") else ""
        raise UserError(f"{path}: the name of a {format} file ends in {ending}{hint}")
    elif suffix in _NO_FOLDERS and not os.path.isdir(path):
        raise UserError(
            f"{path}: the name of a {format} file ends in {ending}, and that of a folder does not "
            f"end in {suffix}"
        )
    else:
        # Numbers stand for names that are not known, but in a run, whose data has them.
        named = vit.step is not None or vit.labels != tuple(map(str, range(config.num_classes)))
        described = {"hf": sidecars.hf_files, "timm": sidecars.timm_files}.get(format)
        files = described(config, vit.preprocess, vit.labels if named else ()) if described else {}
        names = ("model.safetensors", *files)
        check_own(path, (*names, "README.md", "LICENSE*"), f"a model in {format}'s names")
        write_weights(os.path.join(path, names[0]), arrays, card.to_json())
        for name, content in files.items():
            write_atomically(os.path.join(path, name), json.dumps(content, indent=2))
        if format == "timm" and isinstance(config, ViTConfig) and not sidecars.timm_name(config):
            other = config.relative_bias is not None or sidecars_eva.is_eva(config)
            other = other or not sidecars_timm.is_plain(config)
            unnamed = "" if other else "timm has no name for these sizes: "
            notes["architecture"] = (
                f"{unnamed}config.json has {files['config.json']['architecture']} and, in "
                "model_args, what makes it this one"
            )
    lines = tuple(Line(name, array.shape, "written", name) for name, array in arrays.items())
    return Report(lines, facts(f"{format}, {path}", config), {**caveats(config, format), **notes})
