"""The training step, compiled by the TPU's own compiler; there is no TPU."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax.analysis import chips, preflight
from vit_jax.analysis.collectives import by_kind
from vit_jax.errors import UserError
from vit_jax.training.config_file import load_config
from vit_jax.training.sharding import make_mesh

PRETRAIN = Path(__file__).parents[2] / "configs" / "pretrain.py"


def compiled(topology, *overrides, depth=2):
    flags = [f"--config.{each}" for each in ("precision=bfloat16", "model.num_classes=10")]
    flags += [f"--config.{each}" for each in overrides]
    config = load_config(f"{PRETRAIN}:S/16,jft", flags)
    plan, _, _ = preflight.open_plan(config)
    vit = dataclasses.replace(plan.card.config, width=512, num_heads=8, mlp_dim=2048, depth=depth)
    mesh = make_mesh(config.mesh, chips.topology_devices(topology))
    return preflight.compile_step(plan.with_model(vit), mesh)


def test_fsdp_moves_little_more_than_it_needs():
    found = compiled(
        "v5e:2x2", "mesh.data=1", "mesh.fsdp=4", "batch_size=32", "model.remat=full", depth=6
    )
    assert found.fits and found.limit_bytes == 16 * 2**30
    assert found.state_bytes < found.peak_bytes < 2 * 2**30
    blocks = found.program.state.params["blocks"]
    kernels = [leaf.size for leaf in jax.tree.leaves(blocks) if "fsdp" in leaf.sharding.spec]
    totals = by_kind(found.collectives)
    assert totals["all-gather"][1] == pytest.approx(2 * 2 * sum(kernels) * 3 / 4, rel=0.2)
    assert 0.8 < found.moved_bytes / found.least_bytes < 1.25


def test_what_a_chip_cannot_hold_is_found_out():
    found = compiled("v5e:2x2", "batch_size=16384")
    assert found.peak_bytes is None and not found.fits


def test_the_report_names_the_change_that_fits(capsys):
    flags = ["--config.precision=bfloat16", "--config.model.num_classes=10"]
    flags += ["--config.batch_size=8192", "--config.model.depth=1", "--config.model.num_heads=6"]
    config = load_config(f"{PRETRAIN}:S/16,jft", flags)
    with pytest.raises(UserError, match=r"it does with --config\.optim\.accumulate=\d"):
        for line in preflight.preflight(config, "v5e:1x1"):
            print(line)
    out = capsys.readouterr().out
    assert "1 x TPU v5 lite of 1 host" in out
    assert "the compiler needs more than the device has of 16.00 GiB" in out


def test_data_spans_slices_and_fsdp_does_not():
    devices = chips.topology_devices("v5e:2x2*2")
    config = load_config(f"{PRETRAIN}:S/16,jft", ["--config.mesh.data=2", "--config.mesh.fsdp=4"])
    mesh = make_mesh(config.mesh, devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)[:, :, 0]
    assert (slices[0] == slices[0, 0]).all() and (slices[1] == slices[1, 0]).all()
    assert slices[0, 0] != slices[1, 0]


@pytest.mark.parametrize("name", ["v5x:4x4", "v5e:3x5", "nonsense", "v5e:2x2*many"])
def test_a_topology_that_is_none_is_said_in_a_sentence(name):
    with pytest.raises(UserError, match="expected one such as v5e:4x4"):
        chips.topology_devices(name)
