"""The source `table:`: which image has which label, in which split."""

import logging
import pickle

import pyarrow as pa
import pytest
from made import refused, tree, written

from vit_jax.data.forms.listed import table_splits
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError


@pytest.fixture
def here(tmp_path):
    """Files a.jpg, b.jpg, ... of the bytes of their names, some in folders."""
    names = ("a.jpg", "b.jpg", "c.png", "x/a.jpg", "x/d.JPEG", "x/e.jpg", "x/e.png")
    return tree(tmp_path, {name: name.encode() for name in names})


def told(source):
    """[(file, class or classes)], in order; its bytes are its name's."""
    found = []
    for i in range(len(source)):
        example = source[i]
        assert example["image"].decode().endswith(example["file"])
        label = example["label"]
        many = isinstance(label, tuple)
        assert many == source.multi_label
        names = source.label_names
        found.append((example["file"], tuple(names[n] for n in label) if many else names[label]))
    return found


ONE = [("a.jpg", "cat"), ("x/d.JPEG", "dog")]
SOME = [("a.jpg", ("cat", "dog")), ("b.jpg", ()), ("c.png", ("dog",))]
ROOTED = [("a.jpg", "cat"), ("d.JPEG", "dog")]
NUMBERS = pa.table({"path": ["a.jpg", "c.png"], "label": [1.0, 12.0], "b": [b"", b""]})
TAGS = pa.table({"path": ["a.jpg", "b.jpg", "c.png"], "tags": [["dog", "cat"], [], ["dog"]]})
FINDING, SEPARATED = "image,tags\na.jpg,No Finding|b\n", ",labels=tags,separator=|"
NAMED = "image,n,cat,dog\na.jpg,7,1,1\nb.jpg,8,0,0\nc.png,9,0,1\n"
CASES = [
    ("file_name,label\na.jpg,cat\nx/d.JPEG,dog\n", "", ONE),
    ("a.jpg,cat\nx/d.JPEG,dog\n", "", ONE),
    ("a.jpg 0\nx/d.JPEG 1\n", "", [("a.jpg", "0"), ("x/d.JPEG", "1")]),  # a list of Caffe's
    ("bild;art\na.jpg;cat\nx/d.JPEG;dog\n", "", ONE),
    ("bild;art;n\na.jpg;cat;1\nx/d.JPEG;dog;2\n", ",image=bild,label=art", ONE),
    ("a.jpg;cat;1\nx/d.JPEG;dog;2\n", ",label=2", ONE),
    ("id,breed\na,cat\nd,dog\n", ",root=ROOT/x", ROOTED),
    ("image,label\n.\\a.jpg,cat\nx\\d.JPEG,dog\n", "", ONE),  # from Windows
    (NUMBERS, "", [("a.jpg", "1"), ("c.png", "12")]),
    ('{"file_name": "a.jpg", "label": 3}\n', "", [("a.jpg", "3")]),
    (TAGS, ",labels=tags", SOME),
    ("image,tags\na.jpg,cat|dog\nb.jpg,\nc.png,dog\n", ",labels=tags", SOME),
    ("image,tags\na.jpg,cat dog\nb.jpg,\nc.png,dog\n", ",labels=tags", SOME),
    (FINDING, SEPARATED, [("a.jpg", ("No Finding", "b"))]),
    ("image,cat,dog\na.jpg,1,1.0\nb.jpg,0,0.0\nc.png,0,1.0\n", ",labels=*", SOME),
    (NAMED, ",labels=cat+dog", SOME),
    ('{"a.jpg": "cat", "x/d.JPEG": "dog"}', "", ONE),
    ("image,score\na.jpg,0.5\nb.jpg,-1\n", ",label=score", [("a.jpg", "0.5"), ("b.jpg", "-1")]),
    ("image,label\na.jpg,x|y\n", ",label=label", [("a.jpg", "x|y")]),
    ("a.jpg,cat\nx/d.JPEG,dog\na.jpg,cat\n", "", ONE),  # twice
]


def test_what_a_table_lists(here):
    for content, options, expected in CASES:
        path = written(here / "list", content)
        source = open_source(f"table:{path}{options.replace('ROOT', str(here))}", "all")
        assert told(source) == told(pickle.loads(pickle.dumps(source))) == expected, content


SPLITS = "image,label,split\na.jpg,2,train\nb.jpg,10,train\nc.png,2,val\nx/a.jpg,7,val\n"


def test_splits_count_the_same_classes(here, caplog):
    spec = f"table:{written(here / 'list.csv', SPLITS)}"
    assert told(open_source(spec, "train")) == [("a.jpg", "2"), ("b.jpg", "10")]
    val = open_source(spec, "val")
    assert told(val) == [("c.png", "2"), ("x/a.jpg", "7")]
    assert val.label_names == ("2", "7", "10")
    assert len(open_source(spec, "all")) == 4 and caplog.text == ""
    assert table_splits(spec.partition(":")[2]) == ("train", "val", "all")
    halves = [set(told(open_source(spec, f"train[{part}]"))) for part in (":36%", "36%:")]
    assert halves == [{("a.jpg", "2")}, {("b.jpg", "10")}]
    with pytest.raises(UserError, match="no split 'trian'; did you mean 'train'"):
        open_source(spec, "trian")
    (here / "c.png").unlink()
    assert len(open_source(spec, "train")) == 2
    with pytest.raises(UserError, match=r"list.csv, line 4: there is no file '.*c\.png'"):
        open_source(spec, "val")
    written(here / "list.csv", SPLITS.replace("x/a.jpg", "a.jpg"))
    assert len(open_source(spec, "train")) == 2
    assert "has 1 images of split 'train' in others, too" in caplog.text


def test_fingerprints_are_of_the_contents_alone(here, tmp_path_factory):
    spec = written(here / "list.csv", SPLITS)
    first = open_source(f"table:{spec}", "train").fingerprint
    moved = here.rename(tmp_path_factory.mktemp("elsewhere") / "b")
    spec = f"table:{moved / 'list.csv'}"
    assert open_source(spec, "train").fingerprint == first
    (moved / "b.jpg").write_bytes(b"other bytes")
    changed = open_source(spec, "train").fingerprint
    written(moved / "list.csv", SPLITS.replace("a.jpg,2", "a.jpg,10"))
    assert len({first, changed, open_source(spec, "train").fingerprint}) == 3


def test_what_is_not_sure_is_refused(here):
    lists = pa.table({"path": ["a.jpg"], "tags": [["x"]]})
    ids, other = (
        "1 a.jpg\n2 b.jpg\n3 c.png\n4 x/a.jpg\n5 x/e.jpg\n",
        "'1' has another text for each",
    )
    cases = [
        (
            "image,label\na.jpg,cat\nz.jpg,dog\ny.jpg,dog\n",
            "",
            r"line 3: .*'.*z\.jpg', and 1 others",
        ),
        ("image,label\nz.jpg,cat\n", "", r"line 2: there is no file '.*z\.jpg'"),
        ("image,label\nz,cat\n", "", "no column has files of .* say image=COLUMN, or root"),
        ("image,label\nx/e,cat\n", "", "'x/e' may be 'e.jpg' or 'e.png'"),
        ("image,label\na.jpg,cat\nb.jpg,\n", "", r"line 3: 'b\.jpg' has no label"),
        ("image,label\na.jpg,cat\na.jpg,dog\n", "", "line 3: 'a.jpg' is 'dog', but 'cat' in"),
        ("one,two,label\na.jpg,b.jpg,cat\n", "", "several columns with files .'one', 'two'."),
        ("image,sex,age\na.jpg,m,3\n", "", "2 columns that may be labels .'sex', 'age'."),
        ("image,label\na.jpg,cat\n", ",lable=x", "has an option 'lable'; did you mean 'label"),
        ("image,label\na.jpg,cat\n", ",label=x,labels=y", "not both"),
        ("image,label\na.jpg,cat\n", ",label=x", "has no column 'x'"),
        ("image,label,split\na.jpg,cat,\nb.jpg,cat,val\n", "", "line 2 is in no split"),
        ("image,tags\na.jpg,a|b c\n", ",labels=tags", r"Say separator=\| or space"),
        ('image,tags\na.jpg,"x,y"\n', ",labels=tags", "Say separator=comma"),
        ("image,a,b\na.jpg,1,-1\n", ",labels=*", "line 2: column 'b' has '-1'; expected 0 or 1"),
        ("image,target\na.jpg,0.25\nb.jpg,1\n", "", "'target' has numbers such as '0.25': if"),
        ("image;score\na.jpg;0,25\nb.jpg;1,5\n", "", "has numbers such as '0,25'"),
        ("image,label\na.jpg,-1\nb.jpg,1\n", "", "has numbers such as '-1'"),
        ("image,label\na.jpg,cat|dog\nb.jpg,cat\n", "", "'cat|dog' .*,labels=label reads them"),
        ("image,tags\na.jpg,haze primary\nb.jpg,haze\n", "", "several labels, such as 'haze pr"),
        (ids, "", f"{other} image, such as '1'.* as in .*list,label=1"),
        ("image,label\na.jpg,01\nb.jpg,1\n", "", "'01' and '1' one class, or two"),
        ("image,label\nx/a.jpg,0\nx//a.jpg,1\n", "", "'x/a.jpg' is '1', but '0' in line 2"),
        (pa.table({"image": [b"x"], "label": [1]}), "", "use hf-data:"),
        (lists, "", "say labels=tags"),
        (lists, ",label=tags", "say labels=tags"),
    ]
    file = here / "list"
    refused(lambda it, more: open_source(f"table:{written(file, it)}{more}", "all"), cases)
    written(file, "image,label\na.jpg,cat\n")
    with pytest.raises(UserError, match="no column of splits, so that 'train' is unknown"):
        open_source(f"table:{file}", "train")


def test_a_header_that_is_taken_for_one_is_said(here, caplog):
    caplog.set_level(logging.INFO, "vit_jax")
    path = written(here / "list", "bild,art,n\na.jpg,cat,3\n")
    open_source(f"table:{path},label=art", "all")
    assert "its first row, ['bild', 'art', 'n'], is its header" in caplog.text
