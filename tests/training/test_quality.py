"""How good a model is, against scikit-learn, SciPy and written-out NumPy; what `evaluate` keeps."""

import csv
import json
import shutil

import numpy as np
import pytest
import scipy.special
from conftest import fails, write_config
from processes import Command, address
from scipy.stats import binomtest
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    precision_recall_fscore_support,
)

import vit_jax
from vit_jax.__main__ import main
from vit_jax.data.config import Split
from vit_jax.data.forms.arrays import ArraySource
from vit_jax.training.evaluation import assess, predictions, quality
from vit_jax.training.evaluation import files as evaluation_files
from vit_jax.training.evaluation.predictions import Gathered, rows_of
from vit_jax.training.evaluation.quality import Classes, Confusion, Reliability


def made_up(n=400, k=6, seed=0):
    """Labels without class 4, and predictions that are never of class 2."""
    rng = np.random.default_rng(seed)
    label = rng.choice([c for c in range(k) if c != 4], n).astype(np.int32)
    predicted = np.where(rng.random(n) < 0.6, label, rng.integers(0, k, n)).astype(np.int32)
    return label, np.where(predicted == 2, 3, predicted).astype(np.int32)


def test_classes_and_confusion_against_scikit_learn():
    label, predicted = made_up()
    confusion = Confusion.of(label, predicted, 6)
    matrix = confusion_matrix(label, predicted, labels=range(6))
    np.testing.assert_array_equal(confusion.dense(), matrix)
    found = Classes.of(confusion)
    precision, recall, f1, images = precision_recall_fscore_support(
        label, predicted, labels=range(6), zero_division=np.nan
    )
    np.testing.assert_array_equal(found.images, images)
    np.testing.assert_array_equal(found.predicted, matrix.sum(axis=0))
    some = np.array([0, 1, 3, 5])
    for mine, theirs in ((found.precision, precision), (found.recall, recall), (found.f1, f1)):
        np.testing.assert_allclose(mine[some], theirs[some], rtol=1e-12)
        assert np.isnan(mine[4])
    assert found.predicted[4] > 0 and images[4] == 0  # though it is predicted
    assert np.isnan(found.precision[2]) and found.recall[2] == found.f1[2] == 0

    counts = matrix * (1 - np.eye(6, dtype=int))
    (a, b, n), *_ = confusion.most_confused(3)
    assert n == counts.max() == counts[a, b]
    rows, others = confusion.among([1, 3])
    np.testing.assert_array_equal(rows, matrix[np.ix_([1, 3], [1, 3])])
    np.testing.assert_array_equal(rows.sum(axis=1) + others, matrix[[1, 3]].sum(axis=1))
    assert confusion.chosen(6) == [*range(6)] and {a, b} <= set(confusion.chosen(3))


def test_classes_that_are_questions_against_scikit_learn():
    rng = np.random.default_rng(0)
    labels = (rng.random((200, 5)) < 0.3).astype(np.float32)
    labels[:, 3] = 0
    logits = (rng.normal(size=labels.shape) + 2 * labels - 1).astype(np.float32)
    found, some = Classes.of_questions(logits, labels), [0, 1, 2, 4]
    theirs = precision_recall_fscore_support(labels, logits > 0, zero_division=np.nan)
    for mine, their in zip((found.precision, found.recall, found.f1), theirs[:3], strict=True):
        np.testing.assert_allclose(mine[some], their[some], rtol=1e-12)
        assert np.isnan(mine[3])
    areas = average_precision_score(labels[:, some], logits[:, some], average=None)
    np.testing.assert_allclose(found.average_precision[some], areas, rtol=1e-12)


def test_intervals_against_scipy_and_written_out():
    low, high = quality.wilson(np.array([0, 7, 30, 0]), np.array([5, 9, 30, 0]))
    for i, (right, images) in enumerate([(0, 5), (7, 9), (30, 30)]):
        expected = binomtest(right, images).proportion_ci(0.95, "wilson")
        assert (low[i], high[i]) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert np.isnan(low[3]) and np.isnan(high[3])

    label, predicted = made_up(300)
    rng, drawn = np.random.default_rng(7), []
    for _ in range(800):
        rows = rng.integers(0, len(label), len(label))
        y, x = label[rows], predicted[rows]
        known = (0, 1, 2, 3, 5)
        recalls = [np.mean(x[y == c] == c) for c in known]
        f1 = [2 * np.sum((y == c) & (x == c)) / (np.sum(y == c) + np.sum(x == c)) for c in known]
        drawn.append((np.mean(y == x), np.mean(recalls), np.mean(f1)))
    expected = np.quantile(drawn, [0.025, 0.975], axis=0).T
    found = quality.mean_intervals(Confusion.of(label, predicted, 6))
    accuracy = quality.share_interval(int(np.sum(label == predicted)), len(label))
    for mine, theirs in zip((accuracy, *found.values()), expected, strict=True):
        assert mine == pytest.approx(theirs, abs=0.012) and mine[1] - mine[0] > 0.06
    perfect = binomtest(50, 50).proportion_ci(0.95, "wilson")
    assert quality.share_interval(50, 50) == pytest.approx((perfect.low, perfect.high))
    assert quality.mean_intervals(Confusion.of(label, label, 6)) == {}


def overconfident(n=500, k=4, seed=0):
    """Logits whose temperature is about 3."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, k)) * 1.5
    chances = scipy.special.softmax(z, axis=1)
    label = (rng.random((n, 1)) > chances.cumsum(axis=1)).sum(axis=1).clip(0, k - 1)
    return (3 * z).astype(np.float32), label.astype(np.int32)


def losses(logits, label, temperature, objective):
    z = logits.astype(np.float64) / temperature
    if objective == "softmax":
        return -scipy.special.log_softmax(z, axis=1)[np.arange(len(z)), label]
    right = np.eye(z.shape[1])[label]
    return np.sum(np.log1p(np.exp(z)) - right * z, axis=1)


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_temperature_and_ece_against_written_out_numpy(objective, monkeypatch):
    monkeypatch.setattr(quality, "_CHUNK", 700)  # several chunks, of no equal size
    logits, label = overconfident()
    found = quality.fit_temperature(logits, label, objective)
    grid = np.exp(np.linspace(np.log(found) - 0.02, np.log(found) + 0.02, 41))
    means = [losses(logits, label, t, objective).mean() for t in grid]
    assert abs(int(np.argmin(means)) - 20) <= 1 and 1.5 < found < 6
    assert means[20] < losses(logits, label, 1.0, objective).mean()

    for temperature in (1.0, found):
        z = logits.astype(np.float64) / temperature
        chances = (
            scipy.special.softmax(z, axis=1) if objective == "softmax" else 1 / (1 + np.exp(-z))
        )
        confidence, right = chances.max(axis=1), logits.argmax(axis=1) == label
        expected = 0.0
        for i in range(15):
            inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
            if inside.any():
                gap = abs(confidence[inside].mean() - right[inside].mean())
                expected += inside.mean() * gap
        mine = quality.confidences(logits, temperature, objective)
        np.testing.assert_allclose(mine, confidence, rtol=1e-12)
        reliability = Reliability.of(mine, right)
        assert reliability.ece == pytest.approx(expected, abs=1e-12)
        assert reliability.images.sum() == len(label)
    # Logits that are always right have the better loss, the larger they are.
    assert quality.fit_temperature(np.eye(4, dtype=np.float32)[label], label, "softmax") is None


def test_bins_are_closed_above():
    found = Reliability.of(np.array([0.0, 0.5, 0.5 + 1e-9, 1.0]), np.array([True] * 4), bins=2)
    assert found.images.tolist() == [2, 2]


@pytest.mark.parametrize("b, c", [(0, 0), (3, 3), (1, 9), (40, 90), (0, 12)])
def test_two_models_are_compared_by_mcnemars_test(b, c):
    first = np.array([True] * (50 + b) + [False] * (c + 20))
    second = np.array([True] * 50 + [False] * b + [True] * c + [False] * 20)
    found = quality.compare(first, second)
    assert (found.both, found.only_first, found.only_second, found.neither) == (50, b, c, 20)
    assert found.p == pytest.approx(binomtest(b, b + c).pvalue if b + c else 1.0, rel=1e-9)
    assert found.difference == pytest.approx(second.mean() - first.mean())
    rng, n = np.random.default_rng(3), len(first)
    rows = rng.integers(0, n, (2000, n))
    drawn = (second[rows].astype(float) - first[rows]).mean(axis=1)
    assert found.interval == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.015)


def gathered(logits, label, several=None, objective="softmax", batch=7):
    """Predictions of rows that come in batches, the last of them padded."""
    k, n = logits.shape[1], len(logits)
    source = ArraySource(
        np.zeros((n, 2, 2, 1), np.uint8),
        np.zeros(n, np.int32),
        tuple(f"class {c}" for c in range(k)),
    )
    found = Gathered(n, several, objective)
    for start in range(0, n, batch):
        rows = np.arange(start, start + batch)
        index = np.minimum(rows, n - 1)
        found.add(start, logits[index], label[index], rows < n)
    return found.predictions(source, Split("arrays:x", "test"))


def test_too_many_logits_are_not_kept(monkeypatch):
    logits, label = overconfident(60)
    whole = {name: gathered(logits, label) for name in ("val", "test")}
    monkeypatch.setattr(predictions, "MOST_LOGITS", logits.nbytes - 1)
    small = {name: gathered(logits, label) for name in ("val", "test")}
    assert small["val"].logits is None and len(whole["val"].logits) == 60
    before, after = (assess.assess(each)["test"] for each in (whole, small))
    assert before.scaled.ece < before.reliability.ece
    assert (after.scaled, after.temperature) == (None, None)
    assert "no temperature is fitted: the logits of val are too many" in after.notes[0]
    same = ("accuracy", "interval", "means", "mean_intervals")
    assert all(getattr(before, name) == getattr(after, name) for name in same)
    assert after.reliability.ece == before.reliability.ece


def test_logits_that_are_not_finite_are_said(caplog):
    logits, label = overconfident(20)
    logits[3, 1] = np.nan
    found = gathered(logits, label)
    assert np.isnan(found.log_predicted[3]) and found.predicted[3] != 1
    assert assess.assess({"val": found}) == {}
    assert "val: 1 of 20 images have logits that are not finite" in caplog.text


@pytest.mark.parametrize("several", ["any", "each"])
def test_several_labels_an_image(several):
    rng = np.random.default_rng(0)
    label = (rng.random((50, 4)) < 0.4).astype(np.float32)
    logits = (rng.normal(size=(50, 4)) + 2 * label - 1).astype(np.float32)
    objective = "sigmoid" if several == "each" else "softmax"
    found = gathered(logits, label, several, objective)
    (told,) = assess.assess({"val": found}).values()
    some = label.any(axis=1)
    assert told.images == some.sum() < 50 and told.confusion is None
    assert told.accuracy == label[np.arange(50), logits.argmax(axis=1)][some].mean()
    assert (told.classes is None) == (told.reliability is not None) == (several == "any")
    assert any("no confusion matrix" in note for note in told.notes)
    rows = list(rows_of("val", found))
    assert [row["position"] for row in rows] == [*range(50)]
    for row, z, right in zip(rows, logits, label, strict=True):
        top = np.flatnonzero(z > 0) if several == "each" else [z.argmax()]
        assert row["label"] == [f"class {c}" for c in np.flatnonzero(right)]
        assert row["predicted"] == [f"class {c}" for c in top]
        hit = right[z.argmax()] > 0 if several == "any" else ((z > 0) == (right > 0)).all()
        assert row["correct"] == hit


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy of a run folder, what training returned, and what `evaluate` did."""
    workdir = tmp_path_factory.mktemp("quality") / "run"
    shutil.copytree(tiny_run[0], workdir, ignore=shutil.ignore_patterns("evaluation"))
    return workdir, tiny_run[1], vit_jax.evaluate(workdir)


def one_by_one(workdir, split):
    """The probabilities of every image, by the public model, and its labels."""
    vit, source = vit_jax.load(workdir), vit_jax.open_source("digits", split)
    examples = [source[i] for i in range(len(source))]
    logits = np.asarray(vit.model(np.stack([vit.preprocess(x["image"]) for x in examples])))
    label = np.array([x["label"] for x in examples])
    return scipy.special.softmax(logits.astype(np.float64), axis=1), label


def test_evaluate_keeps_every_image_once(run, tmp_path, capsys):
    workdir, trained, _ = run
    file = tmp_path / "rows.csv"
    argv = ["evaluate", f"--workdir={workdir}", f"--predictions={file}"]
    assert main([*argv, "--config.eval.batch_size=56"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{workdir} at step 24:" and out[1].startswith("val accuracy")
    assert out[2].startswith("test accuracy") and out[-1] == f"{file}: 538 rows"
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert tuple(rows[0]) == predictions.COLUMNS
    for split in ("val", "test"):
        chances, label = one_by_one(workdir, split)
        mine = [row for row in rows if row["split"] == split]
        assert [int(row["position"]) for row in mine] == [*range(len(label))]
        assert [int(row["label"]) for row in mine] == label.tolist()
        predicted = np.array([int(row["predicted"]) for row in mine])
        for key, classes in (("label_probability", label), ("predicted_probability", predicted)):
            expected = chances[np.arange(len(label)), classes]
            np.testing.assert_allclose([float(row[key]) for row in mine], expected, atol=2e-5)
        right = [row["correct"] == "true" for row in mine]
        assert right == (predicted == label).tolist()
        assert np.mean(right) == trained[f"{split}/accuracy"]

        told = json.loads((workdir / "evaluation" / f"{split}.json").read_text())
        counts = np.zeros((10, 10), int)
        for a, b, n in told["confusion"]:
            counts[a, b] = n
        np.testing.assert_array_equal(counts, confusion_matrix(label, predicted, labels=range(10)))
        recall = precision_recall_fscore_support(label, predicted, zero_division=np.nan)[1]
        assert [row["recall"] for row in told["classes"]] == pytest.approx(recall)
        stored = evaluation_files.read(workdir)[0][split]
        assert stored.correct.tolist() == right and told["step"] == 24


def test_the_scalars_of_evaluate(run):
    workdir, trained, found = run
    before = {"step", *(f"{s}/{m}" for s in ("val", "test") for m in ("accuracy", "loss", "top5"))}
    new = ("accuracy_low", "accuracy_high", "balanced_accuracy", "macro_f1", "ece")
    after = {f"{split}/{name}" for split in ("val", "test") for name in new}
    assert set(found) == before | after | {"val/temperature", "test/ece_scaled"}
    low, high = found["test/accuracy_low"], found["test/accuracy_high"]
    assert low < found["test/accuracy"] == trained["test/accuracy"] < high
    # Of val: the loss at its temperature is the lowest.
    chances, label = one_by_one(workdir, "val")
    logits = np.log(chances)
    at = [
        losses(logits, label, found["val/temperature"] * f, "softmax").mean()
        for f in (0.98, 1, 1.02)
    ]
    assert at[1] == min(at)


def test_without_val_there_is_no_temperature(run, tmp_path, capsys):
    values = "batch_size=64, data=dict(test=dict(source='digits', split='test'))"
    config = write_config(tmp_path / "config.py", values)
    rows = tmp_path / "rows.jsonl"
    argv = ["evaluate", f"--model={run[0]}", f"--config={config}", f"--predictions={rows}"]
    before = evaluation_files.read(run[0])[0]["test"].told
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "no temperature is fitted: there is no val to fit it on" in out
    assert "is kept in" not in out  # the run's folder is for its own data
    assert evaluation_files.read(run[0])[0]["test"].told == before
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(read) == 359 and isinstance(read[0]["correct"], bool)


def test_what_cannot_be_written_is_said_before_it_is_measured(run, tmp_path, capsys):
    own = ["evaluate", f"--workdir={run[0]}"]
    error = fails(capsys, *own, f"--predictions={tmp_path}/rows.txt")
    assert "rows.txt; expected FILE.csv or FILE.jsonl" in error
    (tmp_path / "folder.csv").mkdir()
    assert "is a folder" in fails(capsys, *own, f"--predictions={tmp_path}/folder.csv")
    (tmp_path / "file").touch()
    assert "is a file; --pictures" in fails(capsys, *own, f"--pictures={tmp_path}/file")
    split = "dict(source='digits', split='{}')"
    near = f"dict(type='knn', train={split.format('val')}, test={split.format('test')})"
    values = f"batch_size=64, eval=dict(evaluators=dict(near={near}))"
    config = write_config(tmp_path / "config.py", values)
    argv = ["evaluate", f"--model={run[0]}", f"--config={config}"]
    error = fails(capsys, *argv, f"--predictions={tmp_path}/rows.csv")
    assert "--predictions is of images that are classified: here no data.val" in error
    assert not (tmp_path / "rows.csv").exists()


def test_a_run_folder_that_cannot_be_written_to_is_evaluated(run, tmp_path, capsys, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(run[0], workdir, ignore=shutil.ignore_patterns("evaluation"))
    (workdir / "evaluation").touch()
    assert main(["evaluate", f"--workdir={workdir}", "--json"]) == 0
    assert "nothing is kept in" in caplog.text and "val/ece" in capsys.readouterr().out


def test_files_of_two_evaluations_are_not_read_as_one(run, tmp_path):
    shutil.copytree(run[0] / "evaluation", tmp_path / "evaluation")
    found, notes = evaluation_files.read(tmp_path)
    assert set(found) == {"val", "test"} and not notes
    shutil.copy(tmp_path / "evaluation/test.npz", tmp_path / "evaluation/val.npz")
    told = json.loads((tmp_path / "evaluation/test.json").read_text())
    (tmp_path / "evaluation/test.json").write_text(json.dumps({**told, "images": "many"}))
    found, notes = evaluation_files.read(tmp_path)
    assert not found and "two evaluations" in notes[1] and "mixed up" in notes[0]


def test_two_processes_have_all_images_and_write_once(run, tmp_path):
    where = address()
    (tmp_path / "told").mkdir()
    flags = [f"--workdir={run[0]}", "--json", f"--predictions={tmp_path}/rows.csv"]
    flags += [f"--coordinator={where}", "--processes=2"]
    both = [
        Command(tmp_path / "told", ["evaluate", *flags, f"--process-id={i}"], devices=2)
        for i in range(2)
    ]
    (out, _), (silent, _) = [each.finish() for each in both]
    found = json.loads([line for line in out.splitlines() if line.startswith("{")][-1])
    assert found["test/accuracy"] == run[1]["test/accuracy"] and "accuracy" not in silent
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert len(rows) == 179 + 359
    assert np.mean([row["correct"] == "true" for row in rows[179:]]) == found["test/accuracy"]
