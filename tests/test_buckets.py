"""Run folders in buckets: on servers of this machine that speak Google's and Amazon's protocols."""

import ast
import asyncio
import errno
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import botocore.exceptions
import jax
import numpy as np
import pytest
import servers
from conftest import DIGITS, ROOT, TINY, fails
from etils import epath
from flax import nnx
from processes import SIGKILL, Command, address

import vit_jax
from vit_jax import buckets, objects
from vit_jax.__main__ import main
from vit_jax.buckets import Copy
from vit_jax.commands import run_training
from vit_jax.errors import Unreachable, UserError
from vit_jax.launch.launchers import Local
from vit_jax.launch.run import run_sweep
from vit_jax.launch.slurm import Slurm
from vit_jax.launch.sweep import load_sweep
from vit_jax.lease import Lease
from vit_jax.objects import Objects
from vit_jax.training.config_file import load_config

needs_x86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="fake-gcs-server's wheel has a program for x86 alone"
)
STORES = [pytest.param("gs", marks=needs_x86), "s3"]
FAULTS = {"gs": servers.Faults(), "s3": servers.Faults()}
# What failed is tried again as often as elsewhere, but soon.
SOON = {**objects.RETRIES, "initial_delay": "10ms", "max_delay": "200ms"}


def without_pauses(patch):
    """Tensorstore's own clients, Orbax's and gcsfs try again at once."""
    from orbax.checkpoint._src.serialization import tensorstore_utils

    patch.setattr(objects, "RETRIES", SOON)
    for context in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
        for name in ("gcs_request_retries", "s3_request_retries"):
            patch.setitem(getattr(tensorstore_utils, context), name, SOON)
    soon = SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 100))
    patch.setattr("gcsfs.retry.asyncio", soon)


@pytest.fixture(scope="module")
def stores():
    """Both servers, and the environment that leads to them."""
    with pytest.MonkeyPatch.context() as patch, servers.amazon(FAULTS["s3"]) as found:
        without_pauses(patch)
        for name, value in found.items():
            patch.setenv(name, value)
        if platform.machine() != "x86_64":
            yield
            return
        with servers.google(FAULTS["gs"]) as found:
            for name, value in found.items():
                patch.setenv(name, value)
            yield


@pytest.fixture
def store(request, stores):
    FAULTS[request.param].share = 0.0
    yield request.param
    FAULTS[request.param].share = 0.0


@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))


def servers_of(store):
    """The environment that leads a process to a store."""
    names = {"gs": ("TENSORSTORE_GCS_HTTP_URL", "STORAGE_EMULATOR_HOST")}
    names["s3"] = tuple(name for name in os.environ if name.startswith("AWS_"))
    return {name: os.environ[name] for name in names[store]}


def number(text):
    try:
        return ast.literal_eval(text)
    except ValueError:
        return {"true": True, "false": False}.get(text, text)


def leaves(path):
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(vit_jax.load(path).model, nnx.Param)))


def lines(text):
    """metrics.jsonl without what depends on the clock."""
    kept = ("step", "train/loss", "train/accuracy", "val/accuracy", "val/loss")
    found = [json.loads(line) for line in text.splitlines()]
    return [{name: line[name] for name in kept if name in line} for line in found]


def assert_equal_to_a_disk(url, folder):
    """Parameters to the bit, and every measurement."""
    for mine, theirs in zip(leaves(url), leaves(folder), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    metrics = Objects(url).read("metrics.jsonl")[0].decode()
    assert lines(metrics) == lines((folder / "metrics.jsonl").read_text())


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_a_run_killed_in_a_bucket_is_the_run_on_a_disk_despite_faults(
    store, tiny_run, tmp_path, cached, capsys
):
    """It dies while it saves; then a request in fifty fails."""
    url = f"{store}://runs/a/tiny"
    argv = ["train", f"--config={DIGITS}", f"--workdir={url}", *TINY]
    Command(tmp_path, argv, dies=(SIGKILL, "save", 8), **servers_of(store)).finish(-SIGKILL)
    before = sum(FAULTS[store].count.values())
    FAULTS[store].share = 0.02
    config = load_config(DIGITS, [*TINY, "--config.checkpoint.every=8"])
    results, said = run_training(config, url)
    assert sum(FAULTS[store].count.values()) > before
    FAULTS[store].share = 0.0
    assert any(line.startswith(f"  vit-jax evaluate --workdir={url}") for line in said)
    assert results["val/accuracy"] == tiny_run[1]["val/accuracy"]
    names = Objects(url).names()
    assert {"metrics.jsonl", "config.json", "data.json", "starts.jsonl"} <= set(names)
    assert any(name.startswith("tensorboard/") for name in names)
    assert len(Objects(url).read("starts.jsonl")[0].splitlines()) == 2
    assert_equal_to_a_disk(url, tiny_run[0])

    assert main(["evaluate", f"--workdir={url}"]) == 0
    assert "evaluation/val.json" in Objects(url).names()
    assert main(["report", url]) == 0
    out = capsys.readouterr().out
    assert f"all of it is kept in {url}/evaluation" in out and "| tiny | finished |" in out
    assert vit_jax.load(f"{url}/checkpoints/24").config == vit_jax.load(tiny_run[0]).config


@pytest.mark.parametrize("store", STORES[:1], indirect=True)
def test_two_processes_are_one_run_in_a_bucket(store, tiny_run, tmp_path, cached):
    """Each sends its own parts of a checkpoint; one dies, and both go on as one run."""
    url = f"{store}://runs/two"

    def start(*flags, dies=None):
        flags = (*flags, f"--coordinator={address()}", "--processes=2", "--config.mesh.fsdp=-1")
        argv = ["train", f"--config={DIGITS}", f"--workdir={url}", *TINY, *flags]
        argv.append("--config.eval.every=0")
        return [
            Command(
                tmp_path,
                [*argv, f"--process-id={i}"],
                devices=1,
                dies=dies if i == 1 else None,
                VIT_JAX_PEER_TIMEOUT="20",
                **servers_of(store),
            )
            for i in range(2)
        ]

    other, victim = start(dies=(SIGKILL, "step", 11))
    victim.finish(-SIGKILL)
    assert re.search("goes on from step [48]$", other.finish(75)[1], re.M)
    for command in start("--config.checkpoint.every=12"):
        command.finish()
    names = Objects(url).names()
    assert any("/ocdbt.process_1/" in name for name in names)  # straight from the second process
    for mine, theirs in zip(leaves(url), leaves(tiny_run[0]), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=5e-4)  # sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES, indirect=True)
def test_25_kills_at_random_moments_change_no_bit(store, tiny_run, tmp_path, cached):
    """With 5% of the requests failing."""
    url, moments = f"{store}://runs/killed", random.Random(store)
    argv = ["train", f"--config={DIGITS}", f"--workdir={url}", *TINY, "--config.checkpoint.every=2"]
    FAULTS[store].share = 0.05
    killed = finished = 0
    while killed < 25:
        command = Command(tmp_path, argv, **servers_of(store))
        command.process.join(moments.uniform(1.0, 12.0))
        if command.process.is_alive():
            command.kill()
            killed += 1
            continue
        command.finish()
        finished += 1
        FAULTS[store].share = 0.0
        assert_equal_to_a_disk(url, tiny_run[0])
        FAULTS[store].share = 0.05
        url = f"{store}://runs/killed{finished}"
        argv[2] = f"--workdir={url}"
    Command(tmp_path, argv, **servers_of(store)).finish()
    FAULTS[store].share = 0.0
    assert_equal_to_a_disk(url, tiny_run[0])
    print(f"{store}: {killed} kills, {finished + 1} runs, faults {FAULTS[store].count}")


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_a_store_that_does_not_answer_is_a_sentence_and_exit_code_75(store, monkeypatch, capsys):
    monkeypatch.setattr(objects, "RETRIES", {**objects.RETRIES, "max_retries": 1})
    FAULTS[store].share = 1.0
    assert main(["train", f"--config={DIGITS}", f"--workdir={store}://runs/gone", *TINY]) == 75
    told = capsys.readouterr().err
    assert "does not answer, after many attempts" in told and "Traceback" not in told


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_a_token_that_expired_is_fetched_anew_once(store, monkeypatch):
    """By both clients; if that does not help, a sentence says so, and no list is empty for it."""
    monkeypatch.setattr(objects, "PAUSE", 0.0)
    url, faults = f"{store}://runs/token", FAULTS[store]
    monkeypatch.setattr(faults, "kinds", ("expired",) if store == "s3" else (401,))
    there = Objects(buckets.check(url))
    there.replace("a", b"1")
    generation = there.read("a")[1]
    path = epath.Path(url) / "a"
    for ask, answer in (
        (lambda: there.read("a")[0], b"1"),
        (lambda: there.write("a", b"2", generation) is None, False),
        (there.names, ["a"]),
        (path.read_text, "2"),
    ):
        monkeypatch.setattr(faults, "most", 1)
        faults.share = 1.0
        assert ask() == answer and faults.most == 0
    monkeypatch.setattr(faults, "most", 1e9)
    asked = [lambda: there.read("a"), lambda: there.write("a", b"3", generation)]
    for ask in asked + [there.names] * (store == "s3"):  # gcsfs tries for half a minute
        with pytest.raises(UserError, match=r"the login has expired .* log in with `(gcloud|aws) "):
            ask()
    monkeypatch.setattr(faults, "kinds", (403,))
    with pytest.raises(UserError, match="access is refused"):
        there.names()


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_run_whose_login_expires_goes_on_after_another(store, tiny_run, tmp_path, monkeypatch):
    """It ends with a sentence and exit code 2, as starting again alone does not help."""
    url, faults = f"{store}://runs/expired", FAULTS[store]
    monkeypatch.setattr(faults, "kinds", ("expired",))
    monkeypatch.setattr(faults, "latency", 0.01)
    argv = ["train", f"--config={DIGITS}", f"--workdir={url}", *TINY]
    command = Command(tmp_path, argv, **servers_of(store))
    while Objects(url).read("checkpoints/4/checksums.json")[0] is None:
        time.sleep(0.05)
    faults.share = 1.0
    told = command.finish(2)[1]
    assert "the login has expired (" in told and "and start the same command again" in told
    assert "Traceback" not in told
    faults.share, faults.latency = 0.0, 0.0
    run_training(load_config(DIGITS, TINY), url)
    assert_equal_to_a_disk(url, tiny_run[0])


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_a_folder_in_use_is_refused(store, capsys):
    """Who beats is seen to live; who is silent loses it, and who is gone at once."""
    url = f"{store}://runs/held"
    with Lease(url, stale=2.0) as first:
        first._me["machine"] = "another"  # or it would be looked for here
        first.confirm()
        with pytest.raises(UserError, match=f"{url} is in use by process {os.getpid()} on"):
            Lease(url, stale=20.0).__enter__()
        first._over.set()  # as if it slept
        first._thread.join()
        with Lease(url, stale=0.5) as second:
            with pytest.raises(UserError, match="is in use by process"):
                first.confirm()
            second.confirm()
    with Lease(url, stale=1e6):  # what was given back is free at once
        pass
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    objects = Objects(url)
    gone = {**Lease(url)._me, "process": int(dead.stdout)}
    assert objects.write(".lease", json.dumps(gone).encode(), objects.read(".lease")[1])
    began = time.monotonic()
    with Lease(url, stale=1e6):
        assert time.monotonic() - began < 60


@pytest.fixture
def folder(tmp_path):
    """A folder that stands for a bucket: tensorstore writes conditionally to disks as well."""
    (tmp_path / "bucket").mkdir()
    return f"file://{tmp_path}/bucket"


def test_a_run_that_lives_here_keeps_its_folder(folder):
    """Its process is looked for, so another start of the run need not wait to know."""
    with Lease(folder, stale=4.0) as first:
        with pytest.raises(UserError, match="is in use by process"):
            Lease(folder, stale=40.0).__enter__()
        first.confirm()


def test_a_copy_sends_whole_lines_and_only_what_changed(folder, tmp_path):
    with Lease(folder) as lease:
        copy = Copy(folder, str(tmp_path / "copy"), "id", lease)
        path = tmp_path / "copy" / "metrics.jsonl"
        path.parent.mkdir()
        path.write_text('{"step": 1}\n{"st')
        copy.push()
        objects = Objects(folder)
        content, generation = objects.read("metrics.jsonl")
        assert content == b'{"step": 1}\n'
        copy.push()
        assert objects.read("metrics.jsonl")[1] == generation
        path.write_text('{"step": 1}\n{"step": 2}\n')
        for hidden in (".lock", "wandb/run", "checkpoints/1/state/d", "x.tmp"):
            (tmp_path / "copy" / hidden).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "copy" / hidden).write_text("no")
        copy.push()
        assert objects.names() == [".lease", "metrics.jsonl"]
    other = Copy(folder, str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "gone.json").write_text("left from before")
    assert other.pull() == 2
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "other" / "metrics.jsonl").read_text() == path.read_text()


def test_a_run_that_slept_writes_nothing_once_another_has_its_folder(folder, tmp_path):
    """Not even a file that it was about to send when it fell asleep."""
    sleeper = Lease(folder, stale=1e6)
    with sleeper:
        copy = Copy(folder, str(tmp_path / "copy"), "id", sleeper)
        path = tmp_path / "copy" / "metrics.jsonl"
        path.parent.mkdir()
        path.write_text("1\n")
        copy.push()
        objects = Objects(folder)
        stolen = json.dumps({**Lease(folder)._me, "host": "other"}).encode()
        assert objects.write(".lease", stolen, objects.read(".lease")[1])
        assert objects.write("metrics.jsonl", b"1\n2\n", objects.read("metrics.jsonl")[1])
        path.write_text("1\nmine\n")
        with pytest.raises(UserError, match=r"is in use by process .* on other"):
            copy.push()
        assert objects.read("metrics.jsonl")[0] == b"1\n2\n"
    assert objects.read(".lease")[0] == stolen  # nor does it give back what it has not


def test_a_push_renews_the_lease_once_unless_it_takes_long(folder, tmp_path, monkeypatch):
    with Lease(folder, stale=1e6) as lease:
        copy, beats = Copy(folder, str(tmp_path / "copy"), "id", lease), []
        (tmp_path / "copy").mkdir()
        write, clock = Objects.write, [0.0]

        def counted(self, name, *args):
            beats.append(name)
            clock[0] += 1e5 if name == "c" else 0.0
            return write(self, name, *args)

        monkeypatch.setattr(Objects, "write", counted)
        # As in a machine that was suspended, where the one clock stands still.
        monkeypatch.setattr("vit_jax.lease._clocks", lambda: (0.0, clock[0]))
        for name in "abcd":
            (tmp_path / "copy" / name).write_text(name)
        copy.push()
        assert beats == [".lease", "a", "b", "c", ".lease", "d"]


def test_a_write_whose_answer_was_lost_is_not_taken_for_another_ones(folder):
    objects = Objects(folder)
    made = objects.write("a", b"one", Objects.MISSING)
    assert objects.write("a", b"two", Objects.MISSING) is None
    assert objects.write("a", b"one", Objects.MISSING) == made  # as a retry of the first


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("az://bucket/run", "expected gs://BUCKET/FOLDER, s3://BUCKET/FOLDER or a folder"),
        ("gs://bucket", "expected gs://BUCKET/FOLDER"),
        ("s3://bucket/../run", "expected s3://BUCKET/FOLDER"),
        ("gs://bucket//run", "expected gs://BUCKET/FOLDER"),
    ],
)
def test_a_url_that_is_none_is_refused(url, told, capsys):
    assert told in fails(capsys, "train", f"--config={DIGITS}", f"--workdir={url}")


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(objects.importlib.util, "find_spec", lambda name: None)
    for scheme, needs in {"gs": "gcsfs", "s3": "s3fs"}.items():
        with pytest.raises(
            UserError, match=rf"needs {needs}: .*\[{'gcs' if scheme == 'gs' else 's3'}\]"
        ):
            buckets.check(f"{scheme}://bucket/run")


def test_what_a_store_says_is_told_with_what_to_do():
    class RefreshError(Exception):
        pass

    login = objects.explained("gs://b/run", RefreshError("reauthentication is needed"))
    assert "gcloud auth application-default login" in str(login) and login.code == 2
    keys = objects.explained("s3://b/run", ValueError("PERMISSION_DENIED: 403"))
    assert "aws configure" in str(keys)
    for head in (
        "Unknown [http_response_code='400'] [http_response_body='x']",
        "[Errno 22] Bad Request",
    ):
        assert "the login has expired" in str(objects.explained("s3://b/run", ValueError(head)))
    busy = objects.explained("gs://b/run", ValueError("UNAVAILABLE: HTTP response code: 503"))
    assert isinstance(busy, Unreachable) and busy.code == 75
    assert "no such bucket" in str(objects.explained("gs://b/run", ValueError("NOT_FOUND: x")))
    for error in (
        OSError(errno.EBUSY, "SlowDown"),
        botocore.exceptions.EndpointConnectionError(endpoint_url="x"),
        ConnectionResetError(),
    ):
        assert isinstance(objects.explained("s3://b/run", error), Unreachable)
    assert "aws configure" in str(objects.explained("s3://b/run", PermissionError("Forbidden")))
    assert objects.explained("gs://b/run", KeyError("a bug of ours")) is None
    full = type("JaxRuntimeError", (RuntimeError,), {})("RESOURCE_EXHAUSTED: out of memory")
    assert objects.explained("gs://b/run", full) is None


def test_a_beat_whose_answer_was_lost_is_our_own(folder, tmp_path, monkeypatch):
    """And so is a file that was sent, and has grown since."""
    with Lease(folder, stale=1e6) as lease:
        copy = Copy(folder, str(tmp_path / "copy"), "id", lease)
        (tmp_path / "copy").mkdir()
        path, write = tmp_path / "copy" / "metrics.jsonl", Objects.write

        def unheard(*args):
            write(*args)
            raise Unreachable("nobody answers")

        for work in (lease.confirm, copy.push):
            path.write_text("1\n")
            monkeypatch.setattr(Objects, "write", unheard)
            with pytest.raises(Unreachable):
                work()
            monkeypatch.setattr(Objects, "write", write)
            path.write_text("1\n2\n")
            work()
        assert Objects(folder).read("metrics.jsonl")[0] == b"1\n2\n"


def test_a_folder_of_checkpoints_in_a_bucket_is_no_checkpoint(monkeypatch, cached):
    """Only what ends with a step, or best, is one."""
    pulled = []
    monkeypatch.setattr(buckets, "check", str)
    monkeypatch.setattr(Copy, "pull", lambda self: pulled.append(self.url) or 1)
    for url in (
        "gs://b/checkpoints/run1",
        "gs://b/run/checkpoints/12",
        "gs://b/r/checkpoints/best",
    ):
        buckets.local(url)
    assert pulled == ["gs://b/checkpoints/run1", "gs://b/run", "gs://b/r"]


def test_a_sweep_by_slurm_needs_a_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)
    path = tmp_path / "sweep.py"
    path.write_text(f"config = {DIGITS!r}\ndef sweep():\n    yield {{'name': 'a'}}\n")
    for workdir, record in (("gs://b/sweep", None), (tmp_path, "record")):
        with pytest.raises(UserError, match=r"with a bucket, and only then, .* --record=DIR"):
            run_sweep(load_sweep(str(path)), workdir, Slurm(record=record))


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_sweep_by_slurm_in_a_bucket_has_its_logs_on_a_disk(store, tmp_path, monkeypatch):
    """Slurm is a program that only looks like it, and so is the training."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "fake").mkdir()
    for name in ("sbatch", "squeue", "scontrol", "scancel", "srun"):
        file = tmp_path / "bin" / name
        fake = (ROOT / "tests" / "launch" / "fake_slurm.py").read_text()
        file.write_text(f"#!{sys.executable} -IS\n{fake}")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "fake"))
    path, url, record = tmp_path / "sweep.py", f"{store}://runs/slurm", tmp_path / "record"
    path.write_text(f"config = {DIGITS!r}\ndef sweep():\n    yield {{'name': 'a'}}\n")

    def command(config, workdir, flags):
        code = f"from vit_jax.objects import Objects; o = Objects({workdir!r});"
        code += """o.replace("metrics.jsonl", b'{"step": 3}\\n'); print("it ran")"""
        return [sys.executable, "-c", code]

    launcher = Slurm(poll=0.1, record=str(record))
    (found,) = run_sweep(load_sweep(str(path)), url, launcher, command=command)
    assert (found.state, found.metrics) == ("finished", {"step": 3})
    assert "it ran" in (record / "a.log").read_text() and (record / "slurm" / "a.sh").exists()
    assert set(Objects(url).names()) >= {"sweep.json", "a/metrics.jsonl"}


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_sweep_in_a_bucket(store, tmp_path, cached, capsys):
    """Its record, logs and runs are there, and what is finished is not run again."""
    path, url, ran = tmp_path / "sweep.py", f"{store}://runs/sweep", []
    flags = (flag.removeprefix("--config.").split("=") for flag in TINY)
    point = {"name": "seed1", **{key: number(value) for key, value in flags}, "total_steps": 4}
    point |= {"data.val": None, "data.test": None}
    path.write_text(f"config = {DIGITS!r}\ndef sweep():\n    yield {point}\n")

    def command(config, workdir, flags):
        ran.append(workdir)
        run = ["train", f"--config={config}", f"--workdir={workdir}", *flags]
        return [sys.executable, "-m", "vit_jax", *run]

    for _ in range(2):
        found = run_sweep(load_sweep(str(path)), url, Local(jobs=1), command=command)
        assert [(result.state, result.metrics["step"]) for result in found] == [("finished", 4)]
    assert ran == [f"{url}/seed1"] * 2  # the command that was made, of which one was run
    assert "1 of 1 points are finished" in capsys.readouterr().out
    names = set(Objects(url).names())
    assert {"sweep.json", "seed1.log", "seed1/metrics.jsonl"} <= names
    assert len(Objects(f"{url}/seed1").read("starts.jsonl")[0].splitlines()) == 1
    assert main(["report", url]) == 0
    assert "| seed1 | finished |" in capsys.readouterr().out
