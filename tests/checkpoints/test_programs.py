"""Models as programs: FILE.stablehlo, read and run without the package. FILE.onnx: tests/parity."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import fails
from dialects import examples

import vit_jax
from vit_jax.__main__ import main
from vit_jax.checkpoints import programs
from vit_jax.checkpoints.card import ModelCard, Report
from vit_jax.checkpoints.load import Loaded
from vit_jax.checkpoints.opened import open_model
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError

SIZES = dict(image_size=8, patch_size=4, width=8, depth=2, mlp_dim=12, num_heads=2, num_classes=5)
MODELS = {
    "token": dict(registers=2, layer_scale=0.5),
    "map": dict(pool="map", gelu="quick"),
    "learned2d": dict(position="learned2d", pool="gap", num_classes=0, attention="cudnn"),
    "bfloat16": dict(dtype="bfloat16"),
}

# Reads each program with JAX alone and runs it on the arrays that are named for it.
READER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vit_jax", "flax"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import jax, numpy as np
inputs, outputs = np.load("inputs.npz"), {}
for name in inputs:
    with open(f"{name.split('@')[0]}.stablehlo", "rb") as file:
        program = jax.export.deserialize(bytearray(file.read()))
    outputs[name] = program.call(inputs[name])
np.savez("outputs.npz", **outputs)
"""


def model(name, **changes):
    return vit_jax.create("Ti/16", seed=3, **{**SIZES, **MODELS[name], **changes})


def pixels(count, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def nonzero(vit):
    """The same model with a head that is not zero, as a new one's is."""
    if vit.config.num_classes:
        shape = vit.head.kernel[...].shape
        vit.head.kernel[...] = jax.random.normal(jax.random.key(1), shape)
    return vit


def test_a_program_runs_without_the_package_for_any_number_of_images(tmp_path):
    inputs, expected = {}, {}
    for name in MODELS:
        vit = nonzero(model(name))
        report = vit_jax.save(vit, tmp_path / f"{name}.stablehlo")
        assert report.facts["input"].startswith("float32 [b 8 8 3], (pixel / 255 - mean) / std")
        images = pixels(3).astype(np.float32) / 127.5 - 1
        logits = np.asarray(jax.jit(nonzero(model(name, attention="xla")))(images))
        for count in (1, 3):
            inputs[f"{name}@{count}"], expected[f"{name}@{count}"] = images[:count], logits[:count]
    loaded = vit_jax.load(examples()["hf vit"].write(tmp_path / "hf"))  # a mean for each channel
    vit_jax.save(loaded, tmp_path / "uint8.stablehlo", preprocess=True)
    inputs["uint8@2"] = pixels(2)
    mean, std = np.float32([0.25, 0.5, 0.75]), np.float32([0.5, 0.25, 0.5])
    images = (inputs["uint8@2"].astype(np.float32) / 255 - mean) / std
    expected["uint8@2"] = np.asarray(loaded.model(images))

    np.savez(tmp_path / "inputs.npz", **inputs)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", READER], cwd=tmp_path, env=env, check=True)
    found = np.load(tmp_path / "outputs.npz")
    for name, value in expected.items():
        assert found[name].dtype == np.float32 and found[name].shape == value.shape
        error = np.abs(found[name] - value).max() / np.abs(value).max()
        assert error < (1e-5 if "bfloat16" not in name else 1e-2), f"{name}: {error}"


def test_it_is_a_program_for_all_devices(tmp_path):
    vit_jax.save(model("learned2d"), tmp_path / "x.stablehlo")
    program = jax.export.deserialize(bytearray((tmp_path / "x.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert "cudnn" not in program.mlir_module()
    assert [str(each) for each in program.in_avals] == ["float32[b,8,8,3]"]
    assert [str(each) for each in program.out_avals] == ["float32[b,8]"]


def test_what_goes_in_and_comes_out_is_said(tmp_path, capsys):
    path, out = examples()["hf vit"].write(tmp_path / "hf"), tmp_path / "x.stablehlo"
    assert main(["convert", str(path), str(out), "--preprocess"]) == 0
    said = (
        f"{out}: takes uint8 [b 8 8 3], pixels of 0 to 255; gives float32 [b 5], logits (softmax)"
    )
    assert capsys.readouterr().out == f"{said}\n"
    said = json.loads((tmp_path / "x.stablehlo.json").read_text())
    assert said["labels"] == ["ant", "bee", "cat", "dog", "eel"]
    assert said["images"]["shape"] == ["b", 8, 8, 3] and said["images"]["dtype"] == "uint8"
    assert said["images"]["mean"] == [0.25, 0.5, 0.75] and said["images"]["aspect"] == "squash"
    assert said["outputs"] == {"shape": ["b", 5], "dtype": "float32", "values": "logits (softmax)"}
    assert said["model"]["family"] == "vit" and said["model"]["num_heads"] == 2


def test_what_cannot_be_a_program_is_said(tmp_path, capsys, monkeypatch):
    def refused(message, function, *args, **how):
        with pytest.raises(UserError, match=message):
            function(*args, **how)

    vit, out = model("token"), tmp_path / "x.stablehlo"
    refused(
        "is a program, not weights in the names of 'timm'", vit_jax.save, vit, out, format="timm"
    )
    npz = tmp_path / "x.npz"
    refused("preprocess is for programs", vit_jax.save, vit, npz, format="google", preprocess=True)
    huge = {"head/kernel": np.broadcast_to(np.float32(0), (2**15, 2**15))}
    refused(
        "at most 2,000,000,000 bytes, .* 4,294,967,296", programs.write, str(out), huge, card(vit)
    )
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    refused(r"x.onnx needs jax2onnx: .*\[onnx\]", vit_jax.save, vit, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
    source = examples()["hf vit"].write(tmp_path / "hf")
    assert "required: --format" in fails(capsys, "convert", source, tmp_path / "x.npz")
    assert main(["convert", str(source), str(out)]) == 0
    refused("is a program of JAX, .*: run it by jax.export.deserialize", open_model, out)


def card(vit):
    return ModelCard(vit.config, Preprocess((8, 8)), tuple("abcde"))


def test_a_program_of_masks_says_how_they_come_from_its_logits(tmp_path):
    vit = model("token", pool="none", num_classes=2)
    how = dict(objective="segmentation", palette=((0, 0, 0), (255, 0, 0)))
    loaded = Loaded(vit, vit.config, Preprocess((8, 8)), ("sky", "roof"), Report(()), None, **how)
    vit_jax.save(loaded, tmp_path / "masks.stablehlo")
    said = json.loads((tmp_path / "masks.stablehlo.json").read_text())
    assert said["outputs"]["shape"] == ["b", 2, 2, 2]
    assert "interpolate them bilinearly" in said["outputs"]["values"]
    assert said["palette"] == [[0, 0, 0], [255, 0, 0]]
