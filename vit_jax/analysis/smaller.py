"""Changes of a config that save memory, for `preflight` to try."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from jax.sharding import Mesh

from vit_jax.models.config import CHOICES, ModelConfig
from vit_jax.training.config import Config
from vit_jax.training.sharding import batch_shards


def smaller(
    config: Config, vit: ModelConfig, mesh: Mesh, state_bytes: int, limit_bytes: int | None
) -> Iterator[tuple[str, Config, str]]:
    """Yields changes that save memory, smallest first: flags, the changed config, its `remat`.

    Changes of one thing by little come first: halving the micro-batch, more rematerialisation,
    doubling the devices along `fsdp` (at the expense of `data`).

    Args:
      state_bytes: of parameters, optimiser state and EMA on a device.
      limit_bytes: a device's memory, None if unknown.
    """
    limit = limit_bytes or math.inf
    remats = CHOICES["remat"][CHOICES["remat"].index(vit.remat) :]
    halves = [2**i for i in range(6)]
    wider = [2**i for i in range(20) if mesh.shape["data"] % 2**i == 0]
    choices = itertools.product(range(len(halves)), range(len(remats)), range(len(wider)))
    for a, r, f in sorted(choices, key=_size_of_change):
        accumulate, fsdp = config.optim.accumulate * halves[a], mesh.shape["fsdp"] * wider[f]
        state = state_bytes * mesh.shape["fsdp"] / fsdp
        rows = config.batch_size % (batch_shards(mesh) * accumulate)
        if (a, r, f) == (0, 0, 0) or rows or state > limit:
            continue
        sizes = dict(mesh.shape) | dict(data=mesh.shape["data"] // wider[f], fsdp=fsdp)
        flags = [f"--config.optim.accumulate={accumulate}"] * (a > 0)
        flags += [f"--config.model.remat={remats[r]}"] * (r > 0)
        flags += [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()] * (f > 0)
        changed = dataclasses.replace(
            config,
            optim=dataclasses.replace(config.optim, accumulate=accumulate),
            mesh=dataclasses.replace(config.mesh, **sizes) if f else config.mesh,
        )
        yield " ".join(flags), changed, remats[r]


def _size_of_change(steps: tuple[int, int, int]) -> tuple[int, int, list[int]]:
    """Sort key of a change: how many things change, by how much, cheapest things first."""
    return sum(n > 0 for n in steps), sum(steps), [-n for n in steps]
