"""Sharding: the mesh of devices, and the placement of parameters, batches and activations on it."""

import contextlib
import dataclasses
import os
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax import distributed
from vit_jax.data.pipeline import HOST_KEYS
from vit_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The `mesh` section: number of devices along each axis.

    -1 takes the rest of the devices: `data`, unless another axis has it.

    Attributes:
      data: devices that replicate the model and split the batch.
      fsdp: devices that split the batch and the parameters.
      tensor: devices that split attention heads and the MLP's hidden units.
      deterministic: whether GPU results are bitwise reproducible, at a cost in speed.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    deterministic: bool = False


# Path of a parameter -> the one of its last dimensions that `tensor` splits, and those that `fsdp`
# may split, in order of preference; earlier ones (the depth) are not split. The paths of optimiser
# state and EMA end in the parameters' paths, so they are split alike.
PLACEMENT = (
    (r"attention/qkv/kernel$", (None, None, "tensor", None), (-4, -1)),
    (r"attention/qkv/bias$", (None, "tensor", None), ()),
    (r"attention/out/kernel$", ("tensor", None, None), (-1, -2)),
    (r"mlp/fc1/kernel$", (None, "tensor"), (-2, -1)),
    (r"mlp/fc1/bias$", ("tensor",), ()),
    (r"mlp/fc2/kernel$", ("tensor", None), (-1, -2)),
    (r"attention/qkv/lora_a$", (None, None, None), (-3,)),
    (r"attention/qkv/lora_b$", (None, None, "tensor", None), (-1,)),
    (r"attention/out/lora_a$", ("tensor", None, None), (-2,)),
    (r"mlp/fc1/lora_b$", (None, "tensor"), (-1,)),
    (r"mlp/fc2/lora_a$", ("tensor", None), (-2,)),
    (r"lora_a$", (None, None), (-2,)),
    (r"lora_b$", (None, None), (-1,)),
    (r"detector/\w+/conv_out/kernel$", (None, None), (-2, -1)),
    (r"(patch_embed|conv\w+)/kernel$", (None, None), (-1,)),
    (r"(pre_logits|head|head_dist|patch_head)/kernel$", (None, None), (-2, -1)),
    (r"pos_embed(_\w+)?$", (None, None), (-1,)),
    (r"attention/rotary_freqs$", (None, "tensor", None), ()),
    (r"relative_bias/(table|fc2/kernel)$", (None, "tensor"), ()),
    (r"relative_bias/fc2/bias$", ("tensor",), ()),
    (r"attention/rel_embed$", (None, "tensor", None), (-1,)),
)


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Arranges devices as a (data, fsdp, tensor) mesh, with neighbours in a torus adjacent.

    Across several TPU slices or GPU nodes, with slow links between them, only `data` spans them:
    gradient shards cross the links once a step, parameters never.

    Raises:
      UserError: the axes do not multiply to the number of devices, or `data` not to the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    if sizes.count(-1) > 1 and sizes[0] == -1:  # the default, which makes way for another axis
        sizes[0] = _slices(devices)
    wanted = "x".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {wanted}: at most one axis may be -1, the others at least 1")
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise UserError(
            f"mesh {wanted} does not fit {len(devices)} devices: set one axis to -1 to fill it"
        )
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    return Mesh(device_grid(tuple(sizes), devices), AXES, axis_types=(AxisType.Auto,) * 3)


def device_memory(device: Any) -> int | None:
    """Memory of a device of this process in bytes, None if unknown.

    For a CPU device, its share of this machine's memory.
    """
    if device.platform == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total // jax.local_device_count()
    with contextlib.suppress(Exception):  # a topology's devices have none, and say so variously
        return int(device.memory_stats()["bytes_limit"])
    return None


def device_grid(shape: tuple[int, int, int], devices: list[Any]) -> np.ndarray:
    """Returns the devices as an array [data fsdp tensor], in the best order for their links.

    Raises:
      UserError: there are several slices, which `data` does not span.
    """
    slices = _slices(devices)
    if shape[0] % slices:
        raise UserError(
            f"mesh.data is {shape[0]} on {slices} slices or nodes of devices, and only data spans "
            f"them: mesh.data must be a multiple of {slices}"
        )
    inside = (shape[0] // slices, *shape[1:])
    if slices == 1:
        return mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        inside,
        (slices, 1, 1),
        devices,
        process_is_granule=_topology_gpus(devices),
        allow_split_physical_axes=True,
    )


def _slices(devices: list[Any]) -> int:
    attribute = "process_index" if _topology_gpus(devices) else "slice_index"
    return len({getattr(device, attribute, 0) for device in devices})


def _topology_gpus(devices: list[Any]) -> bool:
    """Whether these are simulated GPUs of a topology: real ones have their node as slice."""
    first = devices[0]
    return first.platform == "gpu" and getattr(first, "local_hardware_id", None) is None


def batch_shards(mesh: Mesh) -> int:
    """The number of parts that the mesh splits a batch into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises a UserError unless all devices get equally many rows in every micro-batch."""
    shards = batch_shards(mesh)
    if batch_size % (shards * accumulate):
        unit = shards * accumulate
        raise UserError(
            f"batch_size {batch_size} does not divide among {shards} devices (mesh data x fsdp) "
            f"times {accumulate} micro-batches (optim.accumulate): use a multiple of {unit}, such "
            f"as {max(round(batch_size / unit), 1) * unit}"
        )


def placement(tree: Any, mesh: Mesh) -> Any:
    """Returns a NamedSharding for every leaf of a tree of arrays or shapes, by `PLACEMENT`.

    A dimension that its mesh axis does not divide is not split; `fsdp` then tries the next
    candidate, but stops at a size of 1: a dimension that is split in the parameter, and averaged
    over in its factored moments (optim.py).
    """

    def place(path, leaf):
        name, shape = path_name(path), leaf.shape
        for pattern, tensor, candidates in PLACEMENT:
            if re.search(pattern, name) and len(shape) >= len(tensor):
                spec = [None] * (len(shape) - len(tensor)) + [
                    axis if axis and mesh.shape[axis] > 1 and dim % mesh.shape[axis] == 0 else None
                    for axis, dim in zip(tensor, shape[len(shape) - len(tensor) :], strict=True)
                ]
                fsdp = mesh.shape["fsdp"]
                free = [d for d in candidates if not spec[d]]
                fit = [d for d in free if shape[d] % fsdp == 0 or shape[d] == 1]
                if fsdp > 1 and fit and shape[fit[0]] > 1:
                    spec[fit[0]] = "fsdp"
                return NamedSharding(mesh, P(*spec))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, tree)


class Whole(NamedTuple):
    """A parameter that is replicated on every device, and its bytes."""

    name: str
    size: int

    def __str__(self) -> str:
        text = f"{self.name}, {self.size / 2**20:.1f} MiB"
        return f"{text}, is whole on every device: no axis divides it"


def unsplit(params: Any, mesh: Mesh, least: int = 2**20) -> list[Whole]:
    """Lists large parameters that the mesh should split, but that remain replicated."""
    if not _splits(mesh):
        return []
    return [
        Whole(path_name(path), int(np.prod(leaf.shape)) * leaf.dtype.itemsize)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.sharding.is_fully_replicated and np.prod(leaf.shape) * leaf.dtype.itemsize >= least
    ]


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """How a model uses sharded parameters: an implementation of `Layout` (models/stack.py).

    A block's kernels are gathered along `fsdp` when it runs, in the compute dtype, and their
    gradients are scattered to the parameters' shards. Activations stay with their images on one
    device (except for the sums along `tensor`).
    """

    mesh: Mesh
    dtype: str

    def params(self, params: dict[str, Any]) -> dict[str, Any]:
        places = placement(params, self.mesh)
        return jax.tree.map(self._used, params, places)

    def activations(self, x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, BATCH))

    def _used(self, value: jax.Array, kept: NamedSharding) -> jax.Array:
        if "fsdp" not in kept.spec:
            return value
        whole = P(*(None if axis == "fsdp" else axis for axis in kept.spec))

        def gather(_, value):
            value = value.astype(self.dtype)  # in half precision, half the bytes to move
            return jax.lax.with_sharding_constraint(value, NamedSharding(self.mesh, whole))

        def scatter(_, gradient):
            gradient = jax.lax.with_sharding_constraint(gradient, kept)
            return gradient.astype(value.dtype)

        return jax.custom_derivatives.linear_call(gather, scatter, (), value)


def make_layout(mesh: Mesh, dtype: str) -> MeshLayout | None:
    """Returns the layout for a compute dtype; None if the mesh does not split parameters."""
    return MeshLayout(mesh, dtype) if _splits(mesh) else None


def _splits(mesh: Mesh) -> bool:
    """Whether the mesh splits parameters."""
    return mesh.shape["fsdp"] * mesh.shape["tensor"] > 1


def path_name(path: tuple[Any, ...]) -> str:
    """Joins a pytree path to a name: "blocks/mlp/fc1/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that this process's devices own: int64, ascending.

    They need not be contiguous: a mesh follows the links of the devices, not the hosts. Hosts in
    one `tensor` group own the same rows.
    """
    sharding = NamedSharding(mesh, BATCH)
    owned = sharding.addressable_devices_indices_map((batch_size,)).values()
    parts = {rows[0].indices(batch_size) for rows in owned}
    return np.concatenate([np.arange(*part, dtype=np.int64) for part in sorted(parts)])


def to_devices(batch: dict[str, np.ndarray], batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Builds global arrays from this process's rows, without the keys that stay on the host."""
    sharding, rows = NamedSharding(mesh, BATCH), local_rows(batch_size, mesh)

    def spread(values: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return values[first : first + stop - start]

        shape = (batch_size, *values.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return {name: spread(values) for name, values in batch.items() if name not in HOST_KEYS}


def total(flags: np.ndarray, batch_size: int, mesh: Mesh) -> int | jax.Array:
    """Counts the rows of the global batch with a flag (bool, of this process's rows).

    With several processes the devices add them up, without blocking. Collective.
    """
    if distributed.count() == 1:
        return int(flags.sum())
    return to_devices({"flags": flags}, batch_size, mesh)["flags"].sum()
