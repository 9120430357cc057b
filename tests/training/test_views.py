"""Flips and crops in evaluation, against the mean of one view after another."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import DIGITS, fails

import vit_jax
from vit_jax.__main__ import main
from vit_jax.data.config import Split
from vit_jax.data.pipeline import BatchReader
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.training.config_file import load_config
from vit_jax.training.evaluation.evaluate import evaluate_run
from vit_jax.training.evaluation.steps import averaged


def test_five_crops_are_the_centre_and_the_corners():
    image = np.random.default_rng(0).integers(0, 256, (30, 24, 3), np.uint8)
    how = Preprocess((12, 12), aspect="keep", crop=0.75)  # the shorter side becomes 16
    found = how.five_crops(image)
    whole = Preprocess((20, 16)).pixels(image)
    corners = [whole[:12, :12], whole[:12, 4:], whole[8:, :12], whole[8:, 4:]]
    np.testing.assert_array_equal(found, np.stack([whole[4:16, 2:14], *corners]))
    np.testing.assert_array_equal(found[0], how.pixels(image))
    assert how.cuts and Preprocess((12, 12), crop=0.75).cuts and not Preprocess((12, 12)).cuts


def test_a_batch_has_the_crops_of_each_image():
    source = vit_jax.open_source("digits", "val")
    read = BatchReader.of(source, Split("digits", "val", crop=0.5), Preprocess((8, 8), 1), crops=5)
    batch = read(np.arange(3), np.array([4, 2, -1]))
    assert batch["image"].shape == (3, 5, 8, 8, 1) and batch["mask"].tolist() == [True, True, False]
    np.testing.assert_array_equal(batch["image"][1], read.preprocess.five_crops(source[2]["image"]))
    assert not batch["image"][2].any()


def test_probabilities_are_averaged_not_logits():
    z = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32) * 4
    mean = scipy.special.softmax(z.astype(np.float64), axis=-1).mean(axis=0)
    found = np.asarray(averaged(jnp.asarray(z), multi_label=False))
    np.testing.assert_allclose(np.exp(found), mean, rtol=1e-5)
    of_each = scipy.special.expit(z.astype(np.float64)).mean(axis=0)
    found = np.asarray(averaged(jnp.asarray(z), multi_label=True), np.float64)
    np.testing.assert_allclose(scipy.special.expit(found), of_each, rtol=1e-5)


@pytest.mark.parametrize("flip, crops", [(True, 1), (True, 5)])
def test_views_against_one_view_after_another(tiny_run, flip, crops):
    flags = [f"--config.eval.flip={flip}", f"--config.eval.crops={crops}"]
    flags += ["--config.data.val=None", "--config.data.test.crop=0.5"]
    kept = {}
    config = load_config(DIGITS, [*flags, "--config.eval.batch_size=56"])
    found = evaluate_run(tiny_run[0], config, kept=kept)

    vit, source = vit_jax.load(tiny_run[0]), vit_jax.open_source("digits", "test")
    whole = Preprocess((16, 16), 1, **dict.fromkeys(("mean", "std"), 0.5))
    places = [(4, 4), (0, 0), (0, 8), (8, 0), (8, 8)][:crops]
    chances, label = [], np.array([source[i]["label"] for i in range(len(source))])
    pixels = np.stack([whole.pixels(source[i]["image"]) for i in range(len(source))])
    for top, left in places:
        view = pixels[:, top : top + 8, left : left + 8]
        for each in (view, view[:, :, ::-1])[: 1 + flip]:
            logits = np.asarray(vit.model(vit.preprocess.normalise(each)), np.float64)
            chances.append(scipy.special.softmax(logits, axis=1))
    mean = np.mean(chances, axis=0)
    np.testing.assert_allclose(np.exp(kept["test"].logits), mean, atol=2e-5)
    loss = -np.log(mean[np.arange(len(label)), label]).mean()
    assert found["test/loss"] == pytest.approx(loss, rel=1e-4)
    assert found["test/accuracy"] == pytest.approx((mean.argmax(axis=1) == label).mean(), abs=0.003)
    assert (kept["test"].flip, kept["test"].crops) == (flip, crops)


def test_a_run_may_be_evaluated_with_other_views(tiny_run, capsys):
    own = ["evaluate", f"--workdir={tiny_run[0]}"]
    error = fails(capsys, *own, "--config.eval.crops=5")
    assert (
        "eval.crops=5 would be 5 times the same: leave it out, or set --config.data.val.crop"
        in error
    )
    error = fails(capsys, *own, "--config.eval.crops=10")
    assert "eval.crops is 10; expected 1 or 5; ten are crops=5 with flip=True" in error
    assert main([*own, "--config.eval.flip=True"]) == 0
    assert "each image is classified by the mean of 2 views of it" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"eval\.flip averages what a model says of classes"):
        load_config(DIGITS, ["--config.objective=masked_colour", "--config.eval.flip=True"])
    none = [f"--config.data.{split}=None" for split in ("val", "test")]
    with pytest.raises(UserError, match=r"eval\.flip is for evaluations that classify, of which"):
        load_config(DIGITS, [*none, "--config.eval.flip=True"])
