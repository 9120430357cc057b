"""What `evaluate` left in run folders, in a report: tables, pairs of runs, pictures, damage."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from scipy.stats import binomtest
from test_report import Page, lines_of, make_run

from vit_jax.data.config import Split
from vit_jax.data.forms.arrays import ArraySource
from vit_jax.launch.comparison import read_runs
from vit_jax.launch.page import write_report
from vit_jax.launch.quality import by_split, class_table, overview, pair_table, pairs, read_all
from vit_jax.training.evaluation import files as evaluation_files
from vit_jax.training.evaluation.assess import assess
from vit_jax.training.evaluation.predictions import Gathered

NAMES = ("cat", "<b>dog</b>", "cow")


def evaluate(folder, right, seed=0, mask=None):
    """Has a run folder say of which of the images, of three classes, it was right."""
    n = len(right)
    label = (np.arange(n) % 3).astype(np.int32)
    logits = np.zeros((n, 3), np.float32)
    logits[np.arange(n), np.where(right, label, (label + 1) % 3)] = 2
    images = np.full((n, 2, 2, 1), seed, np.uint8)
    gathered = Gathered(n, None, "softmax")
    gathered.add(0, logits, label, np.ones(n, bool) if mask is None else mask)
    found = gathered.predictions(ArraySource(images, label, NAMES), Split("arrays:x", "test"))
    found = {"test": found, "val": found}
    told = assess(found)
    for name, each in told.items():
        results = {"step": 20, **each.scalars(name)}
        text = evaluation_files.to_json(name, each, found[name], results)
        evaluation_files.write(folder / "evaluation", name, text, found[name])


def rights(n, *wrong):
    right = np.ones(n, bool)
    right[list(wrong)] = False
    return right


@pytest.fixture
def runs(tmp_path):
    """Three runs, the first two of which were evaluated on the same 30 images."""
    folders = []
    for i, (name, right, seed) in enumerate(
        [
            ("good", rights(30, 3, 4), 0),
            ("bad", rights(30, 3, 6, 7, 8, 9, 10, 11, 12), 0),
            ("other", rights(30, 3, 4, 5), 1),
        ]
    ):
        folder = make_run(tmp_path / name, f"seed={i}", lines=lines_of(0.5, 0.9, 0.9))
        evaluate(folder, right, seed)
        folders.append(str(folder))
    return folders


def test_runs_on_the_same_images_are_compared_and_no_others(runs):
    found, notes = read_all(read_runs(runs))
    assert [(each.run.name, each.split) for each in found] == [
        (name, split) for split in ("test", "val") for name in ("good", "bad", "other")
    ]
    table = overview(found)
    cells = dict(zip(table.headers, table.rows[0], strict=True))
    assert (cells["run"], cells["images"], cells["accuracy"]) == ("good", "30", "0.9333")
    assert "views" not in table.headers and "ECE" in table.headers and not notes
    compared, different = pairs(found)
    assert [(each.split, each.first.name, each.second.name) for each in compared] == [
        ("test", "good", "bad"),
        ("val", "good", "bad"),
    ]
    paired = compared[0].paired
    counts = (paired.both, paired.only_first, paired.only_second, paired.neither)
    assert counts == (21, 7, 1, 1)
    assert paired.p == pytest.approx(binomtest(1, 8).pvalue)
    row = dict(zip(pair_table(compared).headers, pair_table(compared).rows[0], strict=True))
    assert (row["run"], row["only the run"], row["only the other"]) == ("bad", "1", "7")
    assert row["difference"] == "-0.2000" and row["p (McNemar)"] == "0.07"
    assert "good, bad | other" in different[0] and "fingerprints differ" in different[0]


def test_images_are_paired_by_their_position(runs):
    some = np.ones(30, bool)
    some[[0, 4]] = False  # could not be read
    evaluate(pathlib.Path(runs[1]), rights(30, 3, 6), mask=some)
    compared, _ = pairs(read_all(read_runs(runs[:2]))[0])
    paired = compared[0].paired
    assert compared[0].images == 28
    # Image 4, of which `good` is wrong, is not among them.
    assert {paired.only_first, paired.only_second} == {0, 1} and paired.neither == 1


def test_classes_are_sorted_by_recall_and_absent_ones_are_last(runs):
    found, _ = read_all(read_runs(runs))
    table, count = class_table(by_split(found)["test"][:1])
    assert count == 3 and [row[0] for row in table.rows] == ["cat", "<b>dog</b>", "cow"]
    row = dict(zip(table.headers, table.rows[0], strict=True))
    assert (row["images"], row["recall"], row["precision"]) == ("10", "0.9000", "1.0000")
    bare = json.loads(json.dumps(found[0].stored.told))
    bare["classes"][0] |= dict.fromkeys(("recall", "low", "high", "precision", "f1"))
    stored = dataclasses.replace(found[0].stored, told=bare)
    table, _ = class_table([dataclasses.replace(found[0], stored=stored)])
    assert table.rows[-1][:4] == ["cat", "10", "\N{EN DASH}", "\N{EN DASH}"]


def test_the_page_has_tables_and_pictures_and_tells_of_damage(runs, tmp_path):
    (tmp_path / "bad" / "evaluation" / "val.npz").write_bytes(b"no")
    told = write_report(runs)
    assert "## Image by image" in told and "p (McNemar)" in told
    assert "bad: evaluation/val.json cannot be read (the two files are of two evaluations)" in told
    page = Page((tmp_path / "good" / "report.html").read_text())
    titles = [attrs["aria-label"] for attrs in page.all("svg") if "chart" in attrs.get("class", "")]
    assert titles == [
        f"{kind} of {name}"
        for name in ("good", "other", "bad")
        for kind in ("confusion", "reliability")
    ]
    shown = "".join(page.texts)
    assert "Evaluated" in shown and "cannot be read" in shown and "<b>dog</b>" in shown
    assert not [attrs for tag, attrs in page.tags if tag == "b" and "dog" in str(attrs)]
    hits = [attrs for attrs in page.all("rect") if attrs["class"] == "hit"]
    misses = [attrs for attrs in page.all("rect") if attrs["class"] == "miss"]
    assert len(hits) == 9 and misses


def test_runs_that_were_not_evaluated_have_no_sections(tmp_path):
    folder = make_run(tmp_path / "run", lines=lines_of(0.5, 0.9))
    told = write_report([str(folder)])
    assert "Evaluated" not in told + (folder / "report.html").read_text()


@pytest.mark.parametrize("several", ["any", "each"])
def test_several_labels_an_image_have_no_confusion(tmp_path, several):
    folder = make_run(tmp_path / "run", lines=lines_of(0.5, 0.9))
    rng = np.random.default_rng(0)
    label = (rng.random((40, 3)) < 0.4).astype(np.float32)
    logits = (rng.normal(size=(40, 3)) + 2 * label - 1).astype(np.float32)
    gathered = Gathered(40, several, "sigmoid")
    gathered.add(0, logits, label, np.ones(40, bool))
    source = ArraySource(np.zeros((40, 2, 2, 1), np.uint8), np.zeros(40, np.int32), NAMES)
    found = {"val": gathered.predictions(source, Split("arrays:x", "val"))}
    (told,) = assess(found).values()
    text = evaluation_files.to_json("val", told, found["val"], {})
    evaluation_files.write(folder / "evaluation", "val", text, found["val"])
    shown = write_report([str(folder)])
    assert f"| run | val | \N{EN DASH} | {told.images} | {told.accuracy:.4f} |" in shown
    page = Page((folder / "report.html").read_text())
    charts = [attrs["aria-label"] for attrs in page.all("svg") if attrs.get("class") == "chart"]
    assert charts == (["reliability of run"] if several == "any" else [])
    assert ("average precision" in page.texts) == (several == "each")
