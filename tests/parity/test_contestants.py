"""The benchmarks' timm: as large as ours, and it trains where it should."""

import importlib
import math
import sys
from pathlib import Path

import jax
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
