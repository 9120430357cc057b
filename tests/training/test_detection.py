"""Which location learns which box, and the losses, against loops over locations and boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from vit_jax.models.config import ViTConfig
from vit_jax.models.detector import locations
from vit_jax.training import detection
from vit_jax.training.sharding import BATCH, MeshConfig, make_mesh

CONFIG = ViTConfig(
    image_size=(128, 48),
    patch_size=8,
    width=16,
    depth=1,
    mlp_dim=16,
    num_heads=2,
    num_classes=3,
    pool="locations",
    pyramid=32,
)
N = 1536 + 384 + 96 + 24  # of strides 2, 4, 8 and 16
LEVELS = np.repeat([0, 1, 2, 3], [1536, 384, 96, 24])
PADDING = (-1, 0, 0, 48, 128)


def labels(*images):
    """Rows of boxes, padded with rows that would be as good."""
    most = max(map(len, images)) + 1
    return np.array([[*rows, *[PADDING] * (most - len(rows))] for rows in images], np.float32)


def random_boxes(n, seed):
    random = np.random.default_rng(seed)
    sides = np.exp(random.uniform(np.log(3), np.log((48, 128)), (n, 2)))
    low = random.uniform(0, 1, (n, 2)) * (np.array([48, 128]) - sides)
    return np.column_stack([random.integers(0, 3, n), low, low + sides]).astype(np.float32)


LABEL = labels([*random_boxes(9, 0), (1, 0, 0, 48, 127)], [], random_boxes(4, 1))
assign = jax.jit(detection.assign, static_argnums=0)
sums = jax.jit(detection.sums, static_argnums=0)


def assigned(boxes):
    centres, strides = (each.astype(np.float64) for each in locations(CONFIG))
    rows = []
    for (x, y), stride, index in zip(centres, strides, LEVELS, strict=True):
        lower, upper = 4 * stride * (index > 0), 8 * stride if index < 3 else np.inf
        best, smallest = -1, np.inf
        for row, (kind, x0, y0, x1, y1) in enumerate(boxes.astype(np.float64)):
            sides = x - x0, y - y0, x1 - x, y1 - y
            near = abs(x - (x0 + x1) / 2) < 1.5 * stride and abs(y - (y0 + y1) / 2) < 1.5 * stride
            if kind < 0 or min(sides) <= 0 or not near or not lower < max(sides) <= upper:
                continue
            if (area := (x1 - x0) * (y1 - y0)) < smallest:
                best, smallest = row, area
        rows.append(best)
    return np.array(rows)


def test_each_location_learns_the_smallest_of_the_boxes_that_fit():
    found = assign(CONFIG, LABEL)
    wanted = np.stack([assigned(each) for each in LABEL])
    np.testing.assert_array_equal(found, wanted)
    for index in range(4):  # all maps learn
        assert (wanted[:, LEVELS == index] >= 0).any()
    counted = detection.positives(CONFIG, jnp.asarray(LABEL))
    np.testing.assert_array_equal(counted, (wanted >= 0).sum(axis=1))
    assert counted[1] == 0 and min(counted[0], counted[2]) > 20


@pytest.mark.parametrize(
    "boxes, wanted",
    [
        # The largest distance from (25, 41), on the map of stride 2, is 16, which is up to 8.
        ([(0, 9, 33, 38, 49)], {(25, 41, 2): 0, (22, 42, 4): -1}),
        # From (22, 42), of stride 4, it is now over 4 strides; from (21, 41) it is over 8.
        ([(0, 9, 33, 38.1, 49)], {(22, 42, 4): 0, (25, 41, 2): 0, (21, 41, 2): -1}),
        # Of two boxes of one size the first, and a smaller one before both.
        ([(1, 20, 20, 30, 30), (2, 20, 20, 30, 30)], {(25, 25, 2): 0}),
        ([(1, 20, 20, 30, 30), (2, 20, 20, 30, 30), (0, 21, 21, 29, 29)], {(25, 25, 2): 2}),
        # 3 pixels from the centre are not less than 1.5 strides; on a side is not inside.
        ([(0, 16, 20, 28, 30)], {(25, 25, 2): -1, (23, 25, 2): 0}),
        ([(0, 23, 24, 25, 26)], {(25, 25, 2): -1, (23, 25, 2): -1}),
    ],
)
def test_limits_are_those_of_the_docstring(boxes, wanted):
    centres, strides = locations(CONFIG)
    label = np.full((1, 4, 5), PADDING, np.float32)
    label[0, : len(boxes)] = boxes
    found = assign(CONFIG, label)[0]
    for place, row in wanted.items():
        index = (np.column_stack([centres, strides]) == place).all(axis=1).argmax()
        assert found[index] == row, place


def outputs_of(seed, b=3):
    outputs = np.random.default_rng(seed).normal(size=(b, N, 8)) * 2
    outputs[..., 3:7] = np.maximum(outputs[..., 3:7] + 1, 0)  # some boxes have no area
    return outputs.astype(np.float32)


def losses(outputs, boxes):
    """The three sums of an image."""
    centres, strides = (each.astype(np.float64) for each in locations(CONFIG))
    rows, outputs = assigned(boxes), outputs.astype(np.float64)
    p, right = 1 / (1 + np.exp(-outputs[:, :3])), np.zeros((N, 3), bool)
    box_loss = centerness_loss = 0.0
    for i in np.flatnonzero(rows >= 0):
        kind, *wanted = boxes[rows[i]].astype(np.float64)
        right[i, int(kind)] = True
        (x, y), (left, top, r, bottom) = centres[i], outputs[i, 3:7] * strides[i]
        found = x - left, y - top, x + r, y + bottom
        sides = [min(found[2 + a], wanted[2 + a]) - max(found[a], wanted[a]) for a in (0, 1)]
        inside = max(sides[0], 0) * max(sides[1], 0)
        union = sum((q[2] - q[0]) * (q[3] - q[1]) for q in (found, wanted)) - inside
        around = np.prod(
            [max(found[2 + a], wanted[2 + a]) - min(found[a], wanted[a]) for a in (0, 1)]
        )
        box_loss += 1 - (inside / union - (around - union) / around)
        across, down = (
            sorted((x - wanted[0], wanted[2] - x)),
            sorted((y - wanted[1], wanted[3] - y)),
        )
        target = np.sqrt(across[0] / across[1] * down[0] / down[1])
        q = 1 / (1 + np.exp(-outputs[i, 7]))
        centerness_loss -= target * np.log(q) + (1 - target) * np.log(1 - q)
    focal = np.where(right, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log1p(-p)).sum()
    return focal, box_loss, centerness_loss


def test_losses_are_those_written_out():
    outputs = outputs_of(2)
    found = sums(CONFIG, outputs, LABEL)
    wanted = np.array([losses(*each) for each in zip(outputs, LABEL, strict=True)])
    assert set(found) == {"loss", "class_loss", "box_loss", "centerness_loss"}
    for i, name in enumerate(("class_loss", "box_loss", "centerness_loss")):
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], wanted[:, i], rtol=1e-5)
    np.testing.assert_allclose(found["loss"], wanted.sum(axis=1), rtol=1e-5)
    assert found["box_loss"][1] == found["centerness_loss"][1] == 0  # no box is there
    half = sums(CONFIG, jnp.asarray(outputs, jnp.bfloat16), LABEL)
    assert half["loss"].dtype == jnp.float32
    np.testing.assert_allclose(half["loss"], found["loss"], rtol=0.01)


def test_gradients_are_finite_and_of_what_learns():
    outputs = outputs_of(3)
    outputs[..., 3:7][:, ::2] = 0  # as of a new model
    outputs[0, :3, :3] = 1e4, -1e4, 90
    gradient = np.asarray(jax.grad(lambda x: sums(CONFIG, x, LABEL)["loss"].sum())(outputs))
    assert np.isfinite(gradient).all()
    learns = np.asarray(assign(CONFIG, LABEL) >= 0)
    assert not gradient[..., 3:][~learns].any()
    np.testing.assert_array_equal(gradient[..., 7] != 0, learns)
    assert (np.abs(gradient[..., :3]).sum(axis=-1) > 0).mean() > 0.99


def test_devices_do_not_need_one_anothers_images():
    placed = NamedSharding(make_mesh(MeshConfig(data=2, fsdp=4)), BATCH)
    shapes = [(8, N, 8), LABEL[[0] * 8].shape]
    outputs, label = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=placed) for s in shapes)

    def step(outputs, label):
        learn = jax.grad(lambda x: sums(CONFIG, x, label)["loss"].sum())(outputs)
        return learn, detection.positives(CONFIG, label)

    text = jax.jit(step).lower(outputs, label).compile().as_text()
    for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert kind not in text


def test_a_perfect_box_loses_nothing_and_a_distant_one_two_at_most():
    sides = jnp.array([[1.0, 2, 3, 4]])
    np.testing.assert_allclose(detection.giou(sides, sides), 1, atol=1e-6)
    assert -1 < detection.giou(jnp.zeros((1, 4)), sides)[0] <= 0
    np.testing.assert_allclose(
        detection.centered(jnp.array([[3.0, 5, 3, 5], [1, 1, 4, 1]])), [1, 0.5]
    )
