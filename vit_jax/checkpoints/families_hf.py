"""What a config.json of AIMv2, InternVL or Sapiens 2 of transformers says that weights do not."""

from collections.abc import Mapping
from typing import Any

from vit_jax.errors import UserError
from vit_jax.models.rotary import Rotary


def hints(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields of a vision tower's config.json; {} for other families.

    Raises:
      UserError: it is a model that ours do not reproduce.
    """
    kind = config.get("model_type")
    if kind == "aimv2_vision_model":
        return _aimv2(config)
    if kind == "internvl_vision":
        return _internvl(config)
    if kind == "sapiens2":
        return _sapiens2(config)
    return {}


def _aimv2(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("use_head", True):
        raise UserError(
            "config.json: use_head is true, and there is no such attention pooling, with a query "
            "that no kernel maps; expected false"
        )
    if config.get("is_native"):
        raise UserError(
            "config.json: is_native is true, and there are no such fixed positions; expected false"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: hidden_act {config['hidden_act']!r}; expected 'silu'")
    return {"pool": "gap", "norm": "rmsnorm"}


def _internvl(config: Mapping[str, Any]) -> dict[str, Any]:
    norm = {"layer_norm": "layernorm", "rms_norm": "rmsnorm"}.get(config.get("norm_type"))
    if norm is None:
        raise UserError(
            f"config.json: norm_type {config.get('norm_type')!r}; expected 'layer_norm' or "
            "'rms_norm'"
        )
    mean = config.get("use_mean_pooling", True)
    if norm == "rmsnorm" and not mean:
        raise UserError(
            "config.json: use_mean_pooling is false, so the last norm is a LayerNorm where the "
            "others are RMSNorms; there is one kind for all"
        )
    if config.get("use_qk_norm") and (
        norm != "rmsnorm" or config.get("layer_norm_eps", 1e-6) != 1e-6
    ):
        raise UserError(
            "config.json: use_qk_norm is true: queries and keys have RMSNorms of epsilon 1e-6, so "
            "norm_type 'rms_norm' and layer_norm_eps 1e-6 are expected"
        )
    if not config.get("use_absolute_position_embeddings", True):
        raise UserError("config.json: use_absolute_position_embeddings is false; expected true")
    return {"pool": "gap" if mean else "token", "norm": norm, "final_norm": not mean}


def _sapiens2(config: Mapping[str, Any]) -> dict[str, Any]:
    act = config.get("hidden_act", "silu") if config.get("use_gated_mlp", True) else "no gate"
    if act != "silu":
        raise UserError(f"config.json: a Sapiens 2 with {act!r}; expected a gate, with 'silu'")
    rotary = Rotary(base=float(config.get("rope_theta", 100.0)))
    return {"pool": "token", "norm": "rmsnorm", "position": "rope", "rotary": rotary}
