"""Masks of images of any size, from Python and by `predict`, which overwrites nothing."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx
from tiny_models import as_float32, random_params

import vit_jax
from vit_jax.__main__ import main
from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.segment import pixel_classes
from vit_jax.data.images import encode
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.training.evaluation.predict import Predictor

K = 5
CONFIG = ViTConfig(
    image_size=16,
    patch_size=4,
    width=8,
    depth=1,
    mlp_dim=8,
    num_heads=1,
    num_classes=K,
    pool="none",
)
PALETTE = ((1, 2, 3), (200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 9, 9))
SIZES = [(40, 33), (16, 16), (7, 90), (33, 40)]
IMAGES = [
    np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8) for i, size in enumerate(SIZES)
]


def made(path, **changes):
    """A model of random weights that segments, all classes equally likely, with its card."""
    model = nnx.merge(structure(CONFIG)[0], as_float32(random_params(CONFIG)))
    vit_jax.save(model, path, format="vit_jax")
    vit = vit_jax.load(path)
    logits = np.stack([vit.model(vit.preprocess(image)[None])[0] for image in IMAGES])
    model.head.bias[...] -= logits.mean(axis=(0, 1, 2))
    vit_jax.save(model, path, format="vit_jax")
    names = ("sky", "car", "tree", "road", "cat")
    card = dict(objective="segmentation", labels=names, palette=PALETTE, **changes)
    vit_jax.save(dataclasses.replace(vit_jax.load(path), **card), path, format="vit_jax")
    return vit_jax.load(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("model") / "vit.safetensors"


@pytest.fixture(scope="module")
def vit(path):
    return made(path)


@pytest.fixture(scope="module")
def wanted(vit):
    """The class of the highest logit, by JAX's own interpolation at each image's size."""
    found = []
    for image in IMAGES:
        logits = vit.model(vit.preprocess(image)[None])
        shape = (1, *image.shape[:2], K)
        found.append(jax.image.resize(logits, shape, "bilinear", antialias=False)[0].argmax(-1))
    return [np.asarray(mask, np.uint8) for mask in found]


def same(mask, expected):
    """But for a pixel or two, where two classes are equally high but for rounding."""
    assert mask.dtype == np.uint8 and mask.shape == expected.shape
    assert (mask != expected).sum() <= 2
    return True


def test_the_card_keeps_the_palette(vit):
    assert vit.card.palette == PALETTE and vit.card.objective == "segmentation"
    assert ModelCard.from_json(vit.card.to_json()) == vit.card
    for wrong in (PALETTE[:4], ((1, 2),) * K, ((1, 2, 256),) * K, ((1, 2, 0.5),) * K):
        with pytest.raises(ValueError, match="a palette that is no colour"):
            ModelCard.from_json({**vit.card.to_json(), "palette": wrong})
    old = {name: value for name, value in vit.card.to_json().items() if name != "palette"}
    assert ModelCard.from_json(old).palette is None
    assert vit_jax.load(vit.report.facts["file"].split(", ")[1], num_classes=2).palette is None


def test_masks_have_the_sizes_of_their_images(vit, wanted):
    found = vit.segment(IMAGES)
    assert isinstance(found, list)
    for mask, expected in zip(found, wanted, strict=True):
        assert same(mask, expected) and len(np.unique(expected)) > 1
    assert same(vit.segment(IMAGES[2]), wanted[2])  # one image has one mask
    assert [mask.shape for mask in vit.segment(iter(IMAGES[:2]))] == SIZES[:2]
    batches = list(Predictor(vit, "masks", batch_size=8)(IMAGES * 3))
    assert len(batches) == 12 and batches[0].pixels is None
    for answer, expected in zip(batches, wanted * 3, strict=True):
        assert same(answer.mask, expected)
    with pytest.raises(UserError, match=r"a class for each pixel.*predict --out=FOLDER"):
        vit.predict(IMAGES[0])
    other = dataclasses.replace(vit, objective="softmax")
    for ask in (lambda: other.segment(IMAGES), lambda: Predictor(other, "masks")):
        with pytest.raises(UserError, match="masks are of models trained with objective segment"):
            ask()


def test_windows_are_those_of_an_evaluation(vit):
    """Of logits that are averaged and interpolated by hand, for images larger than the model."""
    with pytest.raises(UserError, match=r"eval.windows is 'all'"):
        Predictor(vit, "masks", windows="all")
    found = list(Predictor(vit, "masks", batch_size=8, windows="scaled", stride=0.5)(IMAGES))
    for image, answer in zip(IMAGES, found, strict=True):
        h, w = image.shape[:2]
        scaled = vit.preprocess.covering(h, w, own=False)
        pixels = vit.preprocess.to_size(image, scaled)
        sums, counts = np.zeros((*scaled, K)), np.zeros((*scaled, 1))
        for top in {min(y, scaled[0] - 16) for y in range(0, scaled[0], 8)}:
            for left in {min(x, scaled[1] - 16) for x in range(0, scaled[1], 8)}:
                here = slice(top, top + 16), slice(left, left + 16)
                logits = vit.model(vit.preprocess.normalise(pixels[here])[None])
                shape = (1, 16, 16, K)
                sums[here] += jax.image.resize(logits, shape, "bilinear", antialias=False)[0]
                counts[here] += 1
        mean = jnp.asarray(sums / counts, jnp.float32)
        stretched = jax.image.resize(mean, (h, w, K), "bilinear", antialias=False)
        assert same(answer.mask, np.asarray(stretched.argmax(-1), np.uint8))


def test_logits_are_interpolated_as_written_out():
    """Bilinearly, between the centres of patches; beyond the outermost the nearest."""
    logits = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    sizes = [(70, 5), (2, 33)]
    for row, (h, w) in enumerate(sizes):
        mask = pixel_classes(jnp.asarray(logits), sizes)[row]
        expected = np.empty((h, w), np.uint8)
        for y in range(h):
            for x in range(w):
                at = np.zeros(6)
                for axis_y, share_y in near((y + 0.5) * 3 / h - 0.5, 3):
                    for axis_x, share_x in near((x + 0.5) * 4 / w - 0.5, 4):
                        at += share_y * share_x * logits[row, axis_y, axis_x].astype(float)
                expected[y, x] = at.argmax()
        np.testing.assert_array_equal(mask, expected)


def near(place, n):
    place = min(max(place, 0), n - 1)
    low = min(int(place), n - 2)
    return (low, 1 - (place - low)), (low + 1, place - low)


# The command. ------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, image in enumerate(IMAGES):
        file = tmp_path / "pets" / ("dogs" if i > 1 else "") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(image))
    return tmp_path


def predict(path, *argv):
    return main(["predict", f"--model={path}", "--batch-size=8", *argv])


def written(path):
    with PIL.Image.open(path) as opened:
        return opened.mode, np.asarray(opened), opened.getpalette()


NAMES = ("0", "1", "dogs/2", "dogs/3")


def test_a_folder_of_masks_and_overlays(path, vit, wanted, here, caplog):
    caplog.set_level("INFO", "vit_jax")
    assert predict(path, "pets", "--out=out", "--overlay") == 0
    assert re.search(r"out: 4 masks in .* classes by classes\.txt", caplog.text)
    files = sorted(str(p.relative_to(here / "out")) for p in (here / "out").rglob("*.*"))
    assert files == sorted(
        ["classes.txt", *(f"{n}{end}" for n in NAMES for end in (".png", ".overlay.png"))]
    )
    flat = [value for colour in PALETTE for value in colour]
    for name, image, expected in zip(NAMES, IMAGES, wanted, strict=True):
        mode, mask, palette = written(here / "out" / f"{name}.png")
        assert mode == "P" and same(mask, expected) and palette[:15] == flat
        _, blend, _ = written(here / "out" / f"{name}.overlay.png")
        half = (image.astype(float) + np.array(PALETTE)[mask]) / 2
        assert np.abs(blend - half).max() <= 0.5
    # Its files are masks that can be read as such, with the images.
    source = open_source(f"pairs:{here},images=pets,masks=out,unpaired=skip", "all")
    np.testing.assert_array_equal(source[3]["label"], written(here / "out" / "dogs" / "3.png")[1])
    assert predict(path, "pets/dogs/2.png", "pets/*.png", "--out=flat") == 0
    assert {p.name for p in (here / "flat").iterdir()} == {"2.png", "0.png", "1.png", "classes.txt"}
    assert predict(path, "pets/**/*.png", "--out=deep", "--windows=own") == 0
    assert all((here / "deep" / f"{name}.png").exists() for name in NAMES)


def test_nothing_is_overwritten(path, vit, here, capsys):
    def refused(message, *argv):
        before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
        assert predict(path, *argv) == 2
        assert re.search(message, capsys.readouterr().err)
        assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file()} == before

    refused("pets/0.png is there already", "pets", "--out=pets")
    (here / "masks").mkdir()
    (here / "masks" / "1.png").write_bytes(b"true")
    refused("masks/1.png is there already, and nothing is overwritten", "pets", "--out=masks")
    (here / "pets" / "0.jpg").write_bytes(encode(IMAGES[0], 90))
    refused(r"pets/0\.png and pets/0\.jpg would both go to new/0\.png", "pets", "--out=new")
    refused("would both go to", "pets/1.png", "pets/dogs", "pets/1.png", "--out=new")
    refused("--topk=2 names classes", "pets/1.png", "--topk=2", "--out=new")
    refused("a class for each pixel", "pets/1.png", "--out=new.csv")
    refused("a class for each pixel", "pets/1.png")
    refused("--overlay is for masks", "pets/1.png", "--overlay", "--out=new.csv")
    refused("--windows=own is for masks", "pets/1.png", "--windows=own")
    refused("eval.windows is 'all'", "pets/1.png", "--windows=all", "--out=new")
    refused("model pools nothing|no features of whole", "pets/1.png", "--features", "--out=x.npy")


def test_what_cannot_be_read_has_no_mask(path, vit, here, caplog):
    (here / "pets" / "broken.jpg").write_bytes(b"\xff\xd8\xff damaged")
    assert predict(path, "pets", "--out=out") == 3
    assert "1 of 5 images cannot be read" in caplog.text
    assert not (here / "out" / "broken.png").exists() and (here / "out" / "0.png").exists()


def test_models_of_classes_give_no_masks(vit, here, tmp_path, capsys):
    plain = dataclasses.replace(CONFIG, pool="token")
    model = nnx.merge(structure(plain)[0], as_float32(random_params(plain)))
    vit_jax.save(model, tmp_path / "plain.safetensors", format="vit_jax")
    assert predict(tmp_path / "plain.safetensors", "pets", "--out=folder") == 2
    assert "--out=folder: classes go to a file that ends in" in capsys.readouterr().err
    assert predict(tmp_path / "plain.safetensors", "pets", "--out=folder", "--overlay") == 2
    assert "--overlay is for masks" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "plain.safetensors")]) == 0
    assert "a class for each pixel" not in capsys.readouterr().out


def test_inspect_says_that_it_segments(path, vit, capsys):
    assert main(["inspect", str(path)]) == 0
    assert "outputs:        a class for each pixel (segmentation)" in capsys.readouterr().out
