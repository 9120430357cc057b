"""What names of timm's BEiT and vit_relpos_* models say, and what keys show of a position bias."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from vit_jax.checkpoints.rows import Found
from vit_jax.errors import UserError
from vit_jax.models import relative
from vit_jax.models.relative import RelativeBias

_RPN = dict(pool="gap", norm_after_branch=True)
# A pattern of names, and the fields of their models; MLPs of offsets do not show the image size.
_FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"beitv?2?_(base|large)_patch16_\d+", dict(pool="gap", rotary=None)),
    (r"beit3_\w+", dict(pool="gap", layernorm_eps=1e-5)),
    (r"vit_base_patch16_rpn_224", _RPN),
    (r"vit_relpos_base_patch32_plus_rpn_256", dict(image_size=256, **_RPN)),
    (r"vit_relpos_\w+_rpn_224", _RPN),
    (
        r"vit_relpos_base_patch16_plus_240",
        dict(pool="gap", norm_after_branch=False, image_size=240),
    ),
    (r"vit_relpos_\w+_cls_224", dict(pool="token", norm_after_branch=False)),
    (r"vit_s?relpos_\w+", dict(pool="gap", norm_after_branch=False)),
    (r"test_vit_relpos", dict(pool="gap", norm_after_branch=False, image_size=160)),
)


def said(name: str) -> dict[str, Any]:
    """The config fields of a timm architecture; {} for a name of another file."""
    found = (fields for pattern, fields in _FAMILIES if re.fullmatch(pattern, name))
    return next(found, {})


def shown(
    found: Mapping[str, Found], axis: Callable[[str, str], int]
) -> tuple[RelativeBias, int] | None:
    """The position bias of a file and its number of heads, by its keys; None if it has none.

    `axis` is as in infer.py.
    """
    for start in ("relative_bias", "blocks/attention/relative_bias"):
        shared = not start.startswith("blocks/")
        if f"{start}/table" in found:
            return RelativeBias("table", shared), axis(f"{start}/table", "h")
        if f"{start}/fc1/kernel" in found:
            coordinates = "log" if f"{start}/fc2/bias" in found else "swin"
            hidden = axis(f"{start}/fc1/kernel", "o")
            return RelativeBias("mlp", shared, hidden, coordinates), axis(
                f"{start}/fc2/kernel", "o"
            )
    return None


def grid_of(
    path: str,
    bias: RelativeBias,
    prefix: int,
    axis: Callable[[str, str], int],
    given: tuple[int, int] | None,
) -> tuple[int, int] | None:
    """The grid of patches that a table of offsets is of: the `given` one, or a square.

    None where there is no table.

    Raises:
      UserError: its rows are neither.
    """
    if bias.kind != "table":
        return None
    count = axis(f"{'' if bias.shared else 'blocks/attention/'}relative_bias/table", "o")
    if given is not None and relative.rows(given, prefix) == count:
        return given
    side = math.isqrt(max(count - relative.rows((1, 1), prefix) + 1, 0))
    square = ((side + 1) // 2,) * 2
    if relative.rows(square, prefix) != count:
        raise UserError(
            f"{path}: a position bias of {count} offsets is of no square grid: give the "
            "image_size=(h, w) it is for"
        )
    return square
