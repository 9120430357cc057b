"""What a run shows, on a terminal, in a notebook and in a file; by which clock it saves."""

import contextlib
import logging
import pty
import sys
import types

import pytest
from conftest import DIGITS, TINY
from etils import epath

from vit_jax import distributed
from vit_jax.training import console, stopping
from vit_jax.training.config_file import load_config
from vit_jax.training.console import Progress

TRAIN = {"train/loss": 2.25, "train/accuracy": 0.5, "train/lr": 0.1, "images_per_second": 12345.6}
VAL = {"val/accuracy": 0.75, "val/loss": 1.25}


@pytest.fixture
def clock(monkeypatch):
    """A list with the time, in seconds."""
    now = [0.0]
    fake = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(console, "time", fake)
    monkeypatch.setattr(stopping, "time", fake)
    return now


def test_a_file_has_a_line_now_and_then(clock, caplog):
    caplog.set_level("INFO", "vit_jax")
    progress = Progress("run", 0, 2000)
    for step in range(1, 2001):
        clock[0] += 0.125
        progress.step(step)
        if step in (200, 2000):
            progress.measured(step, TRAIN)
        if step == 400:
            progress.measured(step, VAL)
    progress.close()
    # The clock starts with the first step; 241 steps take a bit more than 30 seconds.
    train = "train loss 2.25, accuracy 0.5, 12,346 images/s"
    first, *lines = [record.getMessage() for record in caplog.records]
    assert first == "a line of progress every 30 s"
    assert lines[0] == f"step   242 of 2,000: {train}, 03:39 left"
    assert lines[1] == "step   400 of 2,000: val accuracy 0.75, loss 1.25"
    assert lines[-1] == f"step 2,000 of 2,000: {train}"
    assert len(lines) == 8 + 1 + 1


def all_of(lead: int) -> str:
    """What was written to a terminal that is closed; one read may return a part of it."""
    parts = []
    with open(lead, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # Linux' end
        while part := terminal.read(10_000):
            parts.append(part)
    return b"".join(parts).decode()


def test_a_terminal_keeps_lines_above_the_bar(monkeypatch):
    lead, follow = pty.openpty()
    logger = logging.getLogger("vit_jax")
    with open(follow, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(screen)])
        monkeypatch.setattr(logger, "propagate", False)
        monkeypatch.setattr(logger, "level", logging.INFO)
        logger.manager._clear_cache()
        progress = Progress("run", 0, 2)
        progress.step(1)
        progress.measured(1, VAL)
        progress.step(2)
        progress.measured(2, TRAIN)
        progress.close()
    shown = all_of(lead)
    *lines, last = [line.rpartition("\r")[2] for line in shown.strip().split("\r\n")]
    assert lines == ["step 1 of 2: val accuracy 0.75, loss 1.25"]
    assert last.startswith("run 100%|") and len(last) <= 80  # the terminal says no width
    assert last.endswith("| 2/2, 00:00 left, loss=2.25, acc=0.5, img/s=12,346")


def test_a_notebook_has_one_bar_that_is_replaced(monkeypatch, capsys):
    shown = []
    handle = types.SimpleNamespace(update=lambda data, raw: shown.append(data))

    def display(data, raw, display_id):
        assert raw and display_id and not shown
        shown.append(data)
        return handle

    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    ipython.display = types.ModuleType("IPython.display")
    ipython.display.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    progress = Progress("run", 3, 5)
    progress.step(4)
    progress.step(5)
    progress.close()
    assert " 3/5, " in shown[0]["text/plain"] and " 5/5, 00:00 left" in shown[-1]["text/plain"]
    assert capsys.readouterr() == ("", "")


def test_the_results_and_what_comes_next():
    config = load_config(DIGITS, TINY)
    results = {"step": 24, "seconds": 90.0, **TRAIN, **VAL, "test/top5": 1.0, "val/corrupt": 0}
    measured = ["val accuracy 0.75, loss 1.25, corrupt 0", "test top5 1"]
    assert console.evaluated("a.npz", results) == ["a.npz at step 24:", *measured]
    assert console.evaluated("a.npz", VAL) == ["a.npz:", measured[0].rpartition(",")[0]]
    assert console.finished(config, "my runs/a", results, "a.png") == [
        "finished 24 steps in 01:30",
        *measured,
        "my runs/a has the model, its checkpoints and metrics.jsonl; curves in a.png",
        "next:",
        "  vit-jax evaluate '--workdir=my runs/a'",
        "  vit-jax predict '--model=my runs/a' IMAGE",
    ]
    assert not any("evaluate" in line for line in console.finished(config, "a", TRAIN, None))
    said = console.finished(config, "a", TRAIN, None, "a/pictures.png")
    assert any(line.endswith("; what the model finds in a/pictures.png") for line in said)


@pytest.mark.parametrize("processes, asked", [(1, 180), (2, 24)])
def test_a_checkpoint_is_due_by_time(processes, asked, clock, monkeypatch):
    """With several processes, they meet at a few steps only, and are not late."""
    calls = []
    monkeypatch.setattr(distributed, "count", lambda: processes)
    monkeypatch.setattr(distributed, "first", lambda name, make: calls.append(name) or make())
    timer, due = stopping.SaveTimer(1.0, 100), []
    for step in range(101, 281):
        clock[0] += 1.0
        if timer.due(step):
            due.append(step)
            timer.saved()
    assert due == [160, 220, 280] and len(calls) <= asked
    never = stopping.SaveTimer(0.0, 0)
    clock[0] += 1e9
    assert not never.due(1)


def test_scripts_and_notebooks_see_messages(monkeypatch, capsys):
    """Unless they have set a level."""
    logger = logging.getLogger("vit_jax.training.loop")
    with console.shown():
        logger.info("not this")
    monkeypatch.setattr(logging.getLogger("vit_jax"), "level", logging.NOTSET)
    logger.manager._clear_cache()
    with console.shown():
        logger.info("this")
    logger.info("nor this")
    assert capsys.readouterr().err == "this\n"


def test_curves_are_a_figure(tiny_run):
    from vit_jax.analysis.plots import curves, write_curves

    loss, accuracy = curves(tiny_run[0]).axes
    assert loss.get_xlabel() == "step (32 images each)"
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss (cross-entropy, nats)", "accuracy")
    assert [line.get_label() for line in loss.lines] == ["train, one batch", "val", "test"]
    path = epath.Path(tiny_run[0]) / "curves.png"
    assert write_curves(tiny_run[0]) == path and path.read_bytes()[:4] == b"\x89PNG"
