"""Several processes on one machine: together they are one run, and they end together."""

import json
import re
import shutil
import time

import numpy as np
import pytest
from conftest import DIGITS, TINY, fails
from PIL import Image
from processes import SIGINT, SIGKILL, Command, address
from test_resume import logged, weights

from vit_jax import distributed
from vit_jax.__main__ import main
from vit_jax.checkpoints.store import Store
from vit_jax.distributed import LOST
from vit_jax.errors import UserError


@pytest.fixture
def start(tmp_path):
    """Starts `n` processes of a training or of a text; those that are left end with the test."""
    started = []
    (tmp_path / "told").mkdir()

    def start(
        n, *flags, ids=None, dies=None, where=None, cwd=None, workdir=tmp_path / "run", **options
    ):
        """`dies` and `cwd` are by process: how it ends itself, where it runs."""
        where, new = where or address(), []
        for i in range(n) if ids is None else ids:
            argv = [f"--coordinator={where}", f"--processes={n}", f"--process-id={i}"]
            if "text" not in options:
                argv += ["train", f"--config={DIGITS}", f"--workdir={workdir}", *TINY]
                argv = [*argv[3:], *argv[:3], *flags]
            here = {"dies": (dies or {}).get(i), "cwd": cwd and cwd[i]}
            new.append(Command(tmp_path / "told", argv, **here, **options))
        started.extend(new)
        return new

    yield start
    for command in started:
        command.kill()


def finish(commands, code=0):
    """Waits for all; returns what each wrote to stdout and stderr."""
    return [command.finish(code) for command in commands]


def assert_equal_runs(ours, theirs):
    """Equal but for the order in which floats are added up: another sample would be far beyond."""
    mine, other = (
        [line for line in logged(each) if "train/loss" in line or "test/loss" in line]
        for each in (ours, theirs)
    )
    assert [line["step"] for line in mine] == [line["step"] for line in other]
    for line, expected in zip(mine, other, strict=True):
        assert line == pytest.approx(expected, rel=2e-5), line["step"]
    assert Store(ours).newest() == Store(theirs).newest()
    for array, reference in zip(weights(ours), weights(theirs), strict=True):
        np.testing.assert_allclose(array, reference, rtol=1e-3, atol=5e-4)


def json_of(out):
    """What a process printed; Gloo's own lines may come later, as they wait in another buffer."""
    return json.loads([line for line in out.splitlines() if line.startswith("{")][-1])


def test_two_processes_are_one_run_that_one_and_then_two_go_on_with(
    tiny_run, start, tmp_path, caplog
):
    """They stop at one step, whichever of them is told to."""
    alone, workdir = tiny_run[0], tmp_path / "run"
    timed = ["--config.checkpoint.every_minutes=0.01", "--config.checkpoint.keep=9"]
    (_, err), (silent, other) = finish(
        start(2, "--config.eval.every=0", *timed, devices=2, dies={1: (SIGINT, "step", 10)}), 130
    )
    other = other.splitlines()[-1]
    assert err.splitlines()[-1] == other and "step" not in silent
    saved = int(re.fullmatch(r"stopped by Ctrl-C after saving step (\d+) of 24; .*", other)[1])
    assert {1, 4, 8, saved} <= {*Store(workdir).steps()}  # the first by the clock
    assert Store(workdir).newest() == saved and 10 <= saved < 24
    assert logged(workdir)[-1]["step"] == saved - saved % 3
    table = re.findall(r"^process (\d) of 2: \S+, pid \d+, 2 x cpu, ids", err, re.MULTILINE)
    assert table == ["0", "1"]
    assert len(list((workdir / "tensorboard").glob("*"))) <= 1

    caplog.set_level("INFO", "vit_jax")
    assert main(["train", f"--config={DIGITS}", f"--workdir={workdir}", *TINY]) == 0
    assert f"at step {saved} of 24" in caplog.text
    assert_equal_runs(workdir, alone)

    # All must find out that the newest is damaged, whichever of them reads that file.
    largest = max((workdir / "checkpoints" / "24").rglob("*"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    (out, err), (silent, other) = finish(start(2, "--json", devices=2))
    assert f"{largest} does not match its checksum" in err and "at step 20 of 24" in err
    assert json_of(out)["test/accuracy"] == logged(workdir)[-1]["test/accuracy"]
    assert "step" not in silent + other
    assert_equal_runs(workdir, alone)
    assert Store(workdir).steps() == [20, 24]


def test_a_lost_process_ends_the_others(tiny_run, start, tmp_path):
    """The two halves of the heads are on two hosts, which must read the same rows."""
    for victim, step, sentence in (
        (1, 9, r"^error: process 1 of 2 is gone \(no sign of life for 5 s\); "),
        (0, 5, r"^error: .*process 0.* is gone; "),
    ):
        flags = ["--config.mesh.tensor=2", "--config.eval.every=0"]
        dies = {victim: (SIGKILL, "step", step)}
        commands = start(2, *flags, devices=1, dies=dies, VIT_JAX_PEER_TIMEOUT="20")
        commands[victim].finish(-SIGKILL)
        killed = time.monotonic()
        _, err = commands[1 - victim].finish(LOST)
        assert time.monotonic() - killed < 20
        assert "Traceback" not in err
        saved = Store(tmp_path / "run").newest()
        if victim == 1:
            assert "stack trace" not in err and saved in (4, 8)
            found = {line["step"]: line for line in logged(tmp_path / "run")}
            for expected in logged(tiny_run[0])[:2]:
                assert found[expected["step"]] == pytest.approx(expected, rel=2e-5)
            shutil.rmtree(tmp_path / "run" / "checkpoints")
        begins = f"goes on from step {saved}" if victim == 1 else r"goes on from step \d+"
        begins += "|begins anew, as nothing was saved yet" * (victim == 0)
        told = sentence + rf"start the same command again: it ({begins})$"
        assert re.search(told, err, re.MULTILINE), err


def test_a_mistake_on_one_host_ends_all(start, tmp_path):
    folders = [tmp_path / f"host{i}" for i in range(4)]
    for folder in folders:
        for name in "ab" * (folder.name != "host2"):
            (folder / "pictures" / "train" / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(folder / "pictures" / "train" / name / "1.png")
        folder.mkdir(exist_ok=True)
    source = "--config.data.train.source=folder:pictures"
    told = [err for _, err in finish(start(4, source, devices=1, cwd=folders), 2)]
    assert len({err.splitlines()[-1] for err in told}) == 1
    assert re.search(r"^error: .*pictures.*\(on process 2 of 4 only\)$", told[0], re.MULTILINE)
    # A run folder that only one host sees.
    source = "--config.batch_size=64"
    for _, err in finish(start(2, source, devices=1, cwd=folders, workdir="run"), 2):
        assert "must be on a disk that all hosts share (on process 1 of 2 only)" in err


@pytest.mark.parametrize(
    "i, sentence",
    [
        (1, "process 1 could not reach the coordinator {} within 2 s: .*is process 0 running"),
        (0, "not all 2 processes came to the coordinator {} within 2 s"),
    ],
)
def test_who_waits_in_vain_says_so_and_ends(start, i, sentence):
    began, where = time.monotonic(), address()
    ((_, err),) = finish(start(2, "--join-timeout=2", where=where, ids=[i]), LOST)
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
    assert message in fails(capsys, *command)


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


def test_each_device_gets_its_own_rows_and_all_agree(start):
    told = [json_of(out) for out, _ in finish(start(2, devices=2, text=PARTS))]
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
