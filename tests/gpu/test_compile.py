"""The training step, compiled by XLA's compiler for NVIDIA GPUs; there is no GPU."""

import dataclasses
import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax import compiler
from vit_jax.analysis import chips, cost, preflight
from vit_jax.analysis.collectives import by_kind
from vit_jax.analysis.hlo import parse
from vit_jax.analysis.roofline import Roofline, read_kernels
from vit_jax.errors import UserError
from vit_jax.models.variants import variant
from vit_jax.training.config_file import load_config
from vit_jax.training.sharding import make_mesh

if importlib.util.find_spec("jax_cuda13_plugin") is None:
    pytest.skip("needs jax[cuda13]: make test-gpu-compile", allow_module_level=True)
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments" / "benchmarks"))
import roofline as benchmark  # noqa: E402

PRETRAIN = f"{ROOT}/configs/pretrain.py:S/16,jft"
SMALL = dict(width=256, num_heads=4, mlp_dim=1024, depth=2)


def compiled(topology, *overrides, **fields):
    flags = [f"--config.{each}" for each in ("precision=bfloat16", "model.num_classes=10")]
    flags += [f"--config.{each}" for each in ("batch_size=64", *overrides)]
    config = load_config(PRETRAIN, flags)
    plan, _, _ = preflight.open_plan(config)
    vit = dataclasses.replace(plan.card.config, **SMALL | fields)
    mesh = make_mesh(config.mesh, chips.topology_devices(topology))
    return preflight.compile_step(plan.with_model(vit), mesh)


def launches_of_a_block(**fields):
    two, four = (compiled("h100:1", depth=depth, **fields).roofline for depth in (2, 4))
    return (four.launches - two.launches) / 2


@pytest.mark.parametrize("image_size, tokens", [(224, 197), (208, 170)])
def test_attention_is_cudnns_for_odd_and_even_numbers_of_tokens(image_size, tokens):
    found = compiled("h100:1", image_size=image_size)
    assert found.fused_attention == 2 * 2  # there and back, two blocks
    assert found.fits and found.limit_bytes == 60 * 2**30
    shapes = {kernel.arrays for kernel in found.roofline.kernels if "attend" in kernel.op_name}
    assert any(f"bf16[64,{tokens + tokens % 2},4,64]" in shape for shape in shapes)


def test_a_block_is_few_kernels():
    # Forward: QKV 3, attention, its output, two of the MLP, two norms, two copies of the residual.
    # Back: products 8, GELU, attention, slices of QKV joined, two norms, sums of the biases 2 x 4.
    assert launches_of_a_block(image_size=224) <= 11 + 21 + 1


@pytest.mark.parametrize("backend", ["xla", "cudnn"])
def test_gelu_biases_and_residuals_are_written_by_the_products(backend):
    config = variant("B/16", num_classes=10, dtype="bfloat16", attention=backend, depth=2)
    hlo = benchmark.compiled(config, 256, "h100").as_text()
    products = [line for line in hlo.splitlines() if '"__cublas$lt$matmul"' in line]
    epilogues = Counter(re.search('"epilogue":"(\\w+)"', line)[1] for line in products)
    # Q, K, V, attention's output and the MLP's; the patches' and the head's.
    attention = 2 * 6 if backend == "xla" else 0
    assert epilogues == {"BIAS": 2 * 5 + 2, "BIAS_GELU_AUX": 2, "DEFAULT": 2 * 8 + 3 + attention}
    assert sum('"beta":1' in line and '"epilogue":"BIAS"' in line for line in products) >= 2 * 2
    assert "gemm_fusion" not in hlo and ("__cudnn$fmha" in hlo) == (backend == "cudnn")


def counted(hlo):
    """Bytes of all operands and results of a program without loops, in another way.

    Nothing of it is in place or a slice, but for what the table of names leaves out.
    """
    entry = hlo[hlo.index("\nENTRY") :]
    sizes, total = {}, 0.0
    for line in entry.splitlines():
        match = re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z-]+)\((.*)", line)
        if match is None:
            continue
        name, shape, op, rest = match.groups()
        width = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "u8": 1, "pred": 1, "s8": 0}
        arrays = re.findall(r"\b(bf16|f32|s32|u32|u8|s8|pred)\[([\d,]*)\]", shape)
        elements = [np.prod([int(n) for n in dims.split(",") if n]) for _, dims in arrays]
        bytes_of = [width[dtype] * n for (dtype, _), n in zip(arrays, elements, strict=True)]
        index = re.search(r"index=(\d+)", rest)
        if op == "get-tuple-element":
            source = re.match(r"%([\w.-]+)", rest)[1]
            sizes[name] = sizes[source][int(index[1])], bytes_of[0]
        sizes[name] = bytes_of
        if op in ("fusion", "custom-call", "copy"):
            operands = re.findall(r"%([\w.-]+)", rest.partition("), ")[0])
            total += sum(bytes_of) + sum(sum(sizes[each]) for each in dict.fromkeys(operands))
    return total


def test_the_reader_agrees_with_other_counts_of_a_whole_step():
    config = variant("S/16", num_classes=1000, dtype="bfloat16", depth=4, pool="gap")
    hlo = benchmark.compiled(config, 64, "h100").as_text()
    found = Roofline(tuple(read_kernels(hlo)), chips.CHIPS["NVIDIA H100 80GB HBM3"])
    assert not any(each.op == "while" for each in parse(hlo).computations[parse(hlo).entry])
    assert found.bytes == pytest.approx(counted(hlo), rel=0.01)
    # Scores are computed once more on the way back; the image has no gradient.
    forward, attention = cost.flops_per_image(config), 2 * 4 * 196**2 * config.width
    pixels = 2 * 196 * 16 * 16 * 3 * config.width
    assert found.flops == pytest.approx(64 * (3 * forward + attention - pixels), rel=0.01)


@pytest.mark.parametrize("fields", [dict(), dict(pool="gap", position="sincos2d")], ids=str)
def test_b16_is_as_fast_as_it_was_made(fields):
    """By its roofline on an H100, 256 images: 91.8 and 61.8 ms, 984 and 597 kernels before."""
    config = variant("B/16", num_classes=1000, dtype="bfloat16", **fields)
    found = benchmark.measure(config, 256, "h100", "ours")
    assert found["ms"] < 51 and found["kernels"] <= 450
    assert found["temporaries_gib"] < 14.7


def test_only_data_spans_nodes():
    devices = chips.topology_devices("h200:2x4")
    config = load_config(PRETRAIN, ["--config.mesh.data=4", "--config.mesh.fsdp=2"])
    nodes = np.vectorize(lambda device: device.process_index)(
        make_mesh(config.mesh, devices).devices
    )
    assert (nodes == np.array([0, 0, 1, 1])[:, None, None]).all()
    with pytest.raises(UserError, match=r"mesh\.data must be a multiple of 2"):
        make_mesh(load_config(PRETRAIN, ["--config.mesh.fsdp=8"]).mesh, devices)


def test_fsdp_moves_little_more_than_it_needs():
    found = compiled("h100:2x4", "mesh.data=2", "mesh.fsdp=4", depth=4, width=512, num_heads=8)
    assert 0.8 < found.moved_bytes / found.least_bytes < 1.25
    replicated = compiled("h100:8", "mesh.data=8", depth=4)
    assert 0.9 < replicated.moved_bytes / replicated.least_bytes < 1.1


def test_tensor_parallelism_gathers_nothing():
    found = compiled("h100:8", "mesh.data=4", "mesh.tensor=2")
    kinds = by_kind(found.collectives)
    assert sum(kinds.get(kind, (0, 0))[1] for kind in ("all-gather", "all-to-all")) < 100
    assert 0.9 < found.moved_bytes / found.least_bytes < 1.15


def test_a_deterministic_program_compiles():
    found = compiled("h100:1", "mesh.deterministic=True")
    assert found.fits
    mesh = make_mesh(load_config(PRETRAIN, []).mesh, chips.topology_devices("h100:1"))
    options = compiler.compiler_options(mesh, deterministic=True)
    assert options == compiler.OPTIONS["gpu"] | {"xla_gpu_deterministic_ops": True}


@pytest.mark.parametrize("gpu", sorted(chips.GPUS))
def test_every_gpu_compiles_and_has_its_rates(gpu):
    (device,) = chips.topology_devices(f"{gpu}:1")
    product = jax.jit(lambda x: x @ x, out_shardings=make_mesh_of(device))
    x = jax.ShapeDtypeStruct((512, 512), "bfloat16", sharding=make_mesh_of(device))
    hlo = product.lower(x).compile().as_text()
    assert sum(kernel.flops for kernel in read_kernels(hlo)) == 2 * 512**3
    chip, (_, _, facts) = chips.CHIPS[device.device_kind], chips.GPUS[gpu]
    assert chip.bandwidth == pytest.approx(facts["memory_bandwidth"], rel=1e-3)
    assert chip.memory == pytest.approx(facts["device_memory_size"], rel=0.02)


def make_mesh_of(device):
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    return NamedSharding(Mesh([device], "x"), PartitionSpec())


def test_the_report_says_what_the_program_does(capsys):
    flags = ["--config.precision=bfloat16", "--config.model.num_classes=10"]
    flags += ["--config.batch_size=16384", "--config.model.depth=1", "--config.model.num_heads=6"]
    with pytest.raises(UserError, match=r"it does with --config\.optim\.accumulate=\d"):
        for line in preflight.preflight(load_config(PRETRAIN, flags), "h100:1"):
            print(line)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("devices    1 x NVIDIA H100 80GB HBM3 of 1 host")
    assert "attention  cuDNN's, 2 kernels in the program" in lines
    (time,) = [line for line in lines if line.startswith("time ")]
    assert re.search(r"about [\d.e+]+ ms a step, [\d,]+ images/s.* \(by its roofline", time)
    assert len([line for line in lines if line.startswith("dearest ")]) == 5
    (parts,) = [line for line in lines if line.startswith("ms of ")]
    assert {"MLP", "QKV", "norms", "attention"} <= set(re.findall(r"[A-Za-z]+", parts))
