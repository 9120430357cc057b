"""Tables of positions: what they add up to, where they start, and how they are resized."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from tiny_models import as_float32, random_images, random_params

from vit_jax.errors import UserError
from vit_jax.models import positions
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import init_params, structure

# Nothing square and nothing equal, so that no two axes can be confused.
TINY = dict(
    image_size=(12, 20), patch_size=(4, 5), width=8, depth=1, mlp_dim=8, num_heads=2, num_classes=5
)
GRID, N = (3, 4), 12


def model_of(config, params):
    return nnx.merge(structure(config)[0], as_float32(params))


def added(config, **tables):
    """What a model adds to its tokens, of these tables."""
    return np.asarray(model_of(config, random_params(config) | tables).positions())


@pytest.mark.parametrize("n, prefix", [(5, 0), (4, 3), (1, 1)])
def test_relative_logits_equal_loops_over_queries_and_keys(n, prefix):
    random = np.random.default_rng(0)
    q, embeddings = random.normal(size=(2, prefix + n, 3, 4)), random.normal(size=(2 * n - 1, 3, 4))
    wanted = np.zeros((2, 3, prefix + n, prefix + n))
    for b, head, i, j in np.ndindex(2, 3, n, n):
        offset = i - j + n - 1  # from the key's patch to the query's; the first is -(n - 1)
        product = q[b, prefix + i, head] @ embeddings[offset, head]
        wanted[b, head, prefix + i, prefix + j] = product / np.sqrt(4)
    got = positions.relative_logits(jnp.float32(q), jnp.float32(embeddings), prefix)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("position", ["learned2d", "learned2d_added"])
def test_one_table_adds_what_two_do(position):
    config = ViTConfig(**TINY, registers=2, position=position, position_prefix=1)
    params = random_params(config)
    tables = {name: np.asarray(params[name], np.float32) for name in positions.table_shapes(config)}
    table = positions.one_table(tables, config)
    plain = added(dataclasses.replace(config, position="learned"), pos_embed=table)
    np.testing.assert_array_equal(model_of(config, params).positions(), plain)
    assert plain.shape == (3 + N, 8) and not plain[1:3].any()  # tokens without a row


def test_a_table_of_rows_that_is_zero_leaves_columns_alone():
    config = ViTConfig(**TINY, pool="gap", position="learned2d_added")
    columns = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    got = added(config, pos_embed_row=np.zeros((3, 8)), pos_embed_column=columns)
    plain = dataclasses.replace(config, position="learned")
    np.testing.assert_array_equal(got, added(plain, pos_embed=np.tile(columns, (3, 1))))


def logits(config, params, images):
    with jax.default_matmul_precision("highest"):
        return nnx.merge(structure(config)[0], params)(images)


@pytest.mark.parametrize(
    "one, other, zero",
    [
        # One layer has its input, and the model's table.
        (dict(position_at="layers_shared"), dict(position_at="input"), None),
        # What no offset has an embedding of is as if it had none.
        (dict(position="relative"), dict(position="none"), "rel_embed"),
    ],
    ids=["shared in one layer", "relative, all zero"],
)
def test_models_that_must_be_equal_are(one, other, zero):
    # Pooled by the mean: a class token's own attention has no bias.
    one, other = (ViTConfig(**TINY, pool="gap", **fields) for fields in (one, other))
    params, images = as_float32(random_params(one)), as_float32(random_images(one))

    @jax.jit
    def both(params, fewer, images):
        return logits(one, params, images), logits(other, fewer, images)

    fewer = jax.tree.map(lambda leaf: leaf, params)  # dicts of its own
    if zero:
        embeddings = fewer["blocks"]["attention"].pop(zero)
        got, wanted = both(params, fewer, images)
        assert np.abs(got - wanted).max() > 1e-2  # they do something where they are not zero
        params["blocks"]["attention"][zero] = jnp.zeros_like(embeddings)
    got, wanted = both(params, fewer, images)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields, path",
    [
        (dict(position_at="layers"), "blocks/pos_embed"),
        (dict(position="learned2d", position_at="layers_shared"), "pos_embed_row"),
        (dict(position="relative"), "blocks/attention/rel_embed"),
    ],
    ids=str,
)
def test_tables_start_as_the_plain_one_does(fields, path):
    config = ViTConfig(**{**TINY, "width": 64, "depth": 2}, **fields)
    table = jax.jit(lambda: flatten_dict(init_params(config, 0), sep="/")[path])()
    table = np.asarray(table, np.float64)
    assert abs(table.std() / 0.02 - 1) < 5 / np.sqrt(2 * table.size)
    assert abs(table.mean()) < 5 * 0.02 / np.sqrt(table.size)
    if path.startswith("blocks/"):
        assert abs(np.corrcoef(table[0].ravel(), table[1].ravel())[0, 1]) < 0.2


def refit(name, value, method="zoom", **fields):
    old = ViTConfig(**TINY, **fields)
    return positions.fitted(name, value, old, dataclasses.replace(old, image_size=(24, 45)), method)


def test_tables_of_rows_and_columns_are_resized_each_by_itself():
    random = np.random.default_rng(0)
    for name, old, new in (("pos_embed_row", 3, 6), ("pos_embed_column", 4, 9)):
        table = random.normal(size=(old, 5))
        got, status = refit(name, table, position="learned2d")
        places = np.linspace(0, old - 1, new)  # the ends stay in place
        wanted = [np.interp(places, np.arange(old), column) for column in table.T]
        np.testing.assert_allclose(got, np.stack(wanted, axis=1), atol=1e-6)
        assert status == "resized 3x4 -> 6x9 (zoom)"
        smooth, _ = refit(name, table, "bilinear_antialias", position="learned2d")
        wanted = jax.image.resize(table, (new, 5), "bilinear", antialias=True)
        np.testing.assert_allclose(smooth, wanted, atol=1e-5)
    prefix = random.normal(size=(1, 5))
    assert refit("pos_embed_prefix", prefix, position="learned2d") == (prefix, "kept")


def test_tables_of_layers_are_resized_one_by_one():
    table = np.random.default_rng(0).normal(size=(3, 1 + N, 5))
    got, _ = refit("blocks/pos_embed", table, position_at="layers")
    assert got.shape == (3, 1 + 6 * 9, 5)
    for layer, resized in zip(table, got, strict=True):
        np.testing.assert_array_equal(resized, refit("pos_embed", layer)[0])
        np.testing.assert_array_equal(resized[0], layer[0])
    rows = np.random.default_rng(0).normal(size=(3, 3, 5))
    got, _ = refit("blocks/pos_embed_row", rows, position="learned2d", position_at="layers")
    np.testing.assert_array_equal(got[1], refit("pos_embed_row", rows[1])[0])


def test_relative_positions_stay_on_their_grid():
    embeddings = np.zeros((1, 2 * N - 1, 2, 4))
    with pytest.raises(UserError, match="grid of 3x4 do not fit one of 6x9: the same offset"):
        refit("blocks/attention/rel_embed", embeddings, position="relative")
    old = ViTConfig(**TINY, position="relative")
    new = dataclasses.replace(old, image_size=(24, 40), patch_size=(8, 10))
    got = positions.fitted("blocks/attention/rel_embed", embeddings, old, new, "zoom")
    assert got == (embeddings, "kept")
    # As many patches are not the same grid.
    new = dataclasses.replace(old, image_size=(16, 15))
    with pytest.raises(UserError, match="grid of 3x4 do not fit one of 4x3"):
        positions.fitted("blocks/attention/rel_embed", embeddings, old, new, "zoom")
