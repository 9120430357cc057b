"""The best checkpoint and early stopping, on scripted measurements, stopped anywhere."""

import json
import math
import re

import pytest
from conftest import DIGITS, TINY

import vit_jax
from vit_jax.errors import Stopped, UserError
from vit_jax.launch.comparison import lower_is_better
from vit_jax.training.config import read_config
from vit_jax.training.config_file import load_config
from vit_jax.training.evaluation.evaluation import Evaluation
from vit_jax.training.loop import train
from vit_jax.training.metrics import read_metrics, read_starts
from vit_jax.training.selection import History, Metric, Selection, StopConfig
from vit_jax.training.stopping import Stop

NAN = math.nan
# val/accuracy after every second step, and the best of them (the first of equal ones).
CURVE = {2: 0.1, 4: 0.5, 6: NAN, 8: 0.4, 10: 0.7, 12: 0.7, 14: 0.6, 16: 0.2, 18: 0.9, 20: 0.1}


@pytest.mark.parametrize("mode, expected", [("max", [2, 4, 10, 18]), ("min", [2])])
def test_the_best_is_better_than_all_before(mode, expected):
    history = History(Metric.parse("checkpoint.best", f"val/x:{mode}"))
    improved = [step for step, value in CURVE.items() if history.add(step, {"val/x": value})]
    assert improved == expected and history.step == expected[-1]
    assert history.since == sum(step > expected[-1] for step in CURVE)
    assert not history.add(22, {"test/x": 1.0})  # another evaluation
    again = History(history.metric).read({"step": s, "val/x": v} for s, v in CURVE.items())
    assert again == history


def test_a_metric_of_a_class_may_have_slashes():
    metric = Metric.parse("checkpoint.best", "val/iou/road/wet loss")
    assert metric.higher and not lower_is_better(metric.name)
    with pytest.raises(UserError, match=r"val has miou, iou/road$"):
        Selection(metric.name, StopConfig(), {"val": ("miou", "iou/road")}, [])
    chosen = Selection(metric.name, StopConfig(), {"val": None}, [])
    assert chosen.add(1, {"val/miou": 0.5, metric.name: 0.5})
    with pytest.raises(UserError, match=r"but measured are val/miou$"):
        chosen.add(2, {"val/miou": 0.5})


def test_patience_begins_after_the_probe():
    lines = [{"step": step, "val/x": value} for step, value in CURVE.items()]
    stop = StopConfig(patience=3, metric="val/x:max")
    for begins, last in ((0, 16), (12, 20)):  # the best is at 10, and then at 18
        found = Selection(None, stop, {"val": None}, [], begins)
        ended = (line["step"] for line in lines if found.add(line["step"], line) or found.ended)
        assert next(ended, 20) == last
        assert bool(Selection(None, stop, {"val": None}, lines[:8], begins).ended) == (begins == 0)


@pytest.fixture
def scripted(untrained, monkeypatch):
    """Runs that measure CURVE; `stop_after` is the step at which SIGTERM comes."""
    plan, due = {"stop_after": None, "step": 0}, Evaluation.due

    def note(self, step, total_steps):
        plan["step"] = step
        return due(self, step, total_steps)

    def measure(self, names, params):
        for name in names:
            value = CURVE[plan["step"]] if name == "val" else 0.25
            yield {f"{name}/accuracy": value, f"{name}/loss": 1 - value}

    def stop(self, step):
        return "SIGTERM" if step == plan["stop_after"] else None

    monkeypatch.setattr(Evaluation, "due", note)
    monkeypatch.setattr(Evaluation, "measure", measure)
    monkeypatch.setattr(Stop, "__call__", stop)
    return plan


def run(plan, workdir, *flags, stop_after=None, extend=False):
    flags = [f"--config.{flag}" for flag in ("total_steps=20", "eval.every=2", *flags)]
    config = load_config(DIGITS, [*TINY, *flags, "--config.log.tensorboard=False"])
    plan["stop_after"] = stop_after
    return train(config, workdir, extend=extend)


def seen(workdir):
    """best.json, the steps of the checkpoints, and what was measured when."""
    folder = workdir / "checkpoints"
    best = json.loads((folder / "best.json").read_text())
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    lines = [line for line in read_metrics(workdir) if "train/loss" not in line]
    return best, steps, repr(lines)


BEST = ("checkpoint.best=val/accuracy", "checkpoint.every=0", "checkpoint.keep=1")
EARLY = (*BEST, "stop.patience=3")


@pytest.mark.parametrize(
    "flags, best, steps", [(BEST, 18, [18, 20]), (EARLY, 10, [10, 16])], ids=["best", "early"]
)
def test_the_same_however_often_a_run_is_stopped(scripted, tmp_path, flags, best, steps):
    whole = tmp_path / "whole"
    result = run(scripted, whole, *flags)
    expected = seen(whole)
    assert expected[:2] == ({"step": best, "val/accuracy": CURVE[best]}, steps)
    assert result["step"] == steps[-1] and result["test/accuracy"] == 0.25
    assert vit_jax.load(whole, step="best").step == best
    assert vit_jax.load(whole / "checkpoints" / "best").step == best
    assert vit_jax.load(whole).step == vit_jax.load(whole / f"checkpoints/{steps[-1]}").step

    for first in (3, 10) if flags == BEST else (15,):
        parts = tmp_path / f"stopped_at_{first}"
        with pytest.raises(Stopped):
            run(scripted, parts, *flags, stop_after=first)
        # As if the machine had died before best.json was written.
        (parts / "checkpoints" / "best.json").unlink(missing_ok=True)
        assert run(scripted, parts, *flags)["step"] == steps[-1]
        assert seen(parts) == expected
    # A finished run is at its end, and goes on if it may.
    assert run(scripted, whole, *flags)["step"] == steps[-1] and seen(whole) == expected
    if flags == EARLY:
        assert run(scripted, whole, *BEST, "stop.patience=0")["step"] == 20
        assert seen(whole)[:2] == ({"step": 18, "val/accuracy": 0.9}, [18, 20])
    with pytest.raises(UserError, match=r"no checkpoint of step 3; it has: "):
        vit_jax.load(whole, step=3)
    run(scripted, whole, "checkpoint.best=None")
    with pytest.raises(UserError, match="has no best checkpoint"):
        vit_jax.load(whole, step="best")


@pytest.mark.parametrize(
    "flags, said",
    [
        ("checkpoint.best=val/acc", "say whether more is better, val/acc:max, or less"),
        ("checkpoint.best=val/acc:max", "but val has accuracy, top5, loss"),
        ("checkpoint.best=accuracy", "expected a metric of data.val or of an evaluator"),
        ("checkpoint.best=test/accuracy", "expected a metric of data.val or of an evaluator"),
        ("checkpoint.best=val/loss:low", "expected val/loss:min or val/loss:max"),
        ("checkpoint.best=real/accuracy", "but during the run val is measured: set eval.every"),
        ("checkpoint.best=val/accuracy eval.every=0", "during the run nothing is measured"),
        ("stop.patience=2", "stop.patience needs a metric"),
        ("stop.patience=-1", "stop.patience is -1; it must be 0 or more"),
    ],
)
def test_what_is_wrong_is_said_before_a_step(scripted, tmp_path, flags, said):
    with pytest.raises(UserError, match=re.escape(said)):
        run(scripted, tmp_path / "run", *flags.split())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_step_is_of_a_run_folder(tmp_path, tiny_run):
    vit_jax.save(vit_jax.load(tiny_run[0]), tmp_path / "model.npz", format="google")
    with pytest.raises(UserError, match="is no run folder, which alone has checkpoints"):
        vit_jax.load(tmp_path / "model.npz", step=3)
    with pytest.raises(UserError, match="is one checkpoint already"):
        vit_jax.load(tiny_run[0] / "checkpoints" / "24", step="best")
    with pytest.raises(UserError, match="expected the number of a step, or 'best'"):
        vit_jax.load(tiny_run[0], step="newest")


def test_a_run_goes_on_for_longer(scripted, tmp_path, caplog):
    """As if it had been that long: the same config, the same steps, the longer schedule."""
    workdir = tmp_path / "run"
    short = "total_steps=12"
    run(scripted, workdir, short)
    with pytest.raises(UserError, match=r"of 12 steps, and now it is to have 20 .*add --extend"):
        run(scripted, workdir)
    with pytest.raises(UserError, match="holds a run of another config"):
        run(scripted, workdir, "seed=3", extend=True)
    caplog.set_level("INFO", "vit_jax")
    assert run(scripted, workdir, extend=True)["step"] == 20
    # TINY: a cosine to 0 after a warm-up. At step 13, the short one has nothing left.
    assert "extended from 12 to 20 steps: the learning rate at step 13 is " in caplog.text
    assert "where the shorter one had 0\n" in caplog.text
    assert read_config(workdir).total_steps == 20
    assert [line["total_steps"] for line in read_starts(workdir)] == [12, 20]
    assert run(scripted, workdir)["step"] == 20  # as any run of that length
    with pytest.raises(UserError, match=r"of 20 steps, and now it is to have 12 .*cannot be cut"):
        run(scripted, workdir, short, extend=True)
