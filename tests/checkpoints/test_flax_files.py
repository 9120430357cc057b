"""flax_model.msgpack of transformers 4: arrays of its PyTorch models as Flax's layers have them.

With random weights of FlaxViT, FlaxDinov2 and FlaxCLIPVision, transformers 4.57.6 computed the same
to 4e-7; transformers 5 has no Flax models to compare with.
"""

import dataclasses
import json

import dialects
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import serialization, traverse_util
from test_untrusted import all_refused, refused

from vit_jax.checkpoints.opened import open_model

EXAMPLES = dialects.examples()
VIT = EXAMPLES["hf vit"]
CASES = ["hf vit", "hf vit pooler", "hf vit alone", "hf dinov2", "hf dinov2 swiglu", "hf clip"]


def in_flax(arrays):
    """A state dict of PyTorch as Flax's Dense, Conv, LayerNorm and Embed have it."""
    tree = {}
    for name, array in arrays.items():
        *path, leaf = name.split(".")
        if leaf == "weight":
            leaf = {1: "scale", 2: "kernel", 4: "kernel"}[array.ndim]
            if path[-1] == "position_embedding":
                leaf = "embedding"
            elif array.ndim > 1:
                array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        if leaf != "position_ids":  # no parameter
            tree[(*path, leaf)] = array
    return traverse_util.unflatten_dict(tree)


def write(folder, example, tree=None):
    folder.mkdir(exist_ok=True)
    for name, content in example.files.items():
        (folder / name).write_text(json.dumps(content))
    tree = in_flax(example.arrays) if tree is None else tree
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_same_model_as_from_pytorch(name, tmp_path):
    example = EXAMPLES[name]
    opened = open_model(write(tmp_path, example), **example.known)
    expected = example.params()
    assert sorted(opened.shapes) == sorted(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(opened.read(key), value, err_msg=key)
    torch = open_model(example.write(tmp_path / "torch"), **example.known)
    assert opened.card == torch.card
    there = {key for key in torch.leftover if not key.endswith("position_ids")}
    assert len(opened.leftover) == len(there)


def test_bfloat16(tmp_path):
    tree = traverse_util.path_aware_map(
        lambda _, array: np.asarray(jnp.asarray(array, jnp.bfloat16)), in_flax(VIT.arrays)
    )
    opened = open_model(write(tmp_path, VIT, tree))
    for name, value in VIT.params().items():  # multiples of 1/64 below 2, which it holds
        np.testing.assert_array_equal(opened.read(name), value, err_msg=name)


def test_a_safetensors_file_beside_it_is_taken(tmp_path):
    write(tmp_path, VIT, {"nothing": {"of": np.zeros(3, np.float32)}})
    assert open_model(VIT.write(tmp_path)).sources["head/bias"] == "classifier.bias"


def test_what_its_code_would_compute_differently(tmp_path):
    dino = EXAMPLES["hf dinov2"]
    config = dino.files["config.json"] | {"layerscale_value": 0.5}
    path = write(tmp_path, dataclasses.replace(dino, files={"config.json": config}))
    refused(path, "layerscale_value 0.5, by whose square the Flax code multiplies each lambda1")


def packed(shape, dtype, raw, kind=1):
    return msgpack.ExtType(kind, msgpack.packb((shape, dtype, raw)))


def test_what_is_no_such_file(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    whole = serialization.msgpack_serialize(in_flax(VIT.arrays))
    cut = {f"{size} bytes": whole[:size] for size in (2, 40, 1000, len(whole) - 1)}
    all_refused(path, cut | {"more": whole + b"\xc0"}, "is damaged or cut off|neither")
    odd = {
        "a number": {"vit": 3},
        "a list": {"vit": [1, 2]},
        "a text": {"vit": {"a": "b"}},
        "a complex": {"vit": msgpack.ExtType(2, msgpack.packb((1.0, 2.0)))},
        "short": {"vit": packed((2, 2), "float32", b"\0" * 8)},
        "large": {"vit": packed((2**40, 2**40), "float32", b"")},
        "negative": {"vit": packed((-1, -4), "float32", b"\0" * 16)},
        "no shape": {"vit": packed("ab", "float32", b"\0" * 16)},
        "objects": {"vit": packed((1,), "O", b"\0" * 8)},
        "no type": {"vit": packed((1,), "flaot", b"\0" * 4)},
        "whole numbers": in_flax({**VIT.arrays, "classifier.bias": np.zeros(5, np.int32)}),
        "pieces": {"w": {"__msgpack_chunked_array__": True, "shape": {}, "chunks": {}}},
        "many": {"vit": list(range(100_000))},
    }
    odd = {name: msgpack.packb(tree, default=_ext) for name, tree in odd.items()}
    odd["twice"] = b"\x82\xa1a\x80\xa1a\x80"
    odd["deep"] = b"\x81\xa1a" * 5000 + b"\x80"
    odd["no names"] = b"\x81\xa1a\x81\x01\x80"
    all_refused(path, odd)
    # A pickle is no map whose first name is a text.
    path.write_bytes(b"\x80\x04\x95\x05\0\0\0\0\0\0\0]\x94.")
    refused(path, "is pickled")


def _ext(array):
    return packed(array.shape, array.dtype.name, array.tobytes())
