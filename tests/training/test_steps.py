"""Training and evaluation steps, on one device and on meshes, against losses, AdamW and ranks
written out here."""

import dataclasses
import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from jax import jit
from tiny_models import as_float32, random_params

from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.pipeline import BatchReader
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import create, structure
from vit_jax.models.rotary import Rotary
from vit_jax.training import sharding
from vit_jax.training.evaluation.steps import make_eval_step
from vit_jax.training.objectives import Augment, sigmoid, softmax, to_targets
from vit_jax.training.optim import OptimConfig, make_optimizer
from vit_jax.training.sharding import (
    MeshConfig,
    check_batch,
    local_rows,
    make_mesh,
    placement,
    to_devices,
)
from vit_jax.training.state import abstract_state, from_saved, make_state, to_saved
from vit_jax.training.steps import accumulated, class_loss, make_train_step

CONFIG = ViTConfig(
    image_size=(8, 12),
    patch_size=(4, 4),
    in_channels=2,
    width=16,
    depth=2,
    mlp_dim=32,
    num_heads=2,
    num_classes=7,
)
PREPROCESS = Preprocess((8, 12), in_channels=2, mean=0.4, std=0.3)
BATCH, SMOOTHING = 16, 0.1
LRS = [0.02, 0.01, 0.03]
# Gradients of key biases are zero but for rounding: a small eps would blow that up.
OPTIM = OptimConfig(1.0, weight_decay=0.2, grad_clip=2.5, b1=0.8, b2=0.95, eps=1e-3, ema=0.7)


@functools.cache
def initial():
    """Parameters without the head's telling zeros."""
    return as_float32(random_params(CONFIG))


def batch(step):
    """Eleven real examples and five that must not count."""
    random = np.random.default_rng(step)
    return {
        "image": random.integers(0, 256, (BATCH, 8, 12, 2), np.uint8),
        "label": random.integers(0, 7, BATCH).astype(np.int32),
        "mask": random.permutation(BATCH) < 11,
        "index": np.arange(BATCH),
    }


def logits_of(params, pixels, key=None):
    images = (pixels.astype(np.float32) / 255 - 0.4) / 0.3
    return nnx.merge(structure(CONFIG)[0], params)(jnp.asarray(images), key=key)


def cross_entropy(logits, labels, smoothing):
    """The mean over the batch, from sums of exponentials."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - jnp.log(jnp.exp(shifted).sum(axis=1, keepdims=True))
    right = log_p[jnp.arange(len(labels)), labels]
    return -jnp.mean((1 - smoothing) * right + smoothing * log_p.mean(axis=1))


@functools.cache
def reference():
    """Three steps of clipped AdamW and a running average, over the real rows alone."""

    def loss_and_logits(params, pixels, labels):
        logits = logits_of(params, pixels)
        return cross_entropy(logits, labels, SMOOTHING), logits

    differentiate = jit(jax.value_and_grad(loss_and_logits, has_aux=True))
    structure_of, paths = jax.tree.structure(initial()), jax.tree_util.tree_leaves_with_path
    is_kernel = [path[-1].key == "kernel" for path, _ in paths(initial())]
    params = [leaf.astype(np.float64) for leaf in jax.tree.leaves(initial())]
    m, v = [0.0] * len(params), [0.0] * len(params)
    ema, warmed, steps = list(params), list(params), []
    for t, lr in enumerate(LRS):
        rows = batch(t)
        real = rows["mask"]
        tree = jax.tree.unflatten(structure_of, [p.astype(np.float32) for p in params])
        labels = rows["label"][real]
        (loss, logits), grads = differentiate(tree, rows["image"][real], labels)
        grads = [np.asarray(g, np.float64) for g in jax.tree.leaves(grads)]
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        for i, grad in enumerate(grads):
            grad = grad * min(1.0, 2.5 / norm)
            m[i] = 0.8 * m[i] + 0.2 * grad
            v[i] = 0.95 * v[i] + 0.05 * grad**2
            update = m[i] / (1 - 0.8 ** (t + 1)) / (np.sqrt(v[i] / (1 - 0.95 ** (t + 1))) + 1e-3)
            params[i] = params[i] - lr * (update + 0.2 * is_kernel[i] * params[i])
            ema[i] = 0.7 * ema[i] + 0.3 * params[i]
            decay = (0.1, 0.15, 0.15)[t]  # 1 / 10, and 2 / 11 and 3 / 12 are more than 0.15
            warmed[i] = decay * warmed[i] + (1 - decay) * params[i]
        hits = np.asarray(logits).argmax(axis=1) == labels
        metrics = dict(loss=float(loss), accuracy=hits.mean(), grad_norm=norm, lr=lr)
        metrics["param_norm"] = np.sqrt(sum((p**2).sum() for p in params))
        unflatten = functools.partial(jax.tree.unflatten, structure_of)
        averages = {False: unflatten(list(ema)), True: unflatten(list(warmed))}
        steps.append((unflatten(list(params)), averages, metrics))
    return steps


def mesh_of(**sizes):
    """A mesh of these sizes, or of a single device."""
    if sizes:
        return make_mesh(MeshConfig(**sizes))
    return make_mesh(MeshConfig(), jax.devices()[:1])


def schedule(step):
    return jnp.array(LRS)[step]


@functools.cache
def stepper(mesh, config=CONFIG, optim=OPTIM, donate=0, accumulate=1, seed=0):
    """The abstract state and the step, made and compiled as the training loop does."""
    optimizer = make_optimizer(optim, schedule)
    abstract = abstract_state(config, optimizer, ema=optim.ema is not None, mesh=mesh)
    step = make_train_step(
        structure(config)[0],
        optimizer,
        schedule,
        PREPROCESS,
        num_classes=7,
        objective="softmax",
        augment=Augment(label_smoothing=SMOOTHING),
        accumulate=accumulate,
        ema=optim.ema,
        ema_warmup=optim.ema_warmup,
        seed=seed,
    )
    places = (jax.tree.map(lambda leaf: leaf.sharding, abstract), None)
    return abstract, jit(step, donate_argnums=donate, out_shardings=places)


def start(abstract, config=CONFIG, optim=OPTIM):
    optimizer = make_optimizer(optim, schedule)
    return make_state(abstract, config, optimizer, seed=0, params=initial())


def assert_close(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, leaf), wanted in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(leaf, wanted, err_msg=str(path), **tolerance)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "sizes, accumulate, warmup",
    [
        ({}, 1, False),
        (dict(data=1, fsdp=8), 1, True),
        (dict(data=2, fsdp=2, tensor=2), 4, False),
    ],
    ids=str,
)
def test_three_training_steps(sizes, accumulate, warmup):
    """The average's decay is 0.7; where it warms up, it is 0.15."""
    mesh = mesh_of(**sizes)
    optim = dataclasses.replace(OPTIM, ema=0.15, ema_warmup=True) if warmup else OPTIM
    abstract, step = stepper(mesh, optim=optim, accumulate=accumulate)
    state = start(abstract)
    for t, (params, averages, expected) in enumerate(reference()):
        before = state
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of buffers that were given away in vain
            state, metrics = step(state, to_devices(batch(t), BATCH, mesh))
        assert state.step == t + 1
        found = {name: float(value) for name, value in metrics.items()}
        assert found == pytest.approx(expected, rel=1e-5)
        assert found["accuracy"] == np.float32(expected["accuracy"])
        assert_close(state.params, params, rtol=1e-5, atol=3e-6)
        assert_close(state.ema, averages[warmup], rtol=1e-5, atol=3e-6)
        # Updated in place: the state is never there twice.
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_the_steps_above_are_clipped():
    norms = [metrics["grad_norm"] for _, _, metrics in reference()]
    assert max(norms) > 2.5 > min(norms)


def test_randomness_is_a_function_of_seed_and_step():
    rope = dict(rotary=Rotary(shift=0.5, rescale=4.0))
    config = dataclasses.replace(CONFIG, dropout=0.3, drop_path=0.2, **rope)
    abstract, step = stepper(mesh_of(), config, donate=(), seed=7)
    state = start(abstract, config)
    rows = {name: jnp.asarray(values) for name, values in batch(0).items() if name != "index"}

    @jit
    def expected(seed, number):
        key = jax.random.fold_in(jax.random.key(seed), number)
        images = PREPROCESS.normalise(rows["image"])
        logits = nnx.merge(structure(config)[0], state.params)(images, key=key)
        real = np.flatnonzero(batch(0)["mask"])
        return cross_entropy(logits[real], rows["label"][real], SMOOTHING)

    def loss(number):
        return float(step(dataclasses.replace(state, step=jnp.int32(number)), rows)[1]["loss"])

    assert loss(0) == loss(0)
    losses = [loss(0), loss(1), loss(2)]
    assert losses == pytest.approx([float(expected(7, number)) for number in range(3)], rel=1e-5)
    losses += [float(expected(8, 0)), reference()[0][2]["loss"]]
    assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-4


def test_micro_batches_take_every_nth_row_and_their_own_key():
    def grad_fn(params, micro, key, weight):
        assert micro["label"].shape == (2,)
        draw = jax.random.uniform(key)
        product = jnp.prod(micro["label"])
        return (draw / weight, product.astype(jnp.int32)), {"w": params["w"] * product}

    rows = {"label": jnp.array([2.0, 3.0, 5.0, 7.0, 11.0, 13.0])}
    params, key = {"w": jnp.array([1.0, -2.0])}, jax.random.key(5)
    loss, hits, grads = accumulated(grad_fn, params, rows, key, jnp.float32(4), 3)
    assert hits == 2 * 7 + 3 * 11 + 5 * 13
    np.testing.assert_array_equal(grads["w"], [112, -224])
    draws = [float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(3)]
    assert len(set(draws)) == 3
    assert float(loss) == pytest.approx(sum(draws) / 4)


def test_hits_are_counted_and_divided_last():
    graphdef, shapes = structure(CONFIG)
    loss = class_loss(graphdef, PREPROCESS, "softmax", 7, SMOOTHING, None)
    _, sums = jax.eval_shape(loss, shapes, batch(0), jax.random.key(0), jnp.float32(11))
    assert sums["accuracy"].dtype == jnp.int32  # no sum over micro-batches is rounded


def test_without_an_average_there_is_none():
    optim = dataclasses.replace(OPTIM, ema=None)
    abstract, step = stepper(mesh_of(), optim=optim)
    after, _ = step(start(abstract, optim=optim), to_devices(batch(0), BATCH, mesh_of()))
    assert after.ema is None
    assert_close(after.params, reference()[0][0], rtol=1e-5, atol=3e-6)
    assert_equal(from_saved(to_saved(after), abstract), after)


def test_a_saved_state_comes_back_bit_for_bit():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    abstract, step = stepper(mesh, accumulate=4)  # as above, so compiled already
    state, _ = step(start(abstract), to_devices(batch(0), BATCH, mesh))
    saved = to_saved(state)
    assert set(saved) == {"step", "params", "opt_state", "ema"}

    def plain(tree):
        inner = tree.values() if type(tree) is dict else []
        return all(plain(each) for each in inner) and isinstance(tree, dict | jax.Array)

    assert plain(saved)
    count = len(jax.tree.leaves(initial()))
    # Two moments of every parameter, and how often the rule and the schedule have been used.
    assert len(saved["opt_state"]) == 2 * count + 2
    assert len(jax.tree.leaves(saved)) == 4 * count + 3
    host = jax.tree.map(lambda leaf: np.array(leaf), saved)
    assert_equal(from_saved(host, abstract), state)


def test_a_fresh_state_is_that_of_its_seed_on_any_mesh():
    optimizer = make_optimizer(OPTIM, schedule)
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    abstract = abstract_state(CONFIG, optimizer, ema=True, mesh=mesh)
    state = make_state(abstract, CONFIG, optimizer, seed=3)
    expected = nnx.to_pure_dict(nnx.state(create(CONFIG, seed=3)))
    assert_close(state.params, expected, rtol=1e-6, atol=1e-7)
    assert_equal(state.ema, state.params)
    assert state.step == 0


# -- Losses


def logits_and_targets():
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, 5)).astype(np.float32) * 4
    logits[0], logits[1] = [1e4, 0, -1e4, 3, 2], [-1e4, 1e4, 0, 0, 0]
    targets = random.dirichlet(np.ones(5), size=6).astype(np.float32)
    return logits, targets


def test_softmax_loss():
    logits, targets = logits_and_targets()
    wide = logits.astype(np.float64)
    expected = scipy.special.logsumexp(wide, axis=1) * targets.sum(1) - (targets * wide).sum(axis=1)
    found = softmax(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_sigmoid_loss():
    logits, targets = logits_and_targets()
    wide = logits.astype(np.float64)
    # -log p = log(1 + exp(-x)) and -log(1 - p) = log(1 + exp(x))
    yes, no = np.logaddexp(0, -wide), np.logaddexp(0, wide)
    expected = (targets * yes + (1 - targets) * no).sum(axis=1)
    found = sigmoid(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("loss", [softmax, sigmoid])
def test_losses_are_taken_in_float32(loss):
    logits = jnp.array([[0.5, -1.25, 2.0]], jnp.bfloat16)  # held exactly
    targets = jnp.array([[0.1, 0.2, 0.7]])
    found = loss(logits, targets)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, loss(logits.astype(jnp.float32), targets))


def test_targets():
    labels = jnp.array([2, 0])
    np.testing.assert_array_equal(to_targets(labels, 4), [[0, 0, 1, 0], [1, 0, 0, 0]])
    smoothed = [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]
    np.testing.assert_allclose(to_targets(labels, 4, 0.2), smoothed, rtol=1e-6)
    rows = jnp.array([[0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    np.testing.assert_array_equal(to_targets(rows, 4), rows)
    expected = [[0.45, 0.45, 0.05, 0.05], [0.05, 0.85, 0.05, 0.85]]
    np.testing.assert_allclose(to_targets(rows, 4, 0.2), expected, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_smoothing_that_cannot_be_is_refused(smoothing):
    with pytest.raises(UserError, match=f"label_smoothing is {smoothing}"):
        Augment(label_smoothing=smoothing)


# -- Evaluation


@functools.cache
def eval_step(objective="softmax"):
    graphdef, _ = structure(CONFIG)
    return jit(make_eval_step(graphdef, PREPROCESS, num_classes=7, objective=objective))


def on_host(rows, **changes):
    return {name: v for name, v in (rows | changes).items() if name != "index"}


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_evaluation_sums_over_real_examples(objective, one_hot):
    rows = batch(5)
    real, labels = rows["mask"], rows["label"]
    changes = {"label": np.eye(7, dtype=np.float32)[labels]} if one_hot else {}
    found = eval_step(objective)(initial(), on_host(rows, **changes))

    logits = np.asarray(jit(logits_of)(initial(), rows["image"]), np.float64)[real]
    labels = labels[real]
    order = np.argsort(-logits, axis=1)
    right = np.eye(7)[labels] > 0
    if objective == "softmax":
        loss = scipy.special.logsumexp(logits, axis=1).sum() - logits[right].sum()
    else:
        loss = np.logaddexp(0, np.where(right, -logits, logits)).sum()
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {
            "count": 11,
            "accuracy": (order[:, 0] == labels).sum(),
            "top5": (order[:, :5] == labels[:, None]).sum(),
            "loss": loss,
        },
        rel=1e-5,
    )


NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    "logits",
    [
        [0, 0, 0, 0, 0, 0, 0],
        [1, 2, 2, 0, 2, -1, 0],
        [3, 2, 1, 1, 1, 1, 1],
        [INF, INF, 0, 0, 0, -INF, -INF],
        [1, 2, NAN, 4, 5, 6, 7],
        [9, NAN, NAN, 4, 5, 6, 7],
        [NAN] * 7,
    ],
    ids=str,
)
def test_ties_go_to_the_lower_class_and_nothing_to_a_nan(logits):
    """The head gives every image these logits; the labels go through all classes."""
    params = jax.tree.map(lambda leaf: leaf, initial())
    params["head"] = {"kernel": np.zeros((16, 7), np.float32), "bias": np.float32(logits)}
    ranks = sorted(range(7), key=lambda i: (-logits[i], i))
    numbers = not np.isnan(logits).any()
    for label in range(7):
        rows = batch(0) | {"label": np.full(BATCH, label, np.int32)}
        found = eval_step()(params, on_host(rows))
        assert found["accuracy"] == 11 * (numbers and ranks[0] == label)
        if numbers:
            assert found["top5"] == 11 * (label in ranks[:5])
        if np.isnan(logits[label]):
            assert found["top5"] == 0


@pytest.mark.parametrize("resize_dtype", ["uint8", "float32"])
def test_evaluation_sees_what_preprocess_gives(resize_dtype):
    """Of a batch that a reader made, and of images run through `preprocess` one by one."""
    preprocess = Preprocess(
        (8, 12),
        in_channels=2,
        resize="bicubic_antialias",
        aspect="keep",
        crop=0.8,
        resize_dtype=resize_dtype,
        mean=(0.4, 0.6),
        std=(0.3, 0.2),
    )
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (3, 21, 17, 2), np.uint8)
    labels = np.array([4, 0, 6], np.int32)
    read = BatchReader(ArraySource(images, labels, tuple("abcdefg")), preprocess)
    rows = on_host(read(np.arange(4), np.array([0, 1, 2, -1])))
    assert rows["image"].dtype == resize_dtype
    graphdef, _ = structure(CONFIG)
    step = jit(make_eval_step(graphdef, preprocess, num_classes=7, objective="softmax"))
    found = step(initial(), rows)

    @jit
    def model(images):
        return nnx.merge(graphdef, initial())(images)

    logits = np.asarray(model(np.stack([preprocess(image) for image in images])), np.float64)
    loss = scipy.special.logsumexp(logits, axis=1) - logits[np.arange(3), labels]
    assert found["count"] == 3
    assert float(found["loss"]) == pytest.approx(loss.sum(), rel=1e-5)
    assert found["accuracy"] == (logits.argmax(axis=1) == labels).sum()


# -- Devices


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ({}, (8, 1, 1)),
        (dict(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (dict(data=1, fsdp=1, tensor=-1), (1, 1, 8)),
        (dict(data=4, fsdp=2), (4, 2, 1)),
        (dict(fsdp=-1), (1, 8, 1)),
        (dict(fsdp=-1, tensor=2), (1, 4, 2)),
    ],
)
def test_mesh_axes(sizes, shape):
    mesh = make_mesh(MeshConfig(**sizes))
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(data=3), "data=3xfsdp=1xtensor=1 does not fit 8 devices"),
        (dict(fsdp=3), "data=-1xfsdp=3xtensor=1 does not fit 8 devices"),
        (dict(data=2, fsdp=2), "data=2xfsdp=2xtensor=1 does not fit 8 devices"),
        (dict(data=16), "data=16xfsdp=1xtensor=1 does not fit 8 devices"),
        (dict(fsdp=-1, tensor=-1), "at most one axis may be -1"),
        (dict(tensor=0), "the others at least 1"),
        (dict(data=-2), "the others at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize(
    "batch_size, accumulate, advice",
    [(16, 1, None), (16, 4, None), (18, 1, "20|16"), (24, 4, "multiple of 16, such as"), (3, 2, 8)],
)
def test_a_batch_must_divide_among_devices_and_micro_batches(batch_size, accumulate, advice):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)  # four of them split the batch
    if advice is None:
        return check_batch(batch_size, accumulate, mesh)
    with pytest.raises(UserError, match=f"batch_size {batch_size} does not.*{advice}"):
        check_batch(batch_size, accumulate, mesh)


def test_one_process_reads_the_whole_batch():
    for mesh in (mesh_of(), mesh_of(data=8), mesh_of(data=2, fsdp=2, tensor=2)):
        assert local_rows(16, mesh).tolist() == [*range(16)]


@pytest.mark.parametrize(
    "devices, rows",
    [
        ([0, 1, 2, 3], [*range(8)]),
        ([4, 5, 6, 7], [*range(8, 16)]),
        ([2, 3], [4, 5, 6, 7]),
        ([0], [0, 1, 2, 3]),  # two hosts that hold the two halves of the heads
        ([1], [0, 1, 2, 3]),
        ([6, 1, 0], [0, 1, 2, 3, 12, 13, 14, 15]),  # a mesh follows the wiring, not the hosts
        ([5, 2], [4, 5, 6, 7, 8, 9, 10, 11]),
    ],
)
def test_a_host_reads_the_rows_of_its_devices(monkeypatch, devices, rows):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    mine = [mesh.devices.flat[i] for i in devices]

    class OneHost(jax.sharding.NamedSharding):
        def addressable_devices_indices_map(self, shape):
            return {d: index for d, index in self.devices_indices_map(shape).items() if d in mine}

    monkeypatch.setattr(sharding, "NamedSharding", OneHost)
    assert local_rows(16, mesh).tolist() == rows


def test_a_batch_is_split_over_the_devices_but_those_of_tensor():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    rows = batch(0)
    found = to_devices(rows, BATCH, mesh)
    assert set(found) == {"image", "label", "mask"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, rows[name])
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {4}
        for shard in array.addressable_shards:
            data, fsdp, _ = np.argwhere(mesh.devices == shard.device)[0]
            first = 8 * data + 4 * fsdp
            np.testing.assert_array_equal(shard.data, rows[name][first : first + 4])


# Path -> the whole shape, and a device's part of it on data=2, fsdp=2, tensor=2.
PARTS = {
    "blocks/attention/qkv/kernel": [(2, 16, 3, 2, 8), (2, 8, 3, 1, 8)],
    "blocks/attention/qkv/bias": [(2, 3, 2, 8), (2, 3, 1, 8)],
    "blocks/attention/out/kernel": [(2, 2, 8, 16), (2, 1, 8, 8)],
    "blocks/attention/out/bias": [(2, 16), (2, 16)],
    "blocks/mlp/fc1/kernel": [(2, 16, 32), (2, 8, 16)],
    "blocks/mlp/fc1/bias": [(2, 32), (2, 16)],
    "blocks/mlp/fc2/kernel": [(2, 32, 16), (2, 16, 8)],
    "blocks/mlp/fc2/bias": [(2, 16), (2, 16)],
    "blocks/norm1/scale": [(2, 16), (2, 16)],
    "patch_embed/kernel": [(4, 4, 2, 16), (4, 4, 2, 8)],
    "patch_embed/bias": [(16,), (16,)],
    "cls_token": [(1, 1, 16), (1, 1, 16)],
    "pos_embed": [(7, 16), (7, 8)],
    "head/kernel": [(16, 7), (8, 7)],
}


def test_where_parameters_averages_and_moments_are_split():
    abstract, _ = stepper(mesh_of(data=2, fsdp=2, tensor=2), accumulate=1)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for end in PARTS:
            if name.endswith(f"/{end}"):
                found.setdefault(end, []).append(
                    [leaf.shape, leaf.sharding.shard_shape(leaf.shape)]
                )
    assert found == {end: [parts] * 4 for end, parts in PARTS.items()}


def test_heads_that_a_mesh_does_not_divide_stay_whole():
    mesh = mesh_of(data=1, fsdp=2, tensor=4)
    shapes = structure(CONFIG)[1]
    places = placement(shapes, mesh)
    parts = jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), shapes, places)
    assert parts["blocks"]["attention"]["qkv"]["kernel"] == (2, 8, 3, 2, 8)
    assert parts["blocks"]["attention"]["out"]["kernel"] == (2, 2, 8, 8)
    assert parts["blocks"]["mlp"]["fc1"]["kernel"] == (2, 8, 8)
