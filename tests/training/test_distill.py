"""Distillation: losses, gradients and the teacher's view against what is written out here."""

import dataclasses
import functools
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from conftest import DIGITS, TINY, fails
from flax import nnx
from flax.traverse_util import flatten_dict
from processes import SIGTERM, die_at
from tiny_models import as_float32, random_params

import vit_jax
from vit_jax.analysis import preflight
from vit_jax.analysis.cost import flops_per_image, least_traffic, step_flops
from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.fit import fitted
from vit_jax.checkpoints.opened import Opened, open_model
from vit_jax.checkpoints.store import Store
from vit_jax.data.transforms import Preprocess, resize
from vit_jax.errors import Stopped, UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.training import distill, steps
from vit_jax.training.config_file import load_config
from vit_jax.training.distill import DistillConfig, Teacher
from vit_jax.training.loop import train
from vit_jax.training.metrics import TIMING_KEYS, read_metrics
from vit_jax.training.objectives import Augment
from vit_jax.training.plan import TrainingData, make_plan
from vit_jax.training.program import make_program
from vit_jax.training.sharding import MeshConfig, make_layout, make_mesh, placement, to_devices
from vit_jax.training.state import abstract_state, make_state
from vit_jax.training.steps import make_train_step
from vit_jax.training.trainable import trainable

SIZE = (8, 12)
SMALL = dict(patch_size=(4, 4), width=16, depth=2, mlp_dim=32, num_heads=2)
STUDENT = ViTConfig(image_size=SIZE, in_channels=1, num_classes=5, **SMALL)
TOKEN = dataclasses.replace(STUDENT, distillation="head")
PREPROCESS = Preprocess(SIZE, in_channels=1, mean=0.4, std=0.3)
# Larger, in colour, with classes of its own and another order.
MODEL = ViTConfig(image_size=(12, 16), num_classes=7, **SMALL)
THEIRS = Preprocess((12, 16), mean=(0.3, 0.5, 0.6), std=(0.2, 0.25, 0.3))
COLUMNS = (6, 0, 2, 1, 4)


def teacher_of(kind="soft", token=False, **settings):
    settings = DistillConfig("a teacher", kind, **settings)
    return Teacher(settings, MODEL, THEIRS, COLUMNS, token)


@functools.cache
def params_of(config):
    return as_float32(random_params(config, seed=config.num_tokens))


def rows(b=16):
    """Real examples, and five that must not count."""
    random = np.random.default_rng(3)
    return {
        "image": random.integers(0, 256, (b, *SIZE, 1), np.uint8),
        "label": random.integers(0, 5, b).astype(np.int32),
        "mask": random.permutation(b) < b - 5,
    }


def test_the_losses():
    random = np.random.default_rng(0)
    ours, theirs = (random.normal(size=(6, 5)).astype("f") * 4 for _ in range(2))
    ours[0], theirs[1] = [1e4, 0, -1e4, 3, 2], [-1e4, 1e4, 0, 0, 0]
    for t in (1.0, 3.0):
        p, q = (scipy.special.softmax(x.astype(np.float64) / t, axis=1) for x in (ours, theirs))
        expected = t**2 * scipy.special.rel_entr(q, p).sum(axis=1)
        known = np.isfinite(expected)  # where no probability is 0
        found = distill.soft(jnp.array(ours), jnp.array(theirs), t)
        assert np.isfinite(found).all() and known.sum() >= 5
        np.testing.assert_allclose(found[known], expected[known], rtol=2e-5)
    log_p = scipy.special.log_softmax(ours.astype(np.float64), axis=1)
    expected = [-row[best] for row, best in zip(log_p, theirs.argmax(axis=1), strict=True)]
    np.testing.assert_allclose(distill.hard(jnp.array(ours), jnp.array(theirs)), expected, 1e-5)
    half = jnp.array(ours, jnp.bfloat16)
    for loss in (distill.hard, functools.partial(distill.soft, temperature=2.0)):
        assert loss(half, half).dtype == jnp.float32


def seen_by_teacher(pixels):
    """Pixels in 0 to 255, resized by Pillow and normalised."""
    colour = np.repeat(np.asarray(pixels, np.float32), 3, axis=-1)
    large = np.stack([resize(each, (12, 16), "bilinear_antialias") for each in colour])
    return (large / 255 - np.array(THEIRS.mean)) / np.array(THEIRS.std)


@functools.cache
def expected(kind, token, temperature, weight):
    """The metrics of a step, and the gradient, of the real rows alone."""
    batch, config = rows(), TOKEN if token else STUDENT
    real = batch["mask"]
    pixels, labels = batch["image"][real].astype(np.float32), batch["label"][real]
    inputs = jnp.asarray(seen_by_teacher(pixels), jnp.float32)
    wanted = nnx.merge(structure(MODEL)[0], params_of(MODEL))(inputs)[:, np.array(COLUMNS)]
    wanted = np.asarray(wanted, np.float64)
    n = np.arange(len(labels))

    def log_p(logits):
        logits = logits - logits.max(axis=1, keepdims=True)
        return logits - jnp.log(jnp.exp(logits).sum(axis=1, keepdims=True))

    def loss_of(params):
        student = nnx.merge(structure(config)[0], params)
        logits, captured = student((pixels / 255 - 0.4) / 0.3, capture="encoded")
        first = second = logits
        if token:
            first, second = (
                captured["encoded"][:, i] @ params[name]["kernel"] + params[name]["bias"]
                for i, name in enumerate(("head", "head_dist"))
            )
        by_label = -log_p(first)[n, labels].mean()
        if kind == "hard":
            by_teacher = -log_p(second)[n, wanted.argmax(axis=1)].mean()
        else:
            q = scipy.special.softmax(wanted / temperature, axis=1)
            apart = (q * (np.log(q) - log_p(second / temperature))).sum(axis=1)
            by_teacher = temperature**2 * apart.mean()
        loss = (1 - weight) * by_label + weight * by_teacher
        return loss, (by_label, by_teacher, (first + second) / 2)

    with jax.default_matmul_precision("highest"):
        differentiate = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
        (loss, (by_label, by_teacher, logits)), grads = differentiate(params_of(config))
    best = np.asarray(logits).argmax(axis=1)
    return {
        "loss": loss,
        "label_loss": by_label,
        "teacher_loss": by_teacher,
        "agreement": (best == wanted.argmax(axis=1)).mean(),
        "accuracy": (best == labels).mean(),
    }, grads


@pytest.mark.parametrize(
    "kind, token, temperature, weight, sizes, accumulate, freeze",
    [
        ("soft", False, 2.0, 0.7, {}, 1, ()),
        ("hard", False, 1.0, 0.3, dict(data=8), 2, ("blocks[:1]", "patch_embed/*")),
        ("hard", True, 1.0, 0.5, dict(data=2, fsdp=2, tensor=2), 2, ()),
    ],
)
def test_a_training_step(kind, token, temperature, weight, sizes, accumulate, freeze):
    config = TOKEN if token else STUDENT
    mesh = make_mesh(MeshConfig(**sizes), None if sizes else jax.devices()[:1])
    teacher = teacher_of(kind, token, temperature=temperature, weight=weight)
    graphdef, shapes = structure(config)
    learning = trainable(freeze, shapes)
    optimizer = learning.optimizer(optax.sgd(1.0))
    step = make_train_step(
        graphdef,
        optimizer,
        lambda step: 1.0,
        PREPROCESS,
        num_classes=5,
        objective="distill",
        augment=Augment(),
        accumulate=accumulate,
        layout=make_layout(mesh, "float32"),
        trainable=learning,
        teacher=teacher,
    )
    abstract = abstract_state(config, optimizer, ema=False, mesh=mesh)
    state = make_state(
        abstract, config, optimizer, seed=0, params=jax.tree.map(jnp.array, params_of(config))
    )
    weights = jax.device_put(params_of(MODEL), placement(structure(MODEL)[1], mesh))
    with jax.default_matmul_precision("highest"):
        state, metrics = jax.jit(step, donate_argnums=0)(
            state, to_devices(rows(), 16, mesh), weights
        )
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(weights))
    wanted, grads = expected(kind, token, temperature, weight)
    assert set(wanted) == set(metrics) - {"grad_norm", "param_norm", "lr"}
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    before, grads = (flatten_dict(tree, sep="/") for tree in (params_of(config), grads))
    for name, after in flatten_dict(jax.device_get(state.params), sep="/").items():
        moved = np.asarray(before[name]) - after
        gradient = np.array(grads[name])
        assert np.abs(gradient).max() > 1e-5 or name.endswith("bias"), name
        if freeze and name.startswith("patch_embed"):
            gradient = 0 * gradient
        elif freeze and name.startswith("blocks"):
            gradient[0] = 0
        np.testing.assert_allclose(moved, gradient, rtol=1e-3, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("size", [(4, 6), (16, 20), (8, 12)])
def test_the_teacher_sees_the_students_pixels_at_its_size(size):
    pixels = np.random.default_rng(0).uniform(0, 255, (2, *SIZE, 1)).astype("f")
    theirs = Preprocess(size, mean=THEIRS.mean, std=THEIRS.std)
    model = dataclasses.replace(MODEL, image_size=size, patch_size=(2, 2))
    teacher = dataclasses.replace(teacher_of(), model=model, preprocess=theirs)
    found = teacher.inputs(jnp.array(PREPROCESS.normalise(pixels)), PREPROCESS)
    large = [resize(each, size, "bilinear_antialias") for each in pixels.repeat(3, -1)]
    np.testing.assert_allclose(found, theirs.normalise(np.stack(large)), atol=2e-5)


def test_a_grey_teacher_sees_colours_by_their_luminance():
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 12, 16, 3)).astype("f")
    grey = dataclasses.replace(MODEL, in_channels=1)
    teacher = dataclasses.replace(teacher_of(), model=grey, preprocess=Preprocess((12, 16), 1))
    found = teacher.inputs(jnp.array(THEIRS.normalise(pixels)), THEIRS)
    red, green, blue = np.moveaxis(pixels, -1, 0) / 127.5
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue - 1
    np.testing.assert_allclose(found[..., 0], luminance, atol=1e-5)


def test_both_see_the_same_mixed_images(monkeypatch):
    """What each model is given is looked at while the step runs."""
    seen = {}

    def watch(name):
        def model(x, **_):
            jax.debug.callback(lambda x: seen.update({name: np.asarray(x)}), x)
            return jnp.zeros((len(x), 5 if name == "student" else 7))

        return lambda *_: model

    monkeypatch.setattr(steps, "merged", watch("student"))
    monkeypatch.setattr(distill, "merged", watch("teacher"))
    share = np.linspace(0.55, 0.75, 16).astype("f")
    box = np.where(np.arange(16)[:, None] % 2, [2, 3, 7, 9], 0).astype(np.int32)
    drawn = {"share": share, "blend": np.where(box.any(1), 1, share).astype("f"), "box": box}
    monkeypatch.setattr(steps.objectives, "draw_mixing", lambda *_: jax.tree.map(jnp.array, drawn))
    model = dataclasses.replace(MODEL, image_size=SIZE)
    theirs = Preprocess(SIZE, mean=THEIRS.mean, std=THEIRS.std)
    step = make_train_step(
        structure(STUDENT)[0],
        optax.identity(),
        lambda step: 1.0,
        PREPROCESS,
        num_classes=5,
        objective="distill",
        augment=Augment(mixup=1.0, cutmix=1.0),
        teacher=dataclasses.replace(teacher_of(), model=model, preprocess=theirs),
    )
    state = steps.TrainState(jnp.int32(0), {"unused": jnp.zeros(2)}, (), None)
    batch = {name: jnp.asarray(values) for name, values in rows().items()}
    jax.block_until_ready(jax.jit(step)(state, batch, {}))
    jax.effects_barrier()
    ours = (seen["student"] * 0.3 + 0.4) * 255
    its = (seen["teacher"] * np.array(THEIRS.std) + np.array(THEIRS.mean)) * 255
    np.testing.assert_allclose(its, ours.repeat(3, -1), atol=1e-3)
    # They are mixed, by blending and by boxes.
    pixels = rows()["image"].astype("f")
    expected = share[:, None, None, None] * pixels + (1 - share)[:, None, None, None] * np.roll(
        pixels, 1, axis=0
    )
    expected[1::2] = pixels[1::2]
    expected[1::2, 2:7, 3:9] = pixels[::2, 2:7, 3:9]
    np.testing.assert_allclose(ours, expected, atol=1e-3)


@pytest.mark.parametrize(
    "labels, theirs, columns, rule",
    [
        (("cat", "dog"), ("cat", "dog"), None, "2 classes, by name"),
        (("dog", "cat"), ("cat", "dog"), (1, 0), "2 classes, by name, reordered"),
        (("Dog_house",), ("dog house",), None, "1 classes, by name, but for case, _ and -"),
        (("dog", "cat"), ("cat", "cow", "dog"), (2, 0), "2 of its 3 classes, by name"),
        (("0", "1"), ("0", "1"), None, "2 classes, by name"),
    ],
)
def test_classes_go_by_name(labels, theirs, columns, rule):
    assert distill.matched("x", labels, theirs) == (columns, rule)


@pytest.mark.parametrize(
    "labels, theirs, said",
    [
        (("cat", "dog"), ("cat", "cow"), "has 2 classes, the model 2, and it does not have 'dog'"),
        (tuple("abcde"), ("x",), "does not have 'a', 'b', 'c' and 2 more, but 'x': fine-tune"),
        (("0", "1"), ("0", "1", "2"), "which are numbers"),
        (("0", "1"), ("cat", "dog", "cow"), "does not have '0', '1', but 'cat', 'dog', 'cow'"),
        (("cat",), ("Cat", "cat "), "cannot be told from its names which are 'cat'"),
    ],
)
def test_a_teacher_of_other_classes_is_refused(labels, theirs, said):
    with pytest.raises(UserError, match=re.escape(said)):
        distill.matched("distill.teacher x", labels, theirs)


# -- Whole runs

RUN = [*TINY, "--config.total_steps=8", "--config.objective=distill", "--config.eval.every=0"]
RUN += ["--config.model.representation_size=None", "--config.log.every=1"]
RUN += ["--config.model.depth=1", "--config.data.test=None", "--config.log.tensorboard=False"]
HEAD = ["--config.model.distillation=head", "--config.distill.kind=hard"]


def logged(workdir):
    return [
        {name: value for name, value in line.items() if name not in TIMING_KEYS}
        for line in read_metrics(workdir)
    ]


def test_a_run_resumes_with_its_teacher_and_with_no_other(
    tiny_run, tmp_path, monkeypatch, capsys, caplog, compiled_once
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run[0], "teacher")
    caplog.set_level("INFO", "vit_jax")
    flags = [*RUN, *HEAD, "--config.teacher=teacher"]
    command = ["train", f"--config={DIGITS}", *flags]
    train(load_config(DIGITS, flags), "whole")
    assert "teacher     run folder, teacher, step 24; " in caplog.text
    record = json.loads((tmp_path / "whole" / "teacher.json").read_text())
    assert record["place"] == str(tmp_path / "teacher") and record["step"] == 24
    with monkeypatch.context() as patch:
        die_at(SIGTERM, "step", 6, patch.setattr)
        with pytest.raises(Stopped):
            train(load_config(DIGITS, flags), "run")

    # Another one at the same place is refused, before anything is changed.
    os.rename("teacher", "away")
    last = Store(tiny_run[0]).steps()
    shutil.copytree("away", "teacher")
    shutil.rmtree(f"teacher/checkpoints/{last[-1]}")
    error = fails(capsys, *command, "--workdir=run")
    assert "distill.teacher teacher changed since" in error and "teacher, step 20" in error
    # Another name of the same weights goes on, from any folder.
    (tmp_path / "elsewhere").mkdir()
    moved = ["--config.teacher=../away/checkpoints/24", "--config.data.threads=1"]
    with monkeypatch.context() as patch:
        patch.chdir("elsewhere")
        die_at(SIGTERM, "step", 7, patch.setattr)
        with pytest.raises(Stopped):
            train(load_config(DIGITS, [*flags[:-1], *moved]), tmp_path / "run")
    shutil.rmtree("teacher")
    error = fails(capsys, *command, "--workdir=run")
    assert error.startswith("error: distill.teacher: there is no ")

    # The same name is looked for where it was.
    os.rename("away", "teacher")
    monkeypatch.chdir("elsewhere")
    train(load_config(DIGITS, flags), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert "resuming" in caplog.text and "at step 6 of 8" in caplog.text
    assert logged("run") == logged("whole") and len(logged("run")) >= 8
    assert {"train/agreement", "train/label_loss", "train/teacher_loss"} < logged("run")[0].keys()
    student = ModelCard.read("run").config
    assert student.distillation == "head"
    shapes = structure(student)[1]
    saved = [
        jax.tree.leaves(Store(run).restore(8, {"params": shapes, "ema": shapes}))
        for run in ("run", "whole")
    ]
    for ours, theirs in zip(*saved, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert Store("run").names(8) == {"step", "params", "opt_state", "ema"}

    # The student needs its teacher no more.
    shutil.rmtree("teacher")
    vit = vit_jax.load("run")
    assert vit.objective == "distill" and vit.labels == tuple("0123456789")
    name, probability = next(vit.predict(np.zeros((8, 8), np.uint8), topk=10))[0]
    assert 0.1 <= probability <= 1 and name in vit.labels


def plan_of(teacher, *flags):
    flags = [f"--config.{flag}" for flag in flags]
    config = load_config(DIGITS, [*RUN, f"--config.teacher={teacher}", *flags])
    return preflight.open_plan(config)[0]


def test_the_teacher_is_an_argument_placed_as_the_student_is(tiny_run, tmp_path):
    plan = plan_of(tiny_run[0], "precision=bfloat16", "mesh.data=1", "mesh.fsdp=8")
    assert plan.teacher.model.dtype == "bfloat16"
    mesh = make_mesh(plan.config.mesh)
    program = make_program(plan, mesh)
    params, fingerprint = plan.teacher.read(mesh)
    for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(program.teacher), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    assert "fsdp" in program.teacher["blocks"]["mlp"]["fc1"]["kernel"].sharding.spec
    traced = program.step.trace(*program.inputs)
    assert sum(np.asarray(const).nbytes for const in traced.jaxpr.consts) < 1000
    assert "jvp(teacher)/" in traced.lower().as_text(debug_info=True)  # a part of the roofline
    assert jax.tree.structure(program.state.ema) != jax.tree.structure(program.teacher)
    again = dataclasses.replace(plan.teacher, opened=open_model(tiny_run[0], step=20))
    assert again.read(mesh)[1] != fingerprint
    # The same weights in the file of another code base are the same teacher.
    vit_jax.save(vit_jax.load(tiny_run[0]), tmp_path / "same.npz", format="google")
    again = plan_of(tmp_path / "same.npz").teacher
    assert again.opened.facts["file"].startswith("google") and again.read(mesh)[1] == fingerprint
    # And in a file that has another model beside it, which is chosen from.
    same = dict(np.load(tmp_path / "same.npz"))
    other = {f"online/{name}": array + 1 for name, array in same.items()}
    np.savez(tmp_path / "two.npz", **other, **{f"mean/{name}": same[name] for name in same})
    for flag in ("distill.only=mean/*", "distill.ignore=online/*"):
        assert plan_of(tmp_path / "two.npz", flag).teacher.read(mesh)[1] == fingerprint
    with pytest.raises(UserError, match=r"of distill\.teacher distill's"):
        plan_of(tmp_path / "two.npz")


def test_preflight_counts_the_teacher(tiny_run, monkeypatch):
    monkeypatch.setattr(preflight, "_SECONDS_OF_DATA", 0.1)
    plan = plan_of(tiny_run[0], "mesh.data=2", "mesh.fsdp=4")
    student, teacher = plan.card.config, plan.teacher.model
    flops = step_flops(plan.config, student, teacher) - step_flops(plan.config, student)
    assert flops == 32 * flops_per_image(teacher)
    compiled, compile_step = [], preflight.compile_step
    monkeypatch.setattr(
        preflight, "compile_step", lambda *args: compiled.append(compile_step(*args)) or compiled[0]
    )
    lines = list(preflight.preflight(plan.config))
    (line,) = [each for each in lines if each.startswith("teacher")]
    assert re.search(r"step 24; .* parameters, 8x8 pixels; 10 classes, by name; 0\.00 GiB a", line)
    (taught,) = compiled
    size = preflight.shard_bytes(taught.program.teacher)
    assert size > 5000 and taught.peak_bytes > taught.state_bytes + size
    alone = least_traffic(dataclasses.replace(taught.program, teacher=None), plan.config, student)
    split = [
        leaf.sharding.shard_shape(leaf.shape)
        for leaf in jax.tree.leaves(taught.program.teacher)
        if "fsdp" in leaf.sharding.spec
    ]
    # Each of two micro-batches gathers the teacher once.
    gathered = 2 * sum(np.prod(shape) for shape in split) * 4 * 3
    assert taught.least_bytes - alone == pytest.approx(gathered)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["objective=distill"], "objective distill needs a teacher: set --config.distill.teacher"),
        (["teacher=x"], "distill.teacher is 'x', but objective softmax has no teacher"),
        (["distill.weight=0.7"], "distill.weight is 0.7, but objective softmax has no teacher"),
        (["distill.temperature=0"], "distill.temperature is 0.0; it must be above 0"),
        (["distill.weight=0"], "distill.weight is 0.0; it must be in (0, 1]"),
        (["distill.kind=sotf"], "distill.kind is 'sotf'; did you mean 'soft'"),
        (["distill.kind=hard", "distill.temperature=2"], "distill.kind hard has none"),
        (
            ["objective=distill", "teacher=x", "distill.weight=1", "augment.focal=1"],
            "augment.focal is for the loss of the labels",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, said):
    with pytest.raises(UserError, match=re.escape(said)):
        load_config(DIGITS, [f"--config.{flag}" for flag in flags])


def test_teachers_that_cannot_teach_are_refused(tiny_run):
    student, opened = ModelCard.read(tiny_run[0]), open_model(tiny_run[0])
    settings = DistillConfig("x")

    def refused(said, settings=settings, student=student, **card):
        there = dataclasses.replace(opened, card=dataclasses.replace(opened.card, **card))
        with pytest.raises(UserError, match=re.escape(said)):
            Teacher.of(settings, there, student)

    refused("distill.teacher x has no classes", labels=())
    refused("of objective sigmoid, which answers each class by itself", objective="sigmoid")
    config = dataclasses.replace(student.config, in_channels=4)
    refused("takes images of 4 channels, and the model those of 1", config=config)
    named = dataclasses.replace(student, labels=tuple("abcdefghij"))
    refused("it does not have 'j', but", student=named, labels=tuple("abcdefghix"))
    config = dataclasses.replace(TOKEN, num_classes=10)
    token = dataclasses.replace(student, config=config)
    refused("the class head learns from labels alone", DistillConfig("x", weight=1.0), token)
    with pytest.raises(UserError, match=r"distill\.teacher: there is no 'nowhere'"):
        plan_of("nowhere")
    config = load_config(DIGITS, [*RUN, "--config.teacher=x"])
    resnet = dict(variant="R26x1", image_size=(32, 32), in_channels=1, distillation="head")
    with pytest.raises(UserError, match="distillation"):
        make_plan(dataclasses.replace(config, model=resnet), TrainingData(student.labels))


def test_a_checkpoint_without_a_token_gets_one():
    card = ModelCard(STUDENT, PREPROCESS, tuple("abcde"))
    params = flatten_dict(params_of(STUDENT), sep="/")
    shapes = {name: value.shape for name, value in params.items()}
    old = Opened(card, shapes, params.get, {name: name for name in params}, {})
    with pytest.raises(UserError, match=r"has 1: set model\.position_prefix=1, and the new"):
        list(fitted(old, TOKEN))
    lines = {
        line.name: line.status
        for _, line in fitted(old, dataclasses.replace(TOKEN, position_prefix=1))
    }
    assert (
        lines["pos_embed"] == "kept" and lines["dist_token"] == lines["head_dist/bias"] == "fresh"
    )


def test_the_record_of_a_teacher_must_be_there(tmp_path):
    with pytest.raises(UserError, match=r"teacher\.json, which says .* is missing or damaged"):
        distill.open_teacher(DistillConfig("x"), open_model, tmp_path)
    assert distill.open_teacher(DistillConfig(), open_model, tmp_path) is None
