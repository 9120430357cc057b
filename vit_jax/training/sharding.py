"""Where arrays live on a mesh of devices. The model knows nothing of it."""

import dataclasses
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
    """Devices along each axis; -1 takes those that are left: `data`, unless another one does.

    `data` replicates the model and splits the batch, `fsdp` splits both, `tensor` splits heads
    and MLP. `deterministic` makes a GPU repeat itself bit for bit, at a cost in speed.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    deterministic: bool = False


# Path of a parameter -> which of its last dimensions `tensor` splits, and those that `fsdp` may
# split, the best first; earlier ones (the depth) are not split. Optimiser state and averages have
# the parameters' paths as endings, so they follow.
PLACEMENT = (
    (r"attention/qkv/kernel$", (None, None, "tensor", None), (-4, -1)),
    (r"attention/qkv/bias$", (None, "tensor", None), ()),
    (r"attention/out/kernel$", ("tensor", None, None), (-1, -2)),
    (r"mlp/fc1/kernel$", (None, "tensor"), (-2, -1)),
    (r"mlp/fc1/bias$", ("tensor",), ()),
    (r"mlp/fc2/kernel$", ("tensor", None), (-1, -2)),
    (r"(patch_embed|conv\w+)/kernel$", (None, None), (-1,)),
    (r"(pre_logits|head|head_dist|patch_head)/kernel$", (None, None), (-2, -1)),
    (r"pos_embed(_\w+)?$", (None, None), (-1,)),
    (r"attention/rel_embed$", (None, "tensor", None), (-1,)),
)


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Lays the devices out as (data, fsdp, tensor), neighbours in a torus next to one another.

    Where they are several TPU slices or GPU nodes, between which links are slow, only `data` spans
    these: once a step a gradient's shards cross, never parameters.

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


def device_grid(shape: tuple[int, int, int], devices: list[Any]) -> np.ndarray:
    """Returns the devices as an array [data fsdp tensor], as the machine's links favour it.

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
        process_is_granule=_rehearsed_gpus(devices),
        allow_split_physical_axes=True,
    )


def _slices(devices: list[Any]) -> int:
    attribute = "process_index" if _rehearsed_gpus(devices) else "slice_index"
    return len({getattr(device, attribute, 0) for device in devices})


def _rehearsed_gpus(devices: list[Any]) -> bool:
    """Whether these are GPUs of a topology: real ones have their node as their slice."""
    first = devices[0]
    return first.platform == "gpu" and getattr(first, "local_hardware_id", None) is None


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

    A dimension that its axis does not divide is not split; `fsdp` takes the next one that it may,
    but not after one of size 1: that was averaged over where the parameter is split (optim.py).
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
    """A parameter that every device has all of, and its bytes."""

    name: str
    size: int

    def __str__(self) -> str:
        told = f"{self.name}, {self.size / 2**20:.1f} MiB"
        return f"{told}, is whole on every device: no axis divides it"


def unsplit(params: Any, mesh: Mesh, least: int = 2**20) -> list[Whole]:
    """The large parameters that the mesh should split, but that stay whole."""
    if not _splits(mesh):
        return []
    return [
        Whole(path_name(path), int(np.prod(leaf.shape)) * leaf.dtype.itemsize)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.sharding.is_fully_replicated and np.prod(leaf.shape) * leaf.dtype.itemsize >= least
    ]


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """How a model uses what `placement` spread: the `Layout` of models/layers.py.

    A block's kernels are gathered along `fsdp` when it runs, in the dtype that it computes in, and
    their gradients go back to where the parameters are kept. Activations stay with their images, so
    that no device ever sees another's (but for the sums along `tensor`).
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
    """The layout of a model that computes in `dtype`; None where parameters are not split."""
    return MeshLayout(mesh, dtype) if _splits(mesh) else None


def _splits(mesh: Mesh) -> bool:
    """Whether the mesh splits parameters."""
    return mesh.shape["fsdp"] * mesh.shape["tensor"] > 1


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as a name: "blocks/mlp/fc1/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that this process's devices own: int64, ascending.

    They need not be contiguous: a mesh follows the wiring of the devices, not the hosts. Hosts in
    one `tensor` group own the same.
    """
    sharding = NamedSharding(mesh, BATCH)
    owned = sharding.addressable_devices_indices_map((batch_size,)).values()
    parts = {rows[0].indices(batch_size) for rows in owned}
    return np.concatenate([np.arange(*part, dtype=np.int64) for part in sorted(parts)])


def to_devices(batch: dict[str, np.ndarray], batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays out of this process's rows, but for the keys that stay on the host."""
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
    """How many rows of the global batch have a flag (bool, of this process's rows).

    With several processes a device adds them up, and this does not wait for it. Collective.
    """
    if distributed.count() == 1:
        return int(flags.sum())
    return to_devices({"flags": flags}, batch_size, mesh)["flags"].sum()
