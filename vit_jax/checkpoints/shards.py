"""Weights in several files: an index, model.safetensors.index.json, says which has which array."""

import os
import re
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import UserError

INDEX = "model.safetensors.index.json"
_SHARD = r".*-\d{5}-of-\d{5}\.safetensors"


def files_of(index: str, content: Mapping[str, Any]) -> list[str]:
    """The paths of the shards that an index names, all of which are there.

    Raises:
      UserError: the index is damaged, names files outside of its folder, or one is missing.
    """
    names = content.get("weight_map")
    if not isinstance(names, Mapping) or not names:
        raise UserError(f"{index} has no weight_map")
    files = sorted({str(name) for name in names.values()})
    if any(os.path.basename(file) != file for file in files):
        raise UserError(f"{index} names files outside of its folder")
    missing = [file for file in files if not os.path.exists(_beside(index, file))]
    if missing:
        raise UserError(
            f"there is no file {_beside(index, missing[0])!r}, one of the {len(files)} shards that "
            f"{os.path.basename(index)} names: {len(missing)} of them are missing here"
        )
    return [_beside(index, file) for file in files]


def check(index: str, content: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """Checks that each array is in the shard that the index says; `found` is name -> path.

    Raises:
      UserError: it is in another or in none.
    """
    for name, file in content["weight_map"].items():
        if found.get(name) != _beside(index, file):
            there = f"it is in {os.path.basename(found[name])}" if name in found else "none has it"
            raise UserError(
                f"{index} says that {name} is in {file}, but {there}: the shards are not all of "
                "the same model"
            )


def check_alone(path: str) -> None:
    """Raises a UserError if the file is one of several shards, named on its own."""
    index = _beside(path, INDEX)
    if re.fullmatch(_SHARD, os.path.basename(path)):
        whole = index if os.path.exists(index) else f"the folder, with its {INDEX}"
        raise UserError(f"{path} is one of several shards of a model: name {whole}")


def _beside(path: str, name: str) -> str:
    return os.path.join(os.path.dirname(path), name)
