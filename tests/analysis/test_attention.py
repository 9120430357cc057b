"""What attention, filters and positions say, against answers known by hand; and their pictures."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import scipy.special
from conftest import fails
from flax import nnx
from tiny_models import as_float32, random_params

import vit_jax
from vit_jax.__main__ import main
from vit_jax.analysis import attention, plots
from vit_jax.analysis.attention import (
    attention_distance,
    attention_maps,
    embedding_filters,
    filter_components,
    inspect_attention,
    overlay,
    position_similarity,
    rollout,
)
from vit_jax.checkpoints.card import Report
from vit_jax.checkpoints.load import Loaded
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ResNetConfig, ViTConfig
from vit_jax.models.create import structure

# Nothing square and nothing equal, so that no two axes can be confused.
GRID, PATCH = (3, 4), (4, 5)
N = GRID[0] * GRID[1]
TINY = dict(
    image_size=(12, 20), patch_size=PATCH, width=16, depth=3, mlp_dim=24, num_heads=2, num_classes=5
)
HYBRID = {**TINY, "image_size": (16, 24), "patch_size": (1, 2), "resnet": (), "resnet_width": 32}
RESNET = ResNetConfig(image_size=(8, 12), resnet=(1,), resnet_width=32, num_classes=5)


def random_weights(*shape, seed=0):
    logits = np.random.default_rng(seed).normal(size=shape)
    return scipy.special.softmax(logits, axis=-1).astype(np.float32)


def with_prefix(weights, k, share):
    """Puts k tokens before the patches, to which each patch pays `share` of its attention."""
    depth, b, heads, n, _ = weights.shape
    out = random_weights(depth, b, heads, k + n, k + n)
    out[..., k:, :k] = share / k
    out[..., k:, k:] = (1 - share) * weights
    return out


def to(targets):
    """Attention weights [n n] of patches that look at one patch each."""
    return np.eye(N, dtype=np.float32)[np.asarray(targets).ravel()]


ROW, COLUMN = np.indices(GRID)
ITSELF = to(ROW * 4 + COLUMN)
BESIDE = to(ROW * 4 + (COLUMN ^ 1))  # 5 pixels across
BELOW = to((ROW + 1) % 3 * 4 + COLUMN)  # 4 pixels down, from the last row 8 up
SLANTED = to((ROW + 1) % 3 * 4 + (COLUMN ^ 1))


def test_even_attention_reaches_as_far_as_patches_are_apart_on_average():
    total = 0.0
    for i, j in np.ndindex(*GRID):
        for k, m in np.ndindex(*GRID):
            total += np.hypot(4 * (i - k), 5 * (j - m))
    even = np.full((1, 1, 1, N, N), 1 / N, np.float32)
    got = attention_distance(even, GRID, 0, PATCH)
    np.testing.assert_allclose(got, [[total / N**2]], rtol=1e-6)


def test_distances_to_one_patch_are_exact_pixels():
    weights = np.stack([[[ITSELF, BESIDE]], [[BELOW, SLANTED]]])
    slanted = (2 * np.hypot(4, 5) + np.hypot(8, 5)) / 3
    got = attention_distance(weights, GRID, 0, PATCH)
    np.testing.assert_allclose(got, [[0, 5], [16 / 3, slanted]], rtol=1e-6)
    two_images = np.stack([[[ITSELF], [BESIDE]]])
    np.testing.assert_allclose(attention_distance(two_images, GRID, 0, PATCH), [[2.5]], rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_prefix_tokens_have_no_distance(k):
    weights = random_weights(2, 3, 2, N, N)
    wanted = attention_distance(weights, GRID, 0, PATCH)
    got = attention_distance(with_prefix(weights, k, 0.6), GRID, k, PATCH)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    nothing_left = attention_distance(with_prefix(weights, k, 1.0), GRID, k, PATCH)
    np.testing.assert_array_equal(nothing_left, 0)


def test_rollout_of_layers_that_mix_nothing():
    same = np.broadcast_to(np.eye(N, dtype=np.float32), (3, 2, 2, N, N))
    np.testing.assert_allclose(rollout(same, GRID, 0, False), np.full((2, *GRID), 1 / N))
    # A class token that looks at itself knows nothing of the patches.
    np.testing.assert_array_equal(rollout(same, (1, N - 1), 1, True), np.zeros((2, 1, N - 1)))


@pytest.mark.parametrize("k", [0, 1, 3])
def test_rollout_of_attention_to_all_alike_or_to_one_token(k):
    # With the residual, each of 3 layers leaves half in place, and spreads or sends the other half.
    n, class_token = k + N, k > 0
    there = (1 / 8 / N) * (not class_token)  # of a class token's own share, no patch has any
    even = np.full((3, 2, 2, n, n), 1 / n, np.float32)
    wanted = np.full((2, *GRID), 7 / 8 / n + there)
    np.testing.assert_allclose(rollout(even, GRID, k, class_token), wanted, rtol=1e-6)
    to_one = np.zeros((3, 2, 2, n, n), np.float32)
    to_one[..., k + 6] = 1  # row 1, column 2
    wanted = np.full((2, *GRID), there)
    wanted[:, 1, 2] += 7 / 8
    np.testing.assert_allclose(rollout(to_one, GRID, k, class_token), wanted, rtol=1e-6)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_maps_of_attention_to_all_alike_to_one_token_or_to_itself(k):
    n, place = k + N, (GRID, k, k > 0)
    even = np.full((2, 1, 2, n, n), 1 / n, np.float32)
    wanted = np.full((2, 1, 2, *GRID), 1 / n)
    np.testing.assert_allclose(attention_maps(even, *place), wanted, rtol=1e-6)
    to_one = np.zeros((2, 1, 2, n, n), np.float32)
    to_one[0, ..., k + 6] = to_one[1, ..., 0] = 1
    first, last = np.asarray(attention_maps(to_one, *place))
    wanted = np.eye(N)[6].reshape(GRID)
    np.testing.assert_allclose(first, np.broadcast_to(wanted, first.shape), rtol=1e-6)
    # Token 0 is the first patch, or the class token, which no map shows.
    wanted = np.eye(N)[0].reshape(GRID) * (k == 0)
    np.testing.assert_allclose(last, np.broadcast_to(wanted, last.shape), rtol=1e-6)
    itself = np.broadcast_to(np.eye(n, dtype=np.float32), (2, 1, 2, n, n))
    wanted = np.full((2, 1, 2, *GRID), 0 if k else 1 / N)
    np.testing.assert_allclose(attention_maps(itself, *place), wanted, rtol=1e-6)


def test_rollout_of_two_layers_by_hand():
    # Layer 1, mean of two heads: class (1/2 1/4 1/4), patch 1 (0 1/2 1/2). With the residual:
    # class (3/4 1/8 1/8), patch 1 (0 3/4 1/4). Layer 2: the class token looks at patch 1, so it is
    # half class, half patch 1: (3/8 7/16 3/16).
    first = [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0, 0.5, 0.5], [0, 0, 1], [1, 0, 0]],
    ]
    second = [[[0, 1, 0], [1, 0, 0], [0, 1, 0]]] * 2
    weights = np.asarray([[first], [second]], np.float32)
    np.testing.assert_allclose(rollout(weights, (1, 2), 1, True), [[[7 / 16, 3 / 16]]])
    # Without a class token: layer 1 is ((1 0) (1/2 1/2)), layer 2 (1/2 1/2) twice. The other order
    # of the product would give (1/2 1/2).
    weights = np.asarray([[[[[1, 0], [1, 0]]]], [[[[0, 1], [1, 0]]]]], np.float32)
    np.testing.assert_allclose(rollout(weights, (2, 1), 0, False), [[[0.75], [0.25]]])


@pytest.mark.parametrize("k, from_class_token", [(0, False), (1, True), (3, True), (4, False)])
def test_rollout_and_maps_are_rows_of_the_matrices(k, from_class_token):
    n = k + N
    weights = random_weights(3, 2, 2, n, n).astype(np.float64)
    product = np.eye(n)
    for layer in weights.mean(axis=2):
        product = (layer + np.eye(n)) / 2 @ product  # [b n n]

    def read(matrix):
        rows = matrix[..., 0, :] if from_class_token else matrix[..., k:, :].mean(axis=-2)
        return rows[..., k:].reshape(*rows.shape[:-1], *GRID)

    place = (GRID, k, from_class_token)
    weights32 = weights.astype(np.float32)
    np.testing.assert_allclose(rollout(weights32, *place), read(product), rtol=1e-5)
    np.testing.assert_allclose(attention_maps(weights32, *place), read(weights), rtol=1e-5)


def test_overlay_darkens_by_a_bilinear_map():
    image = np.full((2, 4, 3), 0.5, np.float32)
    got = overlay(image, np.asarray([[0.2, 0.4]], np.float32))
    wanted = 0.5 * np.asarray([0.5, 0.625, 0.875, 1])
    np.testing.assert_allclose(got, np.broadcast_to(wanted[:, None], (2, 4, 3)), rtol=1e-6)
    np.testing.assert_array_equal(overlay(image, np.zeros((1, 2), np.float32)), 0)


@functools.cache
def model_of(config, seed=0):
    """A model with random values, none of them a telling zero."""
    params = jax.tree.map(jnp.asarray, as_float32(random_params(config, seed)))
    return nnx.merge(structure(config)[0], params)


def loaded(config, model=None, **preprocess):
    pre = Preprocess(config.image_size, config.in_channels, **preprocess)
    labels = tuple(map(str, range(config.num_classes)))
    return Loaded(model or model_of(config), config, pre, labels, Report((), {}, {}), None)


def random_images(count, channels=3):
    return list(np.random.default_rng(1).integers(256, size=(count, 15, 30, channels), dtype="u1"))


def test_positions_made_by_sines_are_like_their_neighbours():
    model = model_of(ViTConfig(**{**TINY, "width": 64}, position="sincos2d", registers=1))
    got = position_similarity(model)
    assert got.shape == (*GRID, *GRID)
    flat = got.reshape(N, N)
    np.testing.assert_allclose(flat, flat.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(flat), 1)
    # sin^2 + cos^2 of 64 / 4 frequencies: the mean over them of cos(omega), once across, once not.
    omega = 1 / 10_000 ** (np.arange(16) / 15)
    for there, across, down in (((0, 1), 1, 0), ((2, 3), 3, 2)):
        wanted = (np.cos(across * omega).mean() + np.cos(down * omega).mean()) / 2
        assert got[0, 0][there] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_positions_of_a_table_by_hand(rows):
    config = ViTConfig(**TINY, registers=2, position_prefix=rows)
    graphdef, params = nnx.split(model_of(config))
    model = nnx.merge(graphdef, params)
    table = np.full((rows + N, 16), 7.0, np.float32)
    table[rows:] = 0
    table[rows, :2] = 3, 4  # row 0, column 0
    table[rows + 1, 0] = 2
    table[rows + 4, :2] = -6, -8  # row 1, column 0
    model.pos_embed[...] = jnp.asarray(table)
    got = position_similarity(model)
    assert got[0, 0, 0, 1] == pytest.approx(0.6) and got[0, 1, 0, 0] == pytest.approx(0.6)
    assert got[0, 0, 1, 0] == pytest.approx(-1) and got[0, 1, 1, 0] == pytest.approx(-0.6)
    assert got[0, 0, 0, 0] == pytest.approx(1) and got[2, 3, 0, 0] == got[2, 3, 2, 3] == 0


def test_positions_of_two_tables_and_of_the_first_layer():
    # Halves of length 1: patches in one row or column share one half of two, others none.
    config = ViTConfig(**{**TINY, "depth": 2}, position="learned2d", position_at="layers")
    model = model_of(config)
    for name, size in (("pos_embed_row", 3), ("pos_embed_column", 4)):
        table = np.full((2, size, 8), 7.0)
        table[0] = np.eye(8)[:size]
        getattr(model.blocks, name)[...] = jnp.asarray(table, jnp.float32)
    same_row = ROW[:, :, None, None] == ROW
    same_column = COLUMN[:, :, None, None] == COLUMN
    wanted = same_row / 2 + same_column / 2
    np.testing.assert_allclose(position_similarity(model), wanted, atol=1e-6)


def test_models_without_positions_or_attention_say_so():
    with pytest.raises(UserError, match="'relative', which embeds offsets between patches"):
        position_similarity(model_of(ViTConfig(**TINY, position="relative")))
    with pytest.raises(UserError, match="its position is 'none'"):
        position_similarity(model_of(ViTConfig(**TINY, position="none")))
    with pytest.raises(UserError, match="ResNet has no position"):
        position_similarity(model_of(RESNET))
    with pytest.raises(UserError, match="ResNet has no attention"):
        inspect_attention(loaded(RESNET), random_images(1))
    with pytest.raises(UserError, match="at least one image"):
        inspect_attention(loaded(ViTConfig(**TINY)), [])


def test_components_span_what_the_filters_span():
    random = np.random.default_rng(0)
    first, second, mean = np.linalg.qr(random.normal(size=(60, 3)))[0].T
    share = random.normal(size=(2, 40))
    share -= share.mean(axis=1, keepdims=True)
    share[1] -= share[0] * (share[0] @ share[1]) / (share[0] @ share[0])
    kernel = np.outer(first, 5 * share[0]) + np.outer(second, share[1]) + 9 * mean[:, None]
    kernel = kernel.reshape(4, 5, 3, 40).astype(np.float32)
    got = filter_components(kernel, 2)
    assert got.shape == (2, 4, 5, 3)
    for component, wanted in zip(got.reshape(2, 60), (first, second), strict=True):
        wanted = wanted * np.sign(wanted[np.abs(wanted).argmax()])
        np.testing.assert_allclose(component, wanted, atol=1e-5)
        assert np.abs(component).max() == component.max()
    # Upside-down filters have the same components.
    np.testing.assert_allclose(filter_components(-kernel, 2), got, atol=1e-5)


def test_there_are_no_more_components_than_there_can_be():
    kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 64))
    flat = filter_components(kernel).reshape(28, 48)
    np.testing.assert_allclose(flat @ flat.T, np.eye(28), atol=1e-12)
    assert filter_components(kernel[:2, :2, :1]).shape == (4, 2, 2, 1)
    assert filter_components(kernel[..., :9]).shape == (8, 4, 4, 3)


def test_the_filters_that_see_pixels():
    model = model_of(ViTConfig(**TINY))
    np.testing.assert_array_equal(embedding_filters(model), model.patch_embed.kernel[...])
    for config in (ViTConfig(**HYBRID), RESNET):
        root = embedding_filters(model_of(config))
        assert root.shape == (7, 7, 3, 32)
        np.testing.assert_allclose(root.mean(axis=(0, 1, 2)), 0, atol=1e-5)
        np.testing.assert_allclose(root.std(axis=(0, 1, 2)), 1, atol=1e-3)
        assert filter_components(root).shape == (28, 7, 7, 3)


KINDS = {
    "token": dict(registers=1, position_prefix=1),
    "distilled": dict(distillation="head", in_channels=1),
    "gap": dict(pool="gap"),
    "gap-class": dict(pool="gap", class_token=True),
    "map": dict(pool="map", position="relative"),
    "both": dict(pool="token_gap", dtype="bfloat16"),
    "hybrid": HYBRID,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_attention_does_in_a_model(kind, monkeypatch):
    config = ViTConfig(**{**TINY, **KINDS[kind]})
    vit = loaded(config, resize="bicubic_antialias", resize_dtype="float32", mean=0.4, std=0.2)
    images = random_images(3, config.in_channels)
    monkeypatch.setattr(attention, "_AT_ONCE", 8 * config.depth * 2 * config.num_tokens**2)
    got = inspect_attention(vit, images)  # 2 images, then 1

    inputs = np.stack([vit.preprocess(image) for image in images])
    weights = jax.jit(lambda x: vit.model(x, capture="attention")[1]["attention"])(inputs)
    k, from_class_token = config.num_prefix_tokens, kind in ("token", "distilled", "both", "hybrid")
    place = (config.grid, k, from_class_token)
    tolerance = dict(rtol=0.05, atol=2e-3) if config.dtype == "bfloat16" else dict(rtol=1e-4)
    wanted = attention_distance(weights, config.grid, k, config.patch_pixels)
    np.testing.assert_allclose(got.distance, wanted, **tolerance)
    np.testing.assert_allclose(got.maps, attention_maps(weights, *place), **tolerance)
    np.testing.assert_allclose(got.rollout, rollout(weights, *place), **tolerance)
    # The images are those that the model saw, but for values that no screen can show.
    seen = vit.preprocess.normalise(255 * got.images)
    np.testing.assert_allclose(seen, inputs.clip(-0.4 / 0.2, 0.6 / 0.2), atol=1e-5)


def test_a_scan_or_a_loop_give_the_same():
    images = random_images(2)
    scanned = ViTConfig(**TINY, attention="auto")
    looped = ViTConfig(**TINY, attention="xla", scan=False)
    _, params = nnx.split(model_of(scanned))
    again = nnx.merge(structure(looped)[0], params)
    one = inspect_attention(loaded(scanned), images)
    other = inspect_attention(loaded(looped, again), images)
    for name in ("images", "distance", "maps", "rollout"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-5)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models saved, and image files, two of one name."""
    tmp_path = tmp_path_factory.mktemp("files")
    configs = {"vit": ViTConfig(**TINY), "resnet": RESNET}
    configs |= {"none": ViTConfig(**TINY, position="none"), "hybrid": ViTConfig(**HYBRID)}
    configs["relative"] = ViTConfig(**TINY, position="relative")
    for name, config in configs.items():
        vit_jax.save(loaded(config), tmp_path / f"{name}.safetensors", format="vit_jax")
    (tmp_path / "more").mkdir()
    dogs = [tmp_path / "dog.png", tmp_path / "more" / "dog.png"]
    for path, image in zip((*dogs, tmp_path / "cat.jpg"), random_images(3), strict=True):
        PIL.Image.fromarray(image).save(path)
    return tmp_path


def drawn(folder):
    """The names of the pictures in a folder, none of which is blank."""
    for path in folder.iterdir():
        with PIL.Image.open(path) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 100
            assert np.asarray(image.convert("RGB"), float).std() > 1
    return {path.name for path in folder.iterdir()}


WEIGHTS = {"filters.png", "positions.png"}
ONE = {"attention_distance.png", "attention_cat.png", "rollout_cat.png"}
TWO = {f"{what}_{dog}.png" for what in ("attention", "rollout") for dog in ("dog", "dog_2")}
PICTURES = {
    "weights": (["vit", "--pictures=OUT"], WEIGHTS, ""),
    "images last": (
        ["vit", "--pictures=OUT", "dog.png", "cat.jpg", "more/dog.png"],
        WEIGHTS | ONE | TWO,
        "",
    ),
    "images first": (["hybrid", "cat.jpg", "--pictures", "OUT"], WEIGHTS | ONE, ""),
    "resnet": (["resnet", "--pictures=OUT", "cat.jpg"], {"filters.png"}, "ResNet has neither"),
    "no positions": (["none", "--pictures=OUT"], {"filters.png"}, "there is no positions.png"),
    "relative": (["relative", "--pictures=OUT"], {"filters.png"}, "are of offsets, not of places"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_command_draws_just_these(name, files, tmp_path, capsys, monkeypatch):
    (model, *rest), wanted, note = PICTURES[name]
    monkeypatch.chdir(files)
    out = tmp_path / "new" / "pictures"
    rest = [arg.replace("OUT", str(out)) for arg in rest]
    assert main(["inspect", f"{model}.safetensors", *rest]) == 0
    assert drawn(out) == wanted
    lines = capsys.readouterr().out.splitlines()
    notes = [line for line in lines if line.startswith("note: ")]
    assert set(lines) - set(notes) == {f"{out}/{name}" for name in wanted}
    assert len(notes) == bool(note) and (not notes or note in notes[0])


def test_mistakes_about_pictures(files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    inspect = ["inspect", "vit.safetensors"]
    assert "dog.png is drawn with --pictures=DIR only" in fails(capsys, *inspect, "dog.png")
    err = fails(capsys, *inspect, "--pictures=out", "mouse.png")
    assert "there is no image file 'mouse.png'" in err
    assert "dog.png is a file; --pictures must be a folder" in fails(
        capsys, *inspect, "--pictures=dog.png"
    )
    assert "unknown argument '--picture" in fails(capsys, *inspect, "cat.jpg", "--picturez=x")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "[plot]'" in fails(capsys, *inspect, "--pictures=other")
    assert not (files / "other").exists()


def test_inspect_without_pictures_is_as_before(files, capsys):
    assert main(["inspect", str(files / "vit.safetensors")]) == 0
    assert "patch_embed/kernel" in capsys.readouterr().out


def test_pictures_of_large_grids_and_odd_channels():
    similarity = position_similarity(
        model_of(ViTConfig(image_size=(40, 60), patch_size=2, width=8, depth=1, num_heads=1))
    )
    axes = plots.positions(similarity).axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert len(labels) == 16 and labels[0] == "1" and labels[-1] == "30"
    mosaic = axes.images[0].get_array()
    assert mosaic[0, 0] == pytest.approx(1) and mosaic[-1, -1] == pytest.approx(1)
    image = np.random.default_rng(0).uniform(size=(20, 60, 4))
    maps = random_weights(13, 11, 2, 6)  # more layers and heads than there is room for
    *axes, scale = plots.attended_by_heads(image, maps[:1]).axes
    assert scale.get_ylabel() == "share of each panel's largest"
    assert len(axes) == 8 and axes[0].get_ylabel() == "layer 1"
    assert (axes[0].get_title(), axes[-1].get_title()) == ("head 1", "head 11")
    *axes, _ = plots.attended_by_heads(image, maps[:, :1]).axes
    names = [f"layer {i}" for i in (1, 3, 6, 8, 11, 13)]
    assert [cell.get_ylabel() for cell in axes] == names
    for cell, layer in zip(axes, (0, 2, 5, 7, 10, 12), strict=True):
        _, drawn = cell.images  # over the image
        one = maps[layer, 0]
        np.testing.assert_allclose(drawn.get_array(), one / one.max(), rtol=1e-6)
        assert list(drawn.get_extent()) == list(cell.images[0].get_extent())
    components = filter_components(np.random.default_rng(0).normal(size=(4, 4, 2, 16)), 3)
    figure = plots.filters(components)
    assert [len(axes.images) for axes in figure.axes] == [1, 1, 1]
    for axes in figure.axes:
        assert axes.images[0].get_array().shape == (4, 4)


def test_segmented_has_images_truth_and_predictions():
    images = np.arange(3 * 4 * 6, dtype=np.uint8).reshape(3, 4, 6, 1)
    masks = np.array([np.full((4, 6), i) for i in (0, 1, 2)])
    predictions = masks[::-1]
    figure = plots.segmented(images, masks, predictions)
    drawn = [axes.get_images()[0].get_array() for axes in figure.axes]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["image", "truth", "prediction"]
    np.testing.assert_allclose(drawn[1], images[1, ..., 0] / 255)
    assert not drawn[3].any() and drawn[4].any()  # class 0 is black
    for i in range(3):
        np.testing.assert_array_equal(drawn[3 + i], drawn[8 - i])
    assert len(np.unique(np.concatenate(drawn[3:6]).reshape(-1, 3), axis=0)) == 3
