"""Weight name tables of timm's parallel blocks, and of its blocks that run on the same tokens.

The first kernels of a parallel block are one array, as are the last. Such an array is presented as
two, with the name of the part behind a colon: `blocks.0.in_proj.weight:mlp`. Where one bias serves
both branches, that of the MLP's is zero.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

from vit_jax.checkpoints.files import Weights
from vit_jax.checkpoints.rows import Dialect, Row, linear_rows, norm_rows, torch_attention
from vit_jax.models import differential

_BLOCK = "blocks.{}"
_JOINT = re.compile(r"(.*blocks\.\d+)\.(in_proj|out_proj)\.(weight|bias)$")
# Of each array, the parts in their order.
_PARTS = {"in_proj": ("mlp", "qkv"), "out_proj": ("attention", "mlp")}


def _only(rows: list[Row], **only: bool) -> list[Row]:
    return [Row(row.ours, row.theirs, row.layout, row.parts, only=only) for row in rows]


def block_rows() -> tuple[Row, ...]:
    """The rows of a parallel block."""
    into, out = f"{_BLOCK}.in_proj", f"{_BLOCK}.out_proj"
    kernel, bias, *apart = torch_attention(
        "blocks/attention", [f"{into}."], f"{_BLOCK}.attn_out_proj"
    )
    apart += linear_rows("blocks/mlp/fc2", f"{_BLOCK}.mlp_out_proj")
    fused = (
        Row("blocks/attention/out/kernel", (f"{out}.weight:attention",), apart[0].layout),
        Row("blocks/attention/out/bias", (f"{out}.bias:attention",), "d -> d"),
        Row("blocks/mlp/fc2/kernel", (f"{out}.weight:mlp",), "o i -> i o"),
        Row("blocks/mlp/fc2/bias", (f"{out}.bias:mlp",), "o -> o"),
    )
    return (
        *norm_rows("blocks/norm1", f"{_BLOCK}.in_norm"),
        Row(kernel.ours, (f"{into}.weight:qkv",), kernel.layout),
        Row(bias.ours, (f"{into}.bias:qkv",), bias.layout),
        Row("blocks/mlp/fc1/kernel", (f"{into}.weight:mlp",), "o i -> i o"),
        *_only([Row("blocks/mlp/fc1/bias", (f"{into}.bias:mlp",), "o -> o")], qkv_bias=True),
        *_only([Row("blocks/mlp/fc1/bias", (f"{_BLOCK}.mlp_bias",), "o -> o")], qkv_bias=False),
        *_only(
            [*apart, *linear_rows("blocks/mlp/fc2", f"{_BLOCK}.mlp_out_proj")], differential=False
        ),
        *_only(list(fused), differential=True),
        Row("blocks/scale1", (f"{_BLOCK}.ls.gamma",), "d -> d"),
        *norm_rows("blocks/attention/q_norm", f"{_BLOCK}.q_norm"),
        *norm_rows("blocks/attention/k_norm", f"{_BLOCK}.k_norm"),
        *(
            Row(f"blocks/attention/{name}", (f"{_BLOCK}.{name}",), "k -> k")
            for name in differential.NAMES
        ),
        *norm_rows("blocks/attention/head_norm", f"{_BLOCK}.sub_norm"),
    )


def split(weights: Weights) -> Weights:
    """Presents each joint array as its two parts; nothing is read yet."""
    joint = {key: match for key in weights.shapes if (match := _JOINT.match(key))}
    parted = weights.renamed(lambda key: None if key in joint else key)
    for key, match in joint.items():
        width = weights.shapes.get(f"{match[1]}.in_norm.weight", (0,))[0]
        name, leaf, shape = match[2], match[3], weights.shapes[key]
        axis = int(name == "out_proj" and leaf == "weight")
        first = width if name == "out_proj" else max(shape[0] - 3 * width, 0)
        whole = name == "out_proj" and leaf == "bias"
        for index, part in enumerate(_PARTS[name]):
            size = shape[axis] if whole else (first, shape[axis] - first)[index]
            made = (*shape[:axis], size, *shape[axis + 1 :])
            read = _part(weights, key, axis, first * index, size, zero=whole and index == 1)
            parted.add(f"{key}:{part}", made, "float32", read)
    return parted


def _part(
    weights: Weights, key: str, axis: int, start: int, size: int, *, zero: bool
) -> Callable[[], np.ndarray]:
    if zero:
        return lambda: np.zeros(size, np.float32)
    return lambda: weights.read(key).take(range(start, start + size), axis=axis)


def joined(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `split`, for the arrays of a file."""
    whole = {key: value for key, value in arrays.items() if ":" not in key}
    for key in dict.fromkeys(key.partition(":")[0] for key in arrays if ":" in key):
        _, name, leaf = key.rsplit(".", 2)
        parts = [arrays[f"{key}:{part}"] for part in _PARTS[name]]
        if (name, leaf) == ("out_proj", "bias"):
            whole[key] = parts[0] + parts[1]
        else:
            whole[key] = np.concatenate(parts, axis=int(name == "out_proj"))
    return whole


def parallel(timm: Dialect) -> Dialect:
    """timm's names, with parallel blocks in place of the others."""
    rest = tuple(row for row in timm.rows if not row.ours.startswith("blocks/"))
    return Dialect("timm", ("blocks.0.in_proj.weight",), (*rest, *block_rows()), timm.leftover)


_BESIDE = {
    "norm1": "attns.[].norm",
    "attn": "attns.[].attn",
    "ls1": "attns.[].ls",
    "norm2": "ffns.[].norm",
    "mlp": "ffns.[].mlp",
    "ls2": "ffns.[].ls",
}
_NOT_BESIDE = (*(f"attention/{name}" for name in differential.NAMES), "head_norm", "relative_bias")


def beside(timm: Dialect, branches: int = 2) -> Dialect:
    """timm's names, with several blocks on the same tokens in place of each."""
    rows = [row for row in timm.rows if not row.ours.startswith("blocks/")]
    for row in timm.rows:
        left = len(row.theirs) > 1 or any(part in row.ours for part in _NOT_BESIDE)
        if row.ours.startswith("blocks/") and not left:
            block, index, part, rest = row.theirs[0].split(".", 3)
            name = f"{block}.{index}.{_BESIDE[part]}.{rest}"
            says = {**row.says, "branches": branches}
            rows.append(dataclasses.replace(row, theirs=(name,), says=says, branches=branches))
    return Dialect("timm", ("blocks.0.attns.0.norm.weight",), tuple(rows), timm.leftover)
