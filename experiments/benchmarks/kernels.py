"""The kernels of a compiled step: how long the roofline says they take, and how long a profile."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from vit_jax.analysis.chips import Chip
from vit_jax.analysis.roofline import Kernel

OTHER = "not in the program's text"
DEAREST = 15


def profile(run: Callable[[], Any], folder: str) -> bytes:
    """Returns the Chrome trace of what a function makes the devices do: JSON, compressed."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # a trace holds so many events, and these would fill it
    options.host_tracer_level = 1
    with jax.profiler.trace(folder, profiler_options=options):
        run()
    (file,) = Path(folder).glob("plugins/profile/*/*.trace.json.gz")
    return file.read_bytes()


def kernel_seconds(events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds on the streams of GPUs, by HLO instruction, or by the kernel's own name.

    What a trace adds up from these, line by line below the streams, is left out.
    """
    places: dict[tuple, str] = {}
    for event in events:
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name"):
            places[event["pid"], event.get("tid")] = event["args"]["name"]
    seconds: dict[str, float] = {}
    for event in events:
        where = places.get((event.get("pid"), None), "")
        line = places.get((event.get("pid"), event.get("tid")), "")
        if event.get("ph") == "X" and "device:GPU" in where and line.startswith("Stream"):
            name = event.get("args", {}).get("hlo_op") or event["name"]
            seconds[name] = seconds.get(name, 0.0) + event["dur"] / 1e6
    return seconds


def beside(
    kernels: Iterable[Kernel], seconds: dict[str, float], chip: Chip | None
) -> dict[str, Any]:
    """What both say, by part of the model and for the dearest; seconds of a step, None for unknown.

    Args:
      seconds: by HLO instruction, or, as XLA names its own kernels, with _ for what is no letter.
      chip: what the roofline knows of the device, if anything.
    """
    known: dict[str, Kernel] = {}
    for kernel in kernels:
        known[kernel.name] = known[_own_name(kernel.name)] = kernel
    measured: dict[str, float] = {}
    others: dict[str, float] = {}
    for name, took in seconds.items():
        found = known.get(name) or known.get(_own_name(name))
        sums, key = (others, name) if found is None else (measured, found.name)
        sums[key] = sums.get(key, 0.0) + took
    parts: dict[str, dict[str, Any]] = {}
    alike: dict[tuple, dict[str, Any]] = {}
    for kernel in {kernel.name: kernel for kernel in known.values()}.values():
        key = (kernel.part, kernel.direction, kernel.arrays)
        titles = dict(zip(("part", "direction", "arrays"), key, strict=True), name=kernel.name)
        for row in (
            parts.setdefault(kernel.part, {"part": kernel.part}),
            alike.setdefault(key, titles),
        ):
            _add(row, "launches", kernel.times)
            _add(row, "predicted", chip and kernel.seconds(chip))
            _add(row, "measured", measured.get(kernel.name, 0.0) if seconds else None)
    if others:
        parts[OTHER] = {"part": OTHER, "measured": sum(others.values())}
    dearest = [row for row in sorted(alike.values(), key=_cost) if _cost(row)][:DEAREST]
    largest = sorted(others.items(), key=lambda item: -item[1])[:DEAREST]
    return {
        "parts": sorted(parts.values(), key=_cost),
        "dearest": dearest,
        "others": dict(largest),
    }


def _own_name(instruction: str) -> str:
    return re.sub(r"\W", "_", instruction)


def _add(row: dict[str, Any], key: str, value: float | None) -> None:
    row[key] = None if value is None else row.get(key, 0) + value


def _cost(row: dict[str, Any]) -> float:
    """For the dearest first: as measured, or else as predicted."""
    return -(row.get("measured") or row.get("predicted") or 0.0)
