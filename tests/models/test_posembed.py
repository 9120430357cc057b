"""Position embeddings against written-out loops, scipy, OpenCV and jax.image.resize."""

import cv2
import jax
import numpy as np
import pytest
import scipy.ndimage
from numpy_vit import sincos2d

from vit_jax.errors import UserError
from vit_jax.models import posembed

METHODS = ("zoom", "bilinear", "bicubic", "bilinear_antialias", "bicubic_antialias")
UP = [((3, 5), (7, 8)), ((2, 4), (9, 4)), ((14, 14), (24, 24)), ((1, 3), (2, 7))]
DOWN = [((9, 8), (4, 3)), ((24, 24), (14, 14)), ((6, 7), (6, 2)), ((5, 5), (1, 1))]
MIXED = [((3, 9), (7, 4)), ((12, 4), (5, 11))]


def embedding(grid, prefix=0, width=6, seed=0):
    rows = prefix + grid[0] * grid[1]
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def channels(x, grid):
    return [x[:, c].reshape(grid) for c in range(x.shape[1])]


def unchannels(grids):
    return np.stack([g.ravel() for g in grids], axis=1)


def align_corners(old, new_grid):
    """Linear interpolation with the corner samples kept in place, one sample at a time."""

    def place(i, old_size, new_size):
        x = i * (old_size - 1) / (new_size - 1) if new_size > 1 else 0.0
        low = min(int(x), old_size - 1)
        return low, min(low + 1, old_size - 1), x - low

    new = np.zeros(new_grid)
    for i in range(new_grid[0]):
        top, bottom, dy = place(i, old.shape[0], new_grid[0])
        for j in range(new_grid[1]):
            left, right, dx = place(j, old.shape[1], new_grid[1])
            upper = old[top, left] * (1 - dx) + old[top, right] * dx
            lower = old[bottom, left] * (1 - dx) + old[bottom, right] * dx
            new[i, j] = upper * (1 - dy) + lower * dy
    return new


@pytest.mark.parametrize("old, new", UP + DOWN + MIXED)
def test_zoom_is_linear_interpolation_that_keeps_the_corners(old, new):
    x = embedding(old)
    got = posembed.resize(x, old, new, 0, "zoom")
    written_out = unchannels([align_corners(g.astype(np.float64), new) for g in channels(x, old)])
    np.testing.assert_allclose(got, written_out, atol=2e-6)
    factors = (new[0] / old[0], new[1] / old[1])
    scipys = [scipy.ndimage.zoom(g, factors, order=1) for g in channels(x, old)]
    np.testing.assert_allclose(got, unchannels(scipys), atol=1e-6)


@pytest.mark.parametrize(
    "old, new",
    [((8, 8), (26, 42)), ((28, 28), (14, 14)), ((32, 16), (16, 30)), ((24, 24), (42, 7))],
)
def test_zoom_is_right_where_rounding_leaves_the_grid(old, new):
    # scipy's default border puts the last row or column of these grids outside and zeroes it.
    x = embedding(old, width=2)
    got = posembed.resize(x, old, new, 0, "zoom")
    written_out = unchannels([align_corners(g.astype(np.float64), new) for g in channels(x, old)])
    np.testing.assert_allclose(got, written_out, atol=2e-6)


def test_zoom_is_the_default():
    x = embedding((3, 4), prefix=1)
    by_default = posembed.resize(x, (3, 4), (5, 6), 1)
    np.testing.assert_array_equal(by_default, posembed.resize(x, (3, 4), (5, 6), 1, "zoom"))


@pytest.mark.parametrize(
    "method, interpolation", [("bilinear", cv2.INTER_LINEAR), ("bicubic", cv2.INTER_CUBIC)]
)
@pytest.mark.parametrize("old, new", UP + DOWN + MIXED)
def test_plain_methods_equal_opencv(method, interpolation, old, new):
    x = embedding(old)
    got = posembed.resize(x, old, new, 0, method)
    cv2s = [cv2.resize(g, new[::-1], interpolation=interpolation) for g in channels(x, old)]
    np.testing.assert_allclose(got, unchannels(cv2s), atol=2e-5)


@pytest.mark.parametrize(
    "method, kind, antialias",
    [
        ("bilinear", "linear", False),
        ("bilinear_antialias", "linear", True),
        ("bicubic_antialias", "cubic", True),
    ],
)
@pytest.mark.parametrize("old, new", [*UP[:2], *DOWN[:2], *MIXED])
def test_methods_equal_jax_image_resize(method, kind, antialias, old, new):
    x = embedding(old)
    grid = x.reshape(*old, -1)
    wanted = jax.image.resize(grid, (*new, grid.shape[-1]), kind, antialias=antialias)
    got = posembed.resize(x, old, new, 0, method)
    np.testing.assert_allclose(got, np.asarray(wanted).reshape(got.shape), atol=2e-5)


def test_methods_are_five_different_ones():
    x = embedding((6, 6))
    results = [posembed.resize(x, (6, 6), (4, 4), 0, method) for method in METHODS]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert np.abs(a - b).max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prefix", [1, 5])
def test_prefix_rows_stay_bit_for_bit(method, prefix):
    old, new = (3, 5), (6, 4)
    x = embedding(old, prefix)
    got = posembed.resize(x, old, new, prefix, method)
    assert got.shape == (prefix + 24, 6) and got.dtype == np.float32
    assert got[:prefix].tobytes() == x[:prefix].tobytes()
    without = posembed.resize(x[prefix:], old, new, 0, method)
    np.testing.assert_array_equal(got[prefix:], without)


@pytest.mark.parametrize("method", METHODS)
def test_same_grid_returns_the_same_values(method):
    x = embedding((3, 5), prefix=1)
    np.testing.assert_array_equal(posembed.resize(x, (3, 5), (3, 5), 1, method), x)


@pytest.mark.parametrize("method", METHODS)
def test_rows_and_columns_are_not_confused(method):
    # 2x6 and 6x2 have as many rows; resizing to the transposed grid is no identity.
    columns = np.tile(np.arange(6, dtype=np.float32), 2)[:, None]
    got = posembed.resize(columns, (2, 6), (6, 2), 0, method).reshape(6, 2)
    np.testing.assert_allclose(got, np.tile(got[:1], (6, 1)), atol=1e-5)
    assert (got[:, 1] > got[:, 0] + 2).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_stays_constant_on_every_grid(method):
    wrong = []
    for old in range(1, 29):
        for new in range(1, 33):
            grids = (old, 1), (new, 1)
            got = posembed.resize(np.full((old, 1), 3.0, np.float32), *grids, 0, method)
            if got.shape != (new, 1) or not np.allclose(got, 3, rtol=1e-6):
                wrong.append((old, new))
    assert not wrong


def test_rows_that_do_not_fit_the_grid_raise():
    with pytest.raises(UserError, match=r"16 rows.*3x5.*0 prefix.*15 rows"):
        posembed.resize(embedding((3, 5), prefix=1), (3, 5), (4, 4), 0)
    # Also where nothing would be resized.
    with pytest.raises(UserError, match="15 rows"):
        posembed.resize(embedding((3, 5)), (3, 5), (3, 5), 1)


def test_unknown_method_raises_and_names_the_nearest():
    with pytest.raises(UserError, match=r"'bicubik'.*did you mean 'bicubic'\?"):
        posembed.resize(embedding((3, 5)), (3, 5), (4, 4), 0, "bicubik")


@pytest.mark.parametrize("grid, width", [((3, 5), 8), ((14, 14), 192), ((1, 4), 12)])
def test_sincos2d_equals_a_written_out_loop(grid, width):
    got = posembed.sincos2d(grid, width)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, sincos2d(*grid, width), atol=1e-6)
