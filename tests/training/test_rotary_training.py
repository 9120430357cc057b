"""Rotary positions that training moves: a run that is resumed sees the same ones."""

import json
import shutil

import jax
import numpy as np
from conftest import DIGITS, TINY

from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.store import Store
from vit_jax.models.create import structure
from vit_jax.training.config_file import load_config
from vit_jax.training.loop import train

ROPE = ["position=rope", "rotary.shift=0.2", "rotary.jitter=1.5", "rotary.rescale=2"]
FLAGS = [*TINY, "--config.total_steps=4", "--config.checkpoint.every=2", "--config.eval.every=4"]
FLAGS += [*(f"--config.model.{each}" for each in ROPE), "--config.model.remat=full"]


def weights(workdir):
    shapes, store = structure(ModelCard.read(workdir).config)[1], Store(workdir)
    return jax.tree.leaves(store.restore(store.newest(), {"params": shapes}))


def test_a_resumed_run_ends_bit_identical(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train(load_config(DIGITS, FLAGS), first)
    rotary = json.loads((first / "model" / "model.json").read_text())["config"]["rotary"]
    assert (rotary["shift"], rotary["jitter"], rotary["rescale"]) == (0.2, 1.5, 2)
    assert ModelCard.read(first).config.rotary.rescale == 2
    shutil.copytree(first, second)
    shutil.rmtree(second / "checkpoints" / "4")
    assert Store(second).newest() == 2
    train(load_config(DIGITS, FLAGS), second)
    for one, other in zip(weights(first), weights(second), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
