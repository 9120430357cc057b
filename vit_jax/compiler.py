"""The devices that programs are compiled for, and non-default XLA options, in one table.

Each option was measured to pay off; those for GPUs by what the compiled program reads, writes and
launches (see experiments/benchmarks/README.md). XLA_FLAGS in the environment takes precedence.
"""

import contextvars
import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger(__name__)

# Platform -> option -> value. Options are XLA's flags without the dashes.
OPTIONS = {
    # Reductions by YNNPACK, which vectorises them; matrix products, also YNNPACK's by default, by
    # Eigen, which runs several at once.
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
    # Products by cuBLASLt, which fuses biases, residuals and GELU; XLA's Triton products would
    # leave these to other kernels. Slices of stacked parameters in one kernel, not next to each
    # product that reads one. Small Q, K and V as three products, too.
    "gpu": {
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_enable_dynamic_slice_fusion": False,
        "xla_gpu_dot_merger_threshold_mb": 0,
    },
}
DETERMINISTIC = {"gpu": {"xla_gpu_deterministic_ops": True}}
_target: contextvars.ContextVar[Any] = contextvars.ContextVar("target", default=None)


def compiler_options(
    mesh: Mesh | None = None, *, deterministic: bool = False
) -> dict[str, str | bool | int]:
    """Returns the `compiler_options` for `jax.jit`.

    Args:
      mesh: of the devices to compile for; by default those where JAX runs.
      deterministic: whether GPU results are bitwise reproducible, at a cost in speed.
    """
    device = _one_of(mesh)
    platform = device.platform
    wanted = OPTIONS.get(platform, {}) | (DETERMINISTIC.get(platform, {}) if deterministic else {})
    said = {flag.lstrip("-").split("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    return {
        name: value
        for name, value in wanted.items()
        if name not in said and _known(device, name, value)
    }


def target() -> str:
    """The platform that is traced for: that of `traced_for`, or JAX's default backend."""
    device = _target.get()
    return jax.default_backend() if device is None else device.platform


def target_device() -> Any:
    """A device of the kind that is traced for."""
    device = _target.get()
    return _one_of(None) if device is None else device


def _one_of(mesh: Mesh | None) -> Any:
    """A device for trial compilation, local if the mesh has a local one."""
    local = jax.local_devices()
    if mesh is None:
        return local[0]
    return next((device for device in mesh.devices.flat if device in local), mesh.devices.flat[0])


def traced_for(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function to be traced for the devices of `mesh`, which need not exist here."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        token = _target.set(_one_of(mesh))
        try:
            return function(*args)
        finally:
            _target.reset(token)

    return traced


@functools.cache
def _known(device: Any, name: str, value: str | bool | int) -> bool:
    """Whether a device's XLA has the option: experimental ones come and go."""
    place = NamedSharding(Mesh([device], "x"), PartitionSpec())
    try:
        jax.jit(lambda: 0, out_shardings=place, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        logger.warning("XLA does not take %s=%s, and goes without: %s", name, value, error)
        return False
    return True
