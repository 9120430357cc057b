"""The head of detection on a pyramid's maps against equations written out here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from test_dense import pictures
from test_pyramid import doubled, gelu, level, norm
from tiny_models import as_float32, random_params, relative_error, run

import vit_jax
from vit_jax.analysis.cost import flops_per_image
from vit_jax.checkpoints import fit
from vit_jax.checkpoints.convert import shapes_of
from vit_jax.checkpoints.fit import place
from vit_jax.checkpoints.opened import inspect, open_model
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.models.detector import Detector, locations
from vit_jax.models.lora import learns
from vit_jax.training.sharding import MeshConfig, make_mesh, placement
from vit_jax.training.trainable import trainable

FIELDS = dict(width=16, depth=1, mlp_dim=16, num_heads=2, num_classes=3, registers=1)
FIELDS |= dict(image_size=(24, 32), patch_size=8, pool="locations", pyramid=64, towers=2)
CONFIG = ViTConfig(**FIELDS)  # of 3x4 patches: maps of 12x16, 6x8, 3x4 and 1x2


def convolved(x, p):
    h, w, _ = x.shape
    x = np.pad(x, [(1, 1), (1, 1), (0, 0)])
    kernel = p["kernel"]
    return p["bias"] + sum(
        x[i : h + i, j : w + j] @ kernel[i, j] for i in range(3) for j in range(3)
    )


def group_normed(x, p):
    """Each group of two channels has a mean and variance of its own, over all of the map."""
    h, w, c = x.shape
    grouped = x.reshape(h * w, 32, c // 32)
    grouped = grouped - grouped.mean(axis=(0, 2), keepdims=True)
    grouped = grouped / np.sqrt((grouped**2).mean(axis=(0, 2), keepdims=True) + 1e-5)
    return grouped.reshape(x.shape) * p["scale"] + p["bias"]


def tower(x, p):
    for index in (1, 2):
        x = np.maximum(group_normed(convolved(x, p[f"conv{index}"]), p[f"norm{index}"]), 0)
    return convolved(x, p["conv_out"])


def maps_of(x, p):
    up = doubled(gelu(norm(doubled(x, p["conv_up1"]), p["norm_up1"])), p["conv_up2"])
    half = x[:2].reshape(1, 2, 2, 2, -1).max(axis=(1, 3))
    inputs = (up, doubled(x, p["conv_up"]), x, half)
    return [level(each, p[f"level{i}"]) for i, each in enumerate(inputs, 1)]


@pytest.fixture(scope="module")
def params():
    return as_float32(random_params(CONFIG))


def test_outputs_are_those_of_towers_written_out(params):
    images = pictures(CONFIG)
    found, captured = run(CONFIG, params, images, capture=("pooled", "pre_logits"))
    assert found.shape == (2, 192 + 48 + 12 + 2, 3 + 5) and found.dtype == jnp.float32
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for i, tokens in enumerate(np.asarray(captured["pooled"], np.float64)):
        maps, head = maps_of(tokens, exact["pyramid"]), exact["detector"]
        wanted = np.concatenate([each.reshape(-1, 64) for each in maps])
        assert relative_error(captured["pre_logits"][i], wanted) < 1e-5
        rows = []
        for each in maps:
            boxes = tower(each, head["boxes"])
            parts = tower(each, head["classes"]), np.maximum(boxes[..., :4], 0), boxes[..., 4:]
            rows.append(np.concatenate(parts, axis=-1).reshape(-1, 8))
        wanted = np.concatenate(rows)
        assert 0.2 < (wanted[:, 3:7] == 0).mean() < 0.8
        assert relative_error(found[i], wanted) < 1e-5
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    rounded = run(half, params, images)
    assert rounded.dtype == jnp.float32 and relative_error(rounded, np.asarray(found)) < 0.05


def test_a_new_model_finds_little_everywhere():
    params = Detector(CONFIG, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(params.classes.conv_out.bias, -np.log(99), rtol=1e-6)
    for each in (params.classes, params.boxes):
        for layer in (each.conv1, each.conv2, each.conv_out):
            assert np.std(layer.kernel) == pytest.approx(0.01, rel=0.1)
    np.testing.assert_array_equal(params.boxes.conv_out.bias, 0)


def test_locations_are_the_centres_of_cells():
    centres, strides = locations(CONFIG)
    wanted = [
        ((x + 0.5) * stride, (y + 0.5) * stride, stride)
        for stride, h, w in ((2, 12, 16), (4, 6, 8), (8, 3, 4), (16, 1, 2))
        for y in range(h)
        for x in range(w)
    ]
    np.testing.assert_array_equal(np.column_stack([centres, strides]), wanted)
    assert centres.dtype == strides.dtype == np.float32
    hybrid = ViTConfig(**{**FIELDS, "resnet": (1,), "patch_size": 2})  # of 8 pixels as well
    np.testing.assert_array_equal(locations(hybrid)[0], centres)


def drawn(config, names, seed):
    """Stands for new parameters, of which no program need be compiled."""
    shapes = shapes_of(config)
    return {name: np.full(shapes[name], 2, np.float32) for name in names}


def test_it_is_saved_fitted_and_learnt_as_a_head(tmp_path, params, monkeypatch):
    path = tmp_path / "model.safetensors"
    model = nnx.merge(structure(CONFIG)[0], params)
    monkeypatch.setattr(fit, "_fresh", drawn)
    vit_jax.save(model, path)
    again = vit_jax.load(path)
    assert again.config == CONFIG
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again.model)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(UserError, match=r"timm has no models with model\.pool='locations'"):
        vit_jax.save(model, tmp_path / "other.safetensors", format="timm")
    labelled = dict(objective="detection", labels=("cat", "dog", "cow"))
    vit_jax.save(dataclasses.replace(again, **labelled), path)
    text = str(inspect(path))
    assert "boxes, their classes and scores (detection)" in text
    assert "3 classes, towers of 2 convolutions" in text

    opened = open_model(path)
    cases = {  # fields, head: what becomes of pyramid and detector
        (): ("keep", "kept", "kept"),
        (("num_classes", 4),): ("keep", "kept", "fresh"),
        (("towers", 1),): ("keep", "kept", "fresh"),
        (("pyramid", 32),): ("keep", "fresh", "fresh"),
        (("image_size", (32, 32)),): ("fresh", "kept", "fresh"),
    }
    for fields, (head, *wanted) in cases.items():
        lines = place(opened, dataclasses.replace(CONFIG, **dict(fields)), head=head)[1]
        found = [
            {line.status for line in lines if line.name.startswith(part) and line.shape}
            for part in ("pyramid/", "detector/")
        ]
        found[1] -= {"dropped"}  # of a tower that was higher
        assert found == [{each} for each in wanted], fields
    # Of a model that tells the class of each patch, all but the head is kept.
    masks = dataclasses.replace(CONFIG, pool="none")
    vit_jax.save(nnx.merge(structure(masks)[0], as_float32(random_params(masks))), path)
    lines = place(open_model(path), CONFIG)[1]
    assert {line.name.split("/")[0] for line in lines if line.status == "fresh"} == {"detector"}
    assert {line.name for line in lines if line.status == "dropped"} == {"head/kernel", "head/bias"}

    shapes = structure(CONFIG)[1]
    assert set(trainable(("all_but_head",), shapes).select(shapes)) == {"pyramid", "detector"}
    names = flatten_dict(shapes, sep="/")
    assert {name.split("/")[0] for name in names if learns(name)} == {"pyramid", "detector"}


def test_its_products_are_counted():
    plain = dataclasses.replace(CONFIG, pool="none", pyramid=64)
    macs = 254 * 9 * 64 * (2 * 2 * 64 + 3 + 5) - 192 * 64 * 3
    assert flops_per_image(CONFIG) - flops_per_image(plain) == 2 * macs
    # As XLA counts, but for what it leaves out at the maps' sides, and norms.
    config = ViTConfig(**{**FIELDS, "image_size": 256, "scan": False})
    graphdef, params = structure(config)
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    lowered = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))
    counted = lowered.lower(params, images).cost_analysis()["flops"]
    assert flops_per_image(config) == pytest.approx(counted, rel=0.02)


def test_its_kernels_are_split_over_devices():
    places = placement(structure(CONFIG)[1], make_mesh(MeshConfig(data=1, fsdp=8)))
    places = {name: each.spec for name, each in flatten_dict(places, sep="/").items()}
    kernels = [name for name in places if name.startswith("detector/") and name.endswith("kernel")]
    assert len(kernels) == 6 and all("fsdp" in places[name] for name in kernels)


@pytest.mark.parametrize(
    "fields, told",
    [
        (dict(pyramid=None), r"model\.pyramid None: it must be 32, 64, 96"),
        (dict(pyramid=48), r"model\.pyramid 48: it must be 32, 64, 96"),
        (dict(patch_size=(8, 4)), r"model\.patch_size \(8, 4\): it must be as high as wide"),
        (dict(num_classes=0), r"model\.num_classes 0: it must be at least 1"),
        (dict(representation_size=8), r"model\.representation_size 8: it must be None"),
        (dict(head_bias=-7.0), r"model\.head_bias -7\.0: it must be 0"),
        (dict(towers=0), r"model\.towers is 0; expected an integer from 1 up"),
        (dict(patch_dropout=0.5), r"model\.pool 'locations' needs all patches"),
        (dict(max_patches=12), r"model\.pool 'locations' is not: leave max_patches out"),
        (dict(image_size=(8, 32)), r"found pool 'locations', width 16 and 1x4 patches"),
        (dict(pool="gap"), r"for pools 'none' and 'locations', .* found pool 'gap'"),
    ],
)
def test_what_does_not_fit_is_refused(fields, told):
    with pytest.raises(UserError, match=told):
        ViTConfig(**{**FIELDS, **fields})
