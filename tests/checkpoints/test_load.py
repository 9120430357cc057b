"""`vit_jax.load`: a folder in, a model that is ready out."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
from test_dialects import assert_same, parameters, refused, run_folder

import vit_jax
from vit_jax.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    changes = dict(image_size=8, patch_size=2, in_channels=1, num_classes=10)
    return run_folder(tmp_path_factory.mktemp("run"), representation_size=8, **changes)


@pytest.fixture(scope="module")
def vit(run):
    return vit_jax.load(run[0])


def test_loads_model_preprocessing_and_labels(vit, run):
    assert_same(parameters(vit.model), run[1])  # the average, not what was trained at last
    assert vit.labels == tuple(f"class {i}" for i in range(10))
    assert vit.config.image_size == (8, 8) and vit.step == 24
    assert {line.status for line in vit.report.lines} == {"kept"}
    prepared = vit.preprocess(np.full((5, 9), 255, np.uint8))
    assert prepared.shape == (8, 8, 1) and prepared.dtype == np.float32
    np.testing.assert_array_equal(prepared, 1.0)


def test_another_resolution_head_and_dtype(run):
    vit = vit_jax.load(run[0], image_size=(12, 20), num_classes=3, dtype="bfloat16")
    assert vit.config.grid == (6, 10) and vit.config.dtype == "bfloat16"
    statuses = {line.name: line.status for line in vit.report.lines}
    assert statuses["pos_embed"] == "resized 4x4 -> 6x10 (zoom)"
    assert statuses["head/kernel"] == "fresh" and statuses["pre_logits/kernel"] == "dropped"
    image = vit.preprocess(np.zeros((40, 30, 3), np.uint8))[None]
    assert jax.eval_shape(vit.model, image).shape == (1, 3)
    assert not np.asarray(vit.model.head.kernel).any() and not np.asarray(vit.model.head.bias).any()
    assert vit.labels == ("0", "1", "2")
    # As many classes as before are other classes all the same.
    assert not np.asarray(vit_jax.load(run[0], num_classes=10).model.head.kernel).any()


def test_what_is_wrong_is_said(run, tmp_path):
    refused("there is no '/nowhere'", "/nowhere")
    refused("holds no weights", tmp_path)
    refused("does not divide into patches", run[0], image_size=9)
    shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    refused("holds no checkpoint yet", tmp_path / "run")
    card = tmp_path / "run" / "model" / "model.json"
    card.write_text(json.dumps({"config": {"widht": 3}}))
    refused(r"model\.json is damaged or of another version", tmp_path / "run")


def test_one_image_is_one_image_and_several_are_several(vit, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 7, 3), np.uint8)
    pictures = [PIL.Image.fromarray(each) for each in pixels]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    prepared = np.stack([vit.preprocess(each) for each in pixels])
    logits = np.asarray(jax.jit(vit.model)(prepared), np.float64)
    expected = 1 / (1 + np.exp(-logits))

    def check(answers, expected):
        assert len(answers) == len(expected)
        for answer, probabilities in zip(answers, expected, strict=True):
            order = np.argsort(-probabilities)[: len(answer)]
            assert [name for name, _ in answer] == [f"class {i}" for i in order]
            np.testing.assert_allclose([p for _, p in answer], probabilities[order], rtol=1e-5)

    ones = (paths[0], str(paths[0]), paths[0].read_bytes(), bytearray(paths[0].read_bytes()))
    for one in (*ones, pictures[0], pixels[0]):
        check(list(vit.predict(one, topk=3)), expected[:1])
        check([next(vit.predict([one]))], expected[:1])
    for several in (paths, map(str, paths), pictures, pixels, list(pixels), iter(pixels)):
        check(list(vit.predict(several, topk=20)), expected)
    grey = pixels[0, :, :, :1]
    assert list(vit.predict(grey)) == list(vit.predict(grey[..., 0])) == list(vit.predict([grey]))


def test_what_is_no_image_is_not_predicted(vit, tmp_path):
    for topk in (0, -1, 1.0, True, "2", None):
        with pytest.raises((UserError, TypeError), match="topk"):
            vit.predict([], topk=topk)
    eight_grey = np.zeros((8, 5, 9), np.uint8)
    for images, why in (
        (7, r"a Pillow image or uint8 \[h w c\] pixels\) or an iterable of images, found int"),
        (None, "found NoneType"),
        (io.BytesIO(b"x\ny"), "found BytesIO"),
        (str(tmp_path), "is a folder: name the image files in it"),
        ("missing.jpg", r"there is no image file 'missing\.jpg'"),
        (eight_grey, r"with 1 or 3 channels, found \[8, 5, 9\]; of several"),
        (vit.preprocess(eight_grey[0]), r"found float32 \[8, 8, 1\]"),
    ):
        with pytest.raises(UserError, match=why):
            list(vit.predict(images))


def test_a_sigmoid_model_says_of_each_class_how_likely_it_is(vit):
    loaded = dataclasses.replace(vit, objective="sigmoid")
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)
    logits = np.asarray(loaded.model(loaded.preprocess(image)[None])[0], np.float64)
    expected = {
        label: 1 / (1 + np.exp(-logit)) for label, logit in zip(vit.labels, logits, strict=True)
    }
    (found,) = loaded.predict(image, topk=10)
    assert dict(found) == pytest.approx(expected, rel=1e-5)
