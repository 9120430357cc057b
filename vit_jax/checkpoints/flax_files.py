"""Reads Flax's msgpack files, as transformers wrote them (flax_model.msgpack); untrusted input.

Such a file is a nested map whose leaves are of an extension type of msgpack's: an array's shape,
type and bytes, packed once more (flax.serialization). Nothing else is accepted.
"""

import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
from jaxtyping import Shaped

from vit_jax.errors import UserError

_ARRAYS = (1, 3)  # flax.serialization's extension types of arrays and NumPy's scalars
_MOST_KEYS, _MOST_AXES = 100_000, 32


def arrays(path: str) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    """Yields the arrays of a file by their path, "vit/embeddings/cls_token".

    Raises:
      UserError: it holds other things than arrays.
      ValueError, TypeError: it is damaged, or an array has another size than it says.
    """
    with open(path, "rb") as file:
        tree = msgpack.unpackb(
            file.read(),
            ext_hook=_array,
            object_pairs_hook=_map,
            max_map_len=_MOST_KEYS,
            max_array_len=_MOST_AXES,
        )
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}; expected a map of Flax's parameters")
    open_maps = [("", tree)]
    while open_maps:
        before, inside = open_maps.pop()
        for name, value in inside.items():
            if isinstance(value, dict):
                open_maps.append((f"{before}{name}/", value))
            elif isinstance(value, np.ndarray):
                yield f"{before}{name}", value
            else:
                raise UserError(
                    f"{path}: {before}{name} is {type(value).__name__}; expected an array of Flax"
                )


def _map(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs) or not all(isinstance(name, str) for name in found):
        raise ValueError("a map with a name twice, or with one that is no text")
    if "__msgpack_chunked_array__" in found:
        raise ValueError("it has arrays of more than 1 GiB in pieces, which are not read here")
    return found


def _array(kind: int, packed: bytes) -> Shaped[np.ndarray, "..."]:
    if kind not in _ARRAYS:
        raise ValueError(f"it has values of msgpack's extension type {kind}")
    shape, name, raw = msgpack.unpackb(packed, max_array_len=_MOST_AXES, max_map_len=0)
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"it has an array of shape {shape}")
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else str(name))
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"an array of {dtype} and shape {shape} has {len(raw)} bytes")
    return np.frombuffer(raw, dtype).reshape(shape)
