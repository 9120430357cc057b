"""Schedules and update rules against formulas and a NumPy implementation written out here."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import fake_mesh

from vit_jax import compiler
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.training.matrices import scale_by_factored_moment
from vit_jax.training.optim import (
    OptimConfig,
    clip_by_norm,
    is_kernel,
    make_optimizer,
    make_schedule,
    norm,
)
from vit_jax.training.sharding import MeshConfig, make_mesh
from vit_jax.training.state import abstract_state, from_saved, to_saved

LR = 0.4
COSINE = [LR / 2 * (1 + math.cos(math.pi * k / 80)) for k in (20, 40, 80)]


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(schedule="constant"), {0: LR, 57: LR, 100: LR}),
        (dict(schedule="linear"), {0: LR, 25: 0.75 * LR, 90: 0.1 * LR, 100: 0.0}),
        (dict(schedule="cosine"), {0: LR, 25: LR / 2 * (1 + math.sqrt(0.5)), 50: LR / 2, 100: 0.0}),
        (dict(schedule="rsqrt", timescale=9.0), {0: LR, 27: LR / 2, 72: LR / 3}),
        (dict(schedule="rsqrt"), {0: LR, 100: LR / math.sqrt(1.01)}),
        # Twenty steps of warm-up, as a number and as a share.
        *[
            (dict(warmup=warmup, **fields), {0: 0.0, 1: LR / 20, 15: 0.75 * LR, 20: LR} | after)
            for warmup in (20.0, 0.2)
            for fields, after in [
                (dict(schedule="constant"), {21: LR, 100: LR}),
                (dict(schedule="linear"), {40: 0.75 * LR, 60: LR / 2, 100: 0.0}),
                (dict(schedule="cosine"), dict(zip((40, 60, 100), COSINE, strict=True))),
                (dict(schedule="rsqrt", timescale=9.0), {47: LR / 2, 92: LR / 3}),
            ]
        ],
        # Drops in steps and as shares; the named step itself still has the rate from before.
        *[
            (
                dict(schedule="staircase", drops=drops, warmup=20.0),
                {0: 0.0, 10: LR / 2, 20: LR, 30: LR, 31: LR / 10, 60: LR / 10, 61: LR / 100}
                | {90: LR / 100, 91: LR / 1000, 100: LR / 1000},
            )
            for drops in ((30.0, 60.0, 90.0), (0.3, 0.6, 0.9), (0.3, 60.0, 90.0))
        ],
        (
            dict(schedule="staircase", drops=(0.5,), drop_factor=0.25),
            {0: LR, 50: LR, 51: LR / 4, 100: LR / 4},
        ),
        (  # right behind the warm-up; two that round to one step; behind the last step
            dict(schedule="staircase", drops=(20.0, 50.4, 50.6, 50.8, 100.0), warmup=20.0),
            {19: 0.95 * LR, 20: LR, 21: LR / 10, 50: LR / 10, 51: LR / 100, 52: LR / 10_000},
        ),
        (dict(warmup=1.0), {0: 0.0, 1: LR, 100: 0.0}),  # one step, not the whole run
        (dict(warmup=100.0), {0: 0.0, 50: LR / 2, 100: LR}),
    ],
    ids=str,
)
def test_learning_rate_of_a_run_of_a_hundred_steps(fields, expected):
    schedule = make_schedule(OptimConfig(LR, **fields), 100)
    found = {step: float(schedule(jnp.int32(step))) for step in expected}
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r"warmup of 101 steps is longer than the run of 100"):
        make_schedule(OptimConfig(LR, warmup=101.0), 100)


@pytest.mark.parametrize("drop", [19.0, 0.1, 101.0])
def test_a_drop_outside_of_what_follows_the_warmup_is_refused(drop):
    message = r"optim.drops has step \d+, but the warm-up ends at 20 and the run at 100"
    with pytest.raises(UserError, match=message):
        make_schedule(OptimConfig(LR, schedule="staircase", drops=(drop,), warmup=20.0), 100)


# Three steps: the first two gradients are longer than the clip, the last is not.
CLIP = 1.5
LRS = [0.1, 0.05, 0.2]


def parameters():
    random = np.random.default_rng(0)
    shapes = {"a/kernel": (3, 4), "a/bias": (4,), "norm/scale": (4,), "pos_embed": (2, 4)}
    return {name: random.normal(size=shape) for name, shape in shapes.items()}


def gradients():
    random = np.random.default_rng(1)
    for size in (2.0, 1.0, 0.1):
        yield {name: size * random.normal(size=p.shape) for name, p in parameters().items()}


def nested(flat):
    tree = {}
    for name, array in flat.items():
        *parents, last = name.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = jnp.asarray(array, jnp.float32)
    return tree


def assert_close(found, wanted, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, wanted)


def reference(name, *, clip, decay, decayed, b1=0.8, b2=0.95, eps=1e-6, momentum=0.7):
    """Three steps, one parameter after another; returns all of their parameters."""
    params = parameters()
    m = {key: np.zeros_like(p) for key, p in params.items()}
    v = {key: np.zeros_like(p) for key, p in params.items()}
    steps = []
    for t, (grads, lr) in enumerate(zip(gradients(), LRS, strict=True), 1):
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        shrink = 1.0 if clip is None else min(1.0, clip / norm)
        for key, grad in grads.items():
            grad = shrink * grad
            if name == "sgd":
                m[key] = momentum * m[key] + grad
                update = m[key]
            else:
                m[key] = b1 * m[key] + (1 - b1) * grad
                v[key] = b2 * v[key] + (1 - b2) * grad**2
                update = m[key] / (1 - b1**t) / (np.sqrt(v[key] / (1 - b2**t)) + eps)
            if key in decayed:
                update = update + decay * params[key]
            params[key] = params[key] - lr * update
        steps.append(dict(params))
    return steps


@pytest.mark.parametrize(
    "name, decay, which, clip",
    [
        ("adamw", 0.3, "kernels", CLIP),
        ("adamw", 0.3, "all", None),
        ("adamw", 0.0, "kernels", None),
        ("adam", 0.0, "kernels", CLIP),
        ("sgd", 0.0, "kernels", CLIP),
        ("sgd", 0.3, "kernels", None),
    ],
)
def test_three_steps(name, decay, which, clip):
    config = OptimConfig(
        LR,
        name,
        weight_decay=decay,
        decayed=which,
        grad_clip=clip,
        b1=0.8,
        b2=0.95,
        eps=1e-6,
        momentum=0.7,
    )
    optimizer = make_optimizer(config, lambda step: jnp.array(LRS)[step])
    decayed = {"a/kernel"} if which == "kernels" else set(parameters())
    expected = reference(name, clip=clip, decay=decay, decayed=decayed)

    params = nested(parameters())
    state = optimizer.init(params)
    for grads, after in zip(gradients(), expected, strict=True):
        updates, state = jax.jit(optimizer.update)(nested(grads), state, params)
        params = optax.apply_updates(params, updates)
        assert_close(params, nested(after), rtol=2e-5, atol=2e-6)


def test_the_gradients_above_are_clipped_twice():
    norms = [math.sqrt(sum((g**2).sum() for g in grads.values())) for grads in gradients()]
    assert [norm > CLIP for norm in norms] == [True, True, False]


# Two stacked layers and what is around them. Adafactor has a matrix [36 40] or [40 36] for every
# layer and head, of Q, K and V; sides of 32 and more are factored, which the last three lack.
FACTORED = {
    "blocks/attention/qkv/kernel": (2, 40, 3, 2, 36),
    "blocks/attention/out/kernel": (2, 2, 36, 40),
    "blocks/mlp/fc1/kernel": (2, 40, 48),
    "blocks/mlp/fc2/kernel": (2, 48, 40),
    "head/kernel": (40, 32),
    "pos_embed": (35, 40),
}
WHOLE = {
    "blocks/norm1/scale": (2, 40),
    "blocks/mlp/fc1/bias": (33, 48),  # even where the depth is large enough
    "cls_token": (1, 1, 40),
    "patch_embed/kernel": (8, 8, 3, 40),
    "pre_logits/kernel": (40, 31),
}


def stacked(seed, size=1.0):
    random = np.random.default_rng(seed)
    return {name: size * random.normal(size=s) for name, s in (FACTORED | WHOLE).items()}


def stacked_gradients(t):
    """Of which some are zero at first, as behind a zero head."""
    grads = stacked(t, 0.02 / t)
    if t == 1:
        grads["blocks/mlp/fc1/kernel"][0] = 0.0
        grads["blocks/norm1/scale"][:] = 0.0
    return grads


def matrices(name, array):
    """Views of the matrices that Adafactor factors, or of all entries one by one."""
    if name == "blocks/attention/qkv/kernel":
        layers, _, three, heads, _ = array.shape
        indices = np.ndindex(layers, three, heads)
        return [array[layer, :, part, head] for layer, part, head in indices]
    if name == "blocks/attention/out/kernel":
        return [array[index] for index in np.ndindex(array.shape[:2])]
    if name.startswith("blocks/mlp/f") and name in FACTORED:
        return list(array)
    return [array] if name in FACTORED else array.reshape(-1, 1, 1)


def adafactor(*, clip, decay, decayed, b1, b2, dtype):
    """Three steps of it, one matrix after another, with sums as in its paper's algorithm 4."""
    params = stacked(0)
    names = {key: matrices(key, p) for key, p in params.items()}  # views
    rows = {key: [0.0] * len(each) for key, each in names.items()}
    columns = {key: [0.0] * len(each) for key, each in names.items()}
    m = {key: np.zeros_like(p) for key, p in params.items()}
    steps = []
    for t, lr in enumerate(LRS, 1):
        grads = stacked_gradients(t)
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        shrink = 1.0 if clip is None else min(1.0, clip / norm)
        beta = min(b2, 1 - t**-0.8)
        for key, grad in grads.items():
            update = np.zeros_like(grad)
            views = matrices(key, update)
            for i, g in enumerate(matrices(key, shrink * grad)):
                square = g**2 + 1e-30
                rows[key][i] = beta * rows[key][i] + (1 - beta) * square.sum(1)
                columns[key][i] = beta * columns[key][i] + (1 - beta) * square.sum(0)
                v = np.outer(rows[key][i], columns[key][i]) / rows[key][i].sum()
                views[i][...] = g / np.sqrt(v)
            m[key] = b1 * m[key] + (1 - b1) * update
            update = m[key] + (decay * params[key] if key in decayed else 0.0)
            params[key] = params[key] - lr * update
            m[key] = m[key].astype(dtype).astype(np.float64)
        steps.append(dict(params))
    return steps


@pytest.mark.parametrize(
    "fields, clip, which",
    [
        (dict(b1=0.0), None, "all"),
        (dict(b2=0.5), 0.9, "kernels"),  # which bounds the third step alone
        (dict(mu_dtype="bfloat16"), 0.9, "kernels"),
    ],
    ids=str,
)
def test_three_steps_of_adafactor(fields, clip, which):
    fields = dict(b1=0.9, b2=0.999, mu_dtype="float32") | fields
    config = OptimConfig(LR, "adafactor", weight_decay=0.3, decayed=which, grad_clip=clip, **fields)
    optimizer = make_optimizer(config, lambda step: jnp.array(LRS)[step])
    decayed = {key for key in stacked(0) if which == "all" or key.endswith("kernel")}
    dtype = fields.pop("mu_dtype")
    expected = adafactor(clip=clip, decay=0.3, decayed=decayed, dtype=jnp.dtype(dtype), **fields)
    tolerance = dict(atol=1e-3) if dtype == "bfloat16" else dict(rtol=2e-5, atol=2e-6)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = nested(stacked(0))
    state = jax.jit(optimizer.init)(params)
    for t, after in enumerate(expected, 1):
        params, state = step(params, state, nested(stacked_gradients(t)))
        assert_close(params, nested(after), **tolerance)
    kept = {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.size == 40 * 32}
    assert kept == ({dtype} if config.b1 else set())  # of the head, the momentum alone


def test_stacked_layers_are_updated_as_optax_updates_a_list_of_them():
    """In Google's layout, [d heads head_dim] and [heads head_dim d], with big_vision's options."""

    def layer(blocks, i):
        layer = jax.tree.map(lambda leaf: leaf[i], blocks)
        kernel = layer["attention"]["qkv"]["kernel"]
        layer["attention"]["qkv"] = [kernel[:, part] for part in range(3)]
        return layer

    def separate(tree):
        return tree | {"blocks": [layer(tree["blocks"], i) for i in range(2)]}

    ours = scale_by_factored_moment(0.999)
    theirs = optax.scale_by_factored_rms(
        min_dim_size_to_factor=32,
        decay_rate_fn=lambda step, power: jnp.minimum(0.999, 1 - (step + 1.0) ** -power),
    )

    @jax.jit
    def both(params, gradients):
        state, other = ours.init(params), theirs.init(separate(params))
        for grads in gradients:
            found, state = ours.update(grads, state)
            wanted, other = theirs.update(separate(grads), other, separate(params))
        return separate(found), wanted

    gradients = [nested(stacked_gradients(t)) for t in (1, 2)]
    assert_close(*both(nested(stacked(0)), gradients), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [dict(fsdp=4), dict(fsdp=2, tensor=2)], ids=str)
def test_factored_moments_are_split_as_their_parameter_and_saved_by_its_name(sizes):
    vit = ViTConfig(
        image_size=(64, 64),
        patch_size=(8, 8),
        width=64,
        depth=2,
        mlp_dim=128,
        num_heads=2,
        num_classes=40,
    )
    optimizer = make_optimizer(OptimConfig(LR, "adafactor", mu_dtype="bfloat16"), lambda step: LR)
    mesh = make_mesh(MeshConfig(data=1, **sizes), jax.devices()[:4])
    abstract = abstract_state(vit, optimizer, ema=False, mesh=mesh)
    params, (factored, momentum, _) = abstract.params, abstract.opt_state

    def axes(leaf):
        spec = leaf.sharding.spec
        return list(zip(leaf.shape, (*spec, *[None] * len(leaf.shape)), strict=False))

    def check(param, moment):
        if moment is not None:
            pairs = zip(axes(param), axes(moment), strict=True)
            assert all(found in (wanted, (1, None)) for wanted, found in pairs)

    for moments in (factored.row, factored.col, momentum.ema):
        jax.tree.map(check, params, moments)
    kernel = [tree["blocks"]["attention"]["qkv"]["kernel"] for tree in factored[1:]]
    assert [leaf.shape for leaf in kernel] == [(2, 64, 3, 2, 1), (2, 1, 3, 2, 32)]
    assert "fsdp" in kernel[0].sharding.spec
    muon = make_optimizer(OptimConfig(LR, "muon"), lambda step: LR)
    momenta = to_saved(abstract_state(vit, muon, ema=False, mesh=mesh))["opt_state"]
    name = "0/inner_states/muon/inner_state/0/mu/blocks/attention/qkv/kernel"
    assert axes(momenta[name]) == axes(params["blocks"]["attention"]["qkv"]["kernel"])
    assert not any("others" in key and "qkv/kernel" in key for key in momenta)

    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    saved = to_saved(state)
    assert "0/row/blocks/mlp/fc1/bias" in saved["opt_state"]
    assert "0/col/blocks/mlp/fc1/bias" not in saved["opt_state"]
    found = from_saved(saved, abstract)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True)
    assert all(leaf is kept for leaf, kept in pairs)


def test_kernels_are_the_matrices_of_layers():
    names = {
        "patch_embed/kernel": True,
        "blocks/attention/qkv/kernel": True,
        "blocks/mlp/fc1/bias": False,
        "blocks/norm1/scale": False,
        "head/kernel": True,
        "cls_token": False,
        "pos_embed": False,
        "attention_pool/probe": False,
    }
    marks = is_kernel(nested(dict.fromkeys(names, 0.0)))
    paths = jax.tree_util.tree_leaves_with_path(marks)
    assert {jax.tree_util.keystr(p, simple=True, separator="/"): m for p, m in paths} == names


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(name="sdg"), r"optim.name is 'sdg'; did you mean 'sgd'\?"),
        (dict(name="rmsprop"), "optim.name is 'rmsprop'; known: adafactor, adam, adamw, muon, sgd"),
        (dict(schedule="cosin"), "optim.schedule is 'cosin'; did you mean 'cosine'"),
        (dict(decayed="kernel"), "optim.decayed is 'kernel'; did you mean 'kernels'"),
        (dict(name="adam", weight_decay=0.1), "adam has no weight decay; adamw does"),
        (dict(name="adafactor", eps=1e-6), "optim.eps is 1e-06, but adafactor has none to set"),
        (dict(b1=1.0), r"optim.b1 is 1.0; it must be in \[0, 1\)"),
        (dict(b2=-0.1), "optim.b2 is -0.1"),
        (dict(momentum=1.5), "optim.momentum is 1.5"),
        (dict(accumulate=0), "optim.accumulate is 0"),
        (dict(lr=-1e-3), "optim.lr is -0.001; it must be 0 or more"),
        (dict(warmup=-5.0), "optim.warmup is -5.0"),
        (dict(weight_decay=-0.1), "optim.weight_decay is -0.1"),
        (dict(grad_clip=0.0), "optim.grad_clip is 0.0; it must be positive"),
        (dict(grad_clip=-1.0), "optim.grad_clip is -1.0"),
        (dict(timescale=0.0), "optim.timescale is 0.0"),
        (dict(schedule="staircase"), r"'staircase' and optim.drops \(\): staircase needs drops"),
        (dict(drops=(0.5,)), r"'cosine' and optim.drops \(0.5,\): .*, the others have none"),
        *[
            (dict(schedule="staircase", drops=drops), "expected ascending numbers above 0")
            for drops in ((0.0, 0.5), (-1.0,), (0.6, 0.3), (0.5, 0.5), (math.inf,), (math.nan,))
        ],
        *[
            (
                dict(schedule="staircase", drops=(0.5,), drop_factor=factor),
                rf"optim.drop_factor is {factor}; it must be in \(0, 1\)",
            )
            for factor in (0.0, 1.0, -0.1, 10.0)
        ],
        (dict(ema=1.0), r"optim.ema is 1.0; it must be in \[0, 1\)"),
        (dict(ema=-0.5), "optim.ema is -0.5"),
        (dict(ema_warmup=True), "ema_warmup is of an average, and optim.ema is None"),
    ],
)
def test_values_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        OptimConfig(**({"lr": LR} | fields))


def test_a_config_says_its_momentum_as_those_before_muon_did():
    found = [OptimConfig(LR, name).momentum for name in ("sgd", "adamw", "muon")]
    assert found == [0.9, 0.9, 0.95]


def test_values_at_the_edge_are_accepted():
    config = OptimConfig(0.0, ema=0.0, weight_decay=0.0, grad_clip=None, warmup=0.0)
    assert float(make_schedule(config, 10)(3)) == 0.0


def test_the_norm_on_gpus_is_that_of_all_entries():
    """However large a leaf, whether it divides into parts or not; in float32."""
    random = np.random.default_rng(0)
    shapes = [(), (7,), (3, 5), (2**8, 2**9), (3, 2**15 + 1), (2**16 - 1,)]
    tree = {str(i): random.normal(size=shape).astype("float32") for i, shape in enumerate(shapes)}
    tree["half"] = jnp.asarray(random.normal(size=(2**10, 2**7)), jnp.bfloat16)
    wanted = np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(tree)))
    found = jax.jit(compiler.traced_for(fake_mesh("gpu"), norm))(tree)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_clipping_is_optaxs():
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.full((2, 2), 6.0)}
    for bound in (1.0, 12.9, 13.1):
        found, _ = clip_by_norm(bound).update(grads, optax.EmptyState())
        wanted, _ = optax.clip_by_global_norm(bound).update(grads, optax.EmptyState())
        jax.tree.map(np.testing.assert_allclose, found, wanted)


def convolutions():
    """Parameters of Muon beyond `stacked`: of a hybrid's root, and of two stacked units."""
    return {
        "resnet/conv_root/kernel": (3, 3, 2, 8),
        "resnet/stage1/rest/conv2/kernel": (2, 3, 3, 4, 6),
    }


def muon_matrices(name, array):
    """Views of the matrices that Muon makes orthogonal; none of what it leaves to Adam."""
    if name in convolutions():
        stacked = array.reshape(-1, *array.shape[-4:])
        return [each.reshape(-1, each.shape[-1]) for each in stacked]
    if name == "pre_logits/kernel":
        return [array]
    return matrices(name, array) if name.startswith("blocks/") and name in FACTORED else []


def orthogonal(x):
    """Five steps of the iteration of Muon's authors, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("fields, momentum", [({}, 0.95), (dict(momentum=0.8), 0.8)])
def test_three_steps_of_muon(fields, momentum):
    """Matrices by Nesterov's momentum made orthogonal, everything else as by AdamW."""
    random = np.random.default_rng(5)
    more = {name: random.normal(size=shape) for name, shape in convolutions().items()}
    params = stacked(0) | more
    config = OptimConfig(LR, "muon", weight_decay=0.3, grad_clip=CLIP, b1=0.8, b2=0.95, **fields)
    optimizer = make_optimizer(config, lambda step: jnp.array(LRS)[step])
    found = nested(params)
    state = optimizer.init(found)
    m, v = ({key: np.zeros_like(p) for key, p in params.items()} for _ in range(2))
    for t, lr in enumerate(LRS, 1):
        grads = {k: random.normal(size=p.shape) / (20 * t) for k, p in params.items()}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        assert norm > CLIP
        for key, grad in grads.items():
            grad = grad * CLIP / norm
            update = np.zeros_like(grad)
            views = muon_matrices(key, update)
            if views:
                m[key] = momentum * m[key] + (1 - momentum) * grad
                ahead = momentum * m[key] / (1 - momentum ** (t + 1))
                ahead = ahead + (1 - momentum) * grad / (1 - momentum**t)
                for view, g in zip(views, muon_matrices(key, ahead), strict=True):
                    view[...] = 0.2 * math.sqrt(max(g.shape)) * orthogonal(g)
            else:
                m[key] = 0.8 * m[key] + 0.2 * grad
                v[key] = 0.95 * v[key] + 0.05 * grad**2
                update = m[key] / (1 - 0.8**t) / (np.sqrt(v[key] / (1 - 0.95**t)) + 1e-8)
            decay = 0.3 * params[key] if key.endswith("kernel") else 0.0
            params[key] = params[key] - lr * (update + decay)
        updates, state = jax.jit(optimizer.update)(nested(grads), state, found)
        found = optax.apply_updates(found, updates)
        assert_close(found, nested(params), rtol=1e-3, atol=2e-4)
