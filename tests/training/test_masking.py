"""Masked patch prediction against loops, sequences and losses written out here."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DIGITS, ROOT
from flax import nnx
from jax import jit
from tiny_models import as_float32, random_params

import vit_jax
from vit_jax.analysis.cost import flops_per_image
from vit_jax.analysis.preflight import open_plan
from vit_jax.checkpoints import card
from vit_jax.checkpoints.fit import place
from vit_jax.checkpoints.opened import open_model, read_model
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.corruption import Corruption
from vit_jax.models.create import init_params, structure
from vit_jax.models.stack import Captures
from vit_jax.training import masking, objectives
from vit_jax.training.config_file import load_config
from vit_jax.training.evaluation.evaluate import evaluate_run
from vit_jax.training.evaluation.evaluators import Classification, Knn
from vit_jax.training.evaluation.steps import make_masked_eval_step
from vit_jax.training.loop import train
from vit_jax.training.metrics import read_metrics
from vit_jax.training.model import model_config
from vit_jax.training.objectives import Augment
from vit_jax.training.optim import OptimConfig, make_optimizer
from vit_jax.training.plan import TrainingData, make_plan
from vit_jax.training.sharding import MeshConfig, make_layout, make_mesh, to_devices
from vit_jax.training.state import abstract_state, make_state
from vit_jax.training.steps import make_train_step

# Six patches, not square; of two channels.
CONFIG = ViTConfig(
    image_size=(8, 24),
    patch_size=(4, 8),
    in_channels=2,
    width=16,
    depth=1,
    mlp_dim=32,
    num_heads=2,
    num_classes=0,
)
OUTPUTS = {"masked_colour": 8**2, "masked_small": 16 * 8**2, "masked_pixels": 4 * 8 * 2}
PREPROCESS = Preprocess((8, 24), in_channels=2, mean=0.4, std=0.3)
BATCH = 16


@functools.cache
def model_of(objective="masked_small"):
    """The config and parameters without telling zeros."""
    config = dataclasses.replace(CONFIG, patch_outputs=OUTPUTS[objective])
    return config, as_float32(random_params(config))


def images(seed=0, dtype=np.uint8):
    random = np.random.default_rng(seed)
    # Patches of all shades, so that means are not all near 128.
    base = random.integers(0, 256, (BATCH, 2, 3, 2)).repeat(4, 1).repeat(8, 2)
    return np.clip(base + random.integers(-60, 60, base.shape), 0, 255).astype(dtype)


# -- Targets


def shade(values):
    """Which of 8 equal parts of 0 to 255 a mean is in, of Python's exact integers."""
    values = [int(v) for v in np.ravel(values)]
    return sum(values) // (32 * len(values))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("objective", OUTPUTS)
def test_targets_against_loops(objective, dtype):
    pixels = images(dtype=dtype)
    where = np.argsort(np.random.default_rng(1).random((BATCH, 6)), axis=1)[:, :3]
    found = masking.targets(
        objective, jnp.asarray(pixels), PREPROCESS, CONFIG, jnp.asarray(where, jnp.int32)
    )
    cells = {"masked_colour": 1, "masked_small": 4}.get(objective)
    for i in range(BATCH):
        for j, patch in enumerate(where[i]):
            top, left = 4 * (patch // 3), 8 * (patch % 3)
            if cells is None:
                expected = []
                for y in range(top, top + 4):
                    for x in range(left, left + 8):
                        expected += [(float(v) / 255 - 0.4) / 0.3 for v in pixels[i, y, x]]
                np.testing.assert_allclose(found[i, j], expected, rtol=1e-4, atol=1e-5)
                continue
            expected, h, w = [], 4 // cells, 8 // cells
            for y in range(top, top + 4, h):
                for x in range(left, left + 8, w):
                    first, second = (shade(pixels[i, y : y + h, x : x + w, c]) for c in (0, 1))
                    expected.append(8 * first + second)
            assert found[i, j].tolist() == expected


def test_the_colours_of_rgb_are_512_and_their_borders_exact():
    """196 pixels, by which nothing divides evenly in binary; a mean of 32 is the second level."""
    patch = np.full((1, 3, 14, 14, 3), 32, np.uint8)
    patch[0, 1, 5, 6, 1] = 31
    patch[0, 2] = 255
    assert masking.colours(jnp.asarray(patch), 1).tolist() == [[[64 + 8 + 1], [64 + 1], [511]]]
    over = jnp.full((1, 1, 4, 4, 1), 255.9)  # bicubic resizing in floats overshoots
    assert masking.colours(over + 20, 4).tolist() == [[[7] * 16]]
    assert masking.colours(over - 300, 4).tolist() == [[[0] * 16]]


@pytest.mark.parametrize("objective", OUTPUTS)
def test_losses_and_accuracies_are_those_of_formulas(objective):
    random = np.random.default_rng(3)
    shape = {"masked_colour": (1, 64), "masked_small": (16, 64)}.get(objective)
    if shape is None:
        predictions, wanted = random.normal(size=(2, 5, 3, 64))
        expected = ((predictions - wanted) ** 2).sum(axis=(1, 2)) / (3 * 64)
        loss, others = masking.losses(objective, jnp.float32(predictions), jnp.float32(wanted))
        assert others == {}
    else:
        logits = random.normal(size=(5, 3, *shape)) * 3
        wanted = random.integers(0, 64, (5, 3, shape[0]))
        wanted[0, 0] = logits[0, 0].argmax(axis=-1)
        loss, others = masking.losses(
            objective, jnp.float32(logits.reshape(5, 3, -1)), jnp.int32(wanted)
        )
        p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        right = np.take_along_axis(p, wanted[..., None], axis=-1)
        expected = -np.log(right).mean(axis=(1, 2, 3))
        share = (logits.argmax(axis=-1) == wanted).mean(axis=(1, 2))
        np.testing.assert_allclose(others["accuracy"], share, rtol=1e-6)
        assert share[0] >= 1 / 3
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


# -- Corruption


@functools.cache
def drawn(patches=16, count=3000):
    draw = jit(masking.draw_corruption, static_argnums=1)
    return jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), count), patches))


@pytest.mark.parametrize("patches, half", [(3, 2), (16, 8), (25, 12)])
def test_exactly_half_are_corrupted(patches, half):
    where, source, masked = drawn(patches)
    assert where.shape == (3000, half) and source.shape == masked.shape == (3000, patches)
    assert all(len(set(row)) == half and 0 <= min(row) <= max(row) < patches for row in where)
    touched = masked | (source != np.arange(patches))
    for row, chosen in zip(touched, where, strict=True):
        assert set(np.flatnonzero(row)) <= set(chosen)


def test_of_these_80_10_and_10_percent_are_masked_replaced_and_kept():
    where, source, masked = drawn()
    n, own = where.size, np.arange(16)
    replaced = source != own
    assert not (replaced & masked).any()
    for share, found in ((0.8, masked.sum()), (0.1, replaced.sum())):
        assert abs(found - share * n) < 4.5 * np.sqrt(n * share * (1 - share))
    # Each patch is corrupted as often as another, and replaced by each of the others as often.
    counts = np.bincount(where.ravel(), minlength=16)
    assert np.abs(counts - n / 16).max() < 4.5 * np.sqrt(n / 16)
    steps = np.bincount(((source - own) % 16)[replaced], minlength=16)
    assert steps[0] == 0
    expected = replaced.sum() / 15
    assert np.abs(steps[1:] - expected).max() < 4.5 * np.sqrt(expected)
    # Drawn one by one: in some images all are masked, in others few.
    spread = masked.sum(axis=1).var()
    assert spread == pytest.approx(8 * 0.8 * 0.2, rel=0.15)


def test_a_corruption_is_that_of_its_key_alone():
    keys = jax.random.split(jax.random.key(0), 3000)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(lambda x: x[5:7], Corruption(*drawn())),
        jit(masking.draw_corruption, static_argnums=1)(keys[5:7], 16),
    )


# -- The model

CORRUPTION = Corruption(
    where=jnp.int32([[4, 0, 1], [2, 3, 5]]),
    source=jnp.int32([[0, 3, 2, 3, 4, 5], [0, 1, 2, 3, 4, 0]]),
    masked=jnp.array([[1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]], bool),
)


def test_predictions_against_a_sequence_written_out():
    config, params = model_of()
    model = nnx.merge(structure(config)[0], params)
    inputs = PREPROCESS.normalise(jnp.asarray(images()[:2]))
    found = jit(lambda x: model(x, corruption=CORRUPTION))(inputs)
    assert found.shape == (2, 3, 16 * 64) and found.dtype == jnp.float32

    patches = np.asarray(jit(model.patch_embed)(inputs))
    mask = params["mask_token"][0, 0]
    p, q = patches
    masked = [mask, p[3], p[2], p[3], p[4], p[5]]  # or replaced by 3; or not corrupted, or kept
    rows = np.stack([masked, [q[0], q[1], mask, mask, q[4], q[0]]])
    class_token = np.broadcast_to(params["cls_token"], (2, 1, 16))
    x = np.concatenate([class_token, rows], axis=1) + params["pos_embed"]
    x = jit(lambda x: model.norm(model.encode(x, None, Captures())))(x)
    kernel, bias = params["patch_head"]["kernel"], params["patch_head"]["bias"]
    for i, chosen in enumerate(([4, 0, 1], [2, 3, 5])):
        expected = np.asarray(x)[i][[1 + j for j in chosen]] @ kernel + bias
        np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-4)


def test_a_norm_behind_the_pooling_stands_before_the_patch_head_too():
    config, params = model_of()
    inputs = PREPROCESS.normalise(jnp.asarray(images()[:2]))
    outputs = []
    for late in (False, True):
        there = dataclasses.replace(config, norm_after_pool=late)
        model = nnx.merge(structure(there)[0], params)
        outputs.append(jit(lambda x, model=model: model(x, corruption=CORRUPTION))(inputs))
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


def test_a_new_model_says_nothing_and_others_have_nothing_of_it():
    config, _ = model_of()
    plain, masked = jit(lambda: (init_params(CONFIG, 1), init_params(config, 1)))()
    assert not masked["patch_head"]["kernel"].any() and not masked["patch_head"]["bias"].any()
    assert 0.01 < masked["mask_token"].std() < 0.03
    assert set(masked) - set(plain) == {"mask_token", "patch_head"}
    jax.tree.map(np.testing.assert_array_equal, plain, {name: masked[name] for name in plain})
    head = 3 * 16 * config.patch_outputs
    assert flops_per_image(config) == flops_per_image(CONFIG) + 2 * head


# -- Steps


def batch(seed=0):
    mask = np.arange(BATCH) % 3 > 0  # every third is padding
    return {"image": images(seed), "label": np.zeros(BATCH, np.int32), "mask": mask}


def schedule(step):
    return 0.1


@functools.cache
def stepper(objective, accumulate, dtype, sizes):
    """A mesh, or one device, a state by SGD and the jitted step."""
    config, params = model_of(objective)
    config = dataclasses.replace(config, dtype=dtype)
    mesh = make_mesh(MeshConfig(**dict(sizes)), None if sizes else jax.devices()[:1])
    optimizer = make_optimizer(OptimConfig(0.1, name="sgd", momentum=0.0), schedule)
    abstract = abstract_state(config, optimizer, ema=False, mesh=mesh)
    step = make_train_step(
        structure(config)[0],
        optimizer,
        schedule,
        PREPROCESS,
        num_classes=0,
        objective=objective,
        augment=Augment(),
        accumulate=accumulate,
        seed=3,
        layout=make_layout(mesh, config.dtype),
    )
    return mesh, make_state(abstract, config, optimizer, seed=0, params=params), jit(step)


def trained(objective, steps=1, accumulate=1, rows=None, dtype="float32", **sizes):
    """The state and the metrics after some steps."""
    mesh, state, step = stepper(objective, accumulate, dtype, tuple(sizes.items()))
    found = []
    for number in range(steps):
        state, metrics = step(state, to_devices(rows or batch(number), BATCH, mesh))
        found.append({name: float(value) for name, value in metrics.items()})
    return state, found


@pytest.mark.parametrize("objective", ["masked_small", "masked_pixels"])
def test_the_loss_is_over_the_corrupted_patches_of_real_images(objective):
    _, (metrics,) = trained(objective)
    config, params = model_of(objective)
    rows = batch()

    @jit
    def per_image(pixels):
        _, other = jax.random.split(jax.random.fold_in(jax.random.key(3), 0))
        corruption = masking.draw_corruption(jax.random.split(other, BATCH), 6)
        model = nnx.merge(structure(config)[0], params)
        found = model(PREPROCESS.normalise(pixels), corruption=corruption)
        wanted = masking.targets(objective, pixels, PREPROCESS, config, corruption.where)
        loss, others = masking.losses(objective, found, wanted)
        return {"loss": loss, **others}

    expected = per_image(rows["image"])
    expected = {name: float(value[rows["mask"]].mean()) for name, value in expected.items()}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert set(metrics) == {*expected, "grad_norm", "param_norm", "lr"}
    assert ("accuracy" in metrics) == (objective != "masked_pixels")


def test_padding_does_not_count_and_a_gradient_reaches_what_is_learned():
    rows = batch()
    rows["image"] = np.where(rows["mask"][:, None, None, None], rows["image"], 255 - rows["image"])
    (state, found), (again, other) = trained("masked_small"), trained("masked_small", rows=rows)
    assert found == other
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
    before = model_of()[1]
    for name in ("mask_token", "patch_head", "patch_embed", "pos_embed", "cls_token"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before[name], state.params[name])
        assert min(jax.tree.leaves(moved)) > 1e-5, name


@pytest.mark.parametrize(
    "objective, accumulate, sizes",
    [
        ("masked_small", 1, dict(data=2, fsdp=2, tensor=2)),
        ("masked_colour", 2, dict(data=2, fsdp=4)),
    ],
)
def test_a_mesh_computes_the_same(objective, accumulate, sizes):
    _, alone = trained(objective, steps=2, accumulate=accumulate)
    state, found = trained(objective, steps=2, accumulate=accumulate, **sizes)
    for ours, theirs in zip(found, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    if sizes.get("fsdp", 1) > 1:
        kernel = state.params["patch_head"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape)[0] == 16 // sizes["fsdp"]


def test_half_precision_has_a_loss_in_float32():
    _, (metrics,) = trained("masked_small", dtype="bfloat16")
    _, (exact,) = trained("masked_small")
    assert metrics["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert metrics["loss"] != exact["loss"]


def test_an_example_is_evaluated_in_the_same_way_in_any_batch():
    config, params = model_of()
    graphdef = structure(config)[0]
    step = jit(make_masked_eval_step(graphdef, PREPROCESS, objective="masked_small", seed=5))
    rows = batch()
    whole = step(params, rows, 32)
    assert whole["count"] == rows["mask"].sum()
    # The batch before, whose last four are the first four here; and the one after.
    moved = [
        {**rows, "image": np.roll(rows["image"], by, 0), "mask": np.roll(rows["mask"], by) & part}
        for by, part in ((12, np.arange(16) >= 12), (-4, np.arange(16) < 12))
    ]
    halves = [step(params, part, start) for part, start in zip(moved, (20, 36), strict=True)]
    for name, value in whole.items():
        assert float(value) == pytest.approx(sum(float(half[name]) for half in halves), rel=1e-5)
    elsewhere = step(params, rows, 0)
    assert float(elsewhere["loss"]) != pytest.approx(float(whole["loss"]), rel=1e-4)


# -- Runs

FLAGS = [
    "--config.objective=masked_small",
    "--config.model.patch_size=4",
    "--config.model.representation_size=None",
    "--config.model.width=16",
    "--config.model.depth=2",
    "--config.model.mlp_dim=32",
    "--config.model.num_heads=2",
    "--config.batch_size=32",
    "--config.total_steps=24",
    "--config.optim.lr=1e-2",
    "--config.optim.accumulate=2",
    "--config.optim.ema=0.9",
    "--config.eval.every=8",
    "--config.checkpoint.every=12",
    "--config.log.every=4",
]


def config_of(*flags):
    return load_config(DIGITS, [*FLAGS, *flags])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("masked") / "run"
    config = config_of()
    splits = dict(train=config.data.val, test=config.data.test)
    evaluators = {"near": Knn(type="knn", every=0, neighbours=(5,), **splits)}
    config = dataclasses.replace(
        config, eval=dataclasses.replace(config.eval, evaluators=evaluators)
    )
    return workdir, config, train(config, workdir)


def test_a_run_learns_and_resumes_bit_for_bit(run, tmp_path):
    workdir, config, result = run
    lines = read_metrics(workdir)
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    assert losses[0] < np.log(8)  # what a zero head begins with, of 8 shades of grey
    assert any(name.startswith("near/") for name in result)  # features, read without a head

    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "24")
    repeated = train(config, again)
    for name, value in result.items():
        if name.startswith(("train/", "val/", "test/", "near/")):
            assert repeated[name] == value, name
    jax.tree.map(np.testing.assert_array_equal, read_model(again)[1], read_model(workdir)[1])


def test_evaluation_is_the_same_in_batches_of_any_size(run):
    workdir, _, result = run
    again = evaluate_run(workdir, config_of("--config.eval.batch_size=200"))
    for name in ("val/loss", "val/accuracy", "test/loss", "test/accuracy"):
        assert again[name] == pytest.approx(result[name], rel=1e-5)


def test_the_record_loads_and_fine_tuning_drops_what_predicts_patches(
    run, tmp_path, caplog, untrained
):
    workdir, _, _ = run
    caplog.set_level("INFO", "vit_jax")
    vit = vit_jax.load(workdir)
    assert (vit.config.num_classes, vit.labels, vit.config.patch_outputs) == (0, (), 16 * 8)
    assert vit.objective == "masked_small"
    vit_jax.save(vit, tmp_path / "kept.safetensors")
    back = vit_jax.load(tmp_path / "kept.safetensors")
    assert back.config == vit.config and back.objective == vit.objective
    with pytest.raises(UserError, match="no head to name classes by"):
        next(vit.predict([np.zeros((8, 8), "uint8")]))
    with pytest.raises(UserError, match=r"timm files have no place for (mask_token|patch_head)"):
        vit_jax.save(vit, tmp_path / "x.safetensors", format="timm")
    with pytest.raises(UserError, match=r"data\.val: the model has no classes"):
        evaluate_run(workdir, load_config(DIGITS))
    for other in ("masked_colour", "masked_pixels"):
        with pytest.raises(UserError, match="does not predict: its objective is masked_small"):
            evaluate_run(workdir, config_of(f"--config.objective={other}"))
    # A head for classes is not one for patches.
    assert vit_jax.load(workdir, num_classes=3).objective == "softmax"

    flags = [f"--config.init_from={workdir}", "--config.total_steps=1", "--config.batch_size=8"]
    flags += ["--config.data.val=None", "--config.data.test=None"]
    train(load_config(f"{DIGITS}:finetune", flags), tmp_path / "tuned")
    tuned = vit_jax.load(tmp_path / "tuned")
    assert (tuned.config.num_classes, tuned.config.patch_outputs) == (10, 0)
    text = " ".join(" ".join(record.getMessage().split()) for record in caplog.records)
    for sentence in ("mask_token dropped", "patch_head/kernel dropped", "head/kernel fresh"):
        assert sentence in text
    assert len(next(tuned.predict([np.zeros((8, 8), "uint8")], topk=20))) == 10
    with pytest.raises(UserError, match="measures predicted patches, which this model does not"):
        evaluate_run(tmp_path / "tuned", config_of())


@pytest.mark.parametrize(
    "flags, status",
    [
        ([], "fresh"),
        (["--config.model.head=keep"], "kept"),
        (["--config.model.head=keep", "--config.objective=masked_pixels"], "fresh"),
    ],
)
def test_pre_training_goes_on_with_another_target(run, flags, status):
    """The patch head of one target is of no use for another; the [mask] is."""
    opened, config = open_model(run[0]), config_of(*flags)
    plan = make_plan(config, TrainingData(tuple("0123456789")), opened)
    card, keeps = plan.card, plan.keep_head
    assert (card.labels, card.objective) == ((), config.objective)
    _, lines = place(opened, card.config, head="keep" if keeps else "fresh")
    statuses = {line.name: line.status for line in lines}
    assert (statuses["patch_head/kernel"], statuses["mask_token"]) == (status, "kept")


def test_a_preflight_needs_neither_data_nor_classes():
    spec = f"{ROOT}/configs/masked.py:B/16,imagenet,small"
    plan, source, missing = open_plan(load_config(spec))
    assert source is None and "imagenet2012" in missing
    model = plan.card.config
    assert (model.num_classes, model.patch_outputs) == (0, 16 * 512)


DENSE = ("segmentation", "detection")  # whose losses are in files of their own


def test_a_record_may_name_every_objective_there_is():
    assert set(card.OBJECTIVES) == {*objectives.LOSSES, *masking.TARGETS, *DENSE}
    classifying = {name for name, kind in card.OBJECTIVES.items() if kind.probabilities}
    assert classifying == {*objectives.LOSSES, *DENSE}


# What is set, and what is said of it before a run begins.
REFUSED = [
    ("augment", Augment(mixup=0.2), "augment.mixup is for classification"),
    ("augment", Augment(cutmix=0.2), "augment.cutmix is for classification"),
    ("augment", Augment(label_smoothing=0.1), "augment.label_smoothing is for classification"),
    ("objective", "masked_color", "'masked_color'.*masked_colour"),
    ("patch_size", (2, 2), "shrinks each patch to 4x4 pixels, but patches are 2x2"),
    ("patch_size", (8, 8), "an image of 8x8 pixels is one patch of 8x8"),
    ("patch_outputs", 7, "model.patch_outputs is 7, but objective masked_small needs 128"),
    ("num_classes", 10, "10, but objective masked_small has 0 classes"),
    ("in_channels", 5, "has 32,768 colours for 5 channels"),
    ("representation_size", 8, "model.representation_size is 8, but a model of .* has no head"),
]


@pytest.mark.parametrize("name, value, message", REFUSED)
def test_what_does_not_go_together_is_refused(name, value, message):
    config = config_of()
    with pytest.raises(UserError, match=message):
        if name not in ("augment", "objective"):
            name, value = "model", {**config.model, name: value}
        make_plan(dataclasses.replace(config, **{name: value}), TrainingData(("0", "1")))


def test_no_evaluator_may_classify_and_no_resnet_be_masked():
    config = config_of()
    evaluators = {"v2": Classification(test=config.data.test)}
    with pytest.raises(UserError, match=r"eval\.evaluators\.v2 classifies, but a model of"):
        dataclasses.replace(config, eval=dataclasses.replace(config.eval, evaluators=evaluators))
    with pytest.raises(UserError, match="predicts patches, which a ResNet has none of"):
        model_config(dataclasses.replace(config, model={"variant": "R50x1"}), None, 0)
    softmax = dataclasses.replace(config, objective="softmax", model={"variant": "S/16"})
    assert model_config(softmax, None, 10).patch_outputs == 0
    with pytest.raises(UserError, match="patch_outputs is 3, but objective softmax needs 0"):
        changed = {"variant": "S/16", "patch_outputs": 3}
        model_config(dataclasses.replace(softmax, model=changed), None, 10)
    hybrid = model_config(dataclasses.replace(config, model={"variant": "R50+B/16"}), None, 0)
    assert hybrid.patch_outputs == 16 * 512  # patches are of pixels, whatever is cut


def test_a_hybrid_predicts_its_patches():
    config = ViTConfig(
        image_size=(16, 16),
        patch_size=(1, 1),
        in_channels=1,
        resnet=(1, 1),
        resnet_width=32,
        width=16,
        depth=1,
        mlp_dim=16,
        num_heads=2,
        num_classes=0,
        dtype="bfloat16",
        remat="dots",
    )
    config = dataclasses.replace(
        config, patch_outputs=masking.patch_outputs("masked_pixels", config)
    )
    assert config.patch_outputs == 64
    graphdef, shapes = structure(config)

    def predict(params, images, keys):
        corruption = masking.draw_corruption(keys, 4)
        return nnx.merge(graphdef, params)(images, corruption=corruption)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    inputs = jax.ShapeDtypeStruct((2, 16, 16, 1), jnp.float32)
    found = jax.eval_shape(predict, shapes, inputs, keys)
    assert found.shape == (2, 2, 64) and found.dtype == jnp.float32


def test_the_recipe_is_the_papers():
    """Section B.1.2: B/16 on JFT-300M, Adam, its learning rate, warm-up and decay."""
    for words, objective, outputs in (
        ("", "masked_colour", 512),
        (",small", "masked_small", 16 * 512),
        (",pixels,fewshot", "masked_pixels", 16 * 16 * 3),
    ):
        config = load_config(f"{ROOT}/configs/masked.py:B/16,jft,records:shards/mine{words}")
        optim = config.optim
        assert (config.total_steps, config.batch_size) == (1_000_000, 4096)
        assert (optim.name, optim.lr, optim.b1, optim.b2) == ("adam", 2e-4, 0.9, 0.999)
        assert (optim.schedule, optim.warmup, optim.weight_decay) == ("cosine", 10_000, 0)
        assert (config.objective, config.data.train.source) == (objective, "records:shards/mine")
        assert model_config(config, None, 0).patch_outputs == outputs
    assert set(config.eval.evaluators) >= {"pets_fewshot"}
    small = load_config(f"{ROOT}/configs/masked.py:fractals,small")
    assert model_config(small, None, 0).patch_outputs == 16 * 8
    for wrong in ("B/16,jft,small,pixels", "fractals,large", "R50x1,imagenet", "B/16,imagenet,v2"):
        with pytest.raises(UserError, match="argument"):
            load_config(f"{ROOT}/configs/masked.py:{wrong}")


def test_of_two_patches_each_is_replaced_by_the_other():
    keys = jax.random.split(jax.random.key(1), 4000)
    found = jit(masking.draw_corruption, static_argnums=1)(keys, 2)
    replaced = (np.asarray(found.source) != np.arange(2)).sum()
    assert abs(replaced - 400) < 4.5 * np.sqrt(4000 * 0.1 * 0.9)
