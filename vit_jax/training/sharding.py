"""Where arrays live on a mesh of devices. The model knows nothing of it."""

import dataclasses
import os
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.data.pipeline import HOST_KEYS
from vit_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes those that are left.

    `data` replicates the model and splits the batch, `fsdp` splits both, `tensor` splits heads
    and MLP. `deterministic` makes a GPU repeat itself bit for bit, at a cost in speed.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    deterministic: bool = False


# Path of a parameter -> the axes of its last dimensions; earlier ones (the depth) are not split.
# Optimiser state and averages have the parameters' paths as endings, so they follow.
PLACEMENT = (
    (r"attention/qkv/kernel$", ("fsdp", None, "tensor", None)),
    (r"attention/qkv/bias$", (None, "tensor", None)),
    (r"attention/out/kernel$", ("tensor", None, "fsdp")),
    (r"mlp/fc1/kernel$", ("fsdp", "tensor")),
    (r"mlp/fc1/bias$", ("tensor",)),
    (r"mlp/fc2/kernel$", ("tensor", "fsdp")),
    (r"(patch_embed|pre_logits|head)/kernel$", (None, "fsdp")),
    (r"pos_embed$", (None, "fsdp")),
)


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Lays the devices out as (data, fsdp, tensor).

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    if config.deterministic:  # XLA reads its flags when the first device is asked for
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    wanted = "x".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {wanted}: at most one axis may be -1, the others at least 1")
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise UserError(
            f"mesh {wanted} does not fit {len(devices)} devices: set one axis to -1 to fill it"
        )
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    return jax.make_mesh(tuple(sizes), AXES, (AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises a UserError unless every device gets as many rows, in every micro-batch."""
    shards = batch_shards(mesh)
    if batch_size % (shards * accumulate):
        unit = shards * accumulate
        raise UserError(
            f"batch_size {batch_size} does not divide among {shards} devices (mesh data x fsdp) "
            f"times {accumulate} micro-batches (optim.accumulate): use a multiple of {unit}, such "
            f"as {max(round(batch_size / unit), 1) * unit}"
        )


def placement(tree: Any, mesh: Mesh) -> Any:
    """Returns a NamedSharding for every leaf of a tree of arrays or shapes, by the table above.

    A dimension that its axis does not divide is not split.
    """

    def place(path, leaf):
        name = path_name(path)
        for pattern, axes in PLACEMENT:
            if re.search(pattern, name) and len(leaf.shape) >= len(axes):
                dims = leaf.shape[len(leaf.shape) - len(axes) :]
                split = [
                    axis if axis and dim % mesh.shape[axis] == 0 else None
                    for axis, dim in zip(axes, dims, strict=True)
                ]
                return NamedSharding(mesh, P(*[None] * (len(leaf.shape) - len(axes)), *split))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, tree)


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as a name: "blocks/mlp/fc1/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def local_rows(batch_size: int, mesh: Mesh) -> slice:
    """The contiguous rows of a global batch that this process's devices own."""
    sharding = NamedSharding(mesh, BATCH)
    owned = sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = [rows[0].indices(batch_size)[:2] for rows in owned]
    return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds))


def to_devices(batch: dict[str, np.ndarray], batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays out of this process's rows, but for the keys that stay on the host."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
        if name not in HOST_KEYS
    }
