"""Several labels an image, or none: trained, measured against scikit-learn, and predicted.

One run has it all: four classes, each a bright pixel in every square of four, and some files that
are no images.
"""

import dataclasses
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DIGITS, TINY
from flax import nnx
from sklearn.metrics import average_precision_score, f1_score
from test_resume import logged

import vit_jax
from vit_jax.analysis.preflight import open_plan
from vit_jax.checkpoints.fit import place
from vit_jax.checkpoints.opened import open_model, read_model
from vit_jax.data import sources
from vit_jax.data.config import Split
from vit_jax.data.pipeline import BatchReader, train_batches
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.launch.page import write_report
from vit_jax.models.create import structure
from vit_jax.training.config_file import load_config
from vit_jax.training.evaluation import multilabel
from vit_jax.training.evaluation.evaluate import evaluate_run
from vit_jax.training.evaluation.evaluation import Evaluation
from vit_jax.training.evaluation.evaluators import Classification, Knn
from vit_jax.training.loop import train
from vit_jax.training.sharding import MeshConfig, make_mesh, placement
from vit_jax.training.steps import class_loss

SMALL = [flag for flag in TINY if "representation" not in flag and "ema" not in flag]
NAMES = ("north west", "north east", "south west", "south east")
BAD = {"train": (3, 50, 51), "val": (7,)}


@dataclasses.dataclass(frozen=True, eq=False)
class Quarters:
    """Noise, and a bright quarter of the pixels for each label; those in BAD are no image files."""

    split: str
    label_names: tuple[str, ...] = NAMES
    multi_label: bool = True

    fingerprint = "quarters"

    def __len__(self):
        return {"train": 100, "val": 83}[self.split]

    def __getitem__(self, index):
        random = np.random.default_rng((len(self.split), index))
        there = random.random(4) < 0.35
        image = random.integers(0, 60, (8, 8, 1), np.uint8)
        for c in np.flatnonzero(there):
            image[c // 2 :: 2, c % 2 :: 2] += 180
        if self.split == "val" and index % 9 == 0:  # labels that no model can know
            there = random.random(4) < 0.35
        bad = index in BAD[self.split]
        return {
            "image": b"none" if bad else image,
            "label": tuple(np.flatnonzero(there).tolist()) if self.multi_label else 2,
            "name": f"{self.split} {index}",
        }


@pytest.fixture(scope="module", autouse=True)
def quarters():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "quarters", lambda _, split: Quarters(split))
        one = lambda _, split: Quarters(split, multi_label=False)  # noqa: E731
        patch.setitem(sources.SOURCES, "quarter", one)
        yield


def config_of(*flags, **evaluators):
    """The digits config on `Quarters`, which are seen eight times."""
    section = [f"--config.data.{split}.source=quarters" for split in ("train", "val")]
    section += ["--config.data.test=None", "--config.objective=sigmoid", "--config.log.every=1"]
    section += ["--config.model.dropout=0.", "--config.optim.lr=0.02", "--config.optim.warmup=0.1"]
    section += ["--config.model.depth=1", "--config.checkpoint.every=8"]
    section += ["--config.data.on_corrupt=skip", "--config.data.train.affine=None"]
    config = load_config(DIGITS, [*SMALL, *section, *flags])
    changed = dataclasses.replace(config.eval, evaluators=evaluators)
    return dataclasses.replace(config, eval=changed)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder, what training returned, and what it logged."""
    workdir = tmp_path_factory.mktemp("several") / "run"
    with pytest.MonkeyPatch.context() as patch:
        told = []
        for module in ("data.pipeline", "training.loop"):
            name = f"vit_jax.{module}.logger.warning"
            patch.setattr(name, lambda text, *args: told.append(text % args))
        result = train(config_of(), workdir)
    return types.SimpleNamespace(workdir=workdir, result=result, told=told)


def readable(split):
    source = Quarters(split)
    return [source[i] for i in range(len(source)) if i not in BAD[split]]


def expected(workdir):
    """val's metrics in float64, by other libraries, of one image after another."""
    vit, examples = vit_jax.load(workdir), readable("val")
    images = np.stack([vit.preprocess(x["image"]) for x in examples])
    logits = np.asarray(jax.jit(vit.model)(images))
    labels = np.array([[c in x["label"] for c in range(4)] for x in examples])
    some = labels.any(axis=1)
    assert 0 < some.sum() < len(some)
    predicted, best = logits > 0, logits.argmax(axis=1)
    losses = np.logaddexp(0, logits.astype(np.float64)) - labels * logits
    return {
        "val/accuracy": labels[np.arange(len(best)), best][some].mean(),
        "val/top5": 1.0,
        "val/loss": losses.sum(axis=1).mean(),
        "val/mAP": average_precision_score(labels, logits, average="macro"),
        "val/micro_f1": f1_score(labels, predicted, average="micro"),
        "val/macro_f1": f1_score(labels, predicted, average="macro"),
        "val/corrupt": 1,
    }, (some, losses.sum(axis=1))


def test_training_learns_all_labels(run):
    values, _ = expected(run.workdir)
    found = {name: value for name, value in run.result.items() if name.startswith("val/")}
    assert found == pytest.approx(values, rel=1e-5)
    assert 1 > found["val/mAP"] > 0.8 and found["val/macro_f1"] > 0.8  # by chance: 0.35
    assert "val/mAP" in write_report([str(run.workdir)])


def test_the_accuracy_in_training_is_that_of_images_with_labels(run):
    """At step 1 all logits are zero, so that the first class is the best; in micro-batches."""
    config = config_of()
    read = BatchReader.of(
        Quarters("train"), config.data.train, Preprocess((8, 8), 1), seed=0, on_corrupt="skip"
    )
    with train_batches(read, 32, start_step=0, stop_step=1) as batches:
        label = next(batches)["label"]
    first = logged(run.workdir)[0]
    assert first["train/accuracy"] == pytest.approx(label[:, 0].sum() / label.any(axis=1).sum())
    assert first["train/loss"] == pytest.approx(4 * np.log(2), rel=1e-5)


def test_both_labels_are_predicted(run):
    vit = vit_jax.load(run.workdir)
    known = [x for x in readable("val") if int(x["name"].split()[1]) % 9]
    images = [x["image"] for x in known if x["label"] == (0, 3)]
    for found in vit.predict(images):
        assert {name for name, p in found if p > 0.5} == {NAMES[0], NAMES[3]}
    assert images and vit.card.multi_label


@pytest.mark.parametrize("batch_size", [8, 50])
def test_values_do_not_depend_on_the_batch_size(run, batch_size):
    again = evaluate_run(run.workdir, config_of(f"--config.eval.batch_size={batch_size}"))
    assert again.pop("step") == 24
    assert again == pytest.approx({name: run.result[name] for name in again}, rel=1e-5)
    assert len(again) == 7


def test_what_the_labels_are_is_said_by_the_model_or_by_the_evaluator(run, caplog):
    """ImageNet-ReaL's rule for a model that was trained on one label an image, on two devices."""
    values, (some, losses) = expected(run.workdir)
    caplog.set_level("INFO", "vit_jax")
    each = Classification(test=Split("quarters", "val"), several="each")
    opened, mesh = open_model(run.workdir), make_mesh(MeshConfig(), jax.devices()[:2])
    card = dataclasses.replace(opened.card, multi_label=False)
    evaluation = Evaluation(config_of(own=each), card, mesh)
    params, _ = place(opened, card.config, shardings=lambda x: placement(x, mesh))
    real, own = evaluation.measure(["val", "own"], params)
    assert set(real) == {"val/accuracy", "val/top5", "val/loss", "val/corrupt"}
    assert real["val/accuracy"] == own["own/accuracy"] == pytest.approx(values["val/accuracy"])
    assert real["val/loss"] == pytest.approx(losses[some].mean(), rel=1e-5)
    assert own == pytest.approx({f"own/{k[4:]}": v for k, v in values.items()}, rel=1e-5)
    assert "data.val: images have several labels: an image is right where any" in caplog.text
    assert "evaluators.own: images have several labels: each is a question" in caplog.text


def test_an_image_that_cannot_be_read_is_named_and_counted_once(run):
    lines = logged(run.workdir)
    counts = [line["train/corrupt"] for line in lines if "train/corrupt" in line]
    assert counts == sorted(counts) and counts[0] < 3 and counts[4:] == [3.0] * 20  # 3.1 an epoch
    skipped = sorted(line for line in run.told if line.startswith("skipped"))
    assert [line.split(":")[0] for line in skipped] == [
        "skipped train 3", "skipped train 50", "skipped train 51", "skipped val 7",
    ]  # fmt: skip
    assert run.told[-1] == "3 images of quarters could not be read: the next took its place"


def test_a_resumed_run_counts_on(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run.workdir, workdir)
    shutil.rmtree(workdir / "checkpoints" / "24")
    train(config_of(), workdir)
    assert logged(workdir) == logged(run.workdir)


SPLIT = Split("quarters", "val")
MISTAKES = {
    "probe": (
        dict(near=Knn(train=SPLIT, test=SPLIT)),
        r"evaluators\.near\.train: quarters has several labels an image, which no .* type knn",
    ),
    "one": (
        dict(own=Classification(test=Split("quarter", "val"), several="each")),
        r"evaluators\.own: quarter has one label an image: leave several=each out",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_evaluator_that_does_not_fit_is_refused_before_a_run(name, run):
    evaluators, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        evaluate_run(run.workdir, config_of(**evaluators))


def test_softmax_is_refused(run, tmp_path):
    config = config_of("--config.objective=softmax")
    for refused in (lambda: train(config, tmp_path / "run"), lambda: open_plan(config)):
        with pytest.raises(UserError, match=r"^data.train.source quarters has several labels.*set"):
            refused()
    with pytest.raises(UserError, match=r"^data.val: quarters has several .*objective=sigmoid$"):
        evaluate_run(run.workdir, config)
    with pytest.raises(UserError, match="several is 'eech'; did you mean 'each'"):
        Classification(test=SPLIT, several="eech")
    assert open_plan(config_of())[0].card.multi_label


@pytest.mark.parametrize("seed", range(4))
def test_scores_against_scikit_learn(seed):
    """Ties, classes without positives, without predictions, images without labels."""
    random = np.random.default_rng(seed)
    n, k = [(200, 7), (31, 40), (1, 3), (64, 1)][seed]
    logits = random.normal(size=(n, k)).astype(np.float32).round(seed % 2)
    labels = (random.random((n, k)) < 0.2).astype(np.float32)
    labels[:, k - 1 :: 5] = 0
    labels[0, 0] = 1
    logits[:, :: k - 1 or 1] -= 2 * (seed == 0)
    known = labels.any(axis=0)
    predicted = logits > 0
    assert multilabel.scores(logits, labels) == pytest.approx(
        {
            "mAP": average_precision_score(labels[:, known], logits[:, known], average="macro"),
            "micro_f1": f1_score(labels, predicted, average="micro", zero_division=0)
            if k > 1
            else f1_score(labels, predicted, zero_division=0),
            "macro_f1": f1_score(labels, predicted, average="macro", zero_division=0)
            if k > 1
            else f1_score(labels, predicted, zero_division=0),
        },
        rel=1e-12,
    )
    logits[0, 0] = np.nan
    assert all(np.isnan(value) for value in multilabel.scores(logits, labels).values())


def test_the_loss_of_mixed_images(run):
    """Targets are mixed and smoothed; right is a label of the larger part."""
    card, params, _ = read_model(run.workdir)
    loss_of = jax.jit(
        class_loss(structure(card.config)[0], card.preprocess, "sigmoid", 4, 0.1, None)
    )
    random = np.random.default_rng(0)
    b = 16
    pixels = random.integers(0, 256, (b, 8, 8, 1), np.uint8)
    label = (random.random((b, 4)) < 0.3).astype(np.float32)
    mask = random.random(b) < 0.8
    share = random.random(b).astype(np.float32)
    partner = {"image": np.roll(pixels, 1, 0), "label": np.roll(label, 1, 0)}
    mixing = {"share": share, "blend": share, "box": np.zeros((b, 4), np.int32)}
    batch = {"image": pixels, "label": label, "mask": mask, "partner": partner, "mixing": mixing}
    loss, sums = loss_of(params, batch, None, jnp.float32(3))

    s = share[:, None, None, None].astype(np.float64)
    mixed = card.preprocess.normalise(pixels.astype(np.float32))
    mixed = s * mixed + (1 - s) * np.roll(mixed, 1, 0)
    model = nnx.merge(structure(card.config)[0], params)
    logits = np.asarray(jax.jit(model)(jnp.float32(mixed)), np.float64)
    targets = share[:, None] * label + (1 - share[:, None]) * partner["label"]
    targets = 0.9 * targets + 0.1 / 4
    losses = (np.logaddexp(0, logits) - targets * logits).sum(axis=1)
    assert float(loss) == pytest.approx(losses[mask].sum() / 3, rel=1e-4)
    larger = np.where(share[:, None] >= 0.5, label, partner["label"])
    assert int(sums["labelled"]) == larger.any(axis=1)[mask].sum() < mask.sum()
    hits = larger[np.arange(b), logits.argmax(axis=1)] > 0
    assert int(sums["accuracy"]) == hits[mask].sum()

    # One label of each, as a row: what training on class numbers has.
    one = {"image": pixels, "mask": mask, "label": random.integers(0, 4, b).astype(np.int32)}
    rows = {**one, "label": np.eye(4, dtype=np.float32)[one["label"]]}
    (loss, sums), (same, others) = (loss_of(params, x, None, jnp.float32(3)) for x in (one, rows))
    assert loss == same and sums["accuracy"] == others["accuracy"] and set(sums) == {"accuracy"}
