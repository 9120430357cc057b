"""The worker processes, one for JAX and one for torch, and what runs in them.

So neither counts the other's memory or meets the other's libraries. Errors come back as records:
not every one can travel between processes.
"""

import contextlib
import functools
import gc
import importlib.metadata
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
from contestants import Ceiling, Ours, Timm, our_program, program_bytes
from names import Contestant, read_name

from vit_jax.models.config import ModelConfig

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "timm")
LARGEST = 2**20  # batch, beyond which no one looks


@contextlib.contextmanager
def noting(result: dict[str, Any]):
    """Notes an error and goes on: one failure does not end the other measurements."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  jax, torch and their compilers raise many types
        text = f"{type(error).__name__}: {error}"
        memory = re.search(r"RESOURCE_EXHAUSTED|out of memory|can't allocate|MemoryError", text)
        result |= {"error": "out of memory" if memory else text.split("\n")[0], "details": text}


class Workers:
    """A worker process for each family of contestants, which live as long as the block."""

    def __enter__(self) -> "Workers":
        self._pools: dict[str, ProcessPoolExecutor] = {}
        return self

    def __exit__(self, *_: Any) -> None:
        for pool in self._pools.values():
            pool.shutdown()

    def call(self, family: str, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function in a family's process."""
        if family not in self._pools:
            context = multiprocessing.get_context("spawn")
            self._pools[family] = ProcessPoolExecutor(1, mp_context=context)
        return self._pools[family].submit(function, *args).result()

    def noted(self, family: str, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
        """The same for what returns a record; that the process died is an error in it."""
        result: dict[str, Any] = {}
        with noting(result):
            return self.call(family, function, *args)
        return result


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in a process of its own."""
    with Workers() as own:
        return own.call("own", function, *args)


_running: dict[str, Any] = {}  # of this worker process


def start(
    task: str, name: str, config: ModelConfig, batch_size: int, backend: str, caches: str
) -> dict[str, Any]:
    """Makes a contestant run in this process; returns what its start took, or the error."""
    result: dict[str, Any] = {}
    contestant = read_name(name, task)
    with noting(result):
        use_caches(caches)
        if contestant.family == "ours":
            running = Ours(task, contestant, config, batch_size)
        else:
            running = Timm(task, contestant, config, batch_size, backend)
        began = time.perf_counter()
        running.compile()
        result["first_value"] = running.run(1)
        result["first_step_seconds"] = time.perf_counter() - began
        running.run(1)
        result |= {"parameters": running.parameters, **running.memory()}
        _running[name] = running
    if "error" in result:
        running = None  # or this name keeps its memory
        release()
    return result


def turn(name: str, steps: int) -> dict[str, Any]:
    """Lets a contestant take steps; returns seconds a step, the processor's too, or the error."""
    result: dict[str, Any] = {}
    with noting(result):
        _running[name].run(1)  # caches and clocks as it has them, not as the one before
        began, busy = time.perf_counter(), time.process_time()
        result["value"] = _running[name].run(steps)
        result["seconds"] = (time.perf_counter() - began) / steps
        result["cpu_seconds"] = (time.process_time() - busy) / steps
    if "error" in result:
        _running.pop(name, None)
        release()
    return result


def release() -> None:
    """Gives the memory of a contestant that failed back to the others."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def use_caches(folder: str) -> None:
    """Makes both compilers keep what they compile in a folder, and find nothing elsewhere."""
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", f"{folder}/jax")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/torch"
    os.environ.pop("TRITON_CACHE_DIR", None)  # torch sets it to a folder in the first one


def ceiling(dtype: str) -> dict[str, Any]:
    """The side of the product's matrices, and its FLOP/s now; or the error."""
    result: dict[str, Any] = {}
    with noting(result):
        if "ceiling" not in _running:
            _running["ceiling"] = Ceiling(dtype)
        result |= {"size": _running["ceiling"].size, "flops": _running["ceiling"].measure()}
    return result


def largest_batch(
    task: str, name: str, config: ModelConfig, gib: float, caches: str
) -> dict[str, Any]:
    """The largest power of two that fits as a batch, by what XLA says its programs need.

    Args:
      gib: of memory, where the device does not know how much it has.

    Returns:
      `batch_size` (0: not even one image fits), `bytes` of its program and `limit_bytes`; or the
      error.
    """
    result: dict[str, Any] = {}
    with noting(result):
        use_caches(caches)
        stats = jax.devices()[0].memory_stats() or {}
        limit = stats.get("bytes_limit") or int(gib * 2**30)
        needs = functools.partial(_needs, task, read_name(name, task), config)
        batch_size, size = largest_fitting(needs, limit)
        result |= {"batch_size": batch_size, "bytes": size, "limit_bytes": limit}
    return result


def _needs(task: str, contestant: Contestant, config: ModelConfig, batch_size: int) -> float:
    """Bytes that a program needs; infinitely many where the compiler itself runs out of memory."""
    _, shapes, program, _ = our_program(task, contestant, config, batch_size)
    try:
        return program_bytes(program.lower(*shapes).compile(compiler_options=contestant.xla))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf


def largest_fitting(needs: Callable[[int], float], limit: float) -> tuple[int, float | None]:
    """The largest power of two that does not need more than the limit, and what it needs.

    Asks seldom, as each answer is a compilation: what is needed grows about as the batch, so two
    small batches tell where to look. (0, None) where 1 does not fit.
    """
    known: dict[int, float] = {}

    def fits(size: int) -> bool:
        if size not in known:
            known[size] = needs(size)
        return known[size] <= limit

    size = 4
    if fits(4) and fits(8):
        each = max(known[8] - known[4], 1) / 4
        size = 2 ** int(math.log2(max(4 + (limit - known[4]) / each, 8)))
        size = min(size, LARGEST)
    while size and not fits(size):
        size //= 2
    while size and size < LARGEST and fits(2 * size):
        size *= 2
    return size, known.get(size)


def describe(options: dict[str, dict[str, str | bool]]) -> dict[str, Any]:
    """The device that jax runs on, the versions of the packages, and what XLA does not take.

    Args:
      options: of XLA, by the contestant that has them.
    """
    backend, kind = jax.default_backend(), jax.devices()[0].device_kind
    device = kind
    if backend == "cpu":
        with contextlib.suppress(OSError, TypeError):
            device = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
        device += f", {len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.1f}"
    found = {package.name: package.version for package in importlib.metadata.distributions()}
    refused = {}
    for name, asked in options.items():
        try:
            jax.jit(lambda: 0, compiler_options=asked).lower().compile()
        except jax.errors.JaxRuntimeError as error:
            refused[name] = str(error).split("\n")[0]
    return {
        "backend": backend,
        "device": device,
        "device_kind": kind,
        "versions": {name: found.get(name) for name in PACKAGES},
        "refused": refused,
    }
