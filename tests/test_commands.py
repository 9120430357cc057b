"""`vit_jax.train`, `evaluate` and `predict`: what the commands do, from Python."""

import logging
import re

import ml_collections
import numpy as np
import pytest
from conftest import DIGITS

import vit_jax
from vit_jax import commands
from vit_jax.errors import UserError
from vit_jax.training.config import read_config
from vit_jax.training.config_file import as_flags, load_config

SMALL = {"variant": "Ti/16", "image_size": 8, "patch_size": (4, 4), "in_channels": 1, "width": 8}
SMALL |= {"depth": 1, "num_heads": 1, "mlp_dim": 8}
EIGHT = {"total_steps": 8, "model": SMALL, "data.workers": 0, "optim": {"warmup": np.int64(2)}}


@pytest.fixture
def plainly():
    """Logging as Python begins with it."""
    ours, root = logging.getLogger("vit_jax"), logging.getLogger()
    levels = ours.level, root.level
    ours.setLevel(logging.NOTSET)
    root.setLevel(logging.WARNING)
    yield ours
    ours.setLevel(levels[0])
    root.setLevel(levels[1])


def test_train_evaluate_and_predict(untrained, tmp_path, plainly, capsys):
    run = tmp_path / "run"
    trained = vit_jax.train(DIGITS, run, **EIGHT)
    assert trained["step"] == 8 and (run / "curves.png").exists()
    said = capsys.readouterr().err
    assert said.count("data.train  digits, train: 1,259 images") == 1
    assert (plainly.handlers, plainly.propagate) == ([], True)
    assert read_config(run) == load_config(DIGITS, as_flags(EIGHT))

    vit = vit_jax.load(run)
    assert re.fullmatch(
        r"ViT custom, [\d,]+ parameters, 8x8 pixels\n"
        rf"  10 classes: '0', '1', '2', \.\.\.\n  from run folder, {run}, step 8",
        repr(vit),
    )
    again = vit_jax.evaluate(run)
    same = [name for name in trained if name.startswith("test/")]
    assert same and {name: trained[name] for name in same} == {name: again[name] for name in same}
    assert {"test/ece", "test/accuracy_low"} <= again.keys() - trained.keys()
    with pytest.raises(UserError, match=r"is evaluated as its config says \(batch_size"):
        vit_jax.evaluate(run, batch_size=3)
    image = vit_jax.open_source("digits")[0]["image"]
    (found,), (wanted,) = vit_jax.predict(run, image, topk=2), vit.predict([image], topk=2)
    assert [name for name, _ in found] == [name for name, _ in wanted]
    np.testing.assert_allclose([p for _, p in found], [p for _, p in wanted], rtol=1e-5)


def test_a_config_may_be_a_dict(untrained, tmp_path):
    fields = load_config(DIGITS, as_flags(EIGHT))
    nested = ml_collections.ConfigDict(
        {
            "data": {"train": {"source": "digits", "split": "train"}},
            "batch_size": 8,
            "optim": {"lr": 1.0},
        }
    )
    with pytest.raises(UserError, match="set exactly one of total_steps"):
        vit_jax.train(nested, tmp_path / "a")
    vit_jax.train(nested, tmp_path / "b", **EIGHT)
    assert "total_steps" not in nested and dict(nested.optim) == {"lr": 1.0}  # it is the caller's
    assert read_config(tmp_path / "b").total_steps == 8
    with pytest.raises(UserError, match="holds a run of another config"):
        vit_jax.train(fields, tmp_path / "b")


@pytest.mark.parametrize(
    "config, overrides, said",
    [
        (DIGITS, {"totl_steps": 3}, "did you mean 'total_steps'"),
        (DIGITS, {"optim": {"lr": object()}}, "optim.lr is <object"),
        (DIGITS, {"optim": 3}, "unknown config key in --config.optim=3"),
        ("nowhere.py", {}, "nowhere.py"),
    ],
)
def test_what_is_wrong_is_said(config, overrides, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)):
        vit_jax.train(config, tmp_path / "run", **overrides)
    assert not (tmp_path / "run").exists()


def test_a_config_of_another_type():
    with pytest.raises(UserError, match="config is of type int; expected a recipe's name"):
        commands._config(3, {})


def test_flags_of_values():
    values = {"a": {"b": 1e-3, "c": (64, np.float32(0.5))}, "a.d": None, "e": True, "f": "B/16"}
    assert as_flags(values) == [
        "--config.a.b=0.001",
        "--config.a.c=(64, 0.5)",
        "--config.a.d=None",
        "--config.e=True",
        "--config.f=B/16",
    ]


def test_every_public_name_is_there_and_documented():
    for name in vit_jax.__all__:
        assert getattr(vit_jax, name).__doc__, name
