"""The GPU day: its order and its budget, what a kill leaves, kernels of a trace, tables."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from conftest import BENCHMARKS, ROOT, benchmarks
from processes import Command

budget, kernels, one_gpu = benchmarks("budget", "kernels", "one_gpu")

# Jobs that measure nothing. Those that would not end note who is to be gone.
FAKES = """
import os, subprocess, sys, time

RECORD = dict(backend="gpu", device="a GPU", device_kind="NVIDIA H200", dtype="bfloat16")
RECORD |= dict(date="today", versions={"jax": "1"}, header="a GPU, today")

def environment(day):
    yield {"table": "environment", "record": RECORD}

def count(numbers, seconds=0.0):
    for number in numbers:
        yield {"table": "fake", "number": number, "much": "x" * 20_000}
        time.sleep(seconds)

def broken():
    yield {"table": "fake", "number": 1}
    raise ValueError("a | b\\nmore")

def crash():
    yield {"table": "fake", "number": 2}
    os._exit(3)

def hang(path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    with open(path, "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    yield {"table": "fake", "number": 3}
    time.sleep(100)
"""
DRIVER = """
import multiprocessing, sys
sys.path[:0] = [BENCHMARKS, HERE]
import budget, fakes, one_gpu
one_gpu.environment = fakes.environment
budget.LEAST = 4  # what hangs is killed soon, so that no machine is too slow for the rest
forks = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda kind: forks  # processes that start sooner than spawned ones
one_gpu.jobs_of = lambda day, kinds: [JOBS]
one_gpu.main(sys.argv[1:])
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    (tmp_path / "fakes.py").write_text(FAKES)
    for folder in (BENCHMARKS, tmp_path):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "fakes", raising=False)
    return importlib.import_module("fakes")


def gone(pid):
    """Whether a process has ended; one that no one waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def all_gone(pids, seconds=5):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all(map(gone, pids)):
        time.sleep(0.05)
    return all(map(gone, pids))


def test_jobs_run_in_order_and_an_error_is_a_row(fakes, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    jobs = [
        budget.Job("first", 0, fakes.count, ([0],)),
        budget.Job("too long", 100, fakes.count, ([9],)),
        budget.Job("broken", 0, fakes.broken),
        budget.Job("crash", 0, fakes.crash),
        budget.Job("last", 0, fakes.count, ([4, 5],)),
    ]
    failed = budget.run(jobs, rows, time.monotonic() + 50)
    found = budget.read(rows)
    assert [row["number"] for row in found if "number" in row] == [0, 1, 2, 4, 5]
    assert failed == {
        "too long": failed["too long"],
        "broken": "ValueError: a | b",
        "crash": "its process ended with exit code 3",
    }
    assert "it needs about 100 s, and " in failed["too long"]
    assert {row["job"]: row["skipped"] for row in found if "skipped" in row} == {
        "too long": failed["too long"]
    }
    assert {row["job"]: row["error"] for row in found if "error" in row} == {
        name: failed[name] for name in ("broken", "crash")
    }
    (error,) = [row for row in found if row["job"] == "broken" and "error" in row]
    assert "more" in error["details"] and error["job_seconds"] >= 0
    told = capsys.readouterr().out
    assert "broken: ValueError: a | b" in told and "too long: it needs" in told


@pytest.mark.parametrize("hopeless", [True, False])
def test_what_hangs_is_killed_with_its_children(hopeless, fakes, tmp_path, monkeypatch):
    # By the end of the time, or, if that is far away, when the job takes far longer than it should.
    monkeypatch.setattr(budget, "LEAST", 60 if hopeless else 4)
    rows, pids = tmp_path / "rows.jsonl", tmp_path / "pids"
    jobs = [
        budget.Job("hang", 0.1, fakes.hang, (pids,)),
        budget.Job("after", 10, fakes.count, ([4],)),
    ]
    began = time.monotonic()
    failed = budget.run(jobs, rows, began + (4 if hopeless else 60))
    assert time.monotonic() - began < 30
    assert failed["hang"] == "stopped after 4 s" and ("after" in failed) == hopeless
    assert [row.get("number") for row in budget.read(rows)] == [3, None, None if hopeless else 4]
    assert all_gone(pids.read_text().split())


def start(tmp_path, jobs, *argv):
    """The program itself, with other jobs."""
    (tmp_path / "fakes.py").write_text(FAKES)
    text = DRIVER.replace("BENCHMARKS", repr(str(BENCHMARKS))).replace("HERE", repr(str(tmp_path)))
    (tmp_path / "told").mkdir()
    argv = [f"--out={tmp_path}", *argv]
    env = dict(cwd=tmp_path, TMPDIR=str(tmp_path))
    return Command(tmp_path / "told", argv, text=text.replace("JOBS", jobs), **env)


@pytest.mark.parametrize("count", [17, 42])  # amid rows; amid a job that hangs
def test_a_kill_at_any_moment_leaves_whole_rows_and_no_process(count, tmp_path):
    rows, pids = tmp_path / "rows.jsonl", tmp_path / "pids"
    jobs = "budget.Job('count', 20, fakes.count, (range(40), 0.01)), "
    jobs += f"budget.Job('hang', 0, fakes.hang, ({str(pids)!r},))"
    process = start(tmp_path, jobs, "--seconds=60")
    end = time.monotonic() + 60
    while time.monotonic() < end and len(budget.read(rows)) < count:  # all that is there parses
        time.sleep(0.02)
    process.kill()
    time.sleep(1)  # what was started ends by itself
    text = rows.read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert text.endswith("\n") and "record" in found[0] and len(found) >= count
    assert [row["number"] for row in found[1:]] == [*range(40), 3][: len(found) - 1]
    assert not pids.exists() or all_gone(pids.read_text().split())
    assert text == rows.read_text()


def test_the_day_goes_on_whatever_hangs(tmp_path):
    pids = tmp_path / "pids"
    jobs = "budget.Job('count', 20, fakes.count, (range(2),)), "
    jobs += f"budget.Job('hang', 0, fakes.hang, ({str(pids)!r},)), "
    jobs += "budget.Job('later', 1000, fakes.count, (range(2),))"
    process = start(tmp_path, jobs, "--seconds=100")
    told, _ = process.finish()
    assert "a GPU, today" in told and "- hang: stopped after 4 s" in told
    assert "- later: it needs about 1000 s, and " in told
    assert all_gone(pids.read_text().split())


def _day(tmp_path, tiny=False, backend="gpu"):
    record = {"backend": backend, "dtype": "bfloat16" if backend == "gpu" else "float32"}
    return one_gpu.Day(tmp_path, tmp_path, 1e9, tiny, record)


@pytest.mark.parametrize("timm", [True, False])
def test_the_plan(timm, tmp_path, monkeypatch):
    monkeypatch.setattr(one_gpu.importlib.util, "find_spec", lambda name: timm)
    monkeypatch.setattr(one_gpu, "OPTIONS", {"gpu": {"xla_a": False, "xla_b": True, "xla_c": "x"}})
    plan = [job.name for job in one_gpu.jobs_of(_day(tmp_path), list(one_gpu.KINDS))]
    kinds = [name.partition(":")[0] for name in plan]
    assert list(dict.fromkeys(kinds)) == list(one_gpu.KINDS)
    first = "train: B/16 at 224, 256 images: ours"
    assert plan[3] == (f"{first}, timm-compile" if timm else first)
    assert (f"{first}, timm-compile:max-autotune+cudnn" in plan) == timm
    assert kinds.count("train") == (6 if timm else 5)  # without timm two are the same
    assert [name.rpartition(" ")[2] for name in plan if name.startswith("options")] == [
        "ours+scan",
        "ours+xla:xla_a=true",
        "ours+xla:xla_b=false",
        "ours+deterministic",
        "ours+loop",
    ]
    some = one_gpu.jobs_of(_day(tmp_path), ["infer"])
    assert [job.name.partition(":")[0] for job in some] == ["infer"]
    # The real table's options are known to the names.
    monkeypatch.undo()
    assert any("xla_gpu" in job.name for job in one_gpu.jobs_of(_day(tmp_path), ["options"]))


def test_the_tiny_plan_leaves_out_what_a_cpu_has_not(tmp_path):
    plan = one_gpu.jobs_of(_day(tmp_path, tiny=True, backend="cpu"), list(one_gpu.KINDS))
    names = [job.name for job in plan]
    assert len(names) == len(set(names)) < 10 and sum(job.estimate for job in plan) < 40
    assert not any("timm-compile" in name or "deterministic" in name for name in names)
    assert all("mu/16 at 32" in name for name in names[:-1])


def test_parity_with_numpy(tmp_path):
    rows = list(one_gpu.parity(_day(tmp_path, backend="cpu"), one_gpu.TINY))
    exact, rough = (row["difference"] / row["spread"] for row in rows)
    assert exact < 2e-5 and 1e-4 < rough < 0.1
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    assert rows[0]["attention"] == "xla" and rows[0]["spread"] > 0.05


def _kernel(name, part, seconds, arrays="a -> b", times=1, direction="forward"):
    known = dict(name=name, part=part, arrays=arrays, times=times, direction=direction)
    return SimpleNamespace(**known, seconds=lambda chip: chip * seconds)


def _event(tid, name, microseconds, pid=1, **args):
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "dur": microseconds, "args": args}


EVENTS = [
    {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
    {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
    {"ph": "M", "pid": 1, "tid": 7, "name": "thread_name", "args": {"name": "Stream #7(Compute)"}},
    {"ph": "M", "pid": 1, "tid": 8, "name": "thread_name", "args": {"name": "Stream #8(Memcpy)"}},
    {"ph": "M", "pid": 1, "tid": 9, "name": "thread_name", "args": {"name": "XLA Ops"}},
    {"ph": "M", "pid": 2, "tid": 7, "name": "thread_name", "args": {"name": "Stream of words"}},
    _event(7, "nvjet_hsh_128", 30.0, hlo_op="cublas-gemm.1", hlo_module="jit_step"),
    _event(7, "nvjet_hsh_128", 32.0, hlo_op="cublas-gemm.1", hlo_module="jit_step"),
    _event(7, "nvjet_hsh_64", 20.0, hlo_op="cublas-gemm.2"),
    _event(7, "loop_add_fusion_3", 5.0),  # XLA's own kernel has its instruction's name
    _event(8, "MemcpyD2D", 2.0),
    _event(9, "cublas-gemm.1", 62.0, hlo_op="cublas-gemm.1"),  # the same once more, added up
    _event(7, "cublas-gemm.1", 99.0, pid=2, hlo_op="cublas-gemm.1"),  # the host's
    {"ph": "X", "pid": 3, "tid": 1, "name": "of no one", "dur": 1},
    {},
]


def test_kernels_of_a_trace_beside_the_roofline():
    seconds = kernels.kernel_seconds(EVENTS)
    assert seconds == pytest.approx(
        {"cublas-gemm.1": 62e-6, "cublas-gemm.2": 2e-5, "loop_add_fusion_3": 5e-6}
        | {"MemcpyD2D": 2e-6}
    )
    program = [
        _kernel("loop_add_fusion.3", "norms", 4e-6),
        _kernel("cublas-gemm.1", "MLP", 50e-6, times=2),
        _kernel("cublas-gemm.2", "MLP", 10e-6),
        _kernel("copy.9", "QKV", 1e-6, arrays="c -> d"),
    ]
    told = kernels.beside(program, seconds, 1.0)
    assert [row["part"] for row in told["parts"]] == ["MLP", "norms", kernels.OTHER, "QKV"]
    mlp, norms, other, qkv = told["parts"]
    assert mlp["launches"] == 3 and mlp["predicted"] == pytest.approx(60e-6)
    assert mlp["measured"] == pytest.approx(82e-6) and norms["measured"] == pytest.approx(5e-6)
    assert other["measured"] == pytest.approx(2e-6) and told["others"].keys() == {"MemcpyD2D"}
    assert qkv["measured"] == 0 and qkv["predicted"] == pytest.approx(1e-6)
    dear = told["dearest"][0]  # both products: they are alike
    assert (dear["part"], dear["arrays"], dear["launches"]) == ("MLP", "a -> b", 3)
    assert dear["measured"] == pytest.approx(82e-6) and len(told["dearest"]) == 3
    json.dumps(told)


def test_kernels_without_a_profile_or_a_known_chip():
    program = [_kernel("a", "MLP", 1e-6), _kernel("b", "norms", 3e-6)]
    predicted = kernels.beside(program, {}, 1.0)
    assert [row["part"] for row in predicted["dearest"]] == ["norms", "MLP"]
    assert all(row["measured"] is None for row in predicted["parts"])
    unknown = kernels.beside(program, {}, None)
    assert unknown["dearest"] == [] and unknown["parts"][0]["predicted"] is None


def _case(batch_size, side=224, **seconds):
    results = {name.replace("_", "-"): {"seconds_per_step": s} for name, s in seconds.items()}
    case = {"variant": "B/16", "image": [side] * 2, "batch_size": batch_size, "results": results}
    return case | {"flops_per_image": 10**10, "ceiling_flops": [1e14], "ceiling_size": 8192}


def _rows():
    record = dict(backend="gpu", device="a GPU", device_kind="NVIDIA H200", dtype="bfloat16")
    record |= dict(date="today", versions={"jax": "1"}, header="a GPU, today", task="train")
    model = {"variant": "B/16", "image": [224, 224], "batch_size": 128}
    both = {"launches": 7, "predicted": 0.05, "measured": 0.1}
    parts = {"parts": [{"part": "MLP", **both}, {"part": kernels.OTHER, "measured": 0.01}]}
    dear = {"part": "MLP", "direction": "back", "arrays": "a -> b", "name": "gemm", **both}
    return [
        {"job": "environment", "table": "environment", "record": record},
        {"job": "p", "table": "parity", **model, "dtype": "float32", "attention": "xla"}
        | {"difference": 3e-6, "spread": 0.5},
        {"job": "m", "table": "memory", **model, "attention": "cudnn", "loss": 6.9077}
        | {"first_step_seconds": 31.26, "peak_bytes": 2**31, "process_peak_bytes": None},
        {"job": "t", "table": "train", "case": _case(128, ours=[0.128], timm_compile=[0.16])},
        {"job": "u", "table": "train", "case": _case(128, ours=[0.256], ours_scan=[0.512])},
        {"job": "t", "table": "train", "case": _case(64, 384, ours=[0.1])},
        {"job": "i", "table": "infer", "case": _case(256, ours=[0.064])},
        {"job": "r", "table": "roofline", **model, **both},
        {"job": "r", "table": "kernels", **model, "note": "no GPU", "dearest": [dear], **parts},
        {"job": "x", "table": "tests", "files": [], "exit_code": None}
        | {"ends": dict(PASSED=5, FAILED=1, ERROR=0, SKIPPED=2)},
        {"job": "train: L/16", "skipped": "it needs about 200 s, and 9 s are left"},
        {"job": "train: S/16", "error": "ValueError: no"},
    ]


def _written(tmp_path, rows):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_an_earlier_day_is_told_and_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder, picture = _written(tmp_path, _rows()), tmp_path / "train.png"
    one_gpu.main([f"--read={folder}", f"--picture={picture}"])
    told = capsys.readouterr().out
    for line in (
        "a GPU, today",
        "| B/16 | 224x224 | 128 | ours | 1000 (1000-1000) |  | 30 | 30% | 3% |  |  |  |",
        "| B/16 | 224x224 | 128 | timm-compile | 800 (800-800) | 1.25 (1.25-1.25) |",
        "| B/16 | 224x224 | 128 | ours-scan | 250 (250-250) | 2.00 (2.00-2.00) |",
        "B/16 at 224x224: ours / best timm (timm-compile) 1.25.",
        "| B/16 | 224x224 | 256 | ours | 4000 (4000-4000) |  | 40 | 40% |",
        "| B/16 | 224x224 | 128 | 7 | 50.00 | 100.00 | 50% |",
        "| B/16 | 224x224 | 128 | cudnn | 31.3 | 6.908 | 2.00 |  |",
        "| B/16 | 224x224 | float32 | xla | 3e-06 | 0.5 | 6e-06 |",
        "| 5 | 1 | 0 | 2 | the time was over |",
        "| MLP | 7 | 50.00 | 100.00 | 50% |",
        f"| {kernels.OTHER} |  |  | 10.00 |  |",
        "| MLP, back | a -> b | 7 | 50000 | 100000 | 50% |",
        "no GPU.",
        "- train: L/16: it needs about 200 s, and 9 s are left",
        "- train: S/16: ValueError: no",
    ):
        assert line in told
    lines = told.splitlines()
    for number, line in enumerate(lines):  # all rows of a table are as wide as its header
        if line.startswith("| ") and lines[number + 1].startswith("|"):
            assert line.count("|") == lines[number + 1].count("|")
    pixels = np.asarray(PIL.Image.open(picture).convert("RGB")).reshape(-1, 3)
    assert ((pixels[:, 2] > 140) & (pixels[:, 0] < 80)).any()  # ours


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--out=DIR"),
        (["--out=a", "--read=b"], "--out=DIR"),
        (["--out=new", "--seconds=3"], "too few"),
        (["--out=new", "--seconds=nan"], "too few"),
        (["--out=new", "--seconds=many"], "--seconds"),
        (["--out=new", "--only=trian"], "did you mean 'train'?"),
        (["--out=used"], "another folder"),
        (["--out=file/below"], "name a folder to write to"),
        (["--out=/proc/no"], "name a folder to write to"),
        (["--read=empty"], "no rows of a day"),
        (["--read=none"], "no rows of a day"),
        (["--read=torn"], "no rows of a day"),
        (["--read=bare", "--picture=a.png"], "nothing of training"),
        (["--read=used", "--picture=no/such/a.png"], "a folder that exists"),
        (["--out=new", "--picture=a.png"], "goes with --read"),
        (["--ouy=new"], "did you mean '--out'?"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(argv, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("matplotlib")
    _written(tmp_path / "used", _rows())
    _written(tmp_path / "bare", _rows()[:1])
    _written(tmp_path / "empty", [])
    Path("torn").mkdir()
    Path("torn", "rows.jsonl").write_text('{"record": ')
    Path("file").touch()
    with pytest.raises(SystemExit) as stopped:
        one_gpu.main(argv)
    told = capsys.readouterr()
    assert stopped.value.code == 2 and told.out == ""
    assert said in told.err and told.err.count("\n") == 1
    assert not (tmp_path / "new" / "rows.jsonl").exists()


@pytest.mark.slow
def test_a_tiny_day(tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "one_gpu.py", "--tiny", "--seconds=60", f"--out={tmp_path}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and time.monotonic() - began < 62, done.stderr
    rows = budget.read(tmp_path / "rows.jsonl")
    assert all("table" in row for row in rows), rows
    assert {row["table"] for row in rows} == {
        "environment", "parity", "memory", "train", "infer", "roofline", "kernels", "tests"
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {
        "rows.jsonl", "tests.txt", "hlo.txt.gz", "trace.json.gz"
    }  # fmt: skip
    assert "## Training" in done.stdout and "## Parity" in done.stdout
    (kernels_row,) = [row for row in rows if row["table"] == "kernels"]
    assert kernels_row["note"] == "the profile has no kernels of a GPU"
