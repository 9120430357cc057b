"""Preflight: compiles the training step without running it, and reports memory, time and traffic.

With a topology, the step is compiled by the real compiler for TPUs or GPUs that this machine does
not have.
"""

import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vit_jax.analysis.chips import CHIPS, GIB, topology_devices
from vit_jax.analysis.collectives import Collective, by_kind, read_collectives
from vit_jax.analysis.cost import block_tokens, flops_per_image, least_traffic, step_flops
from vit_jax.analysis.roofline import Roofline, read_kernels, tell
from vit_jax.analysis.smaller import smaller
from vit_jax.checkpoints.opened import open_model
from vit_jax.data.pipeline import train_batches
from vit_jax.data.sources import Source, open_source
from vit_jax.errors import UserError
from vit_jax.models.config import ModelConfig, ViTConfig
from vit_jax.models.create import structure
from vit_jax.training.config import Config
from vit_jax.training.distill import open_teacher
from vit_jax.training.phases import Phase
from vit_jax.training.plan import Plan, TrainingData, make_plan
from vit_jax.training.program import Program, make_program
from vit_jax.training.sharding import device_memory, make_mesh, unsplit

SEARCH_SECONDS = 120
_SECONDS_OF_DATA = 5.0


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A training step, compiled but not run; bytes are per device.

    Attributes:
      seconds: how long compiling took.
      state_bytes: parameters, optimiser state and EMA.
      peak_bytes: peak memory; None if compiling failed.
      limit_bytes: the device's memory, None if unknown.
      collectives: communication between devices in a step.
      least_bytes: the lower bound of that for the mesh (see `least_traffic`).
      fused_attention: calls of cuDNN's attention; None if compiling failed.
      roofline: lower bound of the step's time, None for kinds that are not in CHIPS.
    """

    program: Program
    seconds: float
    state_bytes: int
    peak_bytes: int | None
    limit_bytes: int | None
    collectives: tuple[Collective, ...] = ()
    least_bytes: float = 0.0
    fused_attention: int | None = None
    roofline: Roofline | None = None

    @property
    def fits(self) -> bool:
        return self.peak_bytes is not None and self.peak_bytes <= (self.limit_bytes or math.inf)

    @property
    def moved_bytes(self) -> float:
        return sum(each.times * each.bytes for each in self.collectives)


def compile_step(plan: Plan, mesh: Mesh) -> CompiledStep:
    """Compiles the training step of a plan for the devices of `mesh`, which need not exist.

    Of a run with several phases, the one that needs the most memory; of equal ones the last.
    """
    steps = [_compile_phase(plan, mesh, phase) for phase in reversed(plan.phases)]
    return max(steps, key=lambda step: math.inf if step.peak_bytes is None else step.peak_bytes)


def _compile_phase(plan: Plan, mesh: Mesh, phase: Phase) -> CompiledStep:
    program = make_program(plan, mesh, phase)
    state_bytes = shard_bytes(program.state)
    device = mesh.devices.flat[0]
    limit, chip = memory_limit(device), CHIPS.get(device.device_kind)
    began = time.monotonic()
    try:
        compiled = program.step.trace(*program.inputs).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return CompiledStep(program, time.monotonic() - began, state_bytes, None, limit)
    seconds = time.monotonic() - began
    memory = compiled.memory_analysis()
    # All temporaries are one block, which is allocated as a whole; two more batches are being
    # prefetched (see loop.on_device).
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        + 2 * shard_bytes(program.batch)
    )
    hlo = compiled.as_text()
    return CompiledStep(
        program,
        seconds,
        state_bytes,
        peak,
        limit,
        tuple(read_collectives(hlo)) if mesh.size > 1 else (),
        least_traffic(program, plan.config, plan.card.config, teacher_of(plan)),
        len(re.findall(r'custom_call_target="__cudnn\$fmha', hlo)),
        None if chip is None else Roofline(tuple(read_kernels(hlo)), chip),
    )


def teacher_of(plan: Plan) -> ModelConfig | None:
    """The model of the plan's teacher, if it has one."""
    return None if plan.teacher is None else plan.teacher.model


def shard_bytes(tree: Any) -> int:
    """Bytes on each device for a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def memory_limit(device: Any) -> int | None:
    """Memory of a device in bytes; for a CPU device, its share of this machine's memory.

    For a GPU of a topology, the share of its memory that JAX allocates by default.
    """
    if (memory := device_memory(device)) is not None:
        return memory
    known = CHIPS.get(device.device_kind)
    if known is None or device.platform != "gpu":
        return known and known.memory
    variables = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    share = next((os.environ[name] for name in variables if os.environ.get(name)), "0.75")
    if not re.fullmatch(r"0?\.\d+|1(\.0*)?", share):
        raise UserError(f"{' or '.join(variables)} is {share!r}; expected a share such as 0.9")
    return int(float(share) * known.memory)


def preflight(
    config: Config, topology: str | None = None, search_seconds: int | float = SEARCH_SECONDS
) -> Iterator[str]:
    """Yields the lines of a config's preflight report, as they are computed.

    Args:
      topology: the devices to compile for (see `topology_devices`); None for this machine's.
      search_seconds: after how long no further change is tried, if the run does not fit; 0 for no
        search.

    Raises:
      UserError: the config cannot train, or does not fit into memory; the message then suggests a
        change that does.
    """
    config.check_trains()
    devices = topology_devices(topology) if topology else jax.devices()
    mesh = make_mesh(config.mesh, devices)
    plan, source, missing = open_plan(config)
    vit, hosts = plan.card.config, len({device.process_index for device in devices})
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    kind = f"{len(devices)} x {devices[0].device_kind}"
    yield _line("devices", f"{kind} of {hosts} host{'s' * (hosts > 1)}, mesh {axes}")
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(structure(vit)[1]))
    if isinstance(vit, ViTConfig):
        sizes = f"{vit.num_tokens} tokens of {vit.width}"
        if vit.patch_dropout:
            sizes += f", {block_tokens(vit, training=True)} in training"
    else:
        sizes = f"{sum(vit.resnet)} units, {vit.width:,} channels"
    yield _line("model", f"{params:,} parameters, {sizes}")
    if (growth := plan.growth) and len(growth.sides) > 1:
        yield _line("images", f"grow to {vit.image_size[0]} pixels; what follows is of these")
    if probe := config.optim.probe:
        told = f"the first {probe.steps:,} steps train the head alone; what follows is of others"
        yield _line("probe", told)
    flops = step_flops(config, vit, teacher_of(plan))
    forward = f"{flops_per_image(vit) / 1e9:.4g} GFLOP an image forward"
    yield _line("work", f"{forward}, {flops / 1e12:.4g} TFLOP a training step")
    compiled = compile_step(plan, mesh)
    if plan.teacher is not None:
        size = shard_bytes(compiled.program.teacher) / GIB
        forward = f"{flops_per_image(plan.teacher.model) / 1e9:.4g} GFLOP an image forward"
        yield _line("teacher", f"{plan.teacher}; {size:.2f} GiB a device, {forward}")
    calls = compiled.fused_attention
    if isinstance(vit, ViTConfig) and calls is not None:
        yield _line("attention", f"cuDNN's, {calls} kernels in the program" if calls else "XLA's")
    for parameter in unsplit(compiled.program.state.params, mesh):
        yield _line("not split", str(parameter))
    yield _line("memory", _memory(compiled))
    if compiled.collectives:
        for kind, (count, size) in by_kind(compiled.collectives).items():
            yield _line("moves", f"{count:,} x {kind}, {size / 1e9:.3f} GB a device and step")
        ratio = compiled.moved_bytes / compiled.least_bytes
        least = f"the least, {compiled.least_bytes / 1e9:.3f} GB"
        yield _line("", f"together {compiled.moved_bytes / 1e9:.3f} GB, {ratio:.2f} times {least}")
    if compiled.roofline is not None:
        seconds, text = compiled.roofline.seconds, "by its roofline, at the least"
    elif devices[0] in jax.local_devices():
        rate, text = flop_rate(devices, vit)
        seconds = flops / rate
    else:
        seconds = None
    if seconds is not None:
        steps = None if config.total_epochs and source is None else plan.total_steps
        whole = f", {_duration(steps * seconds)} for {steps:,} steps" if steps else ""
        rate = f"{config.batch_size / seconds:,.0f} images/s"
        yield _line("time", f"about {seconds * 1e3:.4g} ms a step, {rate}{whole} ({text})")
    if compiled.roofline is not None:
        yield from roofline_lines(compiled.roofline)
    needed = None if seconds is None else config.batch_size / seconds / hosts
    if source is None:
        yield _line("data", f"not measured: {missing}")
    else:
        yield _line("data", _data_rate(plan, source, config.batch_size // hosts, needed))
    if compiled.fits:
        return

    changes = list(smaller(config, vit, mesh, compiled.state_bytes, compiled.limit_bytes))
    if not changes or search_seconds <= 0:
        raise UserError("this does not fit on the devices: use more or larger ones")
    yield (
        f"This does not fit. Looking for the smallest of {len(changes)} changes that does; the one "
        f"above took {compiled.seconds:.3g} s to compile, and after {search_seconds:g} s of them "
        "(--search-seconds) no other is begun:"
    )
    began = time.monotonic()
    for count, (flags, changed, remat) in enumerate(changes):
        if time.monotonic() - began >= search_seconds:
            raise UserError(
                f"this does not fit on the devices, nor with the {count} of {len(changes)} changes "
                f"tried in {search_seconds:g} s: give more --search-seconds, or use more or larger "
                "devices"
            )
        there = plan.with_model(dataclasses.replace(vit, remat=remat))
        there = dataclasses.replace(there, config=changed)
        tried = compile_step(there, make_mesh(changed.mesh, devices))
        yield f"  {flags}: {_memory(tried)}"
        if tried.fits:
            raise UserError(f"this does not fit on the devices; it does with {flags}")
    raise UserError(
        f"this does not fit, nor does any of the {len(changes)} changes tried: use more or larger "
        "devices"
    )


def roofline_lines(roofline: Roofline) -> Iterator[str]:
    """Yields lines on where a step's time goes, and its slowest kernels."""
    yield _line(
        "kernels",
        f"{roofline.launches:,}, {roofline.bytes / 1e9:,.1f} GB read and written, "
        f"{roofline.flops / 1e12:.3g} TFLOP of products, {roofline.ceiling:.0%} of the ceiling",
    )
    parts = roofline.by(lambda kernel: kernel.part)
    text = ", ".join(f"{part} {seconds * 1e3:.3g}" for part, seconds in parts.items())
    yield _line("ms of", text)
    for dearest in roofline.dearest(5):
        yield _line("dearest", tell(*dearest))
    if roofline.unknown:
        text = "in loops of unknown length, in branches, or of unknown products: counted once"
        yield _line("", f"{roofline.unknown} kernels are {text}")


def flop_rate(devices: list[Any], vit: ModelConfig) -> tuple[float, str]:
    """Total FLOP/s of this machine's devices, and how it was determined."""
    hidden = vit.mlp_dim if isinstance(vit, ViTConfig) else vit.width
    tokens, inner = 2048, jnp.ones((vit.width, hidden), vit.dtype)
    x = jnp.ones((tokens, vit.width), vit.dtype)
    product = jax.jit(lambda x, y: x @ y).lower(x, inner).compile()
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        product(x, inner).block_until_ready()
        best = min(best, time.perf_counter() - began)
    rate = 2 * tokens * vit.width * hidden / best
    # CPU devices share the cores, and so the rate.
    together = rate if devices[0].platform == "cpu" else rate * len(devices)
    return (
        together,
        f"if all ran as a product of its width does here alone, {rate / 1e9:.4g} GFLOP/s",
    )


def open_plan(config: Config) -> tuple[Plan, Source | None, str]:
    """Returns the plan, the data and, if that cannot be opened, the reason.

    Without its data, a run is planned with model.num_classes classes.
    """
    init = None
    if config.init_from is not None:
        init = open_model(config.init_from, **config.init_keys)
    teacher = open_teacher(config.distill, open_model)
    try:
        source = open_source(config.data.train.source, config.data.train.split)
    except UserError as error:
        classes = config.model.get("num_classes") if config.classifies else 0
        if classes is None:
            raise UserError(
                f"{error}; to go on without the data, say how many classes it has: "
                "--config.model.num_classes=1000"
            ) from None
        names = tuple(str(i) for i in range(classes))
        kinds = dict(masks=config.segments, boxes=config.detects)
        data = TrainingData(names, examples=10**9, **kinds)
        return make_plan(config, data, init, teacher), None, str(error)
    return make_plan(config, TrainingData.of(source), init, teacher), source, ""


def _data_rate(plan: Plan, source: Source, rows: int, needed: float | None) -> str:
    """Measures for some seconds how fast one host reads training batches."""
    read, data = dataclasses.replace(plan.reader(source), growth=None), plan.config.data
    size = max(min(rows, 256) // read.repeats, 1) * read.repeats
    options = dict(workers=data.workers, threads=data.threads)
    images, began = 0, None
    with train_batches(read, size, start_step=0, stop_step=10**6, **options) as batches:
        for batch in batches:
            if began is None:  # what was read ahead before is not counted
                began = time.perf_counter()
                continue
            images += len(batch["mask"])
            if time.perf_counter() - began > _SECONDS_OF_DATA:
                break
    rate = images / (time.perf_counter() - began)
    text = f"this machine reads {rate:,.0f} images/s"
    if needed is None:
        return text
    enough = "enough" if rate >= needed else f"{needed / rate:.1f} times too slow"
    return f"{text}, a host needs {needed:,.0f}: {enough}"


def _memory(compiled: CompiledStep) -> str:
    state, limit = compiled.state_bytes / GIB, compiled.limit_bytes
    of = "" if limit is None else f" of {limit / GIB:.2f}"
    if compiled.peak_bytes is None:
        return f"the compiler needs more than the device has{of and of + ' GiB'}"
    text = f"{compiled.peak_bytes / GIB:.2f}{of} GiB a device at the peak, {state:.2f} of it state"
    return text if compiled.fits else f"{text}: too much"


def _line(name: str, what: str) -> str:
    return f"{name:<10} {what}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds > 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
