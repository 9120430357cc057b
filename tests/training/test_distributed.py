"""Real processes on one machine: together they are one run, and they end together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import DIGITS, ROOT, TINY
from test_resume import logged, wait_until, weights

from vit_jax import distributed
from vit_jax.__main__ import main
from vit_jax.checkpoints.store import Store
from vit_jax.distributed import LOST
from vit_jax.errors import UserError

SMALL = [
    *TINY,
    "--config.model.depth=1",
    "--config.optim.accumulate=1",
    "--config.eval.every=0",
    "--config.checkpoint.every=8",
    "--config.checkpoint.keep=3",
    "--config.log.every=1",
]
ENDLESS = ["--config.total_steps=1000000", "--config.checkpoint.every=20"]


def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(command, n, devices, *, where=None, cwd=(), ids=None, **env):
    """Starts `n` processes of a command, each with so many CPU devices."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
        **env,
    }
    where = where or address()
    processes = []
    for i in range(n) if ids is None else ids:
        flags = [f"--coordinator={where}", f"--processes={n}", f"--process-id={i}"]
        processes.append(
            subprocess.Popen(
                [sys.executable, *command, *(flags if n > 1 else ())],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
                cwd=cwd[i] if cwd else None,
            )
        )
    return processes


def train(workdir, n, devices, *extra, **options):
    command = ["-m", "vit_jax", "train", f"--config={DIGITS}", f"--workdir={workdir}"]
    return start([*command, *SMALL, *extra], n, devices, **options)


def finish(processes, code=0):
    """Waits for all; returns what each wrote to stdout and stderr."""
    try:
        told = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, told, strict=True):
        assert process.returncode == code, err
    return told


def assert_equal_runs(ours, theirs):
    """Equal but for the order in which floats are added up: another sample would be far beyond."""
    mine, other = logged(ours), logged(theirs)
    assert [line["step"] for line in mine] == [line["step"] for line in other]
    for line, expected in zip(mine, other, strict=True):
        assert line == pytest.approx(expected, rel=2e-5), line["step"]
    (step, arrays), (expected_step, expected) = weights(ours), weights(theirs)
    assert step == expected_step
    for array, reference in zip(arrays, expected, strict=True):
        np.testing.assert_allclose(array, reference, rtol=1e-3, atol=5e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(train(workdir, 1, 4))
    return workdir


def json_of(out):
    """What a process printed; Gloo's own lines may come later, as they wait in another buffer."""
    return json.loads([line for line in out.splitlines() if line.startswith("{")][-1])


def forget(workdir, *steps):
    for step in steps:
        shutil.rmtree(workdir / "checkpoints" / str(step))


def test_two_processes_are_one_run_that_one_and_then_four_go_on_with(alone, tmp_path):
    workdir = tmp_path / "run"
    (out, err), (silent, other) = finish(train(workdir, 2, 2))
    assert_equal_runs(workdir, alone)
    last = json_of(out)
    assert last["test/accuracy"] == logged(workdir)[-1]["test/accuracy"]
    table = re.findall(r"^process (\d) of 2: \S+, pid \d+, 2 x cpu, ids", err, re.MULTILINE)
    assert table == ["0", "1"]
    assert "step" not in silent + other  # only process 0 speaks
    assert len(list((workdir / "tensorboard").glob("*"))) <= 1

    forget(workdir, 16, 24)
    (_, err), *_ = finish(train(workdir, 1, 4))
    assert "at step 8 of 24" in err
    assert_equal_runs(workdir, alone)

    # All four must find out that the newest is damaged, whichever of them reads that file.
    largest = max((workdir / "checkpoints" / "24").rglob("*"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    (_, err), *others = finish(train(workdir, 4, 1))
    assert f"{largest} does not match its checksum" in err
    assert "at step 16 of 24" in err
    assert [other for _, other in others] == ["", "", ""]
    assert_equal_runs(workdir, alone)
    assert Store(workdir).steps() == [8, 16, 24]


def committed(workdir, beyond=0):
    return [step for step in Store(workdir).steps() if step > beyond]


def test_they_stop_at_one_step_and_a_lost_process_ends_the_others(alone, tmp_path):
    workdir = tmp_path / "run"
    # The two halves of the heads are on two hosts, which must read the same rows.
    options = dict(VIT_JAX_PEER_TIMEOUT="20")
    both = [workdir, 2, 1, *ENDLESS, "--config.mesh.tensor=2"]

    processes = train(*both, **options)
    wait_until(processes[0], lambda: committed(workdir), "checkpoint")
    processes[1].terminate()
    told = [err.splitlines()[-1] for _, err in finish(processes, 143)]
    assert told[0] == told[1]
    saved = int(re.fullmatch(r"stopped by SIGTERM after saving step (\d+) of 1000000", told[0])[1])
    assert Store(workdir).newest() == saved == logged(workdir)[-1]["step"]

    # The first rows are those that one process read; the schedule's warm-up is another.
    for line, expected in zip(logged(workdir)[:1], logged(alone)[:1], strict=True):
        assert line["train/loss"] == pytest.approx(expected["train/loss"], rel=2e-5)

    for victim, sentence in (
        (1, r"^error: process 1 of 2 is gone \(no sign of life for 5 s\); "),
        (0, r"^error: .*process 0.* is gone; "),
    ):
        processes = train(*both, **options)
        if victim == 1:
            ready = lambda: committed(workdir, beyond=saved)  # noqa: B023, E731
        else:
            before = (workdir / "metrics.jsonl").stat().st_ino  # rewritten when the run begins
            ready = lambda: (workdir / "metrics.jsonl").stat().st_ino != before  # noqa: B023, E731
        wait_until(processes[0], ready, "checkpoint, or the beginning")
        processes[victim].kill()
        killed = time.monotonic()
        ((_, err),) = finish([processes[1 - victim]], LOST)
        assert time.monotonic() - killed < 20
        finish([processes[victim]], -signal.SIGKILL)
        assert "Traceback" not in err
        if victim == 1:
            assert "stack trace" not in err
            assert f"resuming {workdir} at step {saved}" in err
        saved = committed(workdir)[-1]
        told = re.findall(sentence + r"start the same command again: it goes on from step (\d+)$",
                          err, re.MULTILINE)  # fmt: skip
        assert told == [str(saved)], err


def test_a_mistake_on_one_host_ends_all(tmp_path):
    from PIL import Image

    for name in "ab":
        folder = tmp_path / "here" / "pictures" / "train" / name
        folder.mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "1.png")
    (tmp_path / "there").mkdir()
    cwd = (tmp_path / "here", tmp_path / "there")
    source = "--config.data.train.source=folder:pictures"
    told = [err for _, err in finish(train(tmp_path / "run", 2, 1, source, cwd=cwd), 2)]
    assert told[0].splitlines()[-1] == told[1].splitlines()[-1]
    assert re.search(r"^error: .*pictures.*\(on process 1 of 2 only\)$", told[0], re.MULTILINE)


def test_a_run_folder_that_only_one_host_sees_is_refused(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    cwd = (tmp_path / "here", tmp_path / "there")
    for _, err in finish(train("run", 2, 1, cwd=cwd), 2):
        assert "must be on a disk that all hosts share (on process 1 of 2 only)" in err


@pytest.mark.parametrize(
    "i, sentence",
    [
        (1, "process 1 could not reach the coordinator {} within 2 s: .*is process 0 running"),
        (0, "not all 2 processes came to the coordinator {} within 2 s"),
    ],
)
def test_who_waits_in_vain_says_so_and_ends(tmp_path, i, sentence):
    where = address()
    processes = train(tmp_path / "run", 2, 1, "--join-timeout=2", where=where, ids=[i])
    began = time.monotonic()
    ((_, err),) = finish(processes, LOST)
    assert time.monotonic() - began < 60
    assert re.search(f"^error: {sentence.format(where)}", err, re.MULTILINE), err
    assert "stack trace" not in err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--processes=2"], "belong together: give all three"),
        (["--coordinator=a:1", "--process-id=0"], "belong together"),
        (["--coordinator=a:1", "--processes=2", "--process-id=2"], "expected 0 to 1"),
        (["--coordinator=a:1", "--processes=0", "--process-id=0"], "--processes: '0' is no"),
        (["--coordinator=a", "--processes=2", "--process-id=0"], "expected HOST:PORT"),
        (["--coordinator=a:99999", "--processes=2", "--process-id=0"], "expected HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, tmp_path, capsys):
    command = ["train", f"--config={DIGITS}", f"--workdir={tmp_path / 'run'}", *flags]
    assert main(command) == 2
    assert message in capsys.readouterr().err


PARTS = """
import json, sys, jax, numpy as np
from jax.sharding import AxisType, Mesh
from vit_jax import distributed
from vit_jax.data.config import Split
from vit_jax.data.pipeline import BatchReader, train_batches
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.training.sharding import local_rows, to_devices, total

where, n, i = (flag.partition("=")[2] for flag in sys.argv[1:])
distributed.connect(where, int(n), int(i))
source = open_source("digits", "train")
read = BatchReader.of(source, Split("digits", "train"), Preprocess((8, 8), 1), seed=5)
told = {"rows": [], "index": [], "wrong": 0, "total": [], "raised": []}
# As on real wiring: neighbours in the mesh are on different hosts.
split, heads = (4, 1, 1), (2, 1, 2)
for shape, order in ((split, [0, 2, 1, 3]), (heads, [0, 2, 1, 3]), (heads, [1, 0, 3, 2])):
    devices = np.array(jax.devices())[order].reshape(shape)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rows = local_rows(8, mesh)
    with train_batches(read, 8, start_step=2, stop_step=3, rows=rows) as batches:
        batch = next(batches)
    told["rows"].append(rows.tolist())
    told["index"].append(batch["index"].tolist())
    for shard in to_devices({"id": rows}, 8, mesh)["id"].addressable_shards:
        told["wrong"] += int((np.asarray(shard.data) != np.arange(8)[shard.index]).sum())
    told["total"].append(int(total(rows >= 3, 8, mesh)))

def fail(on):
    if distributed.index() in on:
        raise UserError("no such file")
    return 7

for attempt in (
    lambda: distributed.each("a", lambda: fail({1})),
    lambda: distributed.each("a", lambda: fail({0, 1})),
    lambda: distributed.first("b", lambda: fail({0})),
    lambda: distributed.first("b", lambda: [fail({1}), distributed.index()]),
    lambda: distributed.gather("c", str(distributed.index())),
):
    try:
        told["raised"].append(attempt())
    except UserError as error:
        told["raised"].append(str(error))
print(json.dumps(told))
distributed.leave(0)
"""


def test_each_device_gets_its_own_rows_and_all_agree(tmp_path):
    script = tmp_path / "parts.py"
    script.write_text(PARTS)
    told = [json_of(out) for out, _ in finish(start([str(script)], 2, 2))]
    assert [one["rows"] for one in told] == [
        [[0, 1, 4, 5], [*range(8)], [0, 1, 2, 3]],
        [[2, 3, 6, 7], [*range(8)], [4, 5, 6, 7]],
    ]
    for one in told:
        assert one["wrong"] == 0
        assert one["total"] == [5, 5, 5]
        assert one["raised"] == [
            "no such file (on process 1 of 2 only)",
            "no such file",
            "no such file",
            [7, 0],
            ["0", "1"],
        ]
        # Whatever the mesh, row r of the global batch is the same example.
        examples = dict(zip(told[0]["rows"][1], told[0]["index"][1], strict=True))
        for rows, index in zip(one["rows"], one["index"], strict=True):
            assert [examples[row] for row in rows] == index


def test_one_process_needs_no_others():
    assert (distributed.count(), distributed.index(), distributed.is_lead()) == (1, 0, True)
    assert distributed.each("x", lambda: 1) == distributed.first("x", lambda: 1) == 1
    assert distributed.gather("x", "a") == ["a"]
    with pytest.raises(UserError, match="no"):
        distributed.first("x", lambda: (_ for _ in ()).throw(UserError("no")))
    distributed.connect(processes=1)
    distributed.leave(2)
