"""What a run with precision bfloat16 computes in it, and how far that takes it from float32."""

import re

import jax
import numpy as np
import pytest
from conftest import DIGITS, TINY

from vit_jax.data.sources import open_source
from vit_jax.training.config_file import load_config
from vit_jax.training.plan import TrainingData, make_plan
from vit_jax.training.program import make_program
from vit_jax.training.sharding import make_mesh, to_devices
from vit_jax.training.state import make_state

CASES = {
    "scanned": ["--config.model.scan=True"],
    "looped": ["--config.model.scan=False"],
    "pooled by attention, computed anew": [
        *("--config.model.pool=map", "--config.model.mlp=swiglu", "--config.model.remat=full"),
    ],
    "relative, on a mesh": [
        *("--config.model.position=relative", "--config.model.scan=False"),
        *("--config.mesh.fsdp=2", "--config.mesh.tensor=2"),
    ],
    "hybrid": [
        *("--config.model.variant=R26+S/32", "--config.model.image_size=(32,32)"),
        *("--config.model.resnet=(1,1)", "--config.model.resnet_width=32"),
    ],
}
PRODUCTS = re.compile(r"stablehlo\.(?:dot_general|convolution).* : \((\S+), (\S+)\) -> (\S+)")


def program_of(flags):
    """What a run on digits with these flags compiles, and its model's config."""
    config = load_config(DIGITS, flags)
    source = open_source("digits", "train")
    plan = make_plan(config, TrainingData.of(source))
    mesh = make_mesh(config.mesh)
    return make_program(plan, mesh), plan.card.config


def products_of(text):
    """The types of each product's operands in a lowered program, and of what it returns."""
    return [
        tuple(kind.rpartition("x")[2].strip(">") for kind in found)
        for found in PRODUCTS.findall(text)
    ]


@pytest.mark.parametrize("case", CASES)
def test_all_products_of_a_step_are_of_bfloat16(case):
    """Forward and backward, the smallest too: of the program that a run compiles, lowered."""
    program, _ = program_of(
        [*TINY, "--config.precision=bfloat16", "--config.model.attention=xla", *CASES[case]]
    )
    traced = program.step.trace(program.state, program.batch)
    for platform in ("cpu", "cuda", "tpu"):
        found = products_of(traced.lower(lowering_platforms=(platform,)).as_text())
        assert {operand for *operands, _ in found for operand in operands} == {"bf16"}, platform
        # Six of a block and two for each one's gradients; patches, the hidden layer and the head.
        if case in ("scanned", "looped"):
            assert len(found) == 18 * (1 if case == "scanned" else 2) + 8
        # Scores, and what they weighted: the softmax in between is in float32.
        assert sum(result == "f32" for *_, result in found) >= 2


def test_cudnn_is_given_bfloat16(monkeypatch):
    """In place of cuDNN, which nothing can be lowered for without it: what takes all gradients."""
    given = []

    def fused(q, k, v, bias, *, implementation, **lengths):
        given.append((implementation, q.dtype.name, k.dtype.name, v.dtype.name))
        return q + k + v

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    program, _ = program_of(
        [*TINY, "--config.precision=bfloat16", "--config.model.attention=cudnn"]
    )
    found = products_of(program.step.lower(program.state, program.batch).as_text())
    assert set(given) == {("cudnn", *["bfloat16"] * 3)}
    assert len(found) == 12 + 8 and set(found) == {("bf16", "bf16", "bf16")}


def test_a_float32_step_has_none_of_it():
    program, _ = program_of([*TINY, "--config.model.scan=True"])
    found = products_of(program.step.lower(program.state, program.batch).as_text())
    assert len(found) == 26 and set(found) == {("f32", "f32", "f32")}


def test_the_loss_goes_down_as_in_float32():
    """Thirty steps on the same 128 digits: both learn them, and side by side."""
    flags = ["width=32", "depth=2", "mlp_dim=64", "num_heads=2", "pool=gap"]
    flags = [f"--config.model.{flag}" for flag in [*flags, "representation_size=None"]]
    flags += ["--config.batch_size=128", "--config.total_steps=30", "--config.optim.lr=3e-3"]
    flags += ["--config.optim.schedule=constant", "--config.optim.warmup=3"]
    source = open_source("digits", "train")
    rows = {
        "image": np.asarray(source.images)[:128].reshape(128, 8, 8, 1),
        "label": np.asarray(source.labels)[:128].astype(np.int32),
        "mask": np.ones(128, bool),
    }
    curves = {}
    for precision in ("float32", "bfloat16"):
        program, vit = program_of([*flags, f"--config.precision={precision}"])
        state = make_state(program.state, vit, program.optimizer, seed=0)
        batch, metrics = to_devices(rows, 128, program.mesh), []
        for _ in range(30):
            state, measured = program.step(state, batch)
            metrics.append([float(measured[name]) for name in ("loss", "grad_norm")])
        curves[precision] = np.transpose(metrics)
    (exact, exact_norms), (found, norms) = curves["float32"], curves["bfloat16"]
    assert exact[0] > 2.3 > 1.1 > exact[-1]
    assert 1e-4 < np.abs(found - exact).max() < 0.03
    np.testing.assert_allclose(norms[:5], exact_norms[:5], rtol=0.02)
