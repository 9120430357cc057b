"""Sweeps on Slurm: what is submitted, watched, lost and taken up again.

The fast tests run the real job scripts, with commands that only look like Slurm's. The slow ones
start a real Slurm on this machine, where its packages are installed.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from conftest import DIGITS, ROOT, fails
from one_node_slurm import one_node_slurm, why_not
from test_run import FINAL, Folder, soon, wait_until

from vit_jax.errors import Stopped, UserError
from vit_jax.launch.jobs import Job
from vit_jax.launch.launchers import make_launcher
from vit_jax.launch.run import failures, run_sweep
from vit_jax.launch.slurm import Slurm
from vit_jax.launch.slurm_queue import Record
from vit_jax.launch.sweep import load_sweep
from vit_jax.training.metrics import TIMING_KEYS, last_values

HERE = pathlib.Path(__file__).parent
COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun")


class Cluster(Folder):
    """A sweep of fake runs on a fake Slurm, whose jobs end with the test."""

    def __init__(self, path, monkeypatch):
        super().__init__(path)
        self.slurm = path / "fake"
        (path / "bin").mkdir()
        self.slurm.mkdir()
        for name in COMMANDS:
            file = path / "bin" / name
            file.write_text(f"#!{sys.executable} -IS\n{(HERE / 'fake_slurm.py').read_text()}")
            file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_SLURM", str(self.slurm))

    def run(self, **options):
        launcher = Slurm(**{"poll": 0.1, "patience": 0.3, **options})
        return run_sweep(self.sweep, self.root, launcher, command=self.command)

    def asked(self):
        return (self.slurm / "asked").read_text().splitlines()

    def jobs(self):
        return {
            path.stem: json.loads(path.read_text()) for path in sorted(self.slurm.glob("*_*.json"))
        }

    def stop_watching(self, when):
        """Runs the sweep until `when`, and stops it as Ctrl-C does; returns what it says."""
        thread = soon(
            lambda: (wait_until(when, "time to stop"), os.kill(os.getpid(), signal.SIGINT))
        )
        with pytest.raises(Stopped) as stopped:
            self.run()
        thread.join()
        return str(stopped.value)

    def go(self):
        (self.behaviour / "go").touch()


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    cluster = Cluster(tmp_path, monkeypatch)
    yield cluster
    (cluster.slurm / "full").unlink(missing_ok=True)
    subprocess.run([tmp_path / "bin" / "scancel", "--quiet", *cluster.jobs()], check=True)


def test_points_run_in_arrays_of_those_that_wait_for_the_same(cluster, capsys):
    results = cluster.run(jobs=3)
    assert {result.state for result in results} == {"finished"} and failures(results) is None
    for result in results:
        assert result.metrics == {"step": 3, "val/accuracy": pytest.approx(FINAL)}
    assert sorted(cluster.names()) == ["a", "b", "c", "d"] and cluster.names()[3] == "d"
    options = [line.split()[:-1] for line in cluster.asked()]
    assert options == [
        ["--parsable", "--array=0-1%3"],
        ["--parsable", "--array=0-0%3", "--dependency=afterok:1_0", "--kill-on-invalid-dep=yes"],
        [
            "--parsable",
            "--array=0-0%3",
            "--dependency=afterok:1_1:2_0",
            "--kill-on-invalid-dep=yes",
        ],
    ]
    assert "d: finished" in capsys.readouterr().out
    log = (cluster.root / "b.log").read_text()
    assert log.startswith("job 1_1 on n1, start 1\ngoing on from step 0/3")
    assert Record.read(cluster.root).arrays == []
    assert cluster.run() == results and len(cluster.asked()) == 3, "what is finished ran again"


def test_a_script_is_a_plain_job(cluster, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    launcher = Slurm(
        partition="gpu",
        nodes=2,
        gpus_per_node="a100:4",
        cpus_per_task=8,
        time="8:00:00",
        sbatch="--account=vision --mem 8G",
    )
    job = Job("lr=0.1,seed=2", ("python", "-m", "x", "--k=(1, 2)"), f"{tmp_path}/a b/lr.log")
    text = launcher.script(job)
    head, _, body = text.partition("\n\n")
    assert head.splitlines() == [
        "#!/bin/bash",
        "#SBATCH --job-name=lr=0.1,seed=2",
        f"#SBATCH --chdir={tmp_path}",
        f'#SBATCH --output="{tmp_path}/a b/slurm/lr=0.1,seed=2.out"',
        "#SBATCH --partition=gpu",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=a100:4",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --time=8:00:00",
        "#SBATCH --signal=TERM@120",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --account=vision --mem 8G",
    ]
    assert "\nsrun --kill-on-bad-exit=0 --cpus-per-task=8 python -m x '--k=(1, 2)'\n" in body
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    # One task takes all GPUs of one node; on several there is one for each.
    assert "--ntasks-per-node=1" in Slurm(gpus_per_node="8").script(job)
    assert "--ntasks-per-node=2" in Slurm(nodes=4, tasks_per_node=2).script(job)


def test_a_script_runs_by_hand(cluster):
    cluster.run()
    (cluster.root / "a" / "metrics.jsonl").unlink()
    script = cluster.root / "slurm" / "a.sh"
    env = {**os.environ, "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n7"}
    assert subprocess.run(["bash", script], env=env, check=False).returncode == 0
    assert "job 77 on n7, start 1\ngoing on from step 0/3" in (cluster.root / "a.log").read_text()


@pytest.mark.parametrize("code, starts", [(143, 6), (75, 4), (-9, 4), (2, 1)])
def test_a_run_that_saved_is_queued_again(cluster, code, starts, capsys):
    cluster.write("[{'name': 'a'}]")
    cluster.behave("a", f"exit={code} times=5")
    (result,) = cluster.run()
    assert len(cluster.names()) == starts
    if code == 143:
        assert result.state == "finished" and result.metrics["step"] == 3
        log = (cluster.root / "a.log").read_text()
        assert "exit code 143: queued again" in log and "start 6\n" in log
    else:
        assert (result.state, result.exit_code) == ("failed", 137 if code == -9 else code)
        assert "error: the disk is full" in capsys.readouterr().out


def test_preemption_is_shown(cluster, capsys):
    cluster.write("[{'name': 'a'}]")
    cluster.behave("a", "wait")
    (cluster.slurm / "full").touch()

    def preempt():
        wait_until(lambda: last_values(cluster.root / "a"), "step")
        time.sleep(0.5)  # until it is seen running
        os.kill(cluster.began()[0]["pid"], signal.SIGTERM)
        wait_until(lambda: cluster.jobs()["1_0"]["state"] == "PENDING", "place in the queue")
        time.sleep(0.5)
        cluster.go()
        (cluster.slurm / "full").unlink()

    thread = soon(preempt)
    (result,) = cluster.run()
    thread.join()
    out = capsys.readouterr().out
    assert "a: started\na: preempted, will be started again\n" in out
    assert result.metrics == {"step": 3, "val/accuracy": pytest.approx(FINAL)}


def test_jobs_outlive_the_sweep_and_are_taken_up(cluster):
    for name in "ab":
        cluster.behave(name, "wait")
    told = cluster.stop_watching(lambda: len(cluster.names()) == 2)
    assert told == (
        "no longer watched: 4 jobs go on in Slurm; the same command watches them again, "
        "`scancel 1 2 3` ends them"
    )
    time.sleep(0.1)
    before = cluster.states()
    assert set(before.values()) <= {"running", "waiting"}, "they run, though nobody watches"
    thread = soon(lambda: (time.sleep(0.2), cluster.go()))
    results = cluster.run()
    thread.join()
    assert {result.state for result in results} == {"finished"}
    assert len(cluster.asked()) == 3 and len(cluster.names()) == 4


def test_what_ended_while_nobody_looked_is_told(cluster, capsys):
    cluster.behave("a", "wait exit=2")
    cluster.behave("b", "wait")
    cluster.stop_watching(lambda: len(cluster.names()) == 2)
    cluster.go()
    ended = {"COMPLETED", "FAILED", "CANCELLED"}
    wait_until(lambda: {job["state"] for job in cluster.jobs().values()} <= ended, "end")
    for path in cluster.slurm.glob("*.json"):  # Slurm forgets, after minutes
        path.unlink()
    results = cluster.run()
    assert cluster.states() == {"a": "failed", "b": "finished", "c": "waiting", "d": "waiting"}
    assert failures(results).startswith("1 of 4 points failed: a with exit code 2 (see NAME.log)")
    assert len(cluster.asked()) == 3 and "b: finished, val" in capsys.readouterr().out
    cluster.behave("a", "")
    assert {result.state for result in cluster.run()} == {"finished"}
    assert cluster.names()[2:] == ["a", "c", "d"]


def test_a_lost_job_is_submitted_again_with_those_that_wait_for_it(cluster):
    for name in "ab":
        cluster.behave(name, "wait")
    cluster.stop_watching(lambda: len(cluster.names()) == 2)
    job = cluster.jobs()["1_0"]
    (cluster.slurm / "1_0.json").write_text(json.dumps({**job, "state": "NODE_FAIL"}))
    os.killpg(job["pid"], signal.SIGKILL)
    cluster.go()
    assert {result.state for result in cluster.run()} == {"finished"}
    assert [line.split()[1] for line in cluster.asked()[3:]] == ["--array=0-0"] * 3
    assert sorted(cluster.names()) == ["a", "a", "b", "c", "d"]


def test_a_cancelled_job_fails_and_its_dependants_are_not_run(cluster, capsys):
    cluster.behave("a", "wait")
    thread = soon(
        lambda: (
            wait_until(lambda: "a" in cluster.names(), "start"),
            subprocess.run(["scancel", "1_0"], check=True),
        )
    )
    results = cluster.run()
    thread.join()
    assert cluster.states() == {"a": "failed", "b": "finished", "c": "waiting", "d": "waiting"}
    assert failures(results) == (
        "1 of 4 points failed: a (see NAME.log); not run, as they are after these: c, d"
    )
    assert "a: failed: error: job 1_0 left no exit code: CANCELLED" in capsys.readouterr().out
    assert cluster.jobs()["3_0"]["state"] == "CANCELLED"
    cluster.go()
    assert {result.state for result in cluster.run()} == {"finished"}


def test_killed_while_submitting_the_array_is_found(cluster, monkeypatch):
    for name in "ab":
        cluster.behave(name, "wait")

    class Killed(Exception):
        pass

    def ask(command):
        subprocess.run(command, check=True, capture_output=True)
        raise Killed  # before its number is known

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("vit_jax.launch.slurm.ask", ask)
        cluster.run()
    assert [array["id"] for array in Record.read(cluster.root).arrays] == [None]
    cluster.go()
    assert {result.state for result in cluster.run()} == {"finished"}
    assert len(cluster.asked()) == 3 and len(cluster.names()) == 4


def test_a_job_of_another_command_is_not_taken_up(cluster):
    cluster.behave("a", "wait")
    cluster.stop_watching(lambda: "a" in cluster.names())
    cluster.write("[{'name': 'a', 'seed': 7}]")
    with pytest.raises(UserError, match=r"job 1_0 .* runs a by another command .*scancel 1_0"):
        cluster.run()


def test_slurm_that_does_not_answer(cluster, monkeypatch):
    (cluster.slurm / "refuse").write_text("sbatch: error: invalid account")
    with pytest.raises(UserError, match=r"sbatch failed \(sbatch: error: invalid account\)"):
        cluster.run()
    assert Record.read(cluster.root).arrays == [] and cluster.names() == []
    (cluster.slurm / "refuse").unlink()
    cluster.behave("a", "wait")
    monkeypatch.setattr("vit_jax.launch.slurm.DOWN", 0.1)
    thread = soon(
        lambda: (
            wait_until(lambda: "a" in cluster.names(), "start"),
            (cluster.slurm / "down").touch(),
        )
    )
    with pytest.raises(UserError, match=r"squeue failed \(.*Unable to contact"):
        cluster.run()
    thread.join()
    (cluster.slurm / "down").unlink()
    cluster.go()
    assert {result.state for result in cluster.run()} == {"finished"}


def test_mistakes(cluster, monkeypatch, capsys):
    for options, message in (
        ({"nodes": 0}, "--nodes is 0; it must be at least 1"),
        ({"tasks_per_node": -1}, "--tasks-per-node is -1"),
        ({"partition": "a b"}, "--partition is 'a b'; expected one word"),
        ({"gpus_per_node": "a100"}, "--gpus-per-node is 'a100'; expected 4, or a100:4"),
        ({"nodes": 2, "tasks_per_node": 1, "gpus_per_node": "8"}, "each takes one GPU"),
        ({"tasks_per_node": 2, "gpus_per_node": "a100:4"}, "expected 4, or one task on one node"),
        ({"sbatch": "account=x"}, "expected sbatch's own options on one line"),
        ({"sbatch": "--a\nrm -rf x"}, "expected sbatch's own options on one line"),
    ):
        with pytest.raises(UserError, match=message):
            make_launcher("slurm", **options)
    with pytest.raises(UserError, match="the launcher 'local' has no --gpus-per-node"):
        make_launcher("local", gpus_per_node="8")
    assert make_launcher("slurm", jobs=None, nodes=None, sbatch=None) == Slurm()

    (cluster.root / "slurm").mkdir(parents=True)
    (cluster.root / "slurm" / "jobs.json").write_text('{"arrays": [1]}')
    with pytest.raises(UserError, match=r"jobs\.json is damaged or of another version"):
        cluster.run()
    with pytest.raises(UserError, match="cannot be named 'slurm'"):
        cluster.write("[{'name': 'slurm'}]")

    monkeypatch.setenv("PATH", "/nowhere")
    command = ["sweep", cluster.sweep.spec, f"--workdir={cluster.path}/new"]
    error = fails(capsys, *command, "--launcher=slurm")
    assert "there is no sbatch and no squeue here" in error
    error = fails(capsys, *command, "--nodes=2")
    assert "the launcher 'local' has no --nodes: leave it out" in error
    assert not (cluster.path / "new").exists()


# A real Slurm. ----------------------------------------------------------------------------------

REAL = f"""
config = {DIGITS!r}
TINY = {{"model.width": 8, "model.depth": 1, "model.mlp_dim": 8, "model.num_heads": 2,
         "model.representation_size": 8, "batch_size": 16, "data.val": None, "data.test": None,
         "log.tensorboard": False}}
def sweep(scale):
    if scale == "two_tasks":
        yield TINY | {{"name": "run", "total_steps": 4}}
    else:
        longer = TINY | {{"total_steps": 400, "checkpoint.every": 20, "log.every": 20}}
        yield longer | {{"name": "cut"}}
        yield longer | {{"name": "whole"}}
"""


@pytest.fixture(scope="module")
def daemons(tmp_path_factory):
    if why_not():
        pytest.skip(why_not())
    with one_node_slurm(tmp_path_factory.mktemp("slurm") / "node") as environment:
        yield environment


@pytest.fixture
def real(daemons, tmp_path, monkeypatch):
    for name, value in daemons.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # one plain device
    (tmp_path / "sweep.py").write_text(REAL)
    return Folder(tmp_path / "100% fake")  # a path that sbatch could misread


def slurm(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_real_arrays_dependencies_and_a_cancelled_job(real):
    def run():
        return run_sweep(
            real.sweep, real.root, Slurm(jobs=2, poll=1.0, patience=3.0), command=real.command
        )

    real.behave("b", "wait")

    def cancel():
        wait_until(lambda: "b" in real.names() and "c" in real.names(), "start", 600)
        number = Record.read(real.root).numbers()["b"]
        slurm("scancel", number)

    thread = soon(cancel)
    results = run()
    thread.join()
    assert real.states() == {"a": "finished", "b": "failed", "c": "finished", "d": "waiting"}
    assert "b (see NAME.log)" in failures(results) or "b with exit code 143" in failures(results)
    (real.behaviour / "go").touch()
    results = run()
    assert {result.state for result in results} == {"finished"}
    for result in results:
        assert result.metrics == {"step": 3, "val/accuracy": pytest.approx(FINAL)}
    assert sorted(real.names()) == ["a", "b", "b", "c", "d"] and real.names()[-1] == "d"


@pytest.mark.slow
def test_really_out_of_time_a_run_is_queued_again_and_outlives_the_sweep(real):
    real.write("[{'name': 'a'}]")
    real.behave("a", "wait")
    launcher = Slurm(poll=1.0, time="1", sbatch="--signal=TERM@50")

    def run():
        return run_sweep(real.sweep, real.root, launcher, command=real.command)

    log = real.root / "a.log"
    thread = soon(
        lambda: (
            wait_until(
                lambda: log.exists() and "queued again" in log.read_text(), "end of time", 600
            ),
            os.kill(os.getpid(), signal.SIGINT),
        )
    )
    with pytest.raises(Stopped, match="1 jobs go on in Slurm"):
        run()
    thread.join()
    (real.behaviour / "go").touch()
    (result,) = run()
    assert result.metrics == {"step": 3, "val/accuracy": pytest.approx(FINAL)}
    assert real.names() == ["a", "a"] and ", start 2\ngoing on from step 1/3" in log.read_text()


@pytest.mark.slow
def test_two_tasks_are_one_run(real, tmp_path):
    sweep = load_sweep(f"{tmp_path}/sweep.py:two_tasks")
    (result,) = run_sweep(sweep, tmp_path / "runs", Slurm(tasks_per_node=2, poll=1.0))
    log = (tmp_path / "runs" / "run.log").read_text()
    assert result.state == "finished" and result.metrics["step"] == 4, log
    assert "process 0 of 2: " in log and "process 1 of 2: " in log


@pytest.mark.slow
def test_a_real_run_queued_again_ends_as_an_undisturbed_one(real, tmp_path):
    sweep, root = load_sweep(f"{tmp_path}/sweep.py:preempted"), tmp_path / "runs"

    def preempt():
        saved = root / "cut" / "checkpoints"
        wait_until(lambda: [*saved.glob("*/checksums.json")], "first checkpoint", 600)
        number = Record.read(root).numbers()["cut"]
        slurm("scancel", "--signal=TERM", number)

    thread = soon(preempt)
    cut, whole = run_sweep(sweep, root, Slurm(poll=1.0))
    thread.join()
    log = (root / "cut.log").read_text()
    assert "exit code 143: queued again" in log and "resuming" in log
    assert cut.metrics["step"] == whole.metrics["step"] == 400
    for name in cut.metrics.keys() - set(TIMING_KEYS):
        assert cut.metrics[name] == whole.metrics[name], name


@pytest.mark.slow
def test_the_ready_job_file(real, tmp_path, monkeypatch):
    # As it stands, but for the size of it and what `python` is.
    text = (ROOT / "experiments" / "launch" / "slurm.sh").read_text()
    for option in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=8"):
        assert f"#SBATCH --{option}\n" in text
        text = text.replace(f"#SBATCH --{option}\n", "")
    (tmp_path / "slurm.sh").write_text(text)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/bash\necho "$@"\n[ -e saved ] && exit 0\ntouch saved\nexit 143\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    number = slurm("sbatch", "--parsable", "slurm.sh").strip()
    wait_until(lambda: (tmp_path / "saved").exists(), "first start", 600)
    wait_until(lambda: "COMPLETED" in slurm("scontrol", "show", "job", number), "end", 600)
    said = (tmp_path / "plain_s16.log").read_text()
    assert said.count("-m vit_jax train --config=configs/plain.py:S/16,imagenet --workdir=") == 2
