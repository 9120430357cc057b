"""FILE.onnx in ONNX Runtime computes what the model does, for each kind of model."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from tiny_models import as_float32, random_params, relative_error, run

import vit_jax
from vit_jax.models.config import ResNetConfig, ViTConfig
from vit_jax.models.create import structure
from vit_jax.models.relative import RelativeBias

pytest.importorskip("jax2onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SIZES = dict(image_size=16, patch_size=4, width=24, depth=2, mlp_dim=40, num_heads=3, num_classes=5)
HYBRID = {**SIZES, "image_size": 32, "patch_size": 1, "resnet": (1, 1), "resnet_width": 32}
CASES = {
    "token": ViTConfig(**SIZES),
    "gap, erf, hidden layer": ViTConfig(**SIZES, pool="gap", gelu="erf", representation_size=6),
    "map, quick": ViTConfig(**SIZES, pool="map", gelu="quick"),
    "registers, layer scale": ViTConfig(**SIZES, registers=3, layer_scale=0.1, position_prefix=0),
    "swiglu, no head": ViTConfig(**{**SIZES, "num_classes": 0}, mlp="swiglu"),
    "pre-norm, sincos2d": ViTConfig(**SIZES, pre_norm=True, position="sincos2d"),
    "relative, bfloat16": ViTConfig(**SIZES, position="relative", dtype="bfloat16"),
    "bias of a table": ViTConfig(**SIZES, position="relative_bias", key_bias=False),
    "bias of an MLP, norms last": ViTConfig(
        **SIZES, relative_bias=RelativeBias("mlp", shared=True), norm_after_branch=True
    ),
    "a pyramid's sum": ViTConfig(**SIZES, pool="none", pyramid=8),
    "a pyramid's locations": ViTConfig(**SIZES, pool="locations", pyramid=64, towers=1),
    "hybrid": ViTConfig(**HYBRID),
    "resnet": ResNetConfig(32, resnet=(1, 1, 1, 1), resnet_width=32, num_classes=5),
}


@pytest.mark.parametrize("name", CASES)
def test_onnx_runtime_computes_the_same(name, tmp_path):
    config = CASES[name]
    params = as_float32(random_params(config))
    in_float32 = dataclasses.replace(config, dtype="float32")
    vit = nnx.merge(structure(config)[0], params)
    path = tmp_path / "x.onnx"
    pixels = np.random.default_rng(0).integers(0, 256, (3, *config.image_size, 3)).astype(np.uint8)
    images = pixels.astype(np.float32) / 127.5 - 1
    for preprocess in (False, True):
        report = vit_jax.save(vit, path, preprocess=preprocess)
        session = onnxruntime.InferenceSession(path)
        (taken,) = session.get_inputs()
        assert (taken.name, taken.shape) == ("images", ["b", *config.image_size, 3])
        for count in (1, 3):
            given = (pixels if preprocess else images)[:count]
            found = session.run(["outputs"], {"images": given})[0]
            assert relative_error(found, run(in_float32, params, images[:count])) < 1e-5
    assert ("dtype" in report.assumed) == (config.dtype != "float32")
