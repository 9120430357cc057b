"""The benchmarks beside timm: what is counted, what names mean, and that both scripts run."""

import dataclasses
import importlib
import itertools
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from conftest import BENCHMARKS, benchmarks
from flax import nnx
from processes import Command

from vit_jax.analysis.cost import flops_per_image
from vit_jax.models.create import structure
from vit_jax.models.variants import variant

names, contestants, workers, tables, flags, engine = benchmarks(
    "names", "contestants", "workers", "tables", "flags", "engine"
)

MU = variant("mu/16", image_size=(32, 32))


def test_flops_of_b16_are_those_written_out_by_hand():
    block = 2 * 197 * 768 * (4 * 768 + 2 * 3072) + 2 * 2 * 197**2 * 768
    by_hand = 2 * 196 * 768 * 768 + 12 * block + 2 * 768 * 1000
    assert flops_per_image(variant("B/16")) == by_hand
    assert by_hand == pytest.approx(35.1e9, rel=2e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pool": "map", "representation_size": 768, "image_size": (64, 64)},
        {"patch_size": (32, 16)},
        {"position": "relative"},
    ],
)
def test_flops_match_what_xla_counts(fields):
    # As a loop: XLA's analysis counts a scanned body once, however often it runs.
    config = variant("B/16", **{"depth": 2, "scan": False, **fields})
    graphdef, params = structure(config)
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)

    def loss(params, images):
        return nnx.merge(graphdef, params)(images).sum()

    def flops(function):
        return jax.jit(function).lower(params, images).cost_analysis()["flops"]

    assert flops_per_image(config) == pytest.approx(flops(loss), rel=0.01)
    training = 3 * flops_per_image(config)
    assert training == pytest.approx(flops(jax.value_and_grad(loss)), rel=0.03)


def test_names_of_contestants():
    ours = names.read_name("ours+loop+deterministic+remat:dots+xla:a_b=c+xla:--d=true", "train")
    assert ours.family == "ours" and ours.fields == {"scan": False, "remat": "dots"}
    assert ours.deterministic and ours.xla == {"a_b": "c", "d": True}
    plain = names.read_name("timm", "infer")
    assert (plain.family, plain.mode, plain.attention) == ("timm", None, None)
    compiled = names.read_name("timm-compile:max-autotune+cudnn", "train")
    assert (compiled.mode, compiled.attention) == ("max-autotune", "cudnn")
    assert names.read_name("timm-compile", "train").mode == "default"
    assert "GPU" in compiled.needless("cpu") and compiled.needless("gpu") is None
    assert "nothing on a cpu" in ours.needless("cpu") and ours.needless("gpu") is None
    assert plain.needless("tpu") and not plain.needless("cpu")


@pytest.mark.parametrize(
    ("task", "argv", "said"),
    [
        ("train", ["--contestants=ours,jimm"], "did you mean 'timm'?"),
        ("train", ["--contestants=ours+lop"], "did you mean 'loop'?"),
        ("infer", ["--contestants=ours+remat:dots"], "no contestant 'ours+remat:dots'"),
        ("train", ["--contestants=timm-compile:max-autotun"], "did you mean 'max-autotune'?"),
        ("train", ["--contestants=timm:default"], "no contestant"),
        ("train", ["--contestants=timm+scan"], "expected nothing, or one of +flash, +cudnn"),
        ("train", ["--contestants=ours+xla:xla_no_such_flag=1"], "xla_no_such_flag"),
        ("train", ["--contestants=ours+deterministic"], "no contestant is left"),
        ("train", ["--repeets=3"], "did you mean '--repeats'?"),
        ("train", ["--steps=many"], "--steps"),
        ("train", ["--batch-sizes=8,-1"], "positive whole numbers"),
        ("infer", ["--resolutions=64,"], "positive whole numbers"),
        ("infer", ["--masks"], "no flag --masks"),
        ("train", ["--masks", "--variants=R26x1"], "pool"),
        ("train", ["--variants=B/15"], "patches of 15x15"),
        ("train", ["--json=no/such/folder/out.json"], "no folder"),
        ("infer", ["--read=no_such.json"], "no such file"),
        ("infer", [f"--read={__file__}"], "no record of a benchmark"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(task, argv, said, capsys, monkeypatch):
    monkeypatch.setattr(workers, "in_child", lambda function, *args: function(*args))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as stopped:
        flags.parse(task, "About.\n", argv)
    told = capsys.readouterr()
    assert stopped.value.code == 2 and told.out == ""
    assert said in told.err and told.err.count("\n") == 1


def test_an_error_is_noted_and_told_in_the_table():
    result = {}
    with workers.noting(result):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nmore")
    assert result["error"] == "out of memory" and "9 bytes" in result["details"]
    other = {}
    with workers.noting(other):
        raise ValueError("a | b\nmore")
    assert other["error"] == "ValueError: a | b"
    case = _case("B/16", 8, {"ours": result, "timm": other})
    record = _record([case])
    rows = tables.rows(record, case)
    assert rows[0].startswith("| B/16 | 224x224 | 8 | ours | out of memory |")
    assert rows[1].startswith("| B/16 | 224x224 | 8 | timm | ValueError: a / b |")
    assert {row.count("|") for row in rows} == {tables.COLUMNS.count("|") + 2}
    assert any(line.endswith("nothing ran.") for line in tables.sentences(record))
    assert tables.summary(record)["geometric_mean"] is None


def _case(name, batch_size, results, ceiling=(100e12,), image=(224, 224)):
    results = {
        key: value if isinstance(value, dict) else {"seconds_per_step": value}
        for key, value in results.items()
    }
    case = {"variant": name, "image": list(image), "batch_size": batch_size, "results": results}
    return case | {"flops_per_image": 10**10, "ceiling_flops": list(ceiling), "ceiling_size": 8192}


def _record(cases, **fields):
    record = dict(task="train", passes=3, device="a GPU", device_kind="NVIDIA H200", date="today")
    record |= dict(dtype="bfloat16", versions={"jax": "1", "torch": None}, header="a GPU")
    return record | dict(cases=cases, largest=[]) | fields


def _two_models():
    """Ours: 1000 at batch 128 on B, 400 on L; timm's best: 800 by max-autotune at 64, 500."""
    return _record(
        [
            _case(
                "B/16", 64, {"ours": [0.08], "timm": [0.16], "timm-compile:max-autotune": [0.08]}
            ),
            _case(
                "B/16",
                128,
                {
                    "ours": [0.2, 0.128, 0.1],
                    "ours+scan": [0.256],
                    "timm": [0.256, 0.256, 0.25],
                    "timm-compile:max-autotune": {"error": "out of memory"},
                },
            ),
            _case("L/16", 64, {"ours": [0.16], "timm": [0.32], "timm-compile": [0.128]}),
        ]
    )


def test_best_of_and_geometric_mean_of_records_made_by_hand():
    told = tables.summary(_two_models())
    b, large = told["models"]["B/16 at 224x224"], told["models"]["L/16 at 224x224"]
    assert b["best"]["ours"] == {"images_per_second": 1000, "batch_size": 128}
    assert b["best"]["timm"] == {"images_per_second": 500, "batch_size": 128}
    assert b["best_timm"] == "timm-compile:max-autotune" and large["best_timm"] == "timm-compile"
    assert b["ours_by_best_timm"] == pytest.approx(1000 / 800)
    assert large["ours_by_best_timm"] == pytest.approx(400 / 500)
    assert told["geometric_mean"] == pytest.approx(math.sqrt(1.25 * 0.8))
    lines = tables.sentences(_two_models())
    assert "B/16 at 224x224: ours / best timm (timm-compile:max-autotune) 1.25." in lines
    assert lines[-1] == "ours / best timm, geometric mean over 2: 1.00."
    busy = {"ours": [0.2, 0.1], "timm": [0.3, 0.2]}
    busy = {name: {"seconds_per_step": s, "cpu_seconds_per_step": s} for name, s in busy.items()}
    record = _record([_case("B/16", 8, busy)], backend="cpu")
    line = "B/16 at 224x224, batch 8: ours / timm by processor time 1.75 (1.50-2.00)."
    assert line in tables.sentences(record)
    assert line not in tables.sentences(record | {"backend": "gpu"})


def test_the_row_of_a_contestant():
    record = _two_models()
    case = record["cases"][1]
    case["results"]["timm"] |= {"peak_bytes": 3 * 2**30, "cold_seconds": 41.26, "warm_seconds": 9}
    rows = tables.rows(record, case)
    # 500 images/s, 30 GFLOP each: 15 TFLOP/s of 100 and of 989.4; ratios are of rounds.
    assert rows[2] == (
        "| B/16 | 224x224 | 128 | timm | 500 (500-512) | 2.00 (1.28-2.50) | 15 | 15% | 2% | 3.00 | "
        "41.3 | 9.0 |"
    )
    assert rows[0].split(" | ")[5] == "" and "| 1000 (640-1280) |" in rows[0]


def test_peaks_of_data_sheets():
    kinds = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4, "NVIDIA L4": 121}
    for kind, peak in (kinds | {"NVIDIA A100-SXM4-40GB": 312}).items():
        assert tables.peak_flops({"device_kind": kind, "dtype": "bfloat16"}) == peak * 1e12
    assert tables.peak_flops({"device_kind": "NVIDIA H200", "dtype": "float32"}) is None
    assert tables.peak_flops({"device_kind": "NVIDIA H1000", "dtype": "bfloat16"}) is None
    unknown = _record([case := _case("B/16", 1, {"ours": [1.0]})], device_kind="cpu")
    assert tables.rows(unknown, case)[0].split(" | ")[8] == ""


@pytest.mark.parametrize("jump", [0, 1000])
def test_the_largest_batch_is_found_with_few_questions(jump):
    for base, each, limit in itertools.product((0, 500), (1, 7, 130), (3, 600, 5000, 10**6)):
        asked = []

        def needs(size, base=base, each=each, asked=asked):
            asked.append(size)
            return base + each * size + jump * (size >= 64)  # not quite a straight line

        found, size = workers.largest_fitting(needs, limit)
        fitting = [2**i for i in range(21) if base + each * 2**i + jump * (2**i >= 64) <= limit]
        assert found == max(fitting, default=0)
        assert (size is None) if not found else size <= limit
        assert len(asked) == len(set(asked)) <= 9


def test_the_largest_batch_of_a_program(monkeypatch):
    monkeypatch.setattr(workers, "use_caches", lambda folder: None)  # tests have their own
    found = workers.largest_batch("infer", "ours", MU, 0.004, "nowhere")
    assert "error" not in found, found
    limit, size = int(0.004 * 2**30), found["batch_size"]
    assert found["limit_bytes"] == limit and size >= 1 and size & (size - 1) == 0
    ours = names.read_name("ours", "infer")

    def needs(size):
        _, shapes, program, _ = contestants.our_program("infer", ours, MU, size)
        return contestants.program_bytes(program.lower(*shapes).compile())

    assert found["bytes"] == needs(size) <= limit < needs(2 * size)
    # Images and parameters are among it.
    params = sum(leaf.size for leaf in jax.tree.leaves(structure(MU)[1]))
    assert needs(size) >= size * 32 * 32 * 3 + 4 * params


class FakeWorkers:
    """Answers as worker processes would; remembers who was asked for what."""

    log, limit, failing = (), 0, ()

    def __enter__(self):
        type(self).log += ("process",)
        return self

    def __exit__(self, *_):
        pass

    def noted(self, family, function, *args):
        what = function.__name__
        if what == "ceiling":
            return {"size": 1024, "flops": 1e12}
        if what == "turn":
            type(self).log += (args[0],)
            broken = args[0] == "timm" and self.log.count("timm") in self.failing
            return {"error": "out of memory"} if broken else {"seconds": 0.5, "value": 1.0}
        if what == "largest_batch":
            return {"batch_size": 64, "bytes": 9, "limit_bytes": 10}
        if self.limit and args[3] > self.limit:
            return {"error": "out of memory"}
        type(self).log += (f"start {family}",)
        return {"first_step_seconds": len(self.log), "parameters": 7 + (args[1] == "ours+loop")}


def _args(names_):
    machine = {"backend": "gpu"}
    known = dict(names=names_, machine=machine, steps=2, repeats=3, memory_gib=1)
    return type("Args", (), known)


@pytest.mark.parametrize("again", [True, False])
def test_contestants_take_turns_until_they_fail(again, monkeypatch):
    failing = (2, 3) if again else (2,)
    monkeypatch.setattr(workers, "Workers", type("Fake", (FakeWorkers,), {"failing": failing}))
    args = _args(["ours", "ours+scan", "timm"])
    case = engine.measure("train", MU, 2, args, Path("caches"), compiling=True)
    log = workers.Workers.log
    # Cold and warm, each in a process of its own; then all in those that measure.
    assert log[:4] == ("process", "start ours") * 2 and log[12] == "process"
    results = case["results"]
    assert results["ours"]["cold_seconds"] == 2 and results["ours"]["warm_seconds"] == 4
    turns = ("ours", "ours+scan", "timm", "ours+scan", "timm", "ours", "ours", "ours+scan")
    assert log[16:24] == turns
    # Out of memory in the second round: then alone, once more in vain or three rounds long.
    assert log[24:26] == ("process", "start timm") and set(log[26:]) == {"timm"}
    assert results["ours"]["seconds_per_step"] == [0.5] * 3
    assert results["timm"]["seconds_per_step"] == [0.5] * (0 if again else 3)
    assert results["timm"].get("error") == ("out of memory" if again else None)
    assert results["timm"]["alone"] and "alone" not in results["ours"]
    assert results["timm"]["warm_seconds"] > results["timm"]["cold_seconds"]
    assert case["ceiling_flops"] == [1e12] * 6 and case["ceiling_size"] == 1024
    whole = case | {"variant": "mu/16", "image": [32, 32], "batch_size": 2, "flops_per_image": 1}
    assert "| timm (alone) |" in tables.rows(_record([whole]), whole)[2]


def test_contestants_of_different_models_are_not_compared(monkeypatch):
    monkeypatch.setattr(workers, "Workers", type("Fake", (FakeWorkers,), {}))
    with pytest.raises(AssertionError, match=r"not the same model: \[7, 8\]"):
        engine.measure("train", MU, 2, _args(["ours", "ours+loop"]), Path("caches"), False)


def test_losses_of_the_same_weights_are_compared_but_for_rounding():
    engine.check_losses([5.0, 5.0004], MU)
    for losses in ([5.0, 5.001], [5.0, math.nan]):
        with pytest.raises(AssertionError, match="not the same loss"):
            engine.check_losses(losses, MU)
    engine.check_losses([5.0, 5.001], dataclasses.replace(MU, dtype="bfloat16"))


def test_ours_learns_masks_and_the_loss_is_of_the_pixels_that_count():
    config = variant("mu/16", image_size=(32, 32), **contestants.MASKS)
    ours = contestants.Ours("train", names.read_name("ours", "train"), config, 2)
    batch = contestants.random_batch(config, 2)
    model = nnx.merge(structure(config)[0], contestants.shared_weights(config))
    logits = np.float64(jax.jit(model)(np.float32(batch["image"] / 127.5 - 1)))
    # Pixels 8 to 23 of a side are between the centres of the two patches, at odd 32nds.
    weights = np.clip((np.arange(32) - 7.5) / 16, 0, 1)
    weights = np.stack([1 - weights, weights], axis=1)
    pixels = np.einsum("hg,wf,bgfk->bhwk", weights, weights, logits)
    pixels -= np.log(np.exp(pixels).sum(-1, keepdims=True))
    counts = batch["label"] != 255
    wanted = -np.take_along_axis(pixels, np.where(counts, batch["label"], 0)[..., None], -1)
    ours.compile()
    assert 0.05 < 1 - counts.mean() < 0.15
    assert ours.run(1) == pytest.approx(wanted[..., 0][counts].mean(), rel=1e-5)


def test_the_largest_batch_is_run_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(workers, "Workers", type("Fake", (FakeWorkers,), {"limit": 20}))
    found = engine.search_largest("train", "ours", MU, _args(["ours"]), Path("caches"))
    assert found == {"batch_size": 16, "bytes": None, "limit_bytes": 10, "ran": True}
    found |= {"variant": "mu/16", "image": [32, 32], "contestant": "ours"}
    assert tables.largest_row(found) == "| mu/16 | 32x32 | ours | 16 |  | 0.00 | yes |"
    failed = {"error": "out | of luck", **{key: found[key] for key in found if key != "ran"}}
    row = tables.largest_row(failed)
    assert row.count("|") == tables.LARGEST_COLUMNS.count("|") + 2 and "out / of luck" in row


def test_the_forward_pass_is_the_models_on_normalised_images():
    config = variant("mu/16", image_size=(32, 32), num_classes=0)  # a fresh head gives zeros
    batch = contestants.random_batch(MU, 2)
    ours = names.read_name("ours+loop", "infer")
    _, shapes, program, make = contestants.our_program("infer", ours, config, 2)
    assert shapes[1]["image"].dtype == jnp.uint8 and set(shapes[1]) == {"image"}
    params = make()
    model = nnx.merge(structure(config)[0], params)
    expected = jax.jit(model)(np.float32(batch["image"] / 127.5 - 1))
    np.testing.assert_allclose(
        program(params, {"image": batch["image"]}), expected, rtol=1e-4, atol=1e-5
    )


def test_xla_options_reach_the_compiler():
    name = "ours+xla:xla_no_such_flag=1"
    assert (
        "xla_no_such_flag" in workers.describe({name: {"xla_no_such_flag": "1"}})["refused"][name]
    )
    known = names.read_name("ours+xla:xla_cpu_enable_fast_math=true", "train").xla
    assert not workers.describe({"fast": known, "slow": {"xla_backend_optimization_level": "0"}})[
        "refused"
    ]
    unknown = contestants.Ours("train", names.read_name(name, "train"), MU, 2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_flag"):
        unknown.compile()


def test_pictures_are_drawn_from_an_earlier_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for number, record in enumerate(
        (
            _two_models(),
            _record(
                [
                    _case("B/16", 8, {"ours": [s / 10], "timm": [s / 8]}, image=(s, s))
                    for s in (64, 128, 224)
                ],
                largest=[
                    {"variant": "B/16", "image": [s, s], "contestant": "ours", "batch_size": b}
                    | {"bytes": 9, "limit_bytes": 10}
                    for s, b in ((64, 512), (128, 128))
                ],
            ),
            _record([_case("B/16", 8, {"ours": {"error": "out of memory"}}, ceiling=())]),
        )
    ):
        saved, picture = tmp_path / f"{number}.json", tmp_path / f"{number}.png"
        saved.write_text(json.dumps(record))
        engine.main("train", "About.\n", [f"--read={saved}", f"--picture={picture}"])
        pixels = np.asarray(PIL.Image.open(picture).convert("RGB")).reshape(-1, 3)
        blue = (pixels[:, 2] > 140) & (pixels[:, 0] < 80)  # what ours is drawn in
        assert blue.any() == (number < 2)
        told = capsys.readouterr().out
        assert all(row in told for case in record["cases"] for row in tables.rows(record, case))
        assert ("largest batch" in told) == bool(record["largest"])


SCRIPT = """
import multiprocessing, os, sys
sys.path[:0] = [BENCHMARKS]
os.environ["PYTHONPATH"] += os.pathsep + BENCHMARKS
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["workers"])
multiprocessing.get_context = lambda kind: forks  # processes that start sooner than spawned ones
import engine
engine.main(sys.argv[1], "About.", sys.argv[2:])
"""


def run_script(task, folder, *flags):
    sizes = "--variants=mu/16 --batch-sizes=2 --steps=1 --repeats=2 --json=out.json".split()
    text = SCRIPT.replace("BENCHMARKS", repr(str(BENCHMARKS)))
    env = dict(devices=1, cwd=folder, GLIBC_TUNABLES="")
    told, _ = Command(folder, [task, *sizes, *flags], text=text, **env).finish()
    return told, json.loads((folder / "out.json").read_text())


def test_training_runs_and_writes_json(tmp_path):
    asked = "--contestants=ours,ours+remat:dots,ours+deterministic"
    out, record = run_script("train", tmp_path, "--image-size=32", asked, "--hugepages")
    assert "| mu/16 | 32x32 | 2 | ours |" in out
    assert "ours+deterministic is left out: deterministic=True changes nothing on a cpu." in out
    assert "huge pages: GLIBC_TUNABLES=glibc.malloc.hugetlb=1." in out
    assert record["environment"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert record["versions"]["jax"] == jax.__version__
    assert (record["task"], record["passes"], record["dtype"]) == ("train", 3, "float32")
    (case,) = record["cases"]
    assert case["flops_per_image"] == flops_per_image(MU) and case["image"] == [32, 32]
    assert list(case["results"]) == ["ours", "ours+remat:dots"]
    assert len(case["ceiling_flops"]) == 2 and case["ceiling_size"] == 1024
    params = sum(leaf.size for leaf in jax.tree.leaves(structure(MU)[1]))
    for result in case["results"].values():
        assert len(result["seconds_per_step"]) == 2 and min(result["seconds_per_step"]) > 0
        assert result["parameters"] == params and result["peak_bytes"] > 12 * params
        assert result["value"] < math.log(1000)  # the loss of a fresh head; four steps were taken
    best = record["summary"]["models"]["mu/16 at 32x32"]
    assert best["best"]["ours"]["batch_size"] == 2 and best["best_timm"] is None


def test_inference_runs_over_resolutions(tmp_path):
    asked = ["--contestants=ours,timm", "--resolutions=32", "--memory-gib=0.004"]
    out, record = run_script("infer", tmp_path, *asked)
    case = record["cases"][0]
    assert record["passes"] == 1 and "ours" in case["results"]
    assert ("timm is left out" in out) == (importlib.util.find_spec("timm") is None)
    (found,) = record["largest"]
    assert found["contestant"] == "ours" and found["bytes"] <= found["limit_bytes"]
    assert found["limit_bytes"] == int(0.004 * 2**30) and found["batch_size"] >= 1
    assert f"| mu/16 | 32x32 | ours | {found['batch_size']} |" in out
