"""Models of random values, run at full precision: what tests compare with written-out equations."""

import functools

import jax
import numpy as np
from flax import nnx

from vit_jax.models.create import structure


def random_params(config, seed=0):
    """Float64 values, none of them a telling zero or one, that float32 holds exactly."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        noise = rng.normal(size=leaf.shape) * (0.25 if name == "kernel" else 0.4)
        return exact(noise + name.startswith("scale"))

    return jax.tree.map_with_path(draw, structure(config)[1])


def random_images(config, n=2, seed=1):
    rng = np.random.default_rng(seed)
    return exact(rng.normal(size=(n, *config.image_size, config.in_channels)))


def exact(values):
    """Float64 values that float32 holds exactly."""
    return values.astype(np.float32).astype(np.float64)


def as_float32(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


@functools.cache
def _compiled(config, capture):
    graphdef, _ = structure(config)
    return jax.jit(
        lambda params, images, key: nnx.merge(graphdef, params)(images, key=key, capture=capture)
    )


def run(config, params, images, *, key=None, capture=()):
    """Calls the model that has these parameters, compiled, at full precision."""
    with jax.default_matmul_precision("highest"):
        return _compiled(config, capture)(as_float32(params), as_float32(images), key)


def relative_error(got, wanted):
    """Of the largest value."""
    got = np.asarray(got, np.float64)
    assert got.shape == wanted.shape
    return np.abs(got - wanted).max() / np.abs(wanted).max()
