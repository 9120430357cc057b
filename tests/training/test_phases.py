"""A linear probe, then fine-tuning, in one run: what learns when, and that it resumes exactly."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import DIGITS, TINY
from flax.traverse_util import flatten_dict
from processes import SIGKILL, Command

from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.opened import open_model
from vit_jax.checkpoints.store import Store
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.models.create import structure
from vit_jax.training.config_file import load_config
from vit_jax.training.loop import train
from vit_jax.training.metrics import TIMING_KEYS, read_metrics
from vit_jax.training.optim import OptimConfig, Probe
from vit_jax.training.phases import learning_rate, make_phases
from vit_jax.training.plan import TrainingData, make_plan
from vit_jax.training.program import make_program
from vit_jax.training.sharding import make_mesh
from vit_jax.training.state import to_saved

HEAD = {"head/kernel", "head/bias"}


def flags_of(base, *more):
    flags = [f"init_from={base}", "model.head=keep", "optim.probe.steps=6", "optim.probe.lr=0.05"]
    flags += ["optim.lr=0.01", "optim.warmup=2", "optim.schedule=linear", "optim.freeze=cls_token"]
    flags += ["total_steps=12", "checkpoint.every=3", "checkpoint.keep=9", "log.every=1"]
    return [*TINY, *(f"--config.{flag}" for flag in (*flags, "eval.every=6", *more))]


@pytest.fixture(scope="module")
def probed(tiny_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("phases") / "run"
    train(load_config(DIGITS, flags_of(tiny_run[0], "model.lora.rank=2")), workdir)
    return workdir


def params_at(workdir, step):
    shapes = structure(ModelCard.read(workdir).config)[1]
    saved = Store(workdir).restore(step, {"params": shapes, "ema": shapes})
    return {name: flatten_dict(tree, sep="/") for name, tree in saved.items()}


def moments_at(workdir, step):
    """The first moments in a checkpoint, by parameter."""
    with ocp.PyTreeCheckpointer() as orbax:
        state = orbax.restore(workdir / "checkpoints" / str(step) / "state")["opt_state"]
    return {n.partition("/mu/")[2]: value for n, value in state.items() if "/mu/" in n}


def moved(workdir, first, last):
    before, after = (params_at(workdir, step)["params"] for step in (first, last))
    return {name for name, value in after.items() if (value != before[name]).any()}


def test_the_head_learns_alone_and_then_all_with_a_schedule_of_its_own(probed):
    adapters = {name for name in params_at(probed, 3)["params"] if "lora_" in name}
    assert len(adapters) == 4
    assert moved(probed, 3, 6) == HEAD and moved(probed, 9, 12) == {*HEAD, *adapters}
    rates = {line["step"]: line["train/lr"] for line in read_metrics(probed) if "train/lr" in line}
    # Steps 7 and 8 warm up from zero, and the other four fall to zero.
    expected = [0.05] * 6 + [0, 0.005, 0.01, 0.0075, 0.005, 0.0025]
    np.testing.assert_allclose([rates[step] for step in range(1, 13)], expected, rtol=1e-6)
    for step, learning, zero in ((3, HEAD, False), (6, {*HEAD, *adapters}, True)):
        moments = moments_at(probed, step)
        assert set(moments) == learning and all((v == 0).all() == zero for v in moments.values())


def test_killed_in_a_phase_or_at_the_change_it_ends_bit_identical(
    probed, tiny_run, tmp_path, compiled_once
):
    flags = flags_of(tiny_run[0], "model.lora.rank=2")

    def resumed(workdir):
        train(load_config(DIGITS, flags), workdir)
        for name, tree in params_at(probed, 12).items():
            jax.tree.map(np.testing.assert_array_equal, params_at(workdir, 12)[name], tree)
        one, other = (
            [{k: v for k, v in line.items() if k not in TIMING_KEYS} for line in read_metrics(each)]
            for each in (workdir, probed)
        )
        assert one == other

    killed = tmp_path / "killed"
    argv = ["train", f"--config={DIGITS}", f"--workdir={killed}", *flags]
    Command(tmp_path, argv, dies=(SIGKILL, "save", 6)).finish(-SIGKILL)
    assert Store(killed).steps() == [3]  # amid the probe
    resumed(killed)
    for step in (6, 9):  # at the change, and after it
        workdir = tmp_path / str(step)
        shutil.copytree(probed, workdir)
        for later in (each for each in Store(workdir).steps() if each > step):
            shutil.rmtree(workdir / "checkpoints" / str(later))
        resumed(workdir)


def test_the_probe_computes_no_gradient_of_the_rest(tiny_run):
    config = load_config(DIGITS, flags_of(tiny_run[0], "model.scan=False"))
    data = TrainingData.of(open_source("digits", "train"))
    plan = make_plan(config, data, open_model(tiny_run[0]))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    head, rest = (make_program(plan, mesh, phase) for phase in plan.phases)
    flops = [
        program.step.trace(program.state, program.batch).lower().cost_analysis()["flops"]
        for program in (head, rest)
    ]
    assert flops[0] < 0.45 * flops[1]
    kept = {n.partition("/mu/")[2] for n in to_saved(rest.state)["opt_state"] if "/mu/" in n}
    assert kept == set(flatten_dict(rest.state.params, sep="/")) - {"cls_token"}


def test_what_a_run_says_of_its_phases(tiny_run, tmp_path, caplog, untrained):
    caplog.set_level("INFO", "vit_jax")
    more = [
        "total_steps=2",
        "model.lora.rank=1",
        "optim.probe.steps=1",
        "optim.warmup=0",
        "data.test=None",
    ]
    train(load_config(DIGITS, flags_of(tiny_run[0], *more, "data.val=None")), tmp_path / "run")
    assert re.search(
        r"^steps .* the first 1 train the head alone \(optim.probe\)", lines(caplog), re.M
    )
    # 10 classes of 8 inputs; A and B of Q, K and V, and of out, in two blocks of width 16.
    learn = 8 * 10 + 10 + 2 * (3 * (16 + 16) + 16 + 16)
    assert f", of which {learn:,} learn" in lines(caplog)
    assert f"step 1: the probe is over; {learn:,} of " in lines(caplog)


def lines(caplog):
    return "\n".join(record.getMessage() for record in caplog.records)


def test_bad_probes_are_refused():
    optim = OptimConfig(0.1, schedule="linear", probe=Probe(5, 0.3))
    with pytest.raises(UserError, match=r"optim.probe.steps is 5, but the run has 5 steps"):
        make_phases(optim, 5)
    warm = dataclasses.replace(optim, warmup=4.0)
    with pytest.raises(UserError, match=r"warmup of 4 steps is longer than the run of 3"):
        make_phases(warm, 8)[1].schedule()
    scratch = load_config(DIGITS, ["--config.optim.probe.steps=2", "--config.optim.probe.lr=0.3"])
    with pytest.raises(UserError, match=r"trained model at first, and init_from names none"):
        make_plan(scratch, TrainingData(tuple("0123456789")))
    for key, said in ((dict(steps=0, lr=0.1), "steps is 0"), (dict(steps=1, lr=0.0), "lr is 0.0")):
        with pytest.raises(UserError, match=said):
            Probe(**key)
    assert [learning_rate(optim, 9, step) for step in (4, 5)] == pytest.approx([0.3, 0.1])
