"""Boxes from outputs, against loops in NumPy and OpenCV's non-maximum suppression."""

import dataclasses
import functools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from vit_jax.checkpoints.detect import best, decoded, suppressed
from vit_jax.models.config import ViTConfig
from vit_jax.models.detector import locations
from vit_jax.training.sharding import BATCH, MeshConfig, make_mesh

K = 3
CONFIG = ViTConfig(
    image_size=(24, 32),
    patch_size=8,
    width=16,
    depth=1,
    mlp_dim=16,
    num_heads=2,
    num_classes=K,
    pool="locations",
    pyramid=32,
)
N = 192 + 48 + 12 + 2
SIZES = np.array([(48, 32), (24, 32), (100, 333), (7, 5)] * 2, np.int32)


def outputs_of(seed, b=8, shift=-1.0):
    outputs = np.random.default_rng(seed).normal(size=(b, N, K + 5))
    outputs[..., :K] += shift
    outputs[..., K : K + 4] = np.maximum(outputs[..., K : K + 4] * 2 + 3, 0)
    return outputs.astype(np.float32)


def ious(one, others):
    low, high = np.maximum(one[:2], others[:, :2]), np.minimum(one[2:], others[:, 2:])
    inside = np.maximum(high - low, 0).prod(axis=1)
    union = (one[2:] - one[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - inside
    return inside / np.maximum(union, 1e-30)


def greedy(corners, classes, iou):
    """The places of boxes that stay, of boxes that are the best first."""
    left, kept, corners = np.arange(len(corners)), [], corners.astype(np.float64)
    while len(left):
        first, left = left[0], left[1:]
        kept.append(first)
        over = (ious(corners[first], corners[left]) > iou) & (classes[left] == classes[first])
        left = left[~over]
    return kept


def opencv(corners, classes, scores, threshold, iou):
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    found = cv2.dnn.NMSBoxesBatched(
        boxes.astype(np.float64).tolist(), scores.tolist(), classes.tolist(), threshold, iou
    )
    return np.asarray(found, np.int64).reshape(-1)


def boxes_of(n, seed, spread=60):
    random = np.random.default_rng(seed)
    low = random.uniform(0, spread, (n, 2))
    return np.concatenate([low, low + random.uniform(2, 30, (n, 2))], axis=1).astype(np.float32)


nms = jax.jit(functools.partial(suppressed, iou=0.6))


def test_a_thousand_boxes_are_suppressed_as_one_after_the_other():
    corners = np.stack([boxes_of(1000, 0), boxes_of(1000, 1, spread=5), boxes_of(1000, 2)])
    random = np.random.default_rng(3)
    classes = np.stack([random.integers(0, K, 1000), np.zeros(1000), np.arange(1000)])
    classes = classes.astype(np.int32)
    scores = np.linspace(1, 0.1, 1000).astype(np.float32)  # the best are first
    found = ~np.asarray(nms(corners, classes, np.ones((3, 1000), bool)))
    for i in range(3):
        wanted = greedy(corners[i], classes[i], 0.6)
        np.testing.assert_array_equal(np.flatnonzero(found[i]), wanted)
        there = opencv(corners[i], classes[i], scores, 0.05, 0.6)
        np.testing.assert_array_equal(np.sort(there), wanted)
    assert found[2].all() and 100 < found[0].sum() < 900 and found[1].sum() < 200


def test_chains_equal_boxes_and_boxes_that_are_not_there():
    # Each overlaps its neighbours alone, so that every other one stays.
    steps = np.arange(9, dtype=np.float32)
    chain = np.stack([steps, 0 * steps, steps + 6, 0 * steps + 6], axis=1)
    equal = np.repeat(chain[:1], 9, axis=0)
    flat = np.repeat(chain[:1, [0, 1, 2, 1]], 9, axis=0)  # of no area
    corners, classes = np.stack([chain, equal, flat, equal]), np.zeros((4, 9), np.int32)
    valid = np.ones((4, 9), bool)
    valid[3, 0] = False
    found = np.asarray(nms(corners, classes, valid))
    np.testing.assert_array_equal(found[0], np.arange(9) % 2 == 1)
    np.testing.assert_array_equal(found[1], np.arange(9) > 0)
    assert not found[2].any()
    np.testing.assert_array_equal(found[3], np.arange(9) > 1)  # the first suppresses nothing
    assert greedy(chain, classes[0], 0.6) == [0, 2, 4, 6, 8]


def test_boxes_and_scores_are_those_of_distances_and_logits():
    outputs = outputs_of(0, b=2)
    corners, scores = decoded(CONFIG, jnp.asarray(outputs))
    (centres, strides), exact = locations(CONFIG), outputs.astype(np.float64)
    left, top, right, bottom = np.moveaxis(exact[..., K : K + 4] * strides[:, None], -1, 0)
    x, y = centres.T
    wanted = np.stack([x - left, y - top, x + right, y + bottom], axis=-1)
    np.testing.assert_allclose(corners, wanted, rtol=1e-5, atol=1e-4)
    p = 1 / (1 + np.exp(-exact[..., [*range(K), K + 4]]))
    np.testing.assert_allclose(scores, np.sqrt(p[..., :K] * p[..., K:]), rtol=1e-5)
    half = decoded(CONFIG, jnp.asarray(outputs, jnp.bfloat16))
    assert half[0].dtype == half[1].dtype == jnp.float32


def wanted_of(outputs, sizes, threshold=0.05, candidates=1000, most=100, iou=0.6):
    """`best`, one image and one box after another."""
    corners, scores = map(np.asarray, decoded(CONFIG, jnp.asarray(outputs)))
    for image, (h, w) in enumerate(sizes):
        own = np.array([w, h, w, h], np.float32)
        boxes = corners[image] * np.array([1 / 32, 1 / 24] * 2, np.float32) * own
        boxes = np.clip(boxes, 0, own)
        flat = scores[image].reshape(-1)
        order = np.argsort(-flat, kind="stable")
        real = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        order = order[(flat[order] > threshold) & real[order // K]][:candidates]
        order = order[greedy(boxes[order // K], order % K, iou)][:most]
        yield boxes[order // K], order % K, flat[order]


CASES = {
    "all": ({}, 0, -1.0),
    "few candidates": (dict(candidates=50, most=20, iou=0.3), 1, -1.0),
    "more than there are": (dict(candidates=5000, most=800), 2, -1.0),
    "none": (dict(threshold=0.9), 3, -3.0),
    "equal scores": (dict(candidates=200), 4, -1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_best_are_those_of_one_box_after_the_other(name):
    options, seed, shift = CASES[name]
    outputs = outputs_of(seed, shift=shift)[:3]
    if name == "equal scores":
        outputs[..., :K], outputs[..., -1] = np.round(outputs[..., :K]), 1
    found = best(CONFIG, jnp.asarray(outputs), jnp.asarray(SIZES[:3]), **options)
    most = options.get("most", 100)
    assert found["corners"].shape == (3, most, 4) and found["corners"].dtype == jnp.float32
    assert found["classes"].dtype == jnp.int32 and found["scores"].shape == (3, most)
    counts = []
    for image, wanted in enumerate(wanted_of(outputs, SIZES[:3], **options)):
        n = len(wanted[0])
        counts.append(n)
        for key, values in zip(("corners", "classes", "scores"), wanted, strict=True):
            np.testing.assert_allclose(found[key][image, :n], values, rtol=1e-5, atol=1e-4)
        assert not np.any(found["corners"][image, n:]) and not np.any(found["scores"][image, n:])
        assert (np.asarray(found["classes"][image, n:]) == -1).all()
    assert max(counts) == 0 if name == "none" else min(counts) > 10


def test_opencv_finds_the_same():
    outputs = outputs_of(5)[:1]
    found = best(CONFIG, jnp.asarray(outputs), jnp.asarray(SIZES[:1]), candidates=N * K, most=N * K)
    corners, scores = (np.asarray(each)[0] for each in decoded(CONFIG, jnp.asarray(outputs)))
    own = np.array([32, 48, 32, 48], np.float32)
    corners = np.clip(corners * np.array([1 / 32, 1 / 24] * 2, np.float32) * own, 0, own)
    real = (corners[:, 2:] > corners[:, :2]).all(axis=1)
    place = np.repeat(np.flatnonzero(real), K)
    classes, scores = np.tile(np.arange(K), real.sum()), scores[real].reshape(-1)
    kept = opencv(corners[place], classes, scores, 0.05, 0.6)
    kept = kept[np.argsort(-scores[kept], kind="stable")]
    count = int((np.asarray(found["classes"]) >= 0).sum())
    assert count == len(kept) > 100
    np.testing.assert_allclose(found["scores"][0, :count], scores[kept], rtol=1e-5)
    np.testing.assert_allclose(found["corners"][0, :count], corners[place[kept]], atol=1e-4)


def test_each_device_sees_to_its_own_images():
    outputs, options = outputs_of(6), dict(candidates=50, most=20)
    alone = best(CONFIG, jnp.asarray(outputs), jnp.asarray(SIZES), **options)
    spread = NamedSharding(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), BATCH)
    inputs = jax.device_put((outputs, SIZES), spread)
    compiled = best.lower(CONFIG, *inputs, **options, spread=spread).compile()
    for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert kind not in compiled.as_text()
    found = compiled(*inputs)
    for key, values in alone.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-6)
        assert found[key].sharding.is_equivalent_to(spread, found[key].ndim)


def test_what_is_beyond_the_image_is_cut_off():
    outputs = np.zeros((1, N, K + 5), np.float32)
    outputs[..., :K], outputs[..., K + 4] = -9, 9
    outputs[0, -1, 1], outputs[0, -1, K : K + 4] = 9, 100
    outputs[0, 0, 2] = 9  # and a box of no area is none
    config = dataclasses.replace(CONFIG, dtype="bfloat16")  # which changes nothing
    found = best(config, jnp.asarray(outputs), jnp.asarray([(64, 30)], dtype=jnp.int32))
    np.testing.assert_allclose(found["corners"][0, 0], [0, 0, 30, 64])
    assert found["classes"][0].tolist() == [1] + [-1] * 99
