"""The source `python:`: the example of its docstring, and what is refused."""

import inspect
import json
import pickle
import textwrap

import pytest
from made import refused

from vit_jax.data.forms import custom
from vit_jax.data.forms.files import percentile
from vit_jax.data.sources import Source, open_source
from vit_jax.errors import UserError


def test_the_example_of_the_docstring_runs(tmp_path):
    text = inspect.getdoc(custom.python)
    example = text[text.index("    import json") : text.index("Args:")]
    example = textwrap.dedent(example).replace("~/package", str(tmp_path))
    (tmp_path / "emoji.py").write_text(example)
    folder = tmp_path / "img/google/64"
    folder.mkdir(parents=True)
    rows = [{"image": f"{i:04x}.png", "category": "ABC"[i % 3]} for i in range(30)]
    for row in rows[:-1]:
        (folder / row["image"]).write_bytes(row["image"].encode())
    (tmp_path / "emoji.json").write_text(json.dumps(rows))
    spec = f"python:{tmp_path / 'emoji.py'}:emoji"
    found = []
    for split in ("train", "val"):
        source = open_source(spec, split)
        assert isinstance(source, Source)
        assert source.label_names == ("A", "B", "C") and not source.multi_label
        for i in range(len(source)):
            one = source[i]
            assert one["image"] == one["name"].encode()
            assert split == ("train" if percentile(one["name"]) < 90 else "val")
            found.append({"image": one["name"], "category": source.label_names[one["label"]]})
    assert sorted(found, key=lambda row: row["image"]) == rows[:-1]
    assert custom.python_splits(spec.partition(":")[2]) == ("train", "val")
    with pytest.raises(UserError, match="no split 'vla'; did you mean 'val'"):
        open_source(spec, "vla")


OWN = """
import numpy as np

class Own:
    label_names = ("a", "b")
    fingerprint = "1"
    def __len__(self): return 3
    def __getitem__(self, i):
        return {"image": np.full((2, 2, 3), i, np.uint8), "label": i % 2}

class Many(Own):
    multi_label = True
    def __getitem__(self, i): return {"image": b"x", "label": (0, 1)}

class Masks(Own):
    masks = True
    def __getitem__(self, i):
        return {**super().__getitem__(i), "label": np.zeros((2, 2), np.uint8)}

def own(split): return Own()
def endless(split):
    return type("E", (), {k: v for k, v in vars(Own).items() if k != "__len__"})()
def many(split): return Many()
def masks(split): return Masks()
def listed(split):
    return [{"image": b"x", "label": 10}, {"image": b"y", "label": 9}]
def tags(split):
    return [{"image": b"x", "label": ("b", "a")}, {"image": b"y", "label": ()}]

def no_names(split): return type("N", (Own,), {"label_names": None})()
def no_print(split): return type("N", (Own,), {"fingerprint": None})()
def twice(split): return type("N", (Own,), {"label_names": ("a", "a")})()
def number(split): return 3
def floats(split): return [{"image": np.zeros((2, 2, 3)), "label": "a"}]
def keys(split): return [{"img": b"", "label": "a"}]
def label(split): return [{"image": b"", "label": 1.5}]
def text(split):
    return type("N", (Own,), {"__getitem__": lambda s, i: {"image": b"", "label": "a"}})()
def beyond(split):
    return type("N", (Own,), {"__getitem__": lambda s, i: {"image": b"", "label": 2}})()
def empty(split): return []
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def test_a_source_is_pickled_as_its_name_and_called_again(own):
    """What worker processes do, in tests of the pipeline."""
    source = open_source(f"python:{own}:own", "train")
    assert len(source) == 3 and source[2]["label"] == 0 and source.fingerprint == "1"
    data = pickle.dumps(source)
    copy = pickle.loads(data)
    assert "inner" not in vars(copy) and copy[1]["image"].max() == copy[1]["label"] == 1
    changed = pickle.loads(data.replace(b"\x8c\x011", b"\x8c\x012"))
    with pytest.raises(UserError, match="another fingerprint in another process: '1', not '2'"):
        changed[0]


def test_the_other_forms(own, monkeypatch):
    assert not hasattr(open_source(f"python:{own}:endless", "train"), "__len__")
    many = open_source(f"python:{own}:many", "train")
    assert many.multi_label and many[0]["label"] == (0, 1)
    assert open_source(f"python:{own}:masks", "train").masks
    listed = open_source(f"python:{own}:listed", "train")
    assert listed.label_names == ("9", "10") and [listed[i]["label"] for i in (0, 1)] == [1, 0]
    tags = open_source(f"python:{own}:tags", "train")
    assert tags.label_names == ("a", "b") and [tags[i]["label"] for i in (0, 1)] == [(0, 1), ()]
    monkeypatch.syspath_prepend(own.parent)
    named = open_source("python:own:listed", "train")
    assert named.fingerprint == listed.fingerprint and len(named) == 2


def test_what_is_no_source_is_refused(own):
    cases = [
        ("own.py:no_names", "label_names is None; expected the names"),
        ("own.py:no_print", "fingerprint is None; expected text that changes when"),
        ("own.py:twice", "has a class twice"),
        ("own.py:number", "gave int; expected a source, or a list of examples"),
        ("own.py:floats", r"image is float64 \[2, 2, 3\]; expected the bytes"),
        ("own.py:keys", "example 0 is dict .*; expected a dict with image and label"),
        ("own.py:label", "a label is 1.5; expected the name or the number"),
        ("own.py:text", "label is str 'a'; expected an int"),
        ("own.py:beyond", "label is 2, but there are 2 classes"),
        ("own.py:empty", "gave no examples"),
        ("own.py:onw", "no function 'onw'; did you mean 'own'"),
        ("own.py", "expected MODULE:FUNCTION or FILE.py:FUNCTION"),
        ("other.py:own", "there is no file '.*other.py'"),
    ]
    refused(lambda name: open_source(f"python:{own.parent / name}", "train"), cases)
    with pytest.raises(UserError, match=r"No module named 'nowhere'; a file .* \./nowhere\.py:f"):
        open_source("python:nowhere:f", "train")
