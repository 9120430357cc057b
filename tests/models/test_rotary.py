"""Rotary positions: against rotations of pairs written out, in all ways to run a model."""

import dataclasses

import jax
import numpy as np
import numpy_vit
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from tiny_models import as_float32, random_images, random_params, relative_error, run

from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.models.rotary import Rotary
from vit_jax.training.sharding import BATCH, MeshConfig, make_mesh, placement

TINY = dict(image_size=(8, 15), patch_size=(4, 5), width=24, mlp_dim=20, num_heads=3, num_classes=5)
EVA02 = Rotary("index", base=10_000.0, reference=(4, 6), layout="pairs")
MIXED = Rotary("index", base=10.0, axes="xy", layout="pairs", learned=True)
PE = Rotary("index", base=10_000.0, reference=(4, 4), offset=1.0, axes="xy", layout="pairs")


def angles(rotary, row, column, grid, head_dim, learned, moved=lambda y, x: (y, x)):
    """The angles of a patch's pairs, one by one; `learned` are a head's frequencies, if any."""
    if rotary.coordinates == "centred":
        y, x = moved(*((2 * i + 1) / n - 1 for i, n in ((row, grid[0]), (column, grid[1]))))
        y, x = 2 * np.pi * y, 2 * np.pi * x
    else:
        h, w = rotary.reference or grid
        y, x = (row + rotary.offset) * h / grid[0], (column + rotary.offset) * w / grid[1]
    frequencies = [rotary.base ** (-4 * i / head_dim) for i in range(head_dim // 4)]
    first, second = (y, x) if rotary.axes == "yx" else (x, y)
    if learned is not None:
        return [first * f + second * g for f, g in zip(*learned, strict=True)]
    return [first * f for f in frequencies] + [second * f for f in frequencies]


def rotated(vector, turns, layout):
    """Each pair of channels as a complex number, times exp(i angle)."""
    out, half = vector.copy(), len(vector) // 2
    for i, turn in enumerate(turns):
        a, b = (i, i + half) if layout == "halves" else (2 * i, 2 * i + 1)
        number = (vector[a] + 1j * vector[b]) * np.exp(1j * turn)
        out[a], out[b] = number.real, number.imag
    return out


def normalised(x, p, eps=1e-6):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def attention(x, p, config, *moved):
    """Weights [heads n n] and output of a block's attention, for normalised tokens x [n d]."""
    kernel, bias = p["qkv"]["kernel"], p["qkv"].get("bias")
    if bias is not None and len(bias) == 2:
        bias = np.stack([bias[0], 0 * bias[0], bias[1]])
    prefix, grid, joined, found = config.num_prefix_tokens, config.grid, [], []
    for head in range(config.num_heads):
        q, k, v = (
            x @ kernel[:, i, head] + (0 if bias is None else bias[i, head]) for i in range(3)
        )
        for patch in range(grid[0] * grid[1]):
            learned = p["rotary_freqs"][:, head] if "rotary_freqs" in p else None
            place = divmod(patch, grid[1])
            turns = angles(config.rotary, *place, grid, config.head_dim, learned, *moved)
            for part in (q, k):
                part[prefix + patch] = rotated(part[prefix + patch], turns, config.rotary.layout)
        weights = np.exp(q @ k.T / np.sqrt(config.head_dim))
        weights /= weights.sum(axis=-1, keepdims=True)
        found.append(weights)
        joined.append(weights @ v)
    y = np.concatenate(joined, axis=-1)
    if config.attention_norm:
        y = normalised(y, p["norm"])
    return np.stack(found), y @ p["out"]["kernel"].reshape(y.shape[-1], -1) + p["out"]["bias"]


def block(x, p, config, *moved):
    weights, y = attention(normalised(x, p["norm1"]), p["attention"], config, *moved)
    x = x + y
    gate, y = np.split(normalised(x, p["norm2"]) @ p["mlp"]["fc1"]["kernel"], 2, axis=-1)
    gate_bias, bias = np.split(p["mlp"]["fc1"]["bias"], 2)
    y = (gate + gate_bias) / (1 + np.exp(-gate - gate_bias)) * (y + bias)
    y = normalised(y, p["mlp"]["norm"]) if config.mlp_norm else y
    return weights, x + y @ p["mlp"]["fc2"]["kernel"] + p["mlp"]["fc2"]["bias"]


CASES = {
    "dinov3": dict(position="rope", registers=2, key_bias=False),
    "dinov3 without biases": dict(position="rope", qkv_bias=False, pool="gap"),
    "eva02": dict(rotary=EVA02, key_bias=False, mlp_norm=True),
    "eva02 clip": dict(rotary=EVA02, key_bias=False, mlp_norm=True, attention_norm=True),
    "pe": dict(rotary=PE),
    "mixed": dict(position="rope", rotary=MIXED),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_those_written_out(name):
    config = ViTConfig(**TINY, depth=2, mlp="swiglu", **CASES[name])
    params, images = random_params(config), random_images(config)
    _, found = run(config, params, images, capture=("patches", "tokens", "attention"))
    for i in range(2):
        x = np.asarray(found["patches"][i], np.float64)
        tokens = [params[n][0] for n in ("cls_token", "registers") if n in params]
        x = np.concatenate([*tokens, x]) + params.get("pos_embed", 0)
        for layer in range(2):
            own = jax.tree.map(lambda leaf: leaf[layer], params["blocks"])  # noqa: B023
            weights, x = block(x, own, config)
            assert relative_error(found["attention"][layer, i], weights) < 1e-5
            assert relative_error(found["tokens"][layer, i], x) < 1e-5


def move_of(rotary, key):
    """A draw of DINOv3's augmentation of places (arXiv 2508.10104), written out, by a key."""
    draws = [
        2 * np.float64(jax.random.uniform(each, shape)) - 1
        for each, shape in zip(jax.random.split(key, 3), ((2,), (2,), ()), strict=True)
    ]  # in [-1, 1)
    shift = np.zeros(2) if rotary.shift is None else rotary.shift * draws[0]
    jitter, rescale = (
        np.ones(2) if most is None else most**draw
        for most, draw in zip((rotary.jitter, rotary.rescale), draws[1:], strict=True)
    )
    return lambda *place: (np.array(place) + shift) * jitter * rescale


MOVED = {
    "all": dict(shift=0.25, jitter=1.5, rescale=2.0),
    "one": dict(rescale=2.0),
    "learned": dict(shift=0.5, jitter=2.0, learned=True, layout="pairs"),
}


@pytest.mark.parametrize("name", MOVED)
def test_training_moves_the_patches_of_all_images_by_one_draw(name):
    """Scanned, looped over and rematerialised; the tokens before them have no place."""
    rotary = Rotary(**MOVED[name])
    config = ViTConfig(
        **TINY, depth=2, mlp="swiglu", position="rope", rotary=rotary, registers=1, scan=True
    )
    params, images, found = random_params(config), random_images(config), {}
    for seed in (0, 1):
        key = jax.random.key(seed)
        capture = dict(key=key, capture=("patches", "tokens", "attention"))
        logits, found[seed] = run(config, params, images, **capture)
        moved = move_of(rotary, jax.random.fold_in(jax.random.split(key)[0], 2))
        for i in range(2):
            x = np.asarray(found[seed]["patches"][i], np.float64)
            x = np.concatenate([params["cls_token"][0], params["registers"][0], x])
            for layer in range(2):
                own = jax.tree.map(lambda leaf: leaf[layer], params["blocks"])  # noqa: B023
                weights, x = block(x, own, config, moved)
                assert relative_error(found[seed]["attention"][layer, i], weights) < 1e-5
                assert relative_error(found[seed]["tokens"][layer, i], x) < 1e-5
    assert np.abs(found[0]["attention"] - found[1]["attention"]).max() > 0.02
    for change in (dict(scan=False), dict(remat="full")):
        again = run(dataclasses.replace(config, **change), params, images, key=key)
        assert relative_error(again, np.asarray(logits)) < 1e-6
    # Without a key nothing moves.
    still = dataclasses.replace(config, rotary=rotary.plain)
    assert not rotary.plain.augments
    wanted = np.asarray(run(still, params, images))
    assert relative_error(run(config, params, images), wanted) < 1e-6


def test_places_are_moved_as_far_as_said_and_no_further():
    rotary, places = Rotary(shift=0.5, jitter=1.5, rescale=3.0), np.zeros((3, 2))
    places[1:] = 2 * np.pi * np.array([[-1, -1], [1, 1]])
    keys = jax.random.split(jax.random.key(0), 2000)
    found = np.asarray(jax.vmap(lambda key: rotary.augmented(places, 1, key))(keys))
    assert (found[:, 0] == 0).all()  # a prefix token
    first, last = found[:, 1] / (2 * np.pi), found[:, 2] / (2 * np.pi)
    scale, shift = (last - first) / 2, (last + first) / (last - first)  # [draws 2]
    for value, most in ((shift, 0.5), (np.log(scale), np.log(4.5))):
        assert 0.9 * most < value.max() <= most + 1e-5 and -most - 1e-5 <= value.min() < -0.9 * most
        np.testing.assert_allclose(value.mean(0), 0, atol=0.1 * most)
    apart = np.log(scale[:, 0] / scale[:, 1])  # of two jitters; the rescaling is the same
    assert 1.8 * np.log(1.5) < np.abs(apart).max() <= 2 * np.log(1.5) + 1e-5
    # Log-uniform: uniform numbers of a variance of a third of their square.
    assert scale[:, 0].size * 0.45 < (scale[:, 0] < 1).sum() < scale[:, 0].size * 0.55
    wanted = (np.log(1.5) ** 2 + np.log(3.0) ** 2) / 3
    np.testing.assert_allclose(np.log(scale).var(0), wanted, rtol=0.1)


def test_scan_and_loop_and_remat_compute_the_same():
    config = ViTConfig(**TINY, depth=2, **CASES["eva02 clip"], scan=True)
    params, images = random_params(config), random_images(config)
    wanted = np.asarray(run(config, params, images))
    for change in (dict(scan=False), dict(scan=True, remat="full")):
        found = run(dataclasses.replace(config, **change), params, images)
        assert relative_error(found, wanted) < 1e-6


@pytest.mark.parametrize("rotary", [None, MIXED], ids=["dinov3", "mixed"])
def test_dropped_patches_take_their_positions_with_them(rotary):
    """The place of what is kept shows: attention is a part of the whole image's, renormalised."""
    rope = dict(position="rope", rotary=rotary, patch_dropout=0.5)
    config = ViTConfig(**TINY, depth=1, registers=1, **rope)
    params, images = random_params(config), random_images(config, n=6)
    whole = run(config, params, images, capture=("attention", "patches"))[1]
    seen = run(config, params, images, key=jax.random.key(1), capture="attention")[1]["attention"][
        0
    ]
    prefix, kept = config.num_prefix_tokens, set()
    for image in range(6):
        every, part = np.asarray(whole["attention"][0, image]), np.asarray(seen[image])
        logits = np.log(every)
        chosen = []
        for token in range(part.shape[1]):  # found by its logits with the prefix tokens
            left = np.log(part[:, token, :prefix]) - np.log(part[:, token, :1])
            right = logits[:, :, :prefix] - logits[:, :, :1]
            chosen.append(int(np.abs(right - left[:, None]).max(axis=(0, 2)).argmin()))
        assert chosen == sorted(chosen) and chosen[:prefix] == list(range(prefix))
        some = every[:, chosen][:, :, chosen]
        np.testing.assert_allclose(part, some / some.sum(-1, keepdims=True), atol=1e-5)
        kept.add(tuple(chosen))
    assert len(kept) > 2


def test_in_bfloat16_angles_keep_their_digits():
    """A rotation in bfloat16 would be 0.4% off; queries and keys rounded once each are less."""
    config = ViTConfig(**TINY, depth=1, **CASES["eva02"])
    params, images = random_params(config), random_images(config)
    exact = run(config, params, images, capture="attention")[1]["attention"]
    half = dataclasses.replace(config, dtype="bfloat16")
    found = run(half, params, images, capture="attention")[1]["attention"]
    assert 1e-4 < np.abs(np.asarray(found) - np.asarray(exact)).max() < 0.03


def test_learned_frequencies_start_along_two_directions_at_a_right_angle():
    model = structure(ViTConfig(**TINY, depth=3, position="rope", rotary=MIXED))[1]
    assert model["blocks"]["attention"]["rotary_freqs"].shape == (3, 2, 3, 4)
    found = np.asarray(MIXED.frequencies(jax.random.key(0), 3, 8), np.float64)  # [2 heads 4]
    first, second = found[..., :2], found[..., 2:]
    np.testing.assert_allclose((first * second).sum(0), 0, atol=1e-6)
    for half in (first, second):
        np.testing.assert_allclose((half**2).sum(0) ** 0.5, [[1, 10**-0.5]] * 3, rtol=1e-5)
    assert len({round(float(f), 3) for f in found[0, :, 0]}) == 3  # a direction for each head


def test_what_is_stored():
    shapes = structure(ViTConfig(**TINY, depth=2, mlp="swiglu", **CASES["eva02 clip"]))[1]
    block = shapes["blocks"]
    assert block["attention"]["qkv"]["bias"].shape == (2, 2, 3, 8)  # of queries and values
    assert block["attention"]["norm"]["scale"].shape == (2, 24)
    assert block["mlp"]["norm"]["scale"].shape == (2, 20)
    config = ViTConfig(**TINY, depth=2, position="rope")
    assert config.rotary == Rotary("centred", 100.0) and "pos_embed" not in structure(config)[1]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(position="none", rotary=EVA02), "set model.position to 'rope'"),
        (dict(position="relative", rotary=EVA02), "does not go with model.position 'relative'"),
        (dict(position="rope", num_heads=4), "heads of 4, 8, 12, ... channels, not 6"),
        (dict(qkv_bias=False, key_bias=False), "key_bias is false, and so is model.qkv_bias"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ViTConfig(**(TINY | fields))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(coordinates="centered"), "coordinates is 'centered'"),
        (dict(base=1.0), "base is 1.0; expected a number above 1"),
        (dict(reference=(16, 16)), "reference is for coordinates 'index'"),
        (dict(coordinates="index", reference=(16, 0)), "expected a grid"),
        (dict(rescale=0.5), "rescale is 0.5; expected a number from 1 up, or None"),
        (dict(shift=-0.5), "shift is -0.5; expected a number from 0 up"),
        (dict(jitter=float("inf")), "jitter is inf; expected"),
        (dict(coordinates="index", rescale=2.0), "rescale is for coordinates 'centred'"),
    ],
    ids=str,
)
def test_rotations_that_do_not_exist_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Rotary(**fields)


def test_heads_on_several_devices_rotate_alike():
    """Queries and keys are split by heads; the table is on every device."""
    fields = TINY | dict(width=32, num_heads=4, mlp_dim=24, depth=2, mlp="swiglu")
    config = ViTConfig(**fields, **CASES["eva02 clip"])
    params, images = as_float32(random_params(config)), random_images(config, n=4)
    wanted = np.asarray(run(config, params, images))
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    graphdef, shapes = structure(config)
    placed = jax.device_put(params, placement(shapes, mesh))
    assert placed["blocks"]["attention"]["qkv"]["bias"].sharding.spec[2] == "tensor"
    split = jax.device_put(images.astype(np.float32), NamedSharding(mesh, BATCH))
    with jax.default_matmul_precision("highest"):
        found = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))(placed, split)
    assert relative_error(found, wanted) < 1e-5


def test_a_pooling_of_all_tokens_with_heads_of_its_own():
    """The Perception Encoder's: no LayerNorm before it, and the class token is read, too."""
    pooling = dict(pool="map", class_token=True, pool_heads=2, pool_mlp_dim=12, pool_prefix=True)
    config = ViTConfig(**TINY, depth=1, rotary=PE, final_norm=False, **pooling)
    params, images = random_params(config), random_images(config)
    assert "norm" not in params
    _, found = run(config, params, images, capture=("tokens", "pooled"))
    head = params["attention_pool"]
    for i in range(2):
        x = np.asarray(found["tokens"][0, i], np.float64)
        y, _ = numpy_vit.attention(head["probe"][0], x, head["attention"])
        y = y + numpy_vit.mlp(normalised(y, head["norm"]), head["mlp"], "tanh")
        assert relative_error(found["pooled"][i], y[0]) < 1e-5
