"""Any mesh computes the same, and moves parameters between devices, never activations."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DIGITS, TINY
from flax import nnx
from tiny_models import as_float32, random_images, random_params

from vit_jax.analysis.collectives import by_kind, read_collectives
from vit_jax.checkpoints.card import ModelCard
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ResNetConfig, ViTConfig
from vit_jax.models.create import structure
from vit_jax.training.config import Config
from vit_jax.training.config_file import load_config
from vit_jax.training.evaluation.evaluation import Evaluation
from vit_jax.training.objectives import Augment
from vit_jax.training.optim import OptimConfig
from vit_jax.training.plan import Plan, TrainingData, make_plan
from vit_jax.training.program import make_program
from vit_jax.training.sharding import (
    MeshConfig,
    device_grid,
    make_layout,
    make_mesh,
    placement,
    to_devices,
    unsplit,
)
from vit_jax.training.state import make_state

# Widths that every mesh below divides. No kernel is as large as a batch of tokens.
VIT = ViTConfig(
    image_size=(32, 32),
    patch_size=(8, 8),
    width=32,
    depth=2,
    mlp_dim=64,
    num_heads=4,
    num_classes=8,
    dropout=0.1,
)
CONFIG = Config(
    batch_size=32,
    total_steps=5,
    # Not Adam, which turns the sign of a tiny gradient into a whole step.
    optim=OptimConfig(name="sgd", lr=0.3, grad_clip=1.0, accumulate=2),
    augment=Augment(mixup=0.2),
)
MESHES = {
    "data=8": MeshConfig(data=8),
    "fsdp=8": MeshConfig(data=1, fsdp=8),
    "data=4 tensor=2": MeshConfig(data=4, tensor=2),
    "data=2 fsdp=2 tensor=2": MeshConfig(data=2, fsdp=2, tensor=2),
}


def program_of(mesh, vit=VIT, config=CONFIG):
    devices = jax.devices()[:1] if mesh is None else jax.devices()
    mesh = make_mesh(MeshConfig() if mesh is None else mesh, devices)
    return make_program(Plan(config, ModelCard(vit, Preprocess(vit.image_size, 3), ())), mesh)


def trained(mesh, vit=VIT, config=CONFIG, steps=3):
    """Losses of some steps, and the parameters after them."""
    program = program_of(mesh, vit, config)
    params = as_float32(random_params(vit))
    state = make_state(program.state, vit, program.optimizer, seed=0, params=params)
    losses = []
    for step in range(steps):
        random = np.random.default_rng(step)
        b = config.batch_size
        batch = {
            "image": random.integers(0, 256, (b, *vit.image_size, 3), np.uint8),
            "label": random.integers(0, 8, b).astype(np.int32),
            "mask": np.ones(b, bool),
        }
        state, metrics = program.step(state, to_devices(batch, b, program.mesh))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def alone():
    return trained(None)


# What is computed anew is the same, too. Of other meshes, see test_steps.py.
@pytest.mark.parametrize(
    "mesh, fields",
    [
        (None, dict(remat="dots", scan=False)),
        ("data=2 fsdp=2 tensor=2", dict(remat="full", scan=True)),
    ],
    ids=str,
)
def test_a_mesh_trains_as_one_device_does(alone, mesh, fields):
    losses, params = trained(mesh and MESHES[mesh], dataclasses.replace(VIT, **fields))
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(alone[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_losses_above_depend_on_everything(alone):
    losses, params = alone
    assert np.abs(np.diff(losses)).min() > 1e-3
    before = random_params(VIT)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True):
        assert np.abs(ours - theirs).max() > 1e-4


def compiled(mesh, model=VIT, **fields):
    config = dataclasses.replace(CONFIG, augment=Augment(), optim=OptimConfig(lr=1e-3))
    program = program_of(mesh, dataclasses.replace(model, **fields), config)
    return program, program.step.lower(program.state, program.batch).compile()


def moved(mesh, model=VIT, **fields):
    program, step = compiled(mesh, model, **fields)
    return program, read_collectives(step.as_text())


def split_sizes(program):
    """Bytes of each parameter that fsdp splits."""
    return {
        jax.tree_util.keystr(path): 4 * leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(program.state.params)
        if "fsdp" in leaf.sharding.spec
    }


@pytest.mark.parametrize("remat", ["none", "full"])
def test_fsdp_gathers_each_block_twice_and_nothing_else(remat):
    program, collectives = moved(MESHES["fsdp=8"], remat=remat)
    split = split_sizes(program)
    # On the way there and back; what is outside of them is used once, or kept.
    blocks = sum(size for name, size in split.items() if "blocks" in name)
    expected = (blocks + sum(split.values())) * 7 / 8
    assert by_kind(collectives)["all-gather"][1] == pytest.approx(expected, rel=0.02)
    # An activation would be: 4 images a device, 17 tokens of 32 channels, 8 devices.
    tokens = 4 * 32 * 17 * 32
    largest = max(each.bytes for each in collectives if each.kind != "all-reduce")
    assert largest < tokens / 2
    assert "all-to-all" not in by_kind(collectives)


def test_evaluation_gathers_each_parameter_once():
    config = load_config(DIGITS, [*TINY, "--config.mesh.fsdp=-1"])
    mesh = make_mesh(config.mesh)
    source = open_source(config.data.train.source, config.data.train.split)
    plan = make_plan(config, TrainingData.of(source))
    program = make_program(plan, mesh)
    step = Evaluation(config, plan.card, mesh)._eval_step
    text = step.lower(program.state.params, program.batch, 0).compile().as_text()
    split = sum(split_sizes(program).values())
    totals = by_kind(read_collectives(text))
    assert totals["all-gather"][1] == pytest.approx(split * 7 / 8, rel=0.02)
    assert totals["all-reduce"][1] < 100  # the sums


def test_data_parallelism_moves_gradients_alone():
    program, collectives = moved(MESHES["data=8"])
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(program.state.params))
    totals = by_kind(collectives)
    assert set(totals) == {"all-reduce"}
    assert totals["all-reduce"][1] == pytest.approx(2 * 7 / 8 * gradients, rel=0.01)


def test_tensor_parallelism_gathers_nothing():
    _, collectives = moved(MESHES["data=4 tensor=2"])
    gathers = [each for each in collectives if each.kind in ("all-gather", "all-to-all")]
    assert sum(each.bytes * each.times for each in gathers) < 100


def test_position_tables_are_split_by_width_and_relative_ones_by_heads():
    tables = dataclasses.replace(VIT, position="learned2d", position_at="layers")
    blocks = program_of(MESHES["fsdp=8"], tables).state.params["blocks"]
    for name in ("pos_embed_row", "pos_embed_column", "pos_embed_prefix"):
        assert tuple(blocks[name].sharding.spec) == (None, None, "fsdp"), name
    relative = dataclasses.replace(VIT, position="relative")
    program = program_of(MESHES["data=2 fsdp=2 tensor=2"], relative)
    embeddings = program.state.params["blocks"]["attention"]["rel_embed"]
    assert tuple(embeddings.sharding.spec) == (None, None, "tensor", "fsdp")


def test_relative_positions_have_the_same_gradients_on_a_mesh():
    # Pooled by the mean: a class token's own attention has no bias.
    vit = dataclasses.replace(VIT, position="relative", depth=1, dropout=0.0, pool="gap")
    graphdef, params = structure(vit)[0], as_float32(random_params(vit))
    images = as_float32(random_images(vit, 4))
    mesh = make_mesh(MESHES["data=2 fsdp=2 tensor=2"])

    def gradients(layout, params, images):
        loss = lambda p: jnp.sin(nnx.merge(graphdef, p)(images, layout=layout)).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    alone = gradients(None, params, images)
    places = placement(params, mesh)
    images = to_devices({"image": images}, 4, mesh)["image"]
    split = gradients(make_layout(mesh, "float32"), jax.device_put(params, places), images)
    for ours, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    assert np.abs(alone["blocks"]["attention"]["rel_embed"]).max() > 1e-2


def test_parameters_that_stay_whole_are_named():
    program = program_of(MESHES["fsdp=8"], dataclasses.replace(VIT, width=36, mlp_dim=60))
    names = dict(unsplit(program.state.params, program.mesh, least=2**10))
    assert names["blocks/mlp/fc1/kernel"] == 4 * 2 * 36 * 60
    # The head's input does not divide, its classes do not matter: the next dimension is taken.
    assert "head/kernel" not in names
    assert unsplit(program.state.params, program_of(None).mesh, least=0) == []


def fake_slices(n):
    """Eight devices of n slices, as TPUs describe themselves."""
    return [
        types.SimpleNamespace(
            id=i, process_index=i // 2, slice_index=i * n // 8, platform="cpu", device_kind="fake"
        )
        for i in range(8)
    ]


@pytest.mark.parametrize(
    "sizes", [dict(data=2, fsdp=4), dict(data=4, fsdp=2), dict(data=2, fsdp=2, tensor=2)]
)
def test_only_data_spans_slices(sizes):
    shape = tuple(sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor"))
    grid = device_grid(shape, fake_slices(2))
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    half = sizes["data"] // 2
    assert (slices[:half] == slices[0, 0, 0]).all()
    assert (slices[half:] == 1 - slices[0, 0, 0]).all()


def test_a_mesh_whose_data_axis_does_not_span_the_slices_is_refused():
    with pytest.raises(UserError, match=r"mesh.data must be a multiple of 2"):
        make_mesh(MeshConfig(data=1, fsdp=8), fake_slices(2))


SIZES = dict(image_size=16, resnet_width=32, num_classes=8)
VIT_SIZES = dict(patch_size=2, width=32, depth=1, mlp_dim=64, num_heads=4)


def test_a_hybrid_trains_on_a_mesh_as_on_one_device():
    config = dataclasses.replace(
        CONFIG, batch_size=8, augment=Augment(), optim=OptimConfig(name="sgd", lr=0.3)
    )
    hybrid = ViTConfig(resnet=(2,), **VIT_SIZES, **SIZES)
    losses, params = trained(None, hybrid, config, 2)
    split = trained(MESHES["data=2 fsdp=2 tensor=2"], hybrid, config, 2)
    assert abs(losses[0] - losses[1]) > 1e-3
    np.testing.assert_allclose(split[0], losses, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(split[1]), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_fsdp_gathers_each_unit_of_a_resnet_when_it_runs():
    program, collectives = moved(MESHES["fsdp=8"], ResNetConfig(resnet=(2,), **SIZES))
    kernels = program.state.params["resnet"]["stage1"]["rest"]
    assert tuple(kernels["conv2"]["kernel"].sharding.spec) == (*4 * (None,), "fsdp")
    split = split_sizes(program)
    # On the way there and back, standardised; root, first unit and head are gathered once and kept.
    scanned = sum(size for name, size in split.items() if "rest" in name)
    expected = (scanned + sum(split.values())) * 7 / 8
    totals = by_kind(collectives)
    assert totals["all-gather"][1] == pytest.approx(expected, rel=0.02)
    assert "all-to-all" not in totals
