"""What is frozen stays, what learns does as it would, and how fast: against written-out NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import DIGITS, TINY
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.models.create import structure
from vit_jax.training.config_file import load_config
from vit_jax.training.optim import Group, OptimConfig, make_optimizer
from vit_jax.training.plan import TrainingData, make_plan
from vit_jax.training.program import make_program
from vit_jax.training.sharding import make_mesh, to_devices
from vit_jax.training.state import from_saved, make_state, to_saved
from vit_jax.training.trainable import rates, trainable

SGD = ["optim.name=sgd", "optim.momentum=0", "optim.grad_clip=None", "optim.weight_decay=0"]
SGD += ["optim.schedule=constant", "optim.warmup=0", "optim.lr=0.5", "model.dropout=0"]
SGD += ["model.depth=3", "batch_size=16", "augment.mixup=0", "augment.label_smoothing=0"]
EMBEDDING = ("patch_embed/*", "cls_token", "pos_embed")


def program_of(*flags):
    config = load_config(DIGITS, [*TINY, *(f"--config.{flag}" for flag in flags)])
    plan = make_plan(config, TrainingData.of(open_source("digits", "train")))
    mesh = make_mesh(config.mesh, None if "mesh.fsdp=2" in flags else jax.devices()[:1])
    return plan, make_program(plan, mesh)


@functools.cache
def params_of(program_flags=()):
    """Parameters in which nothing is zero, so that everything has a gradient."""
    plan, _ = program_of(*SGD, *program_flags)
    shapes, random = structure(plan.card.config)[1], np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype("f"), shapes)


def stepped(*flags):
    """The parameters after a step of SGD, and the state."""
    plan, program = program_of(*SGD, *flags)
    config = plan.card.config
    state = make_state(
        program.state,
        config,
        program.optimizer,
        seed=0,
        params=jax.tree.map(jnp.array, params_of()),
    )
    random = np.random.default_rng(1)
    batch = {
        "image": random.integers(0, 256, (16, 8, 8, 1), np.uint8),
        "label": random.integers(0, 10, 16).astype(np.int32),
        "mask": np.ones(16, bool),
    }
    state, metrics = program.step(state, to_devices(batch, 16, program.mesh))
    return jax.device_get(state), metrics, program


@functools.cache
def plain():
    return flatten_dict(stepped()[0].params, sep="/")


HEADS = {"head/kernel", "head/bias"}


@pytest.mark.parametrize(
    "freeze, flags, learned, rows",
    [
        ("backbone", ["model.scan=False"], {*HEADS, "pre_logits/kernel", "pre_logits/bias"}, 3),
        (("blocks[:2]", *EMBEDDING), [], None, 2),
        (("blocks[:2]", "head/*"), ["model.scan=False", "optim.accumulate=2"], None, 2),
        (("blocks[:1]", "blocks/mlp/*"), ["mesh.fsdp=2"], None, 1),
    ],
)
def test_what_is_frozen_stays_and_the_rest_learns_as_ever(freeze, flags, learned, rows):
    freeze = (freeze,) if isinstance(freeze, str) else freeze
    state, metrics, _ = stepped(f"optim.freeze={','.join(freeze)}", *flags)
    before, norms = flatten_dict(params_of(), sep="/"), []
    for name, found in flatten_dict(state.params, sep="/").items():
        if learned is not None:
            first = 0 if name in learned else None
        elif any(re.match(entry.replace("*", ""), name) for entry in freeze if "[" not in entry):
            first = None
        else:
            first = rows if name.startswith("blocks/") else 0
        still = found if first is None else found[:first] if first else found[:0]
        np.testing.assert_array_equal(still, before[name][: len(still)], err_msg=name)
        if first is not None:
            expected = plain()[name][first:]
            assert np.abs(expected - before[name][first:]).max() > 1e-5, name
            np.testing.assert_allclose(found[first:], expected, atol=2e-5, err_msg=name)
            norms.append(np.square((expected - before[name][first:]) / 0.5).sum())
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(np.sum(norms)), rtol=1e-3)


def test_the_optimiser_and_the_program_leave_out_what_is_frozen():
    adam = ["optim.name=adamw", "model.scan=False"]
    whole, backbone, some = (
        program_of(*adam, *flags)[1]
        for flags in (
            [],
            ["optim.freeze=backbone"],
            ["optim.freeze=blocks[:1],patch_embed/*,cls_token,pos_embed"],
        )
    )
    params = flatten_dict(whole.state.params, sep="/")
    moments = {
        name.partition("/mu/")[2]: leaf.shape
        for name, leaf in to_saved(some.state)["opt_state"].items()
        if "/mu/" in name
    }
    assert moments == {
        name: (1, *leaf.shape[1:]) if name.startswith("blocks/") else leaf.shape
        for name, leaf in params.items()
        if not name.startswith(("patch_embed/", "cls_token", "pos_embed"))
    }
    head = program_of(*adam, "optim.freeze=all_but_head")[1].state.opt_state
    assert {leaf.shape for leaf in jax.tree.leaves(head)} == {(), (8, 10), (10,)}
    flops = [
        program.step.trace(program.state, program.batch).lower().cost_analysis()["flops"]
        for program in (whole, backbone, some)
    ]
    assert flops[1] < 0.5 * flops[0] and 0.5 * flops[0] < flops[2] < 0.85 * flops[0]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), some.state)
    again = from_saved(to_saved(zeros), some.state)
    assert jax.tree.structure(again) == jax.tree.structure(some.state)


def test_rates_by_layer_and_group():
    """AdamW written out: BEiT's factors, decay ** (depth + 1 - layer), and a group's own."""
    config = OptimConfig(
        0.1,
        weight_decay=0.3,
        layer_decay=0.8,
        groups={
            "positions": Group("pos_*", rate=0.0),
            "head": Group("head/*", rate=2.0, weight_decay=0.5),
        },
    )
    shapes = {"pos_embed": (5, 4), "patch_embed/kernel": (3, 4), "norm/scale": (4,)}
    shapes |= {"blocks/mlp/kernel": (3, 4, 4), "blocks/mlp/bias": (3, 4), "head/kernel": (4, 2)}
    random = np.random.default_rng(0)
    params, grads = (
        {name: random.normal(size=shape).astype("f") for name, shape in shapes.items()}
        for _ in range(2)
    )
    layers = {"pos_embed": 0, "patch_embed/kernel": 0, "norm/scale": 4, "head/kernel": 4}
    expected = {}
    for name, p in params.items():
        g = grads[name].astype(np.float64)
        layer = np.array([1, 2, 3]).reshape(3, *[1] * (p.ndim - 1)) if "mlp" in name else None
        layer = layers[name] if layer is None else layer
        rate = 0.1 * 0.8 ** (4.0 - layer) * {"pos_embed": 0.0, "head/kernel": 2.0}.get(name, 1.0)
        decay = {"head/kernel": 0.5}.get(name, 0.3 if name.endswith("kernel") else 0.0)
        expected[name] = p - rate * (g / (np.abs(g) + 1e-8) + decay * p)
    nested = unflatten_dict(params, sep="/")
    factors = rates(config, nested)
    optimizer = make_optimizer(config, lambda step: 0.1, rates=factors)
    updates, _ = optimizer.update(unflatten_dict(grads, sep="/"), optimizer.init(nested), nested)
    found = flatten_dict(optax.apply_updates(nested, updates), sep="/")
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=2e-5, atol=1e-6, err_msg=name)


def test_rates_of_blocks_on_the_same_tokens_are_those_of_one_layer():
    shapes = {"pos_embed": (5, 4), "blocks/mlp/bias": (4, 3), "head/kernel": (4, 2)}
    nested = unflatten_dict({name: np.ones(shape) for name, shape in shapes.items()}, sep="/")
    factors = rates(OptimConfig(0.1, layer_decay=0.5), nested, branches=2)[0]
    assert (factors["pos_embed"], factors["head"]["kernel"]) == (0.125, 1.0)
    assert factors["blocks"]["mlp"]["bias"].ravel().tolist() == [0.25, 0.25, 0.5, 0.5]


def test_rates_of_what_is_frozen_in_part():
    flags = ["optim.freeze=blocks[:1]", "optim.layer_decay=0.5", "optim.groups.a.match=head/*"]
    state, _, _ = stepped(*flags, "optim.groups.a.rate=0.25")
    before = flatten_dict(params_of(), sep="/")
    factors = {"head/bias": 0.25, "pos_embed": 0.5**4}
    factors["blocks/mlp/fc1/bias"] = np.array([0, 0.25, 0.5])[:, None]
    for name, factor in factors.items():
        moved = flatten_dict(state.params, sep="/")[name] - before[name]
        expected = factor * (plain()[name] - before[name])
        np.testing.assert_allclose(moved, expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("optim.freeze=hed/*", "'hed/*', which matches no parameter; did you mean 'head/"),
        ("optim.freeze=bakbone", "did you mean 'backbone'"),
        ("optim.freeze=blocks[:3]", "expected blocks[:N] with N of 1 to 2"),
        ("optim.freeze=blocks[1:]", "expected blocks[:N]"),
        ("optim.freeze=*", "leaves nothing to learn"),
        ("optim.layer_decay=0", "must be in (0, 1]"),
        ("optim.groups.a.rate=2", "optim.groups.a.match is not set"),
        ("optim.groups.a.match=hed", "optim.groups.a.match has 'hed'"),
        (
            ("optim.groups.a.match=head/*", "optim.groups.b.match=*/bias"),
            "a and b both match head/",
        ),
        (("optim.groups.a.match=head/*", "optim.groups.a.rte=2"), "optim.groups.a.rate"),
        (("optim.groups.a.match=head/*", "optim.groups.a.rate=-2"), "it must be 0 or more"),
    ],
)
def test_what_is_wrong_is_said(flags, said):
    with pytest.raises(UserError, match=re.escape(said)):
        program_of(*(flags if isinstance(flags, tuple) else (flags,)))


def test_a_resnet_has_no_blocks():
    params = {"head": {"kernel": np.zeros((2, 2))}, "root": {"kernel": np.zeros((2, 2))}}
    with pytest.raises(UserError, match="the model has none"):
        trainable(["blocks[:1]"], params)
    with pytest.raises(UserError, match="a ResNet has none"):
        rates(OptimConfig(0.1, layer_decay=0.7), params)
