"""Sweeps that run: in order, at a time, killed, stopped and gone on with; mostly of fake runs."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import DIGITS, QUICK, ROOT
from etils import epath

from vit_jax.__main__ import main
from vit_jax.checkpoints.store import lock
from vit_jax.errors import Stopped, UserError
from vit_jax.launch import launchers
from vit_jax.launch.jobs import Job
from vit_jax.launch.launchers import Local, Print, make_launcher, shares
from vit_jax.launch.progress import Progress
from vit_jax.launch.run import Result, failures, read_results, run_sweep
from vit_jax.launch.sweep import load_sweep, point_config
from vit_jax.training.config import to_json
from vit_jax.training.config_file import load_config
from vit_jax.training.evaluation.evaluate import read_config
from vit_jax.training.metrics import TIMING_KEYS, last_values

FAKE = pathlib.Path(__file__).with_name("fake_train.py")
POINTS = (
    "[{'name': 'a'}, {'name': 'b', 'seed': 1}, {'name': 'c', 'init_from': '@a'}, "
    "{'name': 'd', 'after': ('b', 'c'), 'seed': 2}]"
)
# By hand: each step gives its number and a seventh of the sum of what was before.
FINAL = 3 + (1 + (2 + 1 / 7)) / 7


class Folder:
    """A sweep of fake runs in a folder, and how they behave."""

    def __init__(self, path, points=POINTS):
        self.path, self.root, self.behaviour = path, path / "runs", path / "behaviour"
        self.behaviour.mkdir(parents=True, exist_ok=True)
        self.write(points)

    def write(self, points):
        file = self.path / "sweep.py"
        file.write_text(f"config = {DIGITS!r}\ndef sweep(scale=''):\n    yield from {points}\n")
        self.sweep = load_sweep(str(file))
        for point in self.sweep.points:
            config = to_json(point_config(point, lambda name: str(self.root / name)))
            (self.behaviour / f"{point.name}.json").write_text(config)

    def behave(self, name, words):
        (self.behaviour / name).write_text(words)

    def command(self, config, workdir, flags):
        script = [sys.executable, "-I", "-S", str(FAKE), f"--config={config}"]
        return [*script, f"--workdir={workdir}", f"--behaviour={self.behaviour}", *flags]

    def run(self, jobs=1, **options):
        launcher = Local(jobs, poll=0.01, delay=0.01, **options)
        return run_sweep(self.sweep, self.root, launcher, command=self.command)

    def began(self):
        log = self.behaviour / "log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def names(self):
        return [line["name"] for line in self.began()]

    def states(self):
        return {result.name: result.state for result in read_results(self.root)}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def wait_until(condition, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.01)


def soon(function):
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def is_alive(pid):
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_all_points_run_in_order_and_only_once(folder, capsys):
    results = folder.run()
    assert folder.names() == ["a", "b", "c", "d"]
    assert [(r.name, r.state, r.exit_code) for r in results] == [
        (name, "finished", 0) for name in "abcd"
    ]
    for result in results:
        assert result.metrics == {"step": 3, "val/accuracy": pytest.approx(FINAL)}
    assert read_results(folder.root) == results and failures(results) is None
    assert results[2].overrides == {"init_from": "@a"} and results[2].after == ("a",)
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["0 of 4 points are finished", "a: started"]
    assert re.match(r"a: finished in \d+ s, val/accuracy 3\.4", out[2]) and len(out) == 9
    log = (folder.root / "c.log").read_text()
    assert f"--config.init_from={folder.root}/a\n" in log and "going on from step 0/3" in log

    assert folder.run() == results and len(folder.names()) == 4, "what is finished ran again"
    (folder.root / "b" / "checkpoints" / "3" / "checksums.json").unlink()
    assert folder.run() == results and folder.names()[4:] == ["b"]
    (folder.root / "sweep.json").unlink()
    assert folder.run() == results and sorted(folder.names()[5:]) == ["a", "b", "c", "d"]


def test_a_finished_point_of_another_config_is_refused(folder):
    folder.run()
    folder.write(POINTS.replace("'seed': 2", "'seed': 3, 'eval.every': 7"))
    with pytest.raises(UserError, match=r"runs/d holds a run of another config \(seed: 2 -> 3\)"):
        folder.run()
    folder.write(POINTS.replace("'seed': 2", "'seed': 2, 'eval.every': 7"))  # may differ
    folder.run()
    assert len(folder.names()) == 4


def test_two_at_a_time_on_equal_shares(folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    for name in "ab":
        folder.behave(name, "wait")
    thread = soon(
        lambda: (
            wait_until(lambda: len(folder.names()) == 2, "two at a time"),
            (folder.behaviour / "go").touch(),
        )
    )
    folder.run(jobs=2)
    thread.join()
    one, two = folder.began()[:2]
    cores = sorted(os.sched_getaffinity(0))
    assert {one["name"], two["name"]} == {"a", "b"}
    assert sorted([one["gpus"], two["gpus"]]) == ["4", "5"]
    if len(cores) > 1:
        assert len(one["cores"]) == len(two["cores"]) == len(cores) // 2
        assert not set(one["cores"]) & set(two["cores"])
    assert folder.names()[3] == "d" and set(folder.states().values()) == {"finished"}


def test_shares(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 2, 3, 4, 5})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [share.cores for share in shares(2)] == [(2, 3), (4, 5)]
    assert [share.cores for share in shares(7)] == [(2,), (3,), (4,), (5,), (7,), (2,), (3,)]
    assert shares(1) == [launchers.Share()] and shares(2)[0].environment == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert shares(2)[1].environment == {
        "CUDA_VISIBLE_DEVICES": "0",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.450",
    }


def test_a_failed_point_stops_only_those_after_it(folder, capsys):
    folder.behave("a", "exit=2")
    results = folder.run()
    assert folder.names() == ["a", "b"]
    assert folder.states() == {"a": "failed", "b": "finished", "c": "waiting", "d": "waiting"}
    assert failures(results) == (
        "1 of 4 points failed: a with exit code 2 (see NAME.log); not run, as they are after "
        "these: c, d"
    )
    assert "a: failed with exit code 2: error: the disk is full" in capsys.readouterr().out
    folder.behave("a", "")
    folder.run()
    assert folder.names()[2:] == ["a", "c", "d"]
    assert set(folder.states().values()) == {"finished"}


@pytest.mark.parametrize("code, seen", [(143, 143), (75, 75), (-9, 137)])
def test_a_preempted_point_is_started_again(tmp_path, code, seen):
    folder = Folder(tmp_path, "[{'name': 'a'}]")
    folder.behave("a", f"exit={code} times=2")
    (result,) = folder.run()
    assert folder.names() == ["a"] * 3 and result.state == "finished"
    assert "going on from step 3/3" in (folder.root / "a.log").read_text()
    assert result.metrics["val/accuracy"] == pytest.approx(FINAL)

    (folder.root / "sweep.json").unlink()
    folder.behave("a", f"exit={code}")
    (result,) = folder.run(retries=1)
    assert len(folder.names()) == 5 and (result.state, result.exit_code) == ("failed", seen)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_sweep_goes_on_later(folder, number):
    for name in "ab":
        folder.behave(name, "wait")
    thread = soon(
        lambda: (
            wait_until(lambda: len(folder.names()) == 2, "two at a time"),
            os.kill(os.getpid(), number),
        )
    )
    before = signal.getsignal(number)
    with pytest.raises(Stopped):
        folder.run(jobs=2)
    thread.join()
    assert signal.getsignal(number) is before
    assert folder.states() == {"a": "stopped", "b": "stopped", "c": "waiting", "d": "waiting"}
    assert {result.exit_code for result in read_results(folder.root)} == {143, None}
    (folder.behaviour / "go").touch()
    folder.run(jobs=2)
    assert set(folder.states().values()) == {"finished"}
    assert "going on from step 1/3" in (folder.root / "a.log").read_text()


def test_nothing_outlives_an_error_of_the_sweep(folder, monkeypatch):
    folder.behave("a", "wait")
    folder.behave("b", "wait")

    def fails(self, change):
        if change is None and len(folder.names()) == 2:
            raise OSError(28, "no space")

    monkeypatch.setattr("vit_jax.launch.run.Progress.show", fails)
    with pytest.raises(OSError):
        folder.run(jobs=2)
    assert not any(is_alive(line["pid"]) for line in folder.began())
    assert folder.states()["a"] == "stopped"  # it could not be recorded


KILLED = """
import sys
from vit_jax.launch.launchers import Job, Local
jobs = [Job(name, (*sys.argv[1:], f"--workdir={name}"), f"{name}.log") for name in "ab"]
list(Local(jobs=2).run(jobs))
"""


def test_killed_a_sweep_takes_its_runs_with_it(folder):
    folder.root.mkdir()
    for name in "ab":
        folder.behave(name, "wait")
    command = [sys.executable, "-S", str(FAKE), f"--behaviour={folder.behaviour}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *command], cwd=folder.root, env=env, start_new_session=True
    )
    wait_until(lambda: len(folder.names()) == 2, "two runs")
    assert all(is_alive(line["pid"]) for line in folder.began())
    process.kill()
    process.wait()
    wait_until(lambda: not any(is_alive(line["pid"]) for line in folder.began()), "end of both")


def test_a_folder_in_use_is_refused_before_anything_starts(folder, monkeypatch):
    (folder.root / "d").mkdir(parents=True)
    monkeypatch.setattr("vit_jax.launch.run.PATIENCE", 0.0)
    with lock(folder.root), pytest.raises(UserError, match="runs is in use by process"):
        folder.run()
    with lock(folder.root / "d"), pytest.raises(UserError, match=r"runs/d is in use by process"):
        folder.run()
    assert folder.names() == []


def test_results_of_what_is_no_sweep(tmp_path):
    with pytest.raises(UserError, match="holds no sweep"):
        read_results(tmp_path)
    (tmp_path / "sweep.json").write_text('{"points": [{"name": 1}]}')
    with pytest.raises(UserError, match="damaged or of another version"):
        read_results(tmp_path)


def test_mistakes_about_launchers(folder):
    for name, options, message in (
        ("locl", {}, "there is no launcher 'locl'; did you mean 'local'"),
        ("print", {"jobs": 2}, "the launcher 'print' has no --jobs"),
        ("local", {"jobs": 0}, "--jobs is 0"),
    ):
        with pytest.raises(UserError, match=message):
            make_launcher(name, **options)
    assert make_launcher("local", jobs=None) == Local()
    with pytest.raises(UserError, match="expected gs://BUCKET/FOLDER, s3://BUCKET/FOLDER or a fol"):
        run_sweep(folder.sweep, "az://bucket/runs", Local())
    folder.root.write_text("mine")
    with pytest.raises(UserError, match="is a file; --workdir must be a folder"):
        folder.run()


def test_the_command_ends_with_what_became_of_the_points(folder, monkeypatch, capsys):
    fake = functools.partial(run_sweep, command=folder.command)
    monkeypatch.setattr("vit_jax.launch.run.run_sweep", fake)
    command = ["sweep", folder.sweep.spec, f"--workdir={folder.root}"]
    assert main(["sweep", "nowhere.py", f"--workdir={folder.root}"]) == 2
    assert main([*command, "--launcher=slum"]) == 2 and not folder.root.exists()
    capsys.readouterr()
    folder.behave("d", "exit=1")
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err == "error: 1 of 4 points failed: d with exit code 1 (see NAME.log)\n"
    folder.behave("d", "wait")
    (folder.root / "d" / "metrics.jsonl").unlink()
    thread = soon(
        lambda: (
            wait_until(lambda: last_values(folder.root / "d"), "step"),
            os.kill(os.getpid(), signal.SIGTERM),
        )
    )
    assert main(command) == 143
    thread.join()
    assert capsys.readouterr().err.startswith("stopped: what ran has saved")
    (folder.behaviour / "go").touch()
    assert main(command) == 0 and set(folder.states().values()) == {"finished"}


def test_printed_commands_are_plain_and_in_order(folder, capsys):
    assert run_sweep(folder.sweep, folder.root, Print()) == []
    lines = capsys.readouterr().out.splitlines()
    assert not folder.root.exists()
    words = shlex.split(lines[2])
    assert words[1:5] == ["-m", "vit_jax", "train", f"--config={DIGITS}"]
    assert words[5:] == [
        f"--workdir={folder.root}/c",
        f"--config.init_from={folder.root}/a",
    ]
    assert [line.split(f"--workdir={folder.root}/")[1][0] for line in lines] == list("abcd")


def test_on_a_terminal_each_point_has_a_line(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    folder.run()
    folder.behave("b", "exit=1")
    (folder.root / "sweep.json").unlink()
    folder.run()
    last = capsys.readouterr().out.rpartition("\x1b[4F")[2].replace("\x1b[2K", "")
    assert last.splitlines() == [
        "a  finished  3  val/accuracy 3.449",
        "b  failed    3  val/accuracy 3.449",
        "c  finished  3  val/accuracy 3.449",
        "d  waiting ",
        "\x1b[J",
    ]


def test_the_table_shows_how_far_a_run_is(tmp_path, monkeypatch, capsys):
    def drawn(lines):
        monkeypatch.setenv("LINES", lines)
        Progress(epath.Path(tmp_path), results).show(None)
        return re.sub(r"\x1b\[\d?[JKF]", "", capsys.readouterr().out).splitlines()

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "70")
    names = ["x" * 50, *"abcdef"]
    results = {name: Result(name, DIGITS, {}, ()) for name in names}
    for name in names[:2]:
        results[name] = dataclasses.replace(results[name], state="running")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text(
        '{"step": 50, "train/loss": 2.25, "seconds": 20.0}\n{"step": 60, "train/lo'
    )
    (tmp_path / "a" / "starts.jsonl").write_text('{"step": 0, "total_steps": 200}\n')
    rows = drawn("24")
    assert len(rows) == 7 and all(len(row) < 70 for row in rows)
    assert rows[0].split() == ["..." + "x" * 20, "running", "0/?"]
    # 150 steps are left, of 0.4 s each.
    assert re.split("  +", rows[1])[-3:] == ["50/200", "train/loss 2.25", "60 s left"]
    assert drawn("5")[0] == "2 running, 5 waiting" and len(drawn("5")) == 3


REAL = f"""
config = {DIGITS!r}
TINY = {{"model.width": 8, "model.depth": 1, "model.mlp_dim": 8, "model.num_heads": 2,
         "model.representation_size": 8, "batch_size": 16, "total_steps": 4, "data.val": None,
         "data.test": None, "checkpoint.every": 2, "log.every": 2, "log.tensorboard": False}}
def sweep(scale="laptop"):
    yield TINY | {{"name": "tuned", "init_from": "@base", "total_steps": 2}}
    yield TINY | {{"name": "base"}}
"""


def test_a_real_sweep_runs_the_printed_commands(tmp_path, capsys, monkeypatch):
    (tmp_path / "sweep.py").write_text(REAL)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", QUICK)  # one plain device
    sweep = ["sweep", str(tmp_path / "sweep.py"), f"--workdir={tmp_path}/runs"]
    assert main([*sweep, "--launcher=print"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"--config.init_from={tmp_path}/runs/base" in printed[1]
    assert main([*sweep, "--jobs=2"]) == 0
    out = capsys.readouterr().out
    assert "base: finished" in out and "tuned: finished" in out
    results = read_results(tmp_path / "runs")
    assert [result.metrics["step"] for result in results] == [4, 2]
    for result, command in zip(results, printed, strict=True):
        flags = [flag for flag in shlex.split(command) if flag.startswith("--config.")]
        assert read_config(tmp_path / "runs" / result.name) == load_config(DIGITS, flags)
        assert result.metrics["train/loss"] > 0
    # The folders are free again, and what is finished is seen to be.
    assert main(sweep) == 0
    assert capsys.readouterr().out.startswith("2 of 2 points are finished")


SIX = f"""
config = {DIGITS!r}

def sweep(scale="laptop"):
    for lr in (3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2):
        yield {{"optim.lr": lr, "total_steps": 120, "eval.every": 40, "checkpoint.every": 20}}
"""


@pytest.mark.slow
def test_six_learning_rates_killed_twice_end_with_the_same_table(tmp_path):
    (tmp_path / "sweep.py").write_text(SIX)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}  # one plain device

    def start(workdir):
        command = [sys.executable, "-m", "vit_jax", "sweep", str(tmp_path / "sweep.py")]
        return subprocess.Popen([*command, f"--workdir={workdir}", "--jobs=2"], env=env)

    def finished(workdir):
        done = (workdir / "sweep.json").exists() and read_results(workdir)
        return sum(result.state == "finished" for result in done or ())

    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    for count in (1, 3):
        process = start(killed)
        wait_until(lambda count=count: finished(killed) >= count, f"{count} points", 600)
        process.kill()
        assert process.wait() < 0 and finished(killed) < 6
    assert start(killed).wait() == 0 and start(undisturbed).wait() == 0
    tables = []
    for workdir in (killed, undisturbed):
        results = read_results(workdir)
        assert len(results) == 6 and finished(workdir) == 6
        tables.append(
            [
                {k: v for k, v in result.metrics.items() if k not in TIMING_KEYS}
                for result in results
            ]
        )
    assert tables[0] == tables[1]  # bit by bit: each run had one core, whichever it was
    best = [max(table, key=lambda metrics: metrics["val/accuracy"]) for table in tables]
    assert best[0] == best[1] and best[0]["val/accuracy"] > 0.3


@pytest.mark.parametrize("before, seen", [(None, "glibc.malloc.hugetlb=1"), ("", "")])
def test_commands_find_large_pages_unless_told_otherwise(before, seen, tmp_path, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if before is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", before)
    log = tmp_path / "a.log"
    command = (sys.executable, "-c", "import os; print(repr(os.environ['GLIBC_TUNABLES']))")
    changes = launchers.Local(delay=0.0).run([Job("a", command, str(log))])
    assert [change.state for change in changes if change] == ["running", "finished"]
    assert log.read_text().splitlines()[-1] == repr(seen)
