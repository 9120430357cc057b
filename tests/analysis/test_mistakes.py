"""Pictures of quality: of which classes, of which mistakes, and a page that needs nothing else."""

import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from vit_jax.analysis import quality as drawn
from vit_jax.data.config import Split
from vit_jax.data.forms.arrays import ArraySource
from vit_jax.training.evaluation.assess import assess
from vit_jax.training.evaluation.files import to_json
from vit_jax.training.evaluation.predictions import Gathered
from vit_jax.training.evaluation.quality import Confusion

EVIL = "<script>alert('&')<|$_b_$\x1b[31m"


def predictions(n, k, name, error=0.3, seed=0):
    """Of random images; each class is mistaken for the next one alone."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, k, n).astype(np.int32)
    top = np.where(rng.random(n) < error, (label + 1) % k, label)
    logits = rng.normal(size=(n, k)).astype(np.float32)
    logits[np.arange(n), top] += 8 + rng.random(n).astype(np.float32)
    images = rng.integers(0, 256, (n, 6, 6, 3), np.uint8)
    source = ArraySource(images, label, tuple(f"{name} {c}" for c in range(k)))
    gathered = Gathered(n, None, "softmax")
    gathered.add(0, logits, label, np.ones(n, bool))
    return gathered.predictions(source, Split("arrays:x.npz", "test"))


class Cards(html.parser.HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("k", [2, 1000])
def test_a_confusion_matrix_of_any_number_of_classes(k):
    found = predictions(400, k, "class")
    confusion = Confusion.of(found.label, found.predicted, k)
    axes = drawn.confusion(confusion, found.source.label_names, "test").axes[0]
    columns = [label.get_text() for label in axes.get_xticklabels()]
    numbers = [int(text.get_text()) for text in axes.texts]
    if k == 2:
        assert columns == ["class 0", "class 1"] and sum(numbers) == 400
        return
    assert columns[-1] == "all others" and 2 < len(columns) <= drawn.MOST_CLASSES + 1
    chosen = [int(column.split()[1]) for column in columns[:-1]]
    assert sum(numbers) == np.isin(found.label, chosen).sum()


def test_all_that_is_drawn(tmp_path):
    found = {"test": predictions(400, 4, "class")}
    told = assess(found)
    as_json = {"test": to_json("test", told["test"], found["test"], {"step": 3})}
    names = ["test_confusion.png", "test_reliability.png", "test_mistakes.html", "test.json"]
    lines = drawn.write(tmp_path, told, found, as_json)
    assert lines == [str(tmp_path / name) for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert json.loads((tmp_path / "test.json").read_text())["step"] == 3
    pixels = np.asarray(Image.open(tmp_path / "test_confusion.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_the_page_has_the_worst_mistakes_first_and_nothing_else():
    found = predictions(300, 3, EVIL)
    (told,) = assess({"test": found}).values()
    page = drawn.mistakes_page("test", told, found)
    cards = Cards(page)
    images = [attrs for tag, attrs in cards.tags if tag == "img"]
    wrong = np.flatnonzero(found.label != found.logits.argmax(axis=1))
    assert len(images) == drawn.MOST_MISTAKES < len(wrong)
    assert all(attrs["src"].startswith("data:image/png;base64,") for attrs in images)
    assert not any(tag == "script" for tag, _ in cards.tags) and "\x1b" not in page
    assert not re.search(r"https?:|\burl\(|@import", page)
    z = found.logits.astype(np.float64)
    chances = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    worst = sorted(wrong, key=lambda i: -chances[i].max())[: drawn.MOST_MISTAKES]
    assert drawn.worst(found).tolist() == worst
    places = [text for text in cards.texts if text.startswith("example ")]
    assert places == [f"example {i}" for i in worst]
    assert f"{len(wrong)} of 300 images are wrong" in "".join(cards.texts)
    assert EVIL.replace("\x1b", " ") in "".join(cards.texts)


def test_a_page_without_mistakes_says_so():
    found = predictions(30, 3, "class", error=0.0)
    (told,) = assess({"test": found}).values()
    assert "<h1>test: no mistakes</h1>" in drawn.mistakes_page("test", told, found)
