"""The notebooks run from the first cell to the last, on weights made on the spot."""

import dataclasses
import json
import pathlib
import shutil

import jax
import matplotlib
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx
from pages import check_command
from tiny_models import as_float32, random_params

import vit_jax
from vit_jax.launch import launchers
from vit_jax.launch.run import read_results
from vit_jax.models.create import structure
from vit_jax.models.variants import variant

matplotlib.use("Agg")
NOTEBOOKS = ROOT / "experiments" / "notebooks"
NOTEBOOK = NOTEBOOKS / "load_and_look.ipynb"
SWEEP = NOTEBOOKS / "train_and_compare.ipynb"


def cells(path):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


@pytest.fixture
def photos_model(tmp_path):
    """A random model of 1,000 classes and RGB pictures, saved under timm's names."""
    config = variant("mu/16", image_size=32, depth=2)
    model = nnx.merge(structure(config)[0], as_float32(random_params(config)))
    vit_jax.save(model, tmp_path / "photos.safetensors", format="timm")
    return tmp_path / "photos.safetensors"


def test_load_and_look(tiny_run, photos_model, monkeypatch, tmp_path, capsys):
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    for path in (tiny_run[0], photos_model):
        monkeypatch.setenv("VIT", str(path))
        plt.close("all")
        names = {}
        for number, source in enumerate(cells(NOTEBOOK)):
            exec(compile(source, f"cell {number} of {NOTEBOOK.name}", "exec"), names)
        assert names["same"] and names["back"].labels == names["vit"].labels
        assert names["larger"].config.grid == tuple(2 * side for side in names["vit"].config.grid)
        titles = [axis.get_title() for axis in plt.figure(1).axes]
        assert len(titles) == len(names["pictures"]) and all("%" in title for title in titles)
        assert "resized" in capsys.readouterr().out


def fake_local(run):
    """A launcher that trains nothing: each command gets a copy of `run`, worse than the next's."""

    @dataclasses.dataclass(frozen=True)
    class Fake(launchers.Local):
        def run(self, jobs):
            for number, job in enumerate(jobs, 1):
                yield launchers.Change(job.name, "running")
                check_command(job.command[job.command.index("train") :])
                (folder,) = (arg[10:] for arg in job.command if arg.startswith("--workdir="))
                shutil.copytree(run, folder)
                lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
                for line in lines:
                    if "val/accuracy" in line:
                        line["val/accuracy"] *= number / len(jobs)
                text = "".join(json.dumps(line) + "\n" for line in lines)
                pathlib.Path(folder, "metrics.jsonl").write_text(text)
                yield launchers.Change(job.name, "finished", 0)

    return Fake


def test_train_and_compare(tiny_run, monkeypatch, tmp_path, capsys):
    import matplotlib.pyplot as plt

    here = tmp_path / "experiments" / "notebooks"
    here.mkdir(parents=True)
    shutil.copy(NOTEBOOKS / "rates.py", here)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(here)
    monkeypatch.setenv("SCALE", "smoke")
    monkeypatch.setitem(launchers.LAUNCHERS, "local", fake_local(tiny_run[0]))
    plt.close("all")
    names = {}
    for number, source in enumerate(cells(SWEEP)):
        exec(compile(source, f"cell {number} of {SWEEP.name}", "exec"), names)

    results = read_results(tmp_path / "runs" / "rates")
    assert [result.state for result in results] == ["finished"] * 2
    best = results[-1]
    assert names["best"].name == best.name
    assert f"{best.metrics['test/accuracy']:.1%} of the test images" in capsys.readouterr().out
    curves, answers = (plt.figure(number).axes for number in (1, 2))
    assert [len(axis.lines) for axis in curves] == [2, 2]
    model, examples = names["vit"], names["examples"]
    images = np.stack([model.preprocess(example["image"]) for example in examples])
    logits = jax.jit(model.model)(images)
    for axis, example, answer in zip(answers, examples, logits.argmax(axis=1), strict=True):
        right = int(answer) == example["label"]
        assert axis.title.get_color() == ("black" if right else "red")
    plt.close("all")


def test_the_outputs_that_are_kept_are_of_these_cells():
    """Every cell was run, in order, and the pictures are there."""
    for path in (NOTEBOOK, SWEEP):
        found = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in found] == [*range(1, len(found) + 1)]
        kinds = [output["output_type"] for cell in found for output in cell["outputs"]]
        assert "error" not in kinds and kinds.count("display_data") >= 1
        pictures = sum("image/png" in o.get("data", ()) for c in found for o in c["outputs"])
        assert pictures >= 5
