"""LoRA: a step against finite differences in NumPy, and what a run leaves behind."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DIGITS, TINY, fails
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from models import numpy_vit
from tiny_models import random_images, random_params, relative_error, run

import vit_jax
from vit_jax.__main__ import main
from vit_jax.checkpoints.adapter import Adapter
from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.files import open_weights, write_weights
from vit_jax.checkpoints.opened import open_model
from vit_jax.checkpoints.store import Store
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ResNetConfig, ViTConfig
from vit_jax.models.create import create, structure
from vit_jax.models.lora import Lora, is_adapter, merged
from vit_jax.training.config_file import load_config
from vit_jax.training.loop import train
from vit_jax.training.model import model_config
from vit_jax.training.objectives import Augment
from vit_jax.training.optim import OptimConfig, make_optimizer
from vit_jax.training.plan import TrainingData, make_plan
from vit_jax.training.program import make_program
from vit_jax.training.sharding import MeshConfig, make_layout, make_mesh
from vit_jax.training.state import TrainState, to_saved
from vit_jax.training.steps import make_train_step
from vit_jax.training.trainable import trainable

EVERY = Lora(2, 6.0, ("qkv", "out", "fc1", "fc2"))
SMALL = ViTConfig(
    image_size=(4, 6),
    patch_size=(2, 3),
    in_channels=2,
    width=8,
    depth=2,
    mlp_dim=12,
    num_heads=2,
    num_classes=3,
    pool="map",
    lora=EVERY,
)


def written_out(params, lora):
    """The plain parameters: each kernel plus alpha / rank A B, one matrix at a time."""
    flat = {name: np.array(value) for name, value in flatten_dict(params, sep="/").items()}
    s = lora.alpha / lora.rank
    for name in [n for n in flat if n.endswith("lora_a")]:
        layer = name.removesuffix("/lora_a")
        a, b = flat.pop(name), flat.pop(f"{layer}/lora_b")
        stacked = layer.startswith("blocks/")
        kernels = flat[f"{layer}/kernel"] if stacked else flat[f"{layer}/kernel"][None]
        a, b = (a, b) if stacked else (a[None], b[None])
        for kernel, a1, b1 in zip(kernels, a, b, strict=True):
            if layer.endswith("qkv"):
                for part in range(3):
                    for head in range(kernel.shape[2]):
                        kernel[:, part, head] += s * a1[:, part] @ b1[part, :, head]
            elif layer.endswith("out"):
                for head in range(len(kernel)):
                    kernel[head] += s * a1[head] @ b1
            else:
                kernel += s * a1 @ b1
    return unflatten_dict(flat, sep="/")


def loss_of(params, images, labels):
    """Mean cross-entropy, float64."""
    plain = written_out(params, EVERY)
    logits = numpy_vit.forward(plain, images, pool="map", position="learned")["logits"]
    logits = logits - logits.max(axis=-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.mean([log[label] for log, label in zip(logs, labels, strict=True)])


@functools.cache
def stepped(scan=None, fsdp=1, tensor=1, accumulate=1):
    """Parameters before and after a step of SGD at a rate of 1, images and labels."""
    config, lr = dataclasses.replace(SMALL, scan=scan), 1.0
    params, random = random_params(config), np.random.default_rng(3)
    pixels = random.integers(0, 256, (4, *config.image_size, 2)).astype(np.uint8)
    preprocess = Preprocess(config.image_size, 2)
    labels = np.array([0, 2, 1, 2], np.int32)
    mesh = make_mesh(MeshConfig(1, fsdp, tensor), jax.devices()[: fsdp * tensor])
    graphdef, shapes = structure(config)
    learning = trainable((), shapes)
    optim = OptimConfig(lr, name="sgd", momentum=0.0)
    optimizer = learning.optimizer(make_optimizer(optim, lambda step: lr))
    step = make_train_step(
        graphdef,
        optimizer,
        lambda step: lr,
        preprocess,
        num_classes=3,
        objective="softmax",
        augment=Augment(),
        accumulate=accumulate,
        layout=make_layout(mesh, "float32"),
        trainable=learning,
    )
    started = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    state = TrainState(jnp.zeros((), jnp.int32), started, optimizer.init(started), None)
    batch = {"image": pixels, "label": labels, "mask": np.ones(4, bool)}
    with jax.default_matmul_precision("highest"):
        state, _ = jax.jit(step)(state, batch)
    after = flatten_dict(jax.device_get(state.params), sep="/")
    images = np.asarray(preprocess.normalise(pixels.astype(np.float32)), np.float64)
    return flatten_dict(params, sep="/"), after, images, labels


def test_a_step_follows_the_gradient_of_the_written_out_model():
    """Of A, B and the head, by central differences of the float64 loss; the rest stays."""
    before, after, images, labels = stepped()
    random = np.random.default_rng(0)
    for name, value in before.items():
        moved = np.float64(after[name]) - value
        if not (is_adapter(name) or name.startswith("head/")):
            np.testing.assert_array_equal(after[name], value.astype(np.float32), err_msg=name)
            continue
        for index in random.choice(value.size, min(value.size, 8), replace=False):
            losses = []
            for sign in (1, -1):
                changed = value.copy()
                changed.flat[index] += sign * 1e-5
                params = unflatten_dict({**before, name: changed}, sep="/")
                losses.append(loss_of(params, images, labels))
            gradient = (losses[0] - losses[1]) / 2e-5
            np.testing.assert_allclose(-moved.flat[index], gradient, atol=1e-5, err_msg=name)
        assert np.abs(moved).max() > 1e-3, name


@pytest.mark.parametrize(
    "changes", [dict(scan=False, accumulate=2), dict(fsdp=2, tensor=2)], ids=str
)
def test_looped_sharded_or_accumulated_a_step_is_the_same(changes):
    for name, expected in stepped()[1].items():
        np.testing.assert_allclose(stepped(**changes)[1][name], expected, atol=2e-5, err_msg=name)


def test_merged_it_is_a_plain_model_of_the_same_logits():
    params, images = random_params(SMALL), random_images(SMALL)
    plain = merged({n: v.astype("f") for n, v in flatten_dict(params, sep="/").items()}, EVERY)
    config = dataclasses.replace(SMALL, lora=None)
    assert {n: v.shape for n, v in plain.items()} == {
        n: v.shape for n, v in flatten_dict(structure(config)[1], sep="/").items()
    }
    wanted = run(SMALL, params, images)
    got = run(config, unflatten_dict(plain, sep="/"), images)
    assert relative_error(got, np.asarray(wanted, np.float64)) < 5e-6
    written = written_out(params, EVERY)
    expected = numpy_vit.forward(written, images, pool="map", position="learned")["logits"]
    assert relative_error(wanted, expected) < 5e-6


def config_of(*flags):
    return load_config(DIGITS, [*TINY, *(f"--config.{flag}" for flag in flags)])


def flags_of(base):
    rates = ["optim.lr=0.02", "optim.warmup=0", "total_steps=12"]
    return [
        f"init_from={base}",
        "model.head=keep",
        "model.lora.rank=3",
        "model.lora.alpha=6",
        *rates,
    ]


@pytest.fixture(scope="module")
def tuned(tiny_run, tmp_path_factory):
    """A finished run with LoRA, and what training returned."""
    workdir = tmp_path_factory.mktemp("lora") / "tuned"
    return workdir, train(config_of(*flags_of(tiny_run[0])), workdir)


def params_of(workdir, weights="ema"):
    """The parameters that a run has saved, unmerged, and its card."""
    card, store = ModelCard.read(workdir), Store(workdir)
    shapes = structure(card.config)[1]
    return card, store.restore(store.newest(), {weights: shapes})[weights]


def logits(vit):
    params = nnx.to_pure_dict(nnx.state(vit.model))
    return np.asarray(run(vit.config, params, random_images(vit.config)), np.float64)


def test_a_run_begins_at_its_base_and_moves_adapters_and_head_alone(tiny_run, tuned):
    base = vit_jax.load(tiny_run[0])
    card, params = params_of(tuned[0])
    assert card.config.lora == Lora(3, 6.0)
    fresh = flatten_dict(nnx.to_pure_dict(nnx.state(create(card.config, seed=0))), sep="/")
    old = flatten_dict(nnx.to_pure_dict(nnx.state(base.model)), sep="/")
    moved = {
        n for n, v in flatten_dict(params, sep="/").items() if (v != {**fresh, **old}[n]).any()
    }
    layers = [f"blocks/attention/{each}" for each in ("qkv", "out")]
    adapters = {f"{layer}/lora_{each}" for layer in layers for each in "ab"}
    assert moved == {"head/kernel", "head/bias", *adapters}
    begun = unflatten_dict({**fresh, **old}, sep="/")
    images = random_images(card.config)
    at_first = run(card.config, begun, images)
    np.testing.assert_array_equal(
        at_first, run(base.config, nnx.to_pure_dict(nnx.state(base.model)), images)
    )
    assert np.abs(fresh[f"{layers[0]}/lora_a"]).std() > 0.05


def test_a_loaded_run_is_plain_in_every_dialect(tuned, tmp_path):
    card, params = params_of(tuned[0])
    vit = vit_jax.load(tuned[0])
    assert vit.config == dataclasses.replace(card.config, lora=None)
    adapted = [line.name for line in vit.report.lines if line.source.endswith(", with its adapter")]
    assert adapted == sorted(
        name.replace("lora_a", "kernel")
        for name in flatten_dict(params, sep="/")
        if name.endswith("lora_a")
    )
    wanted = np.asarray(run(card.config, params, random_images(card.config)), np.float64)
    assert relative_error(logits(vit), wanted) < 1e-5
    plain_config = dataclasses.replace(SMALL, pool="token")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, "f"), random_params(plain_config))
    bare = nnx.merge(structure(plain_config)[0], params)
    expected = np.asarray(run(plain_config, params, random_images(plain_config)), np.float64)
    for format, name in (
        *(("google", "a.npz"), ("big_vision", "b.npz"), ("timm", "c.safetensors")),
        *(("hf", "d.safetensors"), ("vit_jax", "e.safetensors")),
    ):
        vit_jax.save(bare, tmp_path / name, format=format)
        back = vit_jax.load(tmp_path / name)
        assert back.config.lora is None and relative_error(logits(back), expected) < 1e-5
    vit_jax.save(vit, tmp_path / "run.npz", format="google")
    assert relative_error(logits(vit_jax.load(tmp_path / "run.npz")), wanted) < 1e-5


def test_an_adapter_in_a_file_of_its_own_goes_on_its_base_alone(tiny_run, tuned, tmp_path, capsys):
    file, vit = tmp_path / "adapter.safetensors", vit_jax.load(tuned[0])
    report = vit_jax.save(vit, file, format="lora")
    names = {line.name for line in report.lines}
    assert (
        len(names) == 6
        and file.stat().st_size < 12_000
        and report.facts["base"] == str(tiny_run[0])
    )
    again = vit_jax.load(tiny_run[0], adapter=file)
    np.testing.assert_array_equal(logits(again), logits(vit))
    assert again.labels == vit.labels and again.preprocess == vit.preprocess
    vit_jax.save(again, tmp_path / "again.safetensors", format="lora")
    one, other = (Adapter.read(each) for each in (file, tmp_path / "again.safetensors"))
    assert (one.card, one.base, one.fingerprint) == (other.card, other.base, other.fingerprint)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)

    # The base in another code base's names will do, and what is made of it is a plain model.
    vit_jax.save(vit_jax.load(tiny_run[0]), tmp_path / "base.npz", format="google")
    merge = ["convert", tmp_path / "base.npz", tmp_path / "merged.npz", "--format=google"]
    assert main([*map(str, merge), f"--adapter={file}"]) == 0
    assert relative_error(logits(vit_jax.load(tmp_path / "merged.npz")), logits(vit)) < 1e-6
    capsys.readouterr()

    # Adapted before, the base is another one.
    said = fails(
        capsys, "convert", tuned[0], tmp_path / "x.npz", "--format=google", f"--adapter={file}"
    )
    assert f"the adapter is of {tiny_run[0]}, and {tuned[0]} has other weights" in said
    for base, found in (
        (tmp_path / "other.npz", "has other weights than that had"),
        (
            tmp_path / "wide.npz",
            "is another model: blocks/attention/out/bias is [2, 24] there; expected [2, 16]",
        ),
    ):
        width = 24 if "wide" in base.name else 16
        vit_jax.save(create(dataclasses.replace(vit.config, width=width)), base, format="google")
        with pytest.raises(UserError, match=re.escape(found)):
            vit_jax.load(base, adapter=file)


def test_a_file_that_is_no_whole_adapter_is_refused(tiny_run, tuned, tmp_path):
    base, file = tiny_run[0], tmp_path / "adapter.safetensors"
    vit_jax.save(vit_jax.load(tuned[0]), file, format="lora")
    with pytest.raises(
        UserError, match=r"is an adapter \(LoRA\), which goes with its base: vit_jax"
    ):
        vit_jax.load(file)
    vit_jax.save(vit_jax.load(base), tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match=r"is no adapter: expected a file that vit_jax.save wrote"):
        vit_jax.load(base, adapter=tmp_path / "plain.safetensors")
    with pytest.raises(
        UserError, match=r"format lora is for what a run with model.lora has learnt"
    ):
        vit_jax.save(vit_jax.load(base), tmp_path / "x.safetensors", format="lora")
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        vit_jax.save(vit_jax.load(tuned[0]), tmp_path / "x.npz", format="lora")

    weights = open_weights(str(file))
    arrays = {name: weights.read(name) for name in weights.shapes}
    name = "blocks/attention/qkv/lora_b"
    other, without = tmp_path / "other.safetensors", {**arrays}
    del without[name]
    for changed, said in (
        (without, f"the key {name} of shape [2, 3, 3, 2, 8] is missing"),
        ({**arrays, "norm/bias": np.zeros(16, "f")}, "has norm/bias, which is no part of it"),
        (
            {**arrays, name: arrays[name][:1]},
            f"{name} is [1, 3, 3, 2, 8]; expected [2, 3, 3, 2, 8]",
        ),
    ):
        write_weights(str(other), changed, weights.card)
        with pytest.raises(UserError, match=re.escape(said)):
            vit_jax.load(base, adapter=other)
    card = {**weights.card, "config": {**weights.card["config"], "lora": {"rank": 0}}}
    write_weights(str(other), arrays, card)
    with pytest.raises(UserError, match="is damaged"):
        vit_jax.load(base, adapter=other)


def program_of(base, *flags):
    config = config_of(f"init_from={base}", *flags)
    plan = make_plan(config, TrainingData.of(open_source("digits", "train")), open_model(base))
    return make_program(plan, make_mesh(config.mesh, jax.devices()[:1]))


def test_the_optimiser_and_the_program_know_adapters_and_head_alone(tiny_run):
    whole, lora = (
        program_of(tiny_run[0], *flags, "optim.accumulate=1", "model.scan=False")
        for flags in ([], ["model.lora.rank=1"])
    )
    state = to_saved(lora.state)
    moments = {name.partition("/mu/")[2] for name in state["opt_state"] if "/mu/" in name}
    params = flatten_dict(lora.state.params, sep="/")
    assert moments == {name for name in params if "lora_" in name or name.startswith("head/")}
    flops = [
        program.step.trace(program.state, program.batch).lower().cost_analysis()["flops"]
        for program in (whole, lora)
    ]
    # Forward and backward to the activations: two of three products, where the rank is small.
    assert flops[1] < 0.8 * flops[0]


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            ["model.lora.targets=qvk"],
            "model.lora.targets has 'qvk', which matches no layer; did you",
        ),
        (["model.lora.targets=head"], "which matches no layer"),
        (["model.lora.rank=0"], "model.lora.rank is 0; expected a whole number from 1 up"),
        (["model.lora.rank=17"], "are 16 x 16: the rank is at most the smaller side"),
        (["model.lora.alpha=0"], "model.lora.alpha is 0.0; expected a positive number"),
        (["model.pool=map"], "the model is to have attention_pool/"),
        (["init_from=None"], "and init_from names none"),
        (["model.lora.rnk=2"], "did you mean"),
        (
            ["optim.freeze=backbone"],
            "optim.freeze ('backbone',) freezes all adapters of model.lora",
        ),
        (
            ["optim.groups.a.match=norm/*", "optim.groups.a.rate=2"],
            "optim.groups.a.match is 'norm/*', of which nothing learns with model.lora",
        ),
    ],
)
def test_what_cannot_be_adapted_is_said(tiny_run, flags, said):
    flags = [f"init_from={tiny_run[0]}", "model.lora.rank=2", *flags]
    with pytest.raises(UserError, match=re.escape(said)):
        config = config_of(*flags)
        init = None if config.init_from is None else open_model(config.init_from)
        make_plan(config, TrainingData.of(open_source("digits", "train")), init)


def test_a_resnet_has_no_adapters():
    config = config_of("model.variant=None", "model.lora.rank=2")
    with pytest.raises(UserError, match=r"adapts a trained Vision Transformer, and .* is a ResNet"):
        model_config(config, ResNetConfig(), 10)
