"""The benchmark of the training step: its FLOP count against XLA's, and that it runs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from vit_jax.models.config import variant
from vit_jax.models.vit import structure

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "benchmarks" / "train.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flops_of_b16_are_those_written_out_by_hand(benchmark):
    block = 2 * 197 * 768 * (4 * 768 + 2 * 3072) + 2 * 2 * 197**2 * 768
    by_hand = 2 * 196 * 768 * 768 + 12 * block + 2 * 768 * 1000
    assert benchmark.flops_per_image(variant("B/16")) == by_hand
    assert by_hand == pytest.approx(35.1e9, rel=2e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pool": "map", "representation_size": 768, "image_size": (64, 64)},
        {"patch_size": (32, 16)},
        {"position": "relative"},
    ],
)
def test_flops_match_what_xla_counts(benchmark, fields):
    # As a loop: XLA's analysis counts a scanned body once, however often it runs.
    config = variant("B/16", **{"depth": 2, "scan": False, **fields})
    graphdef, params = structure(config)
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)

    def loss(params, images):
        return nnx.merge(graphdef, params)(images).sum()

    def flops(function):
        return jax.jit(function).lower(params, images).cost_analysis()["flops"]

    assert benchmark.flops_per_image(config) == pytest.approx(flops(loss), rel=0.01)
    training = 3 * benchmark.flops_per_image(config)
    assert training == pytest.approx(flops(jax.value_and_grad(loss)), rel=0.03)


def test_it_runs_and_writes_json(benchmark, tmp_path):
    flags = "--variants=mu/16 --image-size=32 --batch-sizes=2 --steps=1 --repeats=1"
    env = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *flags.split(), "--contestants=ours", "--json=out.json"],
        env=os.environ | env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "| mu/16 | 32x32 | 2 | ours |" in done.stdout
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["versions"]["jax"] == jax.__version__
    (case,) = record["cases"]
    assert case["flops_per_image"] == benchmark.flops_per_image(
        variant("mu/16", image_size=(32, 32))
    )
    seconds = case["results"]["ours"]["seconds_per_step"]
    assert len(seconds) == 1 and seconds[0] > 0


def test_an_error_is_noted_and_told_in_the_table(benchmark):
    result = {}
    with benchmark.noting(result):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nmore")
    case = {"variant": "B/16", "batch_size": 8, "config": {"image_size": (224, 224)}}
    case |= {"results": {"ours": result}, "ceiling_flops": []}
    (row,) = benchmark.rows(case)
    assert row.startswith("| B/16 | 224x224 | 8 | ours | out of memory |")
    assert row.count("|") == benchmark.COLUMNS.count("|") + 2
    assert benchmark.best("B/16", [case]).endswith("nothing ran.")
