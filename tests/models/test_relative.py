"""Relative position bias: against loops over pairs of tokens, in all ways to run a model."""

import dataclasses

import jax
import numpy as np
import numpy_vit
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from scipy.special import expit
from tiny_models import as_float32, random_images, random_params, relative_error, run

from vit_jax.errors import UserError
from vit_jax.models import layers, relative, vit
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import init_params, structure
from vit_jax.models.relative import RelativeBias
from vit_jax.training import growth, optim, trainable
from vit_jax.training.config_file import load_config
from vit_jax.training.model import model_config
from vit_jax.training.sharding import BATCH, MeshConfig, make_mesh, placement

TINY = dict(image_size=(8, 15), patch_size=(4, 5), width=24, mlp_dim=20, num_heads=3, num_classes=5)
GRID, N = (2, 3), 6
ADAMW = optim.OptimConfig(lr=1e-3)
MLP = RelativeBias("mlp", hidden=7)
SWIN = RelativeBias("mlp", hidden=7, coordinates="swin", shared=True)
CASES = {
    "table": dict(),
    "table, no class token": dict(pool="gap"),
    "table, shared, and an embedding": dict(
        position="learned", relative_bias=RelativeBias(shared=True), registers=2
    ),
    "mlp": dict(relative_bias=MLP, pool="gap", registers=2),
    "mlp, swin": dict(relative_bias=SWIN),
    "norms last": dict(relative_bias=MLP, norm_after_branch=True, layer_scale=0.1),
}


def config_of(name, **fields):
    fields = dict(position="relative_bias", depth=2) | CASES[name] | fields
    return ViTConfig(**TINY | fields)


def seen(offset, side, coordinates):
    """What an MLP sees of an offset along an axis."""
    if coordinates == "log":
        return np.sign(offset) * np.log(1 + abs(offset))
    offset = 8 * offset / (side - 1)
    return np.sign(offset) * np.log2(1 + abs(offset)) / 3


def bias_of(p, config):
    """The bias [heads n n] of each query and key, one by one."""
    prefix, (h, w) = config.num_prefix_tokens, config.grid
    found = np.zeros((config.num_heads, prefix + h * w, prefix + h * w))
    for i, j in np.ndindex(found.shape[1:]):
        if i >= prefix and j >= prefix:
            y, x = np.subtract(divmod(i - prefix, w), divmod(j - prefix, w))
            row = (y + h - 1) * (2 * w - 1) + x + w - 1
        else:
            row = -3 if j >= prefix else -2 if i >= prefix else -1
        if config.relative_bias.kind == "table":
            found[:, i, j] = p["table"][row]
        elif row >= 0:
            axes = ((y, h), (x, w))
            of = [seen(*each, config.relative_bias.coordinates) for each in axes]
            hidden = np.maximum(of @ p["fc1"]["kernel"] + p["fc1"]["bias"], 0)
            value = hidden @ p["fc2"]["kernel"] + p["fc2"].get("bias", 0)
            swin = config.relative_bias.coordinates == "swin"
            found[:, i, j] = 16 * expit(value) if swin else value
    return found


def block(x, p, bias, config):
    last, kernel = config.norm_after_branch, p["attention"]["qkv"]["kernel"]
    y = x if last else numpy_vit.layer_norm(x, p["norm1"], 1e-6)
    heads, joined = [], p["attention"]["out"]["bias"]
    for head in range(config.num_heads):
        q, k, v = (
            y @ kernel[:, i, head] + p["attention"]["qkv"]["bias"][i, head] for i in range(3)
        )
        weights = np.exp(q @ k.T / np.sqrt(config.head_dim) + bias[head])
        weights /= weights.sum(axis=-1, keepdims=True)
        heads.append(weights)
        joined = joined + weights @ v @ p["attention"]["out"]["kernel"][head]
    y = numpy_vit.layer_norm(joined, p["norm1"], 1e-6) if last else joined
    x = x + y * p.get("scale1", 1)
    y = numpy_vit.mlp(x if last else numpy_vit.layer_norm(x, p["norm2"], 1e-6), p["mlp"], "tanh")
    y = numpy_vit.layer_norm(y, p["norm2"], 1e-6) if last else y
    return np.stack(heads), x + y * p.get("scale2", 1)


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_those_written_out(name):
    config = config_of(name)
    params, images = random_params(config), random_images(config)
    _, found = run(config, params, images, capture=("patches", "tokens", "attention"))
    for i in range(2):
        x = np.asarray(found["patches"][i], np.float64)
        tokens = [params[n][0] for n in ("cls_token", "registers") if n in params]
        x = np.concatenate([*tokens, x]) + params.get("pos_embed", 0)
        for layer in range(2):
            own = jax.tree.map(lambda leaf: leaf[layer], params["blocks"])  # noqa: B023
            shared = config.relative_bias.shared
            bias = (params if shared else own["attention"])["relative_bias"]
            weights, x = block(x, own, bias_of(bias, config), config)
            assert relative_error(found["attention"][layer, i], weights) < 1e-5
            assert relative_error(found["tokens"][layer, i], x) < 1e-5


def test_scan_and_loop_and_remat_compute_the_same():
    """Gradients, too: a shared bias gets those of all blocks."""
    config = config_of("mlp, swin", scan=True)
    params, images = as_float32(random_params(config)), as_float32(random_images(config))

    def gradient(config):
        def loss(params):
            return (nnx.merge(structure(config)[0], params)(images) ** 2).sum()

        grads = jax.jit(jax.grad(loss))(params)
        return jax.tree.leaves(grads["relative_bias"])

    wanted = gradient(config)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in wanted)
    for change in (dict(scan=False), dict(scan=True, remat="full")):
        for a, b in zip(gradient(dataclasses.replace(config, **change)), wanted, strict=True):
            assert relative_error(a, np.asarray(b)) < 1e-4


def test_in_bfloat16_the_bias_keeps_its_digits():
    config = config_of("mlp, swin")
    params, images = random_params(config), random_images(config)
    exact = run(config, params, images, capture="attention")[1]["attention"]
    half = dataclasses.replace(config, dtype="bfloat16")
    found = run(half, params, images, capture="attention")[1]["attention"]
    assert 1e-4 < np.abs(np.asarray(found) - np.asarray(exact)).max() < 0.05


def test_on_tpus_jaxs_own_attention_takes_the_bias(monkeypatch):
    config = config_of("table", depth=1)
    params, images = as_float32(random_params(config)), as_float32(random_images(config))
    wanted = np.asarray(run(config, params, images))
    for module in (layers, vit):
        monkeypatch.setattr(module, "target", lambda: "tpu")
    program = jax.jit(lambda params: nnx.merge(structure(config)[0], params)(images))
    assert relative_error(program(params), wanted) < 1e-4


def test_heads_on_several_devices_are_biased_alike():
    fields = dict(width=32, num_heads=4, mlp_dim=24, depth=1)
    for name in ("table", "mlp, swin"):
        config = config_of(name, **fields)
        params, images = as_float32(random_params(config)), random_images(config, n=4)
        wanted = np.asarray(run(config, params, images))
        mesh = make_mesh(MeshConfig(data=2, tensor=4))
        graphdef, shapes = structure(config)
        placed = jax.device_put(params, placement(shapes, mesh))
        owner = placed if config.relative_bias.shared else placed["blocks"]["attention"]
        bias = owner["relative_bias"]
        by_head = bias["table"] if "table" in bias else bias["fc2"]["kernel"]
        assert by_head.sharding.spec[-1] == "tensor"
        split = jax.device_put(images.astype(np.float32), NamedSharding(mesh, BATCH))
        program = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))  # noqa: B023
        with jax.default_matmul_precision("highest"):
            found = program(placed, split)
        assert relative_error(found, wanted) < 1e-5


def test_where_it_starts():
    """A table is zeros, so that a new model is as one without; an MLP is not."""
    config = config_of("table", depth=3)
    params = jax.jit(lambda: init_params(config, 0)["blocks"]["attention"]["relative_bias"])()
    assert params["table"].shape == (3, 3 * 5 + 3, 3) and not params["table"].any()
    params = jax.jit(lambda: init_params(config_of("mlp, swin"), 0)["relative_bias"])()
    assert set(params["fc2"]) == {"kernel"} and np.ptp(params["fc2"]["kernel"]) > 0.1
    bare = config_of("table, no class token")
    assert structure(bare)[1]["blocks"]["attention"]["relative_bias"]["table"].shape == (2, 15, 3)


def test_a_run_is_told_by_flags_and_learns_it_as_beit_does():
    flags = [f"--config.model.relative_bias.{flag}" for flag in ("kind=mlp", "hidden=9")]
    flags += ["--config.model.position=relative_bias", "--config.model.norm_after_branch=true"]
    model = model_config(load_config("configs/digits.py", flags), None, 10)
    assert model.relative_bias == RelativeBias("mlp", hidden=9) and model.norm_after_branch
    assert trainable.layer("relative_bias/table", 12) == 13  # a shared one at the full rate
    shapes = structure(config_of("table, shared, and an embedding"))[1]
    decayed = [name for name in flatten_dict(shapes, sep="/") if optim.is_decayed(ADAMW, name)]
    assert not any("table" in name for name in decayed)


def geometric(values, old, new):
    """BEiT's interpolation along one axis, with its ratio found by a solver."""
    from scipy.optimize import brentq

    def beyond(q):
        return sum(q**i for i in range(old // 2)) - new // 2

    q = brentq(beyond, 1.01, 1.5, xtol=1e-12)
    places = np.cumsum([q**i for i in range(old // 2)])
    places = np.concatenate([-places[::-1], [0], places])
    return np.interp(np.arange(new) - new // 2, places, values)


def test_a_table_is_resized_on_the_grid_of_offsets():
    random = np.random.default_rng(0)
    table = random.normal(size=(7 * 9 + 3, 2)).astype(np.float32)
    found = relative.resize(table, (4, 5), (5, 7), "geometric")
    assert found.shape == (9 * 13 + 3, 2) and found.dtype == np.float32
    np.testing.assert_array_equal(found[-3:], table[-3:])
    for head in range(2):
        grid = table[:-3, head].reshape(7, 9)
        across = np.stack([geometric(row, 9, 13) for row in grid])
        both = np.stack([geometric(column, 7, 9) for column in across.T], axis=1)
        np.testing.assert_allclose(found[:-3, head].reshape(9, 13), both, atol=2e-5)
    smooth = relative.resize(table[:-3], (4, 5), (6, 8), "bilinear")
    wanted = jax.image.resize(table[:-3].reshape(7, 9, 2), (11, 15, 2), "bilinear")
    np.testing.assert_allclose(smooth, wanted.reshape(-1, 2), atol=1e-5)
    assert relative.resize(table, (4, 5), (4, 5), "zoom") is not None
    with pytest.raises(UserError, match="position resize 'cubic'"):
        relative.resize(table, (4, 5), (6, 8), "cubic")


@pytest.mark.parametrize("name", ["table", "table, shared, and an embedding"])
def test_growing_images_resize_it_inside_the_step(name):
    small = config_of(name)
    large = dataclasses.replace(small, image_size=(16, 20))
    params = as_float32(random_params(small))
    found = growth.fit(small, large, "geometric")(params)
    assert jax.tree.map(np.shape, found) == jax.tree.map(lambda x: x.shape, structure(large)[1])
    shared = small.relative_bias.shared
    old, new = (p if shared else p["blocks"]["attention"] for p in (params, found))
    old, new = (p["relative_bias"]["table"] for p in (old, new))
    layers = zip(old[None], new[None], strict=True) if shared else zip(old, new, strict=True)
    for before, after in layers:
        wanted = relative.resize(before, (2, 3), (4, 4), "geometric")
        np.testing.assert_allclose(after, wanted, atol=1e-5)


def test_norms_at_the_end_are_not_folded_into_kernels(monkeypatch):
    """On GPUs, where those at the start are."""
    monkeypatch.setattr(vit, "target", lambda: "gpu")
    calls = []
    monkeypatch.setattr(layers, "folded", lambda block, norms: calls.append(norms) or block)
    for name, folds in {"mlp": True, "norms last": False}.items():
        graphdef, shapes = structure(config_of(name, depth=1, scan=True))
        images = jax.ShapeDtypeStruct((1, 8, 15, 3), "float32")
        calls.clear()
        jax.eval_shape(lambda p, x: nnx.merge(graphdef, p)(x), shapes, images)  # noqa: B023
        assert calls == [folds]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(position="none", relative_bias=MLP), "set model.position to 'relative_bias'"),
        (dict(position="rope", relative_bias=MLP), "does not go with model.position 'rope'"),
        (dict(position="relative_bias", attention="cudnn"), "take the bias of model.relative_bias"),
        (
            dict(position="relative_bias", patch_dropout=0.5),
            "model.relative_bias needs all patches",
        ),
        (dict(relative_bias=MLP, patch_dropout=0.5), "model.relative_bias needs all patches"),
        (dict(position="relative_bias", position_at="layers"), "goes with 'input' alone"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ViTConfig(**(TINY | fields))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(kind="tables"), "kind is 'tables'"),
        (dict(coordinates="cr"), "coordinates is 'cr'"),
        (dict(hidden=0), "hidden is 0; expected an integer from 1 up"),
    ],
    ids=str,
)
def test_biases_that_do_not_exist_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        RelativeBias(**fields)
