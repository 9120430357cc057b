"""Accelerator specifications, and compiling for devices that this machine does not have."""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from vit_jax.errors import UserError, nearest
from vit_jax.extras import install

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Specifications of a type of device.

    Attributes:
      memory: bytes.
      peak: dense bfloat16 matrix products in FLOP/s, by the data sheet.
      bandwidth: memory bandwidth in bytes/s, by the data sheet.
      products: achievable FLOP/s of large products; 80% of the peak if not measured.
      copies: achievable bytes/s of large copies; 90% of the bandwidth if not measured.
      launch: seconds to launch a kernel.
    """

    memory: int
    peak: float
    bandwidth: float
    products: float = 0.0
    copies: float = 0.0
    launch: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "products", self.products or 0.8 * self.peak)
        object.__setattr__(self, "copies", self.copies or 0.9 * self.bandwidth)

    def rate(self, dtype: str) -> float:
        """Achievable FLOP/s of large products in a dtype, given by XLA's name."""
        return self.products * {"f32": 0.5, "f64": 0.05}.get(dtype, 1.0)


# By `device_kind`. Sources: Google Cloud's TPU pages (v4, v5e, v5p, v6e), NVIDIA's data sheets
# (without sparsity). Measured: products of 8192 x 8192 matrices and copies on an H100 and an H200.
CHIPS = {
    "TPU v4": Chip(32 * GIB, 275e12, 1.2e12),
    "TPU v5 lite": Chip(16 * GIB, 197e12, 0.82e12),
    "TPU v5": Chip(95 * GIB, 459e12, 2.765e12),
    "TPU v6 lite": Chip(32 * GIB, 918e12, 1.64e12),
    "NVIDIA A100-SXM4-40GB": Chip(40 * GIB, 312e12, 1.555e12, launch=2e-6),
    "NVIDIA A100-SXM4-80GB": Chip(80 * GIB, 312e12, 2.039e12, launch=2e-6),
    "NVIDIA H100 80GB HBM3": Chip(80 * GIB, 989.4e12, 3.352e12, 790e12, 3.0e12, 2e-6),
    "NVIDIA H200": Chip(141 * GIB, 989.4e12, 4.8e12, 790e12, 4.3e12, 2e-6),
    "NVIDIA B200": Chip(178 * GIB, 2250e12, 7.672e12, launch=2e-6),
}

# XLA's GPU parameters, from its own descriptions (openxla/xla,
# xla/backends/gpu/target_config/specs). Those of one generation share most.
_SHARED = dict(
    threads_per_block_limit=1024, threads_per_warp=32, threads_per_core_limit=2048,
    shared_memory_per_block=49152, registers_per_core_limit=65536, registers_per_block_limit=65536,
    block_dim_limit_x=2147483647, block_dim_limit_y=65535, block_dim_limit_z=65535,
    thread_dim_limit_x=1024, thread_dim_limit_y=1024, thread_dim_limit_z=64,
)  # fmt: skip
_AMPERE = dict(
    core_count=108, fpus_per_core=64, clock_rate_ghz=1.41, l2_cache_size=41943040,
    shared_memory_per_core=167936, shared_memory_per_block_optin=166912,
)  # fmt: skip
_HOPPER = dict(
    core_count=132, fpus_per_core=128, clock_rate_ghz=1.98, l2_cache_size=52428800,
    shared_memory_per_core=233472, shared_memory_per_block_optin=232448,
)  # fmt: skip
_BLACKWELL = _HOPPER | dict(core_count=148, clock_rate_ghz=1.965, l2_cache_size=132644864)
# Name in a topology -> kind, major version of the compute capability, XLA's parameters.
GPUS = {
    "a100-40": ("NVIDIA A100-SXM4-40GB", 8, _AMPERE | dict(
        device_memory_size=42331013120, memory_bandwidth=1555200000000)),
    "a100": ("NVIDIA A100-SXM4-80GB", 8, _AMPERE | dict(
        device_memory_size=85100068864, memory_bandwidth=2039040000000)),
    "h100": ("NVIDIA H100 80GB HBM3", 9, _HOPPER | dict(
        device_memory_size=84942979072, memory_bandwidth=3352320000000)),
    "h200": ("NVIDIA H200", 9, _HOPPER | dict(
        device_memory_size=151397597184, memory_bandwidth=4800000000000)),
    "b200": ("NVIDIA B200", 10, _BLACKWELL | dict(
        device_memory_size=191514411008, memory_bandwidth=7672320000000)),
}  # fmt: skip


def topology_devices(name: str) -> list[Any]:
    """Returns the devices of a topology; programs can be compiled for them without having them.

    TPUs as v5e:4x4 or v5p:8x8x4, two slices as v5p:4x4x4*2; GPUs as h100:8, two nodes of eight as
    h200:2x8.

    Raises:
      UserError: no such topology, or the compiler for it is not installed.
    """
    if not os.environ.get("JAX_PLATFORMS"):  # what runs meanwhile needs no accelerator
        jax.config.update("jax_platforms", "cpu")
    kind = name.partition(":")[0]
    if re.fullmatch(r"v\d[a-z]*", kind):
        return _tpus(name)
    if kind not in GPUS:
        raise UserError(
            f"--topology={name}: expected one such as v5e:4x4 or h100:8, {nearest(kind, GPUS)}"
        )
    return _gpus(name, kind)


def _gpus(name: str, kind: str) -> list[Any]:
    shape = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", name.partition(":")[2])
    if shape is None:
        raise UserError(
            f"--topology={name}: expected a number of GPUs as {kind}:8, nodes x GPUs as {kind}:2x8"
        )
    how = f"runs anywhere, with jax 0.10.2 or later: {install('cuda')}"
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UserError(f"--topology={name} needs the compiler for GPUs, which {how}")
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=target_config(kind),
            topology=f"1x{shape[1] or 1}x{shape[2]}",
        )
    except Exception as error:  # noqa: BLE001  plugins raise what they like
        raise UserError(
            f"--topology={name}: the compiler for GPUs does not start: {_first_line(error)}; it "
            f"{how}"
        ) from None
    return list(topology.devices)


def target_config(kind: str) -> str:
    """XLA's description of a GPU: a GpuTargetConfigProto as text."""
    name, major, facts = GPUS[kind]
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    described = "\n".join(f"  {key}: {value}" for key, value in (_SHARED | facts).items())
    return (
        f"gpu_device_info {{\n{described}\n"
        f"  cuda_compute_capability {{ major: {major} feature_extension: {extension} }}\n"
        f'  name: "{name}"\n  device_vendor: "NVIDIA Corporation"\n'
        "  device_interconnect_info { active_links: 18 }\n}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 }\n'
        f'runtime_version {{ major: 13 }}\ndevice_description_str: "{name}"\n'
    )


def _tpus(name: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology needs the compiler for TPUs, which runs anywhere: {install('tpu')}"
        )
    # Otherwise libtpu spends long looking for a local TPU, and locks it.
    for variable, value in (
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    shape, star, slices = name.partition("*")
    options: dict[str, Any] = {"num_slices": int(slices)} if slices.isdigit() else {}
    if shape.endswith((":1x1", ":1x1x1")):  # by themselves they are of a host of four
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        if star and not slices.isdigit():
            raise ValueError(f"{slices!r} is no number of slices")
        topology = topologies.get_topology_desc(platform="tpu", topology_name=shape, **options)
    except Exception as error:  # noqa: BLE001  libtpu raises what it likes
        raise UserError(
            f"--topology={name}: {_first_line(error)}; expected one such as v5e:4x4, "
            "v5p:8x8x4, v6e:16x16, or v5p:4x4x4*2 for two slices"
        ) from None
    return list(topology.devices)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
