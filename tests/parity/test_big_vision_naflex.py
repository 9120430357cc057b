"""big_vision's SigLIP 2 for images of any shape: models/proj/image_text/naflex_vit.py.

Its weights are drawn under its names. The numbers are compared with the formulas in float64 NumPy,
where positions come from the function of JAX that its code calls, and with transformers' port.
"""

import jax
import numpy as np
import pytest
import torch
import transformers
from models.numpy_vit import forward

import vit_jax
from parity import test_google, test_naflex
from parity.references import TOLERANCE, assert_same_models, error, load, same_tensors
from parity.test_google import DEPTH, HEADS, MLP, PATCH, SIDE, WIDTH
from vit_jax.errors import UserError

FAMILY, PREFIX = "big_vision, SigLIP 2 NaFlex", "params/img/"
LONGEST = 64  # patches a side, beyond which its code gives NaN


def drawn(pool="map", head=False):
    """The arrays of an image tower, and the same numbers as the NumPy version takes them."""
    arrays, params = test_google.drawn(**test_google.BIG_VISION, pool=pool)
    if not head:
        del params["head"], arrays["head/kernel"], arrays["head/bias"]
    arrays["embedding/kernel"] = arrays["embedding/kernel"].reshape(-1, WIDTH)
    arrays["pos_embedding"] = arrays["pos_embedding"].reshape(SIDE, SIDE, WIDTH)
    return arrays, params


def write(path, arrays):
    """As published: both towers, the temperature and the bias."""
    tower = {f"{PREFIX}{name}": array for name, array in arrays.items()}
    text = {"params/txt/Embed_0/embedding": np.ones((5, WIDTH), np.float32)}
    text |= {"params/t": np.ones(1, np.float32), "params/b": -np.ones(1, np.float32)}
    np.savez(path, **tower, **text)
    return path


def resized(table, h, w):
    """The table for a grid of h x w patches: rows [h * w, d]."""
    scale = np.array([h / SIDE, w / SIDE], np.float32)
    shape, zeros = (LONGEST, LONGEST, WIDTH), np.zeros(2, np.float32)
    whole = jax.image.scale_and_translate(
        np.float32(table), shape, (0, 1), scale, zeros, "bilinear", antialias=True
    )
    return np.float64(whole[:h, :w]).reshape(-1, WIDTH)


@pytest.mark.parametrize("pool, head", [("map", False), ("gap", True)])
def test_against_the_formulas(pool, head, tmp_path, record):
    arrays, params = drawn(pool, head)
    vit = load(write(tmp_path / "a.npz", arrays), max_patches=test_naflex.MOST)
    scanned = write(tmp_path / "b.npz", test_google.scanned(arrays))
    assert_same_models(load(scanned, max_patches=test_naflex.MOST), vit)
    assert vit.config.native_resize == vit.position_resize == "bilinear_antialias"
    assert (vit.config.gelu, vit.config.layernorm_eps, vit.config.pool) == ("tanh", 1e-6, pool)
    assert vit.config.image_size == (SIDE * PATCH,) * 2 and vit.config.num_heads == HEADS

    packed, found = test_naflex.ours(vit)
    table, worst = params["pos_embed"].reshape(SIDE, SIDE, WIDTH), []
    for row, (h, w) in enumerate(packed.grid):
        tiles = packed.pixels[row, : h * w].reshape(1, h, w, PATCH, PATCH, 3)
        image = tiles.swapaxes(2, 3).reshape(1, h * PATCH, w * PATCH, 3)
        one = params | {"pos_embed": resized(table, h, w)}
        wanted = forward(one, np.float64(image), pool=pool, position="learned")
        tokens = found["tokens"][:, row, : h * w]
        worst += [error(*each) for each in zip(tokens, wanted["tokens"][:, 0], strict=True)]
        worst.append(error(found["pooled"][row], wanted["pooled"][0]))
        worst.append(error(found["output"][row], wanted["logits"][0]))
    assert max(worst) < TOLERANCE
    what = "file, native" if pool == "map" else "mean and a head"
    record(FAMILY, "tests/models/numpy_vit.py, float64; jax.image", what, max(worst))


def in_transformers(arrays):
    """The same weights under the names of transformers' Siglip2VisionModel, [out in]."""

    def flat(name, axes):  # the heads and their channels are one axis
        return arrays[name].reshape(*axes)

    found = {
        "embeddings.patch_embedding.weight": arrays["embedding/kernel"].T,
        "embeddings.patch_embedding.bias": arrays["embedding/bias"],
        "embeddings.position_embedding.weight": flat("pos_embedding", (SIDE * SIDE, WIDTH)),
        "head.probe": arrays["MAPHead_0/probe"],
    }
    norms = {
        "Transformer/encoder_norm": "post_layernorm",
        "MAPHead_0/LayerNorm_0": "head.layernorm",
    }
    mlps = {"MAPHead_0/MlpBlock_0": "head.mlp"}
    for i in range(DEPTH):
        block, layer = f"Transformer/encoderblock_{i}", f"encoder.layers.{i}"
        norms |= {f"{block}/LayerNorm_{n}": f"{layer}.layer_norm{n + 1}" for n in (0, 1)}
        mlps[f"{block}/MlpBlock_0"] = f"{layer}.mlp"
        theirs = f"{block}/MultiHeadDotProductAttention_0"
        for part, name in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
            kernel = flat(f"{theirs}/{part}/kernel", (WIDTH, WIDTH)).T
            found[f"{layer}.self_attn.{name}_proj.weight"] = kernel
            found[f"{layer}.self_attn.{name}_proj.bias"] = flat(f"{theirs}/{part}/bias", (WIDTH,))
    for theirs, name in norms.items():
        found[f"{name}.weight"] = arrays[f"{theirs}/scale"]
        found[f"{name}.bias"] = arrays[f"{theirs}/bias"]
    for theirs, name in mlps.items():
        for n in (0, 1):
            found[f"{name}.fc{n + 1}.weight"] = arrays[f"{theirs}/Dense_{n}/kernel"].T
            found[f"{name}.fc{n + 1}.bias"] = arrays[f"{theirs}/Dense_{n}/bias"]
    pool = "MAPHead_0/MultiHeadDotProductAttention_0"
    parts = [flat(f"{pool}/{part}/kernel", (WIDTH, WIDTH)).T for part in ("query", "key", "value")]
    biases = [flat(f"{pool}/{part}/bias", (WIDTH,)) for part in ("query", "key", "value")]
    found["head.attention.in_proj_weight"] = np.concatenate(parts)
    found["head.attention.in_proj_bias"] = np.concatenate(biases)
    found["head.attention.out_proj.weight"] = flat(f"{pool}/out/kernel", (WIDTH, WIDTH)).T
    found["head.attention.out_proj.bias"] = arrays[f"{pool}/out/bias"]
    return {name: torch.from_numpy(array.copy()) for name, array in found.items()}


def test_against_transformers_and_both_ways(tmp_path, record):
    arrays, _ = drawn()
    sizes = dict(hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=DEPTH)
    sizes |= dict(num_attention_heads=HEADS, num_patches=SIDE * SIDE, patch_size=PATCH)
    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes)).eval()
    model.load_state_dict(in_transformers(arrays))
    vit = load(write(tmp_path / "a.npz", arrays), max_patches=test_naflex.MOST)
    call = test_naflex.siglip2(model)
    reference = f"transformers {transformers.__version__} Siglip2VisionModel"
    record(
        FAMILY, reference, "the same weights", test_naflex.agree(vit, model.encoder.layers, call)
    )

    vit_jax.save(vit, tmp_path / "hf", format="hf")
    back = transformers.Siglip2VisionModel.from_pretrained(tmp_path / "hf")
    same_tensors(back.state_dict(), model.state_dict())

    vit_jax.save(vit, tmp_path / "back.npz", format="big_vision")
    (tmp_path / "back.json").unlink()
    with np.load(tmp_path / "back.npz") as written:
        assert set(written) == {f"params/{name}" for name in arrays}
        for name, array in arrays.items():
            np.testing.assert_array_equal(written[f"params/{name}"], array)
    again = load(tmp_path / "back.npz", max_patches=test_naflex.MOST)
    assert_same_models(again, vit)
    assert again.preprocess == vit.preprocess


def test_preprocessing(tmp_path):
    """Its search for the size, and JAX's resize, which is TensorFlow's."""
    most = test_naflex.MOST
    vit = load(write(tmp_path / "a.npz", drawn()[0]), max_patches=most)
    for picture in test_naflex.PICTURES:
        pixels = np.asarray(picture, np.float32) / 127.5 - 1
        low, high = 1e-6, 100.0
        while high - low >= 1e-5:
            middle = (low + high) / 2
            grid = [max(np.ceil(side * middle / PATCH), 1) for side in pixels.shape[:2]]
            low, high = (middle, high) if np.prod(grid) <= most else (low, middle)
        size = [PATCH * int(max(np.ceil(side * low / PATCH), 1)) for side in pixels.shape[:2]]
        wanted = jax.image.resize(pixels, (*size, 3), "bilinear", antialias=True)
        found = vit.preprocess(picture)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=5e-5)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"patchln_pre/scale": np.ones(3 * PATCH**2, np.float32)}, "patchln_pre/scale"),
        ({"cls": np.ones((1, 1, WIDTH), np.float32)}, "img/cls"),
        ({"pos_embedding": None}, "pos_embedding is missing"),
        ({"pos_embedding": np.ones((1, SIDE, SIDE, WIDTH), np.float32)}, "expected 3 axes"),
        ({"embedding/kernel": np.ones((PATCH, WIDTH), np.float32)}, "no patch of an RGB image"),
    ],
)
def test_what_its_code_has_not_is_refused(changes, says, tmp_path):
    arrays = {k: v for k, v in (drawn()[0] | changes).items() if v is not None}
    with pytest.raises(UserError, match=says):
        load(write(tmp_path / "a.npz", arrays))
