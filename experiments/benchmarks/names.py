"""What the names of contestants say."""

import dataclasses
from typing import Any

from vit_jax.errors import UserError, nearest
from vit_jax.models.config import CHOICES

OURS = {"loop": {"scan": False}, "scan": {"scan": True}, "deterministic": {}}
OURS |= {f"remat:{kind}": {"remat": kind} for kind in CHOICES["remat"] if kind != "none"}
MODES = ("default", "max-autotune", "reduce-overhead", "max-autotune-no-cudagraphs")
ATTENTION = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}  # of torch's SDPBackend


@dataclasses.dataclass(frozen=True)
class Contestant:
    """What a name says: `ours` or `timm`, and how.

    Attributes:
      fields: of the model's config that are ours to change.
      xla: compiler options beside those that `vit_jax.compiler` asks for.
      mode: of torch.compile; None is eager.
      attention: the only one of torch's fused attentions that is allowed, None for torch's choice.
    """

    name: str
    family: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    deterministic: bool = False
    xla: dict[str, str | bool] = dataclasses.field(default_factory=dict)
    mode: str | None = None
    attention: str | None = None

    def needless(self, backend: str) -> str | None:
        """Why it is left out on a backend of JAX: a half sentence; None where it is not."""
        if self.deterministic and backend != "gpu":
            return f"deterministic=True changes nothing on a {backend}"
        if self.attention and backend != "gpu":
            return f"{self.attention} attention is for GPUs, and this is a {backend}"
        if self.family == "timm" and backend not in ("cpu", "gpu"):
            return f"torch does not run on a {backend} by itself"
        return None


def read_name(name: str, task: str) -> Contestant:
    """Reads a name such as ours+scan+xla:FLAG=VALUE or timm-compile:max-autotune+flash.

    Args:
      task: "train" or "infer".

    Raises:
      UserError: there is no such contestant.
    """
    head, *changes = name.split("+")
    if head == "ours":
        fields: dict[str, Any] = {}
        xla: dict[str, str | bool] = {}
        for change in changes:
            flag, _, value = change.removeprefix("xla:").partition("=")
            if change.startswith("xla:") and flag and value:
                # XLA's parser of options, unlike that of XLA_FLAGS, wants a bool for a bool.
                said = {"true": True, "false": False}.get(value.lower(), value)
                xla[flag.removeprefix("--")] = said
            elif change in OURS and (task == "train" or not change.startswith("remat")):
                fields |= OURS[change]
            else:
                known = [each for each in OURS if task == "train" or "remat" not in each]
                known.append("xla:FLAG=VALUE")
                raise UserError(f"no contestant {name!r}: ours+{change}; {nearest(change, known)}")
        return Contestant(name, "ours", fields, "deterministic" in changes, xla)
    kind, _, mode = head.partition(":")
    if kind not in ("timm", "timm-compile") or (mode and kind == "timm"):
        raise UserError(
            f"no contestant {name!r}; {nearest(head, ('ours', 'timm', 'timm-compile'))}"
        )
    if mode and mode not in MODES:
        raise UserError(f"no contestant {name!r}: torch.compile's mode {nearest(mode, MODES)}")
    if len(changes) > 1 or not set(changes) <= set(ATTENTION):
        raise UserError(
            f"no contestant {name!r}: after {head}, expected nothing, or one of "
            + ", ".join(f"+{each}" for each in ATTENTION)
        )
    mode = mode or ("default" if kind == "timm-compile" else None)
    return Contestant(name, "timm", mode=mode, attention=changes[0] if changes else None)
