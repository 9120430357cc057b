"""The benchmarks' timm: as large as ours, trains where it should, and learns masks as ours does."""

import importlib
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.models.create import structure
from vit_jax.models.variants import variant

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))
names, contestants = (importlib.import_module(name) for name in ("names", "contestants"))
del sys.path[0]


@pytest.mark.parametrize("task", ["train", "infer"])
@pytest.mark.parametrize("name", ["mu/16", "R26x1"])
def test_timms_models_are_as_large_as_ours(name, task):
    config = variant(name, image_size=(32, 32))
    timms = contestants.Timm(task, names.read_name("timm", task), config, 2, "cpu")
    assert timms.parameters == sum(leaf.size for leaf in jax.tree.leaves(structure(config)[1]))
    first = timms.run(1)
    assert math.isfinite(first) and (timms.run(3) != first) == (task == "train")


def test_hybrids_are_not_compared():
    with pytest.raises(UserError, match="hybrids"):
        contestants.timm_model(variant("R50+B/16"))


def test_losses_of_masks_are_the_same_step_after_step():
    config = variant("mu/16", image_size=(32, 48), **contestants.MASKS)
    plain = names.read_name("timm", "train")
    timms = contestants.Timm("train", plain, config, 2, "cpu")
    ours = contestants.Ours("train", names.read_name("ours", "train"), config, 2)
    ours.compile()
    assert timms.parameters == ours.parameters
    wanted = [timms.run(1) for _ in range(3)]
    assert wanted[0] - wanted[2] > 0.01 and abs(wanted[0] - math.log(150)) > 0.01
    np.testing.assert_allclose([ours.run(1) for _ in range(3)], wanted, rtol=1e-5)
