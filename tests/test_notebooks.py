"""The notebooks run from the first cell to the last, on weights made on the spot."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

import vit_jax
from vit_jax.__main__ import main
from vit_jax.launch import launchers
from vit_jax.launch.run import read_results

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
    random = np.random.default_rng(0)
    graphdef, state = nnx.split(vit_jax.create("mu/16", image_size=32, depth=2))
    state = jax.tree.map(lambda x: jnp.asarray(0.1 * random.standard_normal(x.shape)), state)
    vit_jax.save(nnx.merge(graphdef, state), tmp_path / "photos.safetensors", format="timm")
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


@dataclasses.dataclass(frozen=True)
class Here(launchers.Local):
    """Runs commands in this process, which need not start Python and JAX for each."""

    def run(self, jobs):
        for job in jobs:
            yield launchers.Change(job.name, "running")
            code = main([arg for arg in job.command if arg != "-m"][2:])
            yield launchers.Change(job.name, "failed" if code else "finished", code)


def test_train_and_compare(monkeypatch, tmp_path, capsys):
    import matplotlib.pyplot as plt

    here = tmp_path / "experiments" / "notebooks"
    here.mkdir(parents=True)
    shutil.copy(NOTEBOOKS / "rates.py", here)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(here)
    monkeypatch.setenv("SCALE", "smoke")
    monkeypatch.setitem(launchers.LAUNCHERS, "local", Here)
    plt.close("all")
    names = {}
    for number, source in enumerate(cells(SWEEP)):
        exec(compile(source, f"cell {number} of {SWEEP.name}", "exec"), names)

    results = read_results(tmp_path / "runs" / "rates")
    assert [result.state for result in results] == ["finished"] * 2
    best = max(results, key=lambda result: result.metrics["val/accuracy"])
    assert names["best"].name == best.name
    assert f"{best.metrics['test/accuracy']:.1%} of the test images" in capsys.readouterr().out
    curves, answers = (plt.figure(number).axes for number in (1, 2))
    assert [len(axis.lines) for axis in curves] == [2, 2]
    model, examples = names["vit"], names["examples"]
    logits = model.model(np.stack([model.preprocess(example["image"]) for example in examples]))
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
