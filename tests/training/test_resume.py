"""A run that is disturbed ends exactly as an undisturbed one: killed, stopped, on a full disk."""

import json
import re
import resource
import shutil

import jax
import numpy as np
import pytest
from conftest import DIGITS, TINY
from processes import SIGINT, SIGKILL, SIGTERM, Command, die_at

from vit_jax.__main__ import main
from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.store import Store
from vit_jax.models.create import structure
from vit_jax.training.metrics import TIMING_KEYS, read_metrics


def logged(workdir):
    lines = read_metrics(workdir)
    return [{k: v for k, v in line.items() if k not in TIMING_KEYS} for line in lines]


def weights(workdir, step=None):
    """The weights and their running average; of the newest step."""
    config = ModelCard.read(workdir).config
    shapes, store = structure(config)[1], Store(workdir)
    return jax.tree.leaves(store.restore(step or store.newest(), {"params": shapes, "ema": shapes}))


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax
def test_killed_stopped_and_refused_by_the_disk_it_ends_bit_identical(
    tiny_run, tmp_path, monkeypatch, capsys, caplog, compiled_once
):
    """Other workers after every restart: they must not change a sample."""
    undisturbed, workdir = tiny_run[0], tmp_path / "run"
    train = ["train", f"--config={DIGITS}", f"--workdir={workdir}", *TINY]

    # Killed before the first checkpoint and amid a line: it begins anew. Killed amid a save.
    shutil.copytree(undisturbed, workdir)
    shutil.rmtree(workdir / "checkpoints")
    lines = (undisturbed / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(lines[: lines.index("\n") + 9])
    Command(tmp_path, train, dies=(SIGKILL, "save", 8)).finish(-SIGKILL)
    half = workdir / "checkpoints" / "8"
    assert half.exists() and not (half / "checksums.json").exists()
    assert Store(workdir).steps() == [4] and logged(workdir)[-1]["step"] == 8

    # As a full disk would, this refuses to write a file on; the log lines still fit.
    before, unlimited = weights(workdir), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, unlimited[1]))
        assert main([*train, "--config.log.tensorboard=False"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert f"ignoring {half}: it was not completely written" in caplog.text
    assert re.search(r"^error: .*could not be written.*$", capsys.readouterr().err, re.M)
    assert Store(workdir).newest() == 4
    assert_equal(weights(workdir), before)

    with monkeypatch.context() as patch:  # SIGTERM saves wherever it comes, and says so
        die_at(SIGTERM, "step", 18, patch.setattr)
        assert main([*train, "--config.data.workers=2"]) == 143
    assert "stopped by SIGTERM after saving step 18 of 24; the same" in capsys.readouterr().err
    assert Store(workdir).newest() == 18 and logged(workdir)[-1]["step"] == 18
    with monkeypatch.context() as patch:  # so does Ctrl-C
        die_at(SIGINT, "step", 21, patch.setattr)
        assert main([*train, "--config.checkpoint.every_minutes=1e-9"]) == 130
    assert "stopped by Ctrl-C after saving step 21 of 24; the same" in capsys.readouterr().err
    assert "stopping after this step; Ctrl-C again to stop at once" in caplog.text
    assert Store(workdir).steps() == [20, 21]  # every step is saved

    caplog.set_level("INFO", "vit_jax")
    assert main([*train, "--json"]) == 0
    assert "at step 21 of 24" in caplog.text
    assert json.loads(capsys.readouterr().out)["step"] == 24
    assert_equal(weights(workdir), weights(undisturbed))
    assert logged(workdir) == logged(undisturbed)
    steps = [line["step"] for line in logged(workdir) if "train/loss" in line]
    assert steps == [*range(3, 25, 3)]
    # The comparisons could not fail if nothing changed from step to step.
    with pytest.raises(AssertionError):
        assert_equal(weights(undisturbed, 20), weights(undisturbed))
    assert len({line["train/loss"] for line in logged(undisturbed) if "train/loss" in line}) == 8
