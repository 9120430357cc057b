"""`vit_jax.load`: a folder in, a model that is ready out."""

import dataclasses
import io
import json
import shutil

import numpy as np
import PIL.Image
import pytest
from jaxtyping import TypeCheckError

import vit_jax
from vit_jax.errors import UserError


def test_loads_model_preprocessing_and_labels(tiny_run):
    vit = vit_jax.load(tiny_run[0])
    assert vit.labels == tuple(str(i) for i in range(10))
    assert vit.config.image_size == (8, 8) and vit.step == 24
    assert {line.fate for line in vit.report.lines} == {"kept"}
    image = np.full((5, 9), 255, np.uint8)
    prepared = vit.preprocess(image)
    assert prepared.shape == (8, 8, 1) and prepared.dtype == np.float32
    np.testing.assert_array_equal(prepared, 1.0)
    assert vit.model(prepared[None]).shape == (1, 10)


def test_another_resolution_head_and_dtype(tiny_run):
    vit = vit_jax.load(tiny_run[0], image_size=(12, 20), num_classes=3, dtype="bfloat16")
    assert vit.config.grid == (6, 10) and vit.config.dtype == "bfloat16"
    fates = {line.name: line.fate for line in vit.report.lines}
    assert fates["pos_embed"] == "resized 4x4 -> 6x10 (zoom)"
    assert fates["head/kernel"] == "fresh" and fates["pre_logits/kernel"] == "dropped"
    logits = vit.model(vit.preprocess(np.zeros((40, 30, 3), np.uint8))[None])
    np.testing.assert_array_equal(logits, np.zeros((1, 3)))  # a fresh head is zero
    assert vit.labels == ("0", "1", "2")

    # As many classes as before are other classes all the same.
    assert not np.asarray(vit_jax.load(tiny_run[0], num_classes=10).model.head.kernel).any()


def test_the_average_is_what_is_loaded(tiny_run):
    from vit_jax.checkpoints.opened import open_model
    from vit_jax.checkpoints.store import Store
    from vit_jax.models.vit import structure

    opened = open_model(tiny_run[0])
    average, step = opened.read("pos_embed"), opened.step
    shapes = structure(opened.card.config)[1]
    saved = Store(tiny_run[0]).restore(step, {"params": shapes, "ema": shapes})
    np.testing.assert_array_equal(average, saved["ema"]["pos_embed"])
    assert np.abs(average - saved["params"]["pos_embed"]).max() > 1e-5


def test_what_is_wrong_is_said(tiny_run, tmp_path):
    with pytest.raises(UserError, match="there is no '/nowhere'"):
        vit_jax.load("/nowhere")
    with pytest.raises(UserError, match="holds no weights"):
        vit_jax.load(tmp_path)
    with pytest.raises(UserError, match="does not divide into patches"):
        vit_jax.load(tiny_run[0], image_size=9)
    shutil.copytree(tiny_run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        vit_jax.load(tmp_path / "run")
    card = tmp_path / "run" / "model" / "model.json"
    card.write_text(json.dumps({"config": {"widht": 3}}))
    with pytest.raises(UserError, match=r"model\.json is damaged or of another version"):
        vit_jax.load(tmp_path / "run")


def test_one_image_is_one_image_and_several_are_several(tiny_run, tmp_path):
    vit = vit_jax.load(tiny_run[0])
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 7, 3), np.uint8)
    pictures = [PIL.Image.fromarray(each) for each in pixels]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    prepared = np.stack([vit.preprocess(each) for each in pixels])
    logits = np.asarray(vit.model(prepared), np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = weights / weights.sum(axis=1, keepdims=True)

    def check(answers, expected):
        assert len(answers) == len(expected)
        for answer, probabilities in zip(answers, expected, strict=True):
            order = np.argsort(-probabilities)[: len(answer)]
            assert [name for name, _ in answer] == [str(i) for i in order]
            np.testing.assert_allclose([p for _, p in answer], probabilities[order], rtol=1e-5)

    ones = (paths[0], str(paths[0]), paths[0].read_bytes(), bytearray(paths[0].read_bytes()))
    for one in (*ones, pictures[0], pixels[0]):
        check(list(vit.predict(one, topk=3)), expected[:1])
        check([next(vit.predict([one]))], expected[:1])
    for several in (paths, map(str, paths), pictures, pixels, list(pixels), iter(pixels)):
        check(list(vit.predict(several, topk=20)), expected)
    grey = pixels[0, :, :, :1]
    assert list(vit.predict(grey)) == list(vit.predict(grey[..., 0])) == list(vit.predict([grey]))


@pytest.mark.parametrize("topk", [0, -1, 1.0, True, "2", None])
def test_topk_is_a_number_of_classes(tiny_run, topk):
    with pytest.raises((UserError, TypeCheckError), match=r"topk"):
        vit_jax.load(tiny_run[0]).predict([], topk=topk)


def test_what_is_no_image_is_not_predicted(tiny_run, tmp_path):
    vit = vit_jax.load(tiny_run[0])
    for images, why in {
        7: r"a Pillow image or uint8 \[h w c\] pixels\) or an iterable of images, found int",
        None: "found NoneType",
        io.BytesIO(b"x\ny"): "found BytesIO",
        str(tmp_path): "is a folder: name the image files in it",
        "missing.jpg": r"there is no image file 'missing\.jpg'",
    }.items():
        with pytest.raises(UserError, match=why):
            list(vit.predict(images))
    eight_grey = np.zeros((8, 5, 9), np.uint8)
    with pytest.raises(UserError, match=r"with 1 or 3 channels, found \[8, 5, 9\]; of several"):
        list(vit.predict(eight_grey))
    with pytest.raises(UserError, match=r"found float32 \[8, 8, 1\]"):
        list(vit.predict(vit.preprocess(eight_grey[0])))


def test_a_sigmoid_model_says_of_each_class_how_likely_it_is(tiny_run):
    loaded = dataclasses.replace(vit_jax.load(tiny_run[0]), objective="sigmoid")
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)
    logits = np.asarray(loaded.model(loaded.preprocess(image)[None])[0], np.float64)
    expected = {str(i): 1 / (1 + np.exp(-logit)) for i, logit in enumerate(logits)}
    (found,) = loaded.predict(image, topk=10)
    assert dict(found) == pytest.approx(expected, rel=1e-5)
