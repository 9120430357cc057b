"""Real kills in real processes: a disturbed run ends exactly as an undisturbed one."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import DIGITS, ROOT, TINY

from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.store import Store
from vit_jax.models.vit import structure
from vit_jax.training.metrics import TIMING_KEYS, read_metrics


def start(workdir, *extra, **popen):
    """Starts the training command in a process of its own, on one plain CPU device."""
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vit_jax", "train", f"--config={DIGITS}"]
    command += [f"--workdir={workdir}", *TINY, *extra]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **popen
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


def wait_until(process, condition, what):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended before {what}: {process.communicate()[1]}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.001)


def logged(workdir):
    lines = read_metrics(workdir)
    return [{k: v for k, v in line.items() if k not in TIMING_KEYS} for line in lines]


def weights(workdir):
    store = Store(workdir)
    config = ModelCard.read(workdir).config
    shapes = structure(config)[1]
    step = store.newest()
    restored = store.restore(step, {"params": shapes, "ema": shapes})
    return step, jax.tree.leaves(restored)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(workdir))
    return workdir


def half_written(workdir, step):
    path = workdir / "checkpoints" / str(step)
    return path.exists() and not (path / "checksums.json").exists()


def test_killed_at_any_moment_it_ends_bit_identical(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    # Other workers after every restart: they must not change a sample.
    workers = [f"--config.data.workers={n}" for n in (0, 2, 0, 1, 0)]

    process = start(workdir, workers[0])  # before the first checkpoint
    wait_until(process, lambda: logged(workdir), "first log line")
    process.kill()
    finish(process, -signal.SIGKILL)
    assert not (workdir / "checkpoints" / "8").exists()

    process = start(workdir, workers[1])  # in the middle of a save
    wait_until(process, lambda: half_written(workdir, 8), "save in progress")
    process.kill()
    finish(process, -signal.SIGKILL)
    assert half_written(workdir, 8), "the save had ended before the kill"
    assert Store(workdir).steps() == [4]

    process = start(workdir, workers[2])  # after a save, with lines beyond it
    wait_until(process, lambda: logged(workdir)[-1]["step"] >= 15, "line of step 15")
    process.kill()
    _, err = finish(process, -signal.SIGKILL)
    assert f"ignoring {workdir}/checkpoints/8: it was not completely written" in err

    process = start(workdir, workers[3])  # SIGTERM saves wherever it comes, and says so
    wait_until(process, lambda: logged(workdir)[-1]["step"] >= 18, "line of step 18")
    process.terminate()
    _, err = finish(process, 143)
    saved = int(re.search(r"stopped by SIGTERM after saving step (\d+) of 24", err)[1])
    assert Store(workdir).newest() == saved

    _, err = finish(start(workdir, workers[4]))
    assert f"at step {saved} of 24" in err
    step, arrays = weights(workdir)
    expected_step, expected = weights(undisturbed)
    assert step == expected_step == 24
    for ours, theirs in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)
    assert logged(workdir) == logged(undisturbed)
    assert [line["step"] for line in logged(workdir) if "train/loss" in line] == [*range(3, 25, 3)]


def test_another_seed_ends_elsewhere(undisturbed, tmp_path):
    # The comparison above could not fail if nothing depended on anything.
    finish(start(tmp_path / "run", "--config.seed=1"))
    assert logged(tmp_path / "run") != logged(undisturbed)


def test_a_full_disk_loses_nothing(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_until(process, lambda: Store(workdir).steps(), "checkpoint")
    process.terminate()
    finish(process, 143)
    saved = Store(workdir).newest()
    before = weights(workdir)[1]

    def no_large_files():
        # As a full disk would, this refuses to write a file on; the log lines still fit.
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    _, err = finish(start(workdir, preexec_fn=no_large_files), 2)
    assert [line for line in err.splitlines() if "could not be written" in line]
    assert "Traceback" not in err
    assert Store(workdir).newest() == saved
    for ours, theirs in zip(weights(workdir)[1], before, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)

    finish(start(workdir))
    assert logged(workdir) == logged(undisturbed)


def test_a_finished_run_is_left_alone(undisturbed):
    before = (undisturbed / "metrics.jsonl").read_text()
    out, _ = finish(start(undisturbed))
    assert (undisturbed / "metrics.jsonl").read_text() == before
    lines = read_metrics(undisturbed)
    assert json.loads(out)["test/accuracy"] == lines[-1]["test/accuracy"]
