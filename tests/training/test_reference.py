"""Every key of a config has a meaning, and `vit-jax config` says what a config resolves to."""

import dataclasses
import re

from conftest import DIGITS, ROOT, fails
from test_structure import sections

from vit_jax.__main__ import main
from vit_jax.data.config import is_possible
from vit_jax.models.config import ViTConfig
from vit_jax.recipes import recipes
from vit_jax.training import reference
from vit_jax.training.config import Config, keys
from vit_jax.training.evaluation.evaluators import EVALUATORS

LEAVES = [leaf for section in reference.sections() for leaf in section.leaves]
# Texts that may be anything; all others have a list of choices.
FREE = ("source", "split", "classes", "cache", "init_from", "wandb_project", "variant")
FREE += ("targets", "freeze", "match", "class_weights", "best", "metric", "teacher")
FREE += ("only", "ignore", "fresh")


def test_every_key_is_explained_and_nothing_else():
    possible = {key for key in keys() if is_possible(key)}
    assert {leaf.key for leaf in LEAVES if ".NAME." not in leaf.key} == possible
    for leaf in LEAVES:
        assert len(leaf.meaning) > 10, leaf
        free = leaf.key.rpartition(".")[2] in FREE
        assert bool(leaf.choices) == (leaf.kind.startswith("text") and not free), leaf
    for kind in {*sections(Config), ViTConfig, *EVALUATORS.values()}:
        names = {field.name for field in dataclasses.fields(kind)}
        names |= {
            f"model.{name}"
            for name in ("variant", "head", "position_resize", "only", "ignore", "fresh")
        }
        assert set(reference.meanings(kind)) <= names, kind


def test_the_page_is_written_from_the_docstrings():
    page = (ROOT / "docs" / "reference" / "config.md").read_text()
    assert page == reference.page(), (
        "python -m vit_jax.training.reference > docs/reference/config.md"
    )


def told(capsys, *argv):
    assert main(["config", *argv]) == 0
    return capsys.readouterr().out


def test_a_config_is_shown_with_where_its_values_are_from(capsys):
    out = told(capsys, "finetune:B/16,pets", "--config.lr=3e-4", "--config.data.test=None")
    for line in (
        "flag     optim.lr=0.0003",
        "flag     data.test=None",
        "file     optim.name=sgd",
        "file     data.train.inception_crop.ratio=(0.75, 1.33)",
        "file     model.image_size=(384, 384)",
        "variant  model.width=768",
        "default  model.pool=token",
        "default  optim.b1=0.9",
    ):
        assert line in out.splitlines(), line
    assert out.count("model.width") == 1 and "data.val.flip" not in out and "num_classes" not in out

    out = told(capsys, "evaluate:cifar10,knn", "--config.init_from=run")
    assert "file     eval.evaluators.knn.type=knn" in out
    assert "default  eval.evaluators.knn.temperature=0.07" in out
    assert "model.pool" not in out and out.endswith("those of init_from\n")

    # What is shown is what flags take.
    shown = [line.split(None, 1)[1] for line in told(capsys, DIGITS).splitlines()]
    shown = [each for each in shown if not each.endswith(("=None", "=()"))]
    again = reference.resolved("digits", [f"--config.{each}" for each in shown])
    assert {f"{key}={value}" for key, (value, origin) in again.items() if origin == "flag"} == {
        *shown
    }


def test_keys_are_explained(capsys):
    out = told(capsys, "digits", "optim.", "--config.optim.ema=0.5")
    assert out.startswith("optim.lr=0.003 (file)\n    number; required\n    the peak learning rate")
    assert (
        "optim.ema=0.5 (flag)\n" in out
        and "    adamw | adam | adafactor | sgd | muon; default" in out
    )
    both = told(capsys, "optim.lr") + told(capsys, "optim.probe.lr")
    assert told(capsys, "lr") == both
    assert told(capsys, "mesh").count("\n    ") == told(capsys, "mesh.").count("\n    ") >= 8
    assert {"eval.every", "log.every"} <= {*re.findall(r"^\S+", told(capsys, "every"), re.M)}
    assert told(capsys, "width").startswith("model.width (ViT)\n")
    for argv, message in (
        (["optim.learning_rate"], "did you mean 'optim.lr'"),
        (["optin."], "there is no config key 'optin.'"),
        (["digit"], "did you mean 'digits'"),
        (["digits", "optim.lrr"], "did you mean 'optim.lr'"),
        (["lr", "--config.seed=1"], "is for a config file, but lr is a key"),
        (["nowhere.py"], "there is no config file 'nowhere.py'"),
    ):
        assert message in fails(capsys, "config", *argv), argv
    for name in recipes():
        assert not any(f".{leaf.key}.".find(f".{name}.") >= 0 for leaf in LEAVES), name
