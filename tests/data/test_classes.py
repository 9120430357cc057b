"""Which class is which: every rule by the labels that come out, and what no rule decides."""

import pickle

import numpy as np
import pytest
from made import refused, written

from vit_jax.data.classes import Relabelled, match, renamed, with_labels
from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.labels import imagenet_labels, imagenet_synsets
from vit_jax.errors import UserError

SHARKS = ("tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark")
LETTERS = tuple("abcdefghijkl")


def source_of(names):
    labels = np.arange(len(names), dtype=np.int32)
    return ArraySource(np.zeros((len(names), 2, 2, 1), np.uint8), labels, tuple(names))


def test_a_class_is_the_one_that_is_called_so():
    for names, labels, classes, rule in [
        (("cat", "ant"), ("ant", "bee", "cat"), (2, 0), "by name"),
        # The words, in whatever order the folders sort.
        (("goldfish", "great_white_shark", "tench"), SHARKS, (1, 2, 0), "first of several"),
        (("Great-White_shark",), SHARKS, (2,), "but for case"),
        (("puma, Cougar",), ("lion", "puma, catamount, cougar"), (1,), "first of several"),
        (("TENCH, tinca tinca",), SHARKS, (0,), "but for case"),
        # Folders sort as text: 0, 1, 10, 11, 2, ...
        (tuple(sorted(map(str, range(12)))), LETTERS, None, "by number"),
        (tuple(f"{i:02d}" for i in range(12)), LETTERS, tuple(range(12)), "by number"),
        (("07", "3"), tuple(map(str, range(10))), (7, 3), "by number"),
        # A few of ImageNet's, by id or by words, on either side.
        (("n01443537", "n01440764"), SHARKS, (1, 0), "WordNet"),
        (("n02085620-Chihuahua",), ("dog", "Chihuahua"), (1,), "WordNet"),
        (("great white shark", "tench"), ("n01440764", "n01484850"), (1, 0), "WordNet"),
        (("e\u0301clair",), ("\xe9clair", "cake"), (0,), "but for case"),
    ]:
        matched = match(names, labels)
        assert matched.classes == (tuple(map(int, names)) if classes is None else classes)
        said = f"{names[0]} is {labels[matched.classes[0]]}"
        assert rule in matched.rule and said in str(matched)


def test_all_of_imagenets_ids_are_all_of_its_words():
    ids, words = imagenet_synsets(), imagenet_labels()
    assert match(ids[::-1], words).classes == tuple(range(1000))[::-1]
    assert match(words, ids).classes == tuple(range(1000))
    # As Hugging Face has them: two cranes and no ids, told apart by their places in the whole list.
    theirs = tuple(name.partition(" [")[0] for name in words)
    assert len(set(theirs)) < 1000
    assert match(("n03126707", "n02012849"), theirs).classes == (517, 134)
    with pytest.raises(UserError, match="the model knows no 'crane'"):
        match(("crane",), theirs)


def test_what_no_name_decides_is_refused():
    cases = [
        (("x", "y"), ("ant", "bee"), "the model knows no 'x', 'y', but 'ant', 'bee'.*in_order"),
        (("fish, gold",), ("fish, silver", "x"), "knows no 'fish, gold'"),
        (("ant", "dog"), ("ant", "bee"), "the model knows no 'dog'"),
        (("x", "y", "z", "w"), ("ant", "bee"), "4 classes, the model 2.* and 1 more"),
        (("1", "2", "3"), ("a", "b", "c"), "knows no '1'"),  # from 1, or all but 0?
        (("0", "1"), ("a", "b", "c"), "knows no '0'"),
        (("a", "b", "c"), ("0", "1", "2"), "knows no 'a'"),
        (("1", "01"), ("0", "1"), "knows no '01'"),
        (("Cat", "cat"), ("cat", "dog"), "'Cat' and 'cat'|'cat' and 'Cat'"),
        (("crane", "x"), ("x", "crane", "crane"), "knows no 'crane'"),
        (("maillot", "maillot"), ("maillot", "x"), "would both be"),
    ]
    refused(match, cases)


def test_in_order_is_for_those_who_say_so():
    assert match(("x", "y"), ("ant", "bee"), "in_order").classes == (0, 1)
    with pytest.raises(UserError, match="2 classes, the model 3: they cannot be taken in order"):
        match(("x", "y"), ("ant", "bee", "cat"), "in_order")
    with pytest.raises(UserError, match="no such model"):
        renamed(("x", "y"), "in_order")


def test_a_file_says_which_is_which(tmp_path, monkeypatch):
    file, labels = tmp_path / "classes.csv", ("cat", "ant", "bee", "x", "y")
    for text, names, order in [
        ("x,bee\ny,ant\n", ("bee", "ant"), ("bee", "ant")),
        ("bee,x\nant,y\nbee,z\n", ("bee", "ant"), ("bee", "ant")),  # the other way round
        ("x,bee\ny,bee\n", ("bee", "bee"), ("bee",)),  # two classes are one
        ("y\nx\nz\n", ("x", "y"), ("y", "x", "z")),
    ]:
        assert renamed(("x", "y"), written(file, text)) == (names, order)
        assert match(("x", "y"), labels, str(file)).classes == tuple(map(labels.index, names))
    # A list names the classes of data that has numbers.
    written(file, "cat\ndog\nemu\n")
    assert renamed(("0", "2"), str(file)) == (("cat", "emu"), ("cat", "dog", "emu"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert match(("0", "2"), ("emu", "cat"), "~/classes.csv").classes == (1, 0)
    cases = [(("x", "y"), r"one column.*called 'x', 'y': expected two columns")]
    refused(lambda n: renamed(n, str(file)), [*cases, (("0", "3"), "expected two columns")])
    cases = [
        ("x,bee\n", "says nothing of the data's class 'y'"),
        ("x,y\ny,z\nz,x\n", "in both columns"),
        ("x,bee\ny,ant\nx,ant\n", "'x' twice"),
        ("x\nx\ny\n", "names a class twice"),
        ("x,bee\ny,dodo\n", "knows no 'dodo'"),
    ]
    refused(lambda text: match(("x", "y"), ("ant", "bee"), written(file, text)), cases)


def test_a_source_has_the_models_classes():
    labels = ("ant", "bee", "cat")
    assert with_labels(same := source_of(labels), labels) is same
    fewer = with_labels(source_of(("cat", "ant")), labels)
    assert isinstance(fewer, Relabelled) and fewer.label_names == labels
    for source in (fewer, pickle.loads(pickle.dumps(fewer))):
        assert [source[i]["label"] for i in range(len(source))] == [2, 0]
        assert source.fingerprint == fewer.source.fingerprint
        assert not hasattr(source, "multi_label")
