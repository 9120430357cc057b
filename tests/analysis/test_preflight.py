"""What a run will need: the report's numbers, and the change that makes a config fit."""

import dataclasses
import itertools
import re
import time
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import pytest
from conftest import DIGITS, TINY

from vit_jax.__main__ import main
from vit_jax.analysis import chips, cost, preflight
from vit_jax.analysis.smaller import smaller
from vit_jax.errors import UserError
from vit_jax.models.variants import variant
from vit_jax.training.config_file import load_config
from vit_jax.training.sharding import make_mesh


def lines_of(*overrides, topology=None):
    """The report as {name: what it says}."""
    found = {}
    for line in preflight.preflight(load_config(DIGITS, [*TINY, *overrides]), topology):
        name, _, what = line.partition(" ")
        found.setdefault(name, []).append(what.strip())
    return found


@pytest.fixture(scope="module")
def report():
    preflight._SECONDS_OF_DATA = 0.2
    return lines_of("--config.mesh.fsdp=-1", "--config.mesh.data=1")


def test_the_report_says_what_the_run_will_be(report):
    (devices,) = report["devices"]
    assert devices == "8 x cpu of 1 host, mesh data 1 x fsdp 8 x tensor 1"
    # 17 tokens of 16; counted as the parts of the paper's model.
    block = 2 * 2 * 16 + 16 * 48 + 48 + 16 * 16 + 16 + 2 * 16 * 32 + 32 + 16
    embed = 2 * 2 * 1 * 16 + 16 + 16 + 17 * 16
    params = embed + 2 * block + 2 * 16 + 16 * 8 + 8 + 8 * 10 + 10
    assert report["model"] == [f"{params:,} parameters, 17 tokens of 16"]
    assert report["attention"] == ["XLA's"]
    assert re.search(r"GiB a device at the peak, 0\.00 of it state", *report["memory"])
    assert any("all-gather" in line for line in report["moves"])
    assert re.search(r"ms a step.* for 24 steps", *report["time"])
    assert re.search(r"this machine reads [\d,]+ images/s, a host needs", *report["data"])


def test_state_is_a_share_and_the_least_traffic_is_counted():
    config = load_config(DIGITS, [*TINY, "--config.mesh.fsdp=8", "--config.mesh.data=1"])
    plan, _, _ = preflight.open_plan(config)
    found = preflight.compile_step(plan, make_mesh(config.mesh))
    leaves = jax.tree.leaves(found.program.state)
    # AdamW: two moments; and the average: four times the parameters and some counters.
    params = sum(leaf.size for leaf in jax.tree.leaves(found.program.state.params))
    assert sum(leaf.size for leaf in leaves) == pytest.approx(4 * params, abs=5)
    split = sum(leaf.size for leaf in leaves if "fsdp" in leaf.sharding.spec)
    whole = sum(leaf.size for leaf in leaves) - split
    assert found.state_bytes == 4 * (split // 8 + whole)

    split, whole = split / 4, params - split / 4
    least = 2 * 4 * 7 / 8 * (3 * split + 2 * whole)  # two micro-batches, float32
    assert found.least_bytes == pytest.approx(least)
    # On a CPU sums are whole: 2 for a gradient instead of 1.
    assert found.least_bytes < found.moved_bytes < 1.7 * found.least_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flops_of_a_step_count_what_remat_repeats(dtype):
    config = load_config(DIGITS, TINY)
    vit = variant("B/16", dtype=dtype)
    forward = cost.flops_per_image(vit)
    assert cost.step_flops(config, vit) == 32 * 3 * forward
    full = cost.step_flops(config, dataclasses.replace(vit, remat="full"))
    assert full == 32 * 4 * forward


def test_what_does_not_fit_is_made_to_fit(monkeypatch, capsys):
    compiled, compile_step = {}, preflight.compile_step

    def compile_once(plan, mesh):
        """The same step on a device with as much memory as there is now."""
        key = repr((plan.config, mesh.shape))
        compiled[key] = found = compiled.get(key) or compile_step(plan, mesh)
        return dataclasses.replace(found, limit_bytes=preflight.memory_limit(mesh.devices.flat[0]))

    monkeypatch.setattr(preflight, "compile_step", compile_once)
    # As much memory as half of what this needs.
    flags = ["--config.batch_size=256", "--config.mesh.data=1", "--config.mesh.fsdp=8"]
    flags += ["--config.optim.accumulate=1", "--config.data.train.affine=None"]
    config = load_config(DIGITS, [*TINY, *flags])
    plan, _, _ = preflight.open_plan(config)
    mesh = make_mesh(config.mesh)
    found = preflight.compile_step(plan, mesh)
    needs = found.peak_bytes
    monkeypatch.setattr(preflight, "memory_limit", lambda device: int(0.7 * needs))
    monkeypatch.setattr(preflight, "_SECONDS_OF_DATA", 0.1)
    assert main(["preflight", f"--config={DIGITS}", *TINY, *flags]) == 2
    out, err = capsys.readouterr()
    assert "too much" in out
    count = len(list(smaller(config, plan.card.config, mesh, found.state_bytes, int(0.7 * needs))))
    told = rf"smallest of {count} changes that does; the one above took [\d.]+ s to compile, and "
    assert re.search(rf"{told}after 120 s of them", out), out
    (advice,) = re.findall(r"it does with (.*)", err)
    assert advice.startswith("--config.optim.accumulate=")
    changed = load_config(DIGITS, [*TINY, *flags, *advice.split()])
    found = preflight.compile_step(
        dataclasses.replace(plan, config=changed), make_mesh(changed.mesh)
    )
    assert found.fits and found.peak_bytes <= 0.7 * needs

    # The clock of the search: a step of it is a minute.
    monkeypatch.setattr(preflight, "memory_limit", lambda device: 1 + found.state_bytes)
    clock = itertools.count(0.0, 60.0)
    fake = SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr(preflight, "time", fake)
    tries = preflight.preflight(config, search_seconds=100)
    with pytest.raises(UserError, match=r"nor with the 1 of \d+ changes tried in 100 s: give more"):
        list(tries)
    with pytest.raises(UserError, match="does not fit on the devices: use more or larger ones"):
        list(preflight.preflight(config, search_seconds=0))


def test_small_changes_come_first():
    config = load_config(DIGITS, [*TINY, "--config.optim.accumulate=1"])
    plan, _, _ = preflight.open_plan(config)
    mesh = make_mesh(config.mesh)
    flags = [flags for flags, *_ in smaller(config, plan.card.config, mesh, 0, None)]
    assert flags[:3] == [
        "--config.optim.accumulate=2",
        "--config.model.remat=dots",
        "--config.mesh.data=4 --config.mesh.fsdp=2 --config.mesh.tensor=1",
    ]
    assert len(set(flags)) == len(flags)
    # 32 images on 8 devices: at most four micro-batches.
    assert not any("accumulate=8" in each for each in flags)


def test_without_the_data_the_number_of_classes_is_asked_for():
    source = "--config.data.train.source=folder:/nowhere"
    with pytest.raises(UserError, match=r"/nowhere.*--config\.model\.num_classes=1000"):
        lines_of(source)
    assert "/nowhere" in lines_of(source, "--config.model.num_classes=10")["data"][0]


def test_a_config_that_only_evaluates_is_refused():
    with pytest.raises(UserError, match=r"data\.train is not set"):
        list(preflight.preflight(load_config("configs/evaluate.py:imagenet")))


def test_a_topology_needs_libtpu(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.*\[tpu\]'"):
        chips.topology_devices("v5e:4x4")


def test_the_peak_has_two_more_batches_and_aliases_once(monkeypatch):
    config = load_config(DIGITS, TINY)
    plan, _, _ = preflight.open_plan(config)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    names = ("argument", "output", "alias", "temp", "generated_code")
    sizes = dict(
        zip((f"{name}_size_in_bytes" for name in names), (1, 20, 300, 4000, 50000), strict=True)
    )
    compiled = Mock(as_text=lambda: "", memory_analysis=lambda: Mock(**sizes))
    step = Mock()
    step.trace.return_value.lower.return_value.compile.return_value = compiled
    program = dataclasses.replace(preflight.make_program(plan, mesh), step=step)
    monkeypatch.setattr(preflight, "make_program", lambda *_: program)
    batch = 32 * (8 * 8 + 4 + 1)  # pixels, label and mask of an image
    assert preflight.compile_step(plan, mesh).peak_bytes == 53721 + 2 * batch
