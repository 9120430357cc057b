"""Other norms, and differential attention, against NumPy in float64."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.tiny_models import random_images, random_params, relative_error, run
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig

TINY = dict(image_size=16, patch_size=8, width=12, depth=2, mlp_dim=20, num_heads=3, num_classes=5)
AIM = dict(norm="rmsnorm", patch_norm=True, proj_bias=False, qkv_bias=False, mlp="swiglu")


def normed(x, p, config):
    """A norm over the last axis: LayerNorm has a bias, RMSNorm has not."""
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.layernorm_eps) * p["scale"]
    return y + p["bias"] if config.norm == "layernorm" else y


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def softmax(logits):
    weights = np.exp(logits)
    return weights / weights.sum(-1, keepdims=True)


def difference(q, k, v, p, index):
    """The output of one head, whose halves make a map each (arXiv 2410.05258, section 2.1)."""
    half = q.shape[-1] // 2
    first, second = (
        softmax(q[:, part] @ k[:, part].T / np.sqrt(half))
        for part in (slice(0, half), slice(half, None))
    )
    start = 0.8 - 0.6 * np.exp(-0.3 * index)
    factor = np.exp(p["lambda_q1"] @ p["lambda_k1"]) - np.exp(p["lambda_q2"] @ p["lambda_k2"])
    y = (first - (factor + start) * second) @ v
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * p["head_norm"]["scale"]
    return y * (1 - start)


def attention(x, p, config, index):
    """Of tokens [n d], written out head by head."""
    heads, found = config.num_heads, []
    q, k, v = (
        np.einsum("nd,dhk->nhk", x, p["qkv"]["kernel"][:, i])
        + (p["qkv"]["bias"][i] if "bias" in p["qkv"] else 0)
        for i in range(3)
    )
    if config.qk_norm == "all":
        flat = (len(x), config.width)
        q, k = (
            normed(y.reshape(flat), p[f"{name}_norm"], config).reshape(y.shape)
            for name, y in (("q", q), ("k", k))
        )
    for head in range(heads):
        a, b = q[:, head], k[:, head]
        if config.qk_norm == "head":
            a, b = normed(a, p["q_norm"], config), normed(b, p["k_norm"], config)
        if config.differential:
            found.append(difference(a, b, v[:, head], p, index))
            continue
        found.append(softmax(a @ b.T / np.sqrt(config.head_dim)) @ v[:, head])
    kernel = p["out"]["kernel"].reshape(config.width, config.width)
    return np.concatenate(found, axis=-1) @ kernel + p["out"].get("bias", 0.0)


def mlp(x, p, config, index):
    y = dense(x, p["fc1"])
    if config.mlp == "swiglu":
        gate, y = np.split(y, 2, axis=-1)
        y = gate / (1 + np.exp(-gate)) * y
    else:
        y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return dense(y, p["fc2"])


def layer(x, blocks, config, index):
    """A block, or several on the same tokens (arXiv 2203.09795, section 3)."""
    if config.parallel:
        (p,) = blocks
        y = normed(x, p["norm1"], config)
        parts = attention(y, p["attention"], config, index) + mlp(y, p["mlp"], config, index)
        return x + parts * p.get("scale1", 1.0)
    for name, function, part in (("1", attention, "attention"), ("2", mlp, "mlp")):
        found = []
        for p in blocks:
            if config.norm_after_branch:
                y = normed(function(x, p[part], config, index), p[f"norm{name}"], config)
            else:
                y = function(normed(x, p[f"norm{name}"], config), p[part], config, index)
            found.append(y * p.get(f"scale{name}", 1.0))
        x = x + sum(found)
    return x


CASES = {
    "aimv2": AIM,
    "heads": dict(qk_norm="head"),
    "all heads": dict(qk_norm="all", norm="rmsnorm", layer_scale=0.5),
    "behind": dict(norm_after_branch=True, qkv_bias=False),
    "differential": dict(differential=True),
    "parallel": dict(parallel=True, layer_scale=0.5),
    "on the same tokens": dict(branches=3, depth=6, layer_scale=0.5),
    "sapiens": dict(qk_norm="head", norm="rmsnorm", layer_scale=0.5, mlp_scale=False),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_written_out(name):
    config = ViTConfig(**TINY | CASES[name], position="none", layernorm_eps=0.01)
    params, images = random_params(config), random_images(config)
    _, found = run(config, params, images, capture=("patches", "tokens", "encoded"))
    grid, size = config.grid, config.patch_size
    for index, image in enumerate(images):
        rows = image.reshape(grid[0], size[0], grid[1], size[1], 3).transpose(0, 2, 1, 3, 4)
        kernel = params["patch_embed"]["kernel"].reshape(-1, config.width)
        x = rows.reshape(grid[0] * grid[1], -1) @ kernel + params["patch_embed"]["bias"]
        if config.patch_norm:
            x = normed(x, params["patch_embed"]["norm"], config)
        assert relative_error(found["patches"][index], x) < 1e-5
        x = np.concatenate([params["cls_token"][0], x])
        every = [jax.tree.map(lambda leaf: leaf[i], params["blocks"]) for i in range(config.depth)]  # noqa: B023
        for depth in range(config.depth // config.branches):
            own = every[depth * config.branches : (depth + 1) * config.branches]
            x = layer(x, own, config, depth)
            assert relative_error(found["tokens"][depth, index], x) < 1e-5
        x = normed(x, params["norm"], config)
        assert relative_error(found["encoded"][index], x) < 1e-5


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(norm="rms"), "model.norm is 'rms': did you mean 'rmsnorm'?"),
        (dict(qk_norm="heads"), "model.qk_norm is 'heads': did you mean 'head'?"),
        (
            dict(differential=True, qk_norm="head"),
            "not go with model.qk_norm 'head'",
        ),
        (
            dict(parallel=True, norm_after_branch=True),
            "norm_after_branch True does not apply",
        ),
        (dict(branches=0), "model.branches is 0; expected an integer from 1 up"),
        (dict(branches=3), "model.depth 2 does not divide into layers of 3 blocks"),
        (dict(branches=2, position_at="layers"), "not go with model.position_at 'layers'"),
        (dict(branches=2, differential=True, num_heads=2), "not go with model.differential True"),
        (dict(mlp_scale=False), "model.mlp_scale is false, and without model.layer_scale"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(UserError) as error:
        ViTConfig(**TINY | fields)
    assert message in str(error.value)


def test_attention_of_blocks_on_the_same_tokens():
    """The heads of all, one block after the other."""
    config = ViTConfig(**TINY, branches=2)
    params, images = random_params(config), random_images(config)
    alone = dataclasses.replace(config, branches=1)
    wanted = []
    for order in ([0, 1], [1, 0]):
        blocks = jax.tree.map(lambda leaf: leaf[order], params["blocks"])  # noqa: B023
        _, each = run(alone, params | {"blocks": blocks}, images, capture="attention")
        wanted.append(each["attention"][0])
    _, found = run(config, params, images, capture="attention")
    assert found["attention"].shape[0] == 1
    assert relative_error(found["attention"][0], np.concatenate(wanted, axis=1)) < 1e-6


def test_the_pooling_head_keeps_its_form():
    """Of the blocks' norms and biases, it shares the kind of the norm alone."""
    config = ViTConfig(**TINY, **AIM | dict(qk_norm="head"), pool="map")
    pool = random_params(config)["attention_pool"]
    assert set(pool["norm"]) == {"scale"} and "q_norm" not in pool["attention"]
    assert "bias" in pool["attention"]["out"] and "bias" in pool["mlp"]["fc1"]
    whole = dataclasses.replace(config, pool="token")
    assert "bias" not in random_params(whole)["blocks"]["mlp"]["fc1"]
