"""The benchmarks of the input pipeline and of the whole training program run, and what they say."""

import json

import pytest
from conftest import BENCHMARKS
from processes import Command


def benchmark(folder, flags, code=0, program="import loop; loop.main(sys.argv[1:])"):
    """Runs one in a process of its own, whose caches it sets; returns what it says."""
    text = f"import sys; sys.path[:0] = [{str(BENCHMARKS)!r}]; {program}"
    return Command(folder, flags, text=text, devices=1, cwd=folder).finish(code)


def test_the_input_benchmark_runs(tmp_path):
    flags = ["--images=20", "--rounds=1", "--contestants", "tf.data, files", "ours, files"]
    told, _ = benchmark(tmp_path, flags, program="import input; input.main()")
    assert "| tf.data, files | " in told and "needs --tf-python" in told
    assert "| ours, files | " in told and "Resident memory" in told


def test_the_benchmark_of_the_whole_program_runs(tmp_path):
    flags = ["--variant=mu/16", "--image-size=32", "--batch-size=8", "--log-every=2", "--steps=4"]
    flags += ["--images=20", "--rounds=1", "--threads=1", "--json=out.json"]
    told, _ = benchmark(tmp_path, flags)
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["backend"] == "cpu" and record["versions"]["jax"] and record["argv"] == flags
    settings = {"variant": "mu/16", "batch_size": 8, "dtype": "float32", "warmup": 2, "steps": 4}
    assert settings.items() <= record["settings"].items()
    assert 5e4 < record["bytes_per_image"] < 2e5  # photographs' size

    [found] = record["rounds"]
    runs = ("train", "train, every step logged")
    speed = {name: found[name]["images_per_second"] for name in ("step", "reader", *runs)}
    assert min(speed.values()) > 0
    assert all(0 <= found[name]["input_wait_fraction"] <= 1 for name in runs)
    # The two parts share a CPU's cores: an image takes as long as both together.
    limit = speed["step"] * speed["reader"] / (speed["step"] + speed["reader"])
    assert found["limit"] == pytest.approx(limit)
    assert record["ratios"] == {
        "train / limit": [pytest.approx(speed["train"] / limit)],
        "train / step": [pytest.approx(speed["train"] / speed["step"])],
        "every step logged / train": [pytest.approx(speed[runs[1]] / speed["train"])],
    }
    assert record["medians"] == {name: values[0] for name, values in record["ratios"].items()}
    for line in ("| step | ", "| reader | ", "| train | ", "| train, every step logged | "):
        assert line in told
    assert "train / limit: " in told and "target 0.97" in told


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps=15", "--log-every=10"], "--steps 15 is no multiple of --log-every 10"),
        (["--variant=Q/16"], "no variant 'Q'"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, message, tmp_path):
    _, err = benchmark(tmp_path, flags, 2)
    assert message in err and "Traceback" not in err
