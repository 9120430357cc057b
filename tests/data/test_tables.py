"""Tables of labels and of classes: what they say, in every form that they come in."""

import json

import pyarrow as pa
from made import refused, written

from vit_jax.data.forms.cells import read_table
from vit_jax.data.forms.class_lists import read_classes, read_pairs, sorted_names
from vit_jax.data.forms.label_files import read_labels
from vit_jax.data.forms.layout import options

PLAIN = [("i0", "cat"), ("i1", "dog")]


def lines(rows, delimiter=",", end="\n"):
    return "".join(delimiter.join(row) + end for row in rows)


HEADED = [("image", "label"), *PLAIN]
TABLES = {
    "commas": lines(PLAIN),
    "semicolons": lines(PLAIN, ";"),
    "tabs": lines(PLAIN, "\t"),
    "bars": lines(PLAIN, "|"),
    "crlf": lines(PLAIN, end="\r\n"),
    "old mac": lines(PLAIN, end="\r"),
    "quotes": '"i0","cat"\n"i1","dog"\n',
    "padded": "i0 , cat \n\n i1,dog,\n".replace(",\n", "\n"),
    "bom": "\ufeff" + lines(PLAIN),
    "utf-16": lines(HEADED).encode("utf-16"),
    "header": lines(HEADED),
    "CamelCase": lines([("ImageId", "PredictionString"), *PLAIN]),
    "header of no known words": lines([("stem", "what"), *PLAIN]),
    "label first": lines([("breed", "id"), *((b, a) for a, b in PLAIN)]),
    "label first, no header": lines((b, a) for a, b in PLAIN),
    "pandas": ",image,label\n0,i0,cat\n1,i1,dog\n",
    "three columns": "image,label,width\ni0,cat,3\ni1,dog,4\n",
    "trailing delimiter": "image,label,\ni0,cat,\ni1,dog,\n",
    "paths": "train\\i0.jpg,cat\ntrain\\i1.jpg,dog\n",
    "ending": "i0.JPG,cat\ni1.JPG,dog\n",
    "more images": lines([*PLAIN, ("i2", "ox"), ("i2", "cow")]),
    "twice": lines([*PLAIN, PLAIN[0]]),
    "name label": "i0.jpg cat\ni1.jpg dog\n",
    "stem label": "i0 cat\ni1 dog\n",
    "jsonl": '{"file_name": "i0.jpg", "label": "cat"}\n{"file_name": "i1.jpg", "label": "dog"}\n',
    "json": json.dumps([{"label": b, "image": a, "box": {"x": 1}} for a, b in PLAIN]),
    "parquet": pa.table({"image": ["i0", "i1"], "label": ["cat", "dog"], "x": [b"1", b"2"]}),
}


def test_labels_go_to_their_images(tmp_path):
    for form, content in TABLES.items():
        path = written(tmp_path / "table", content)
        for names in (["i1.jpg", "i0.jpg"], ["t/a/i1.jpg", "t/b/i0.jpg"]):
            assert read_labels(path, names) == ["dog", "cat"], form


BOXES = (
    "ImageId,PredictionString\nv_2,n03995372 85 1 49 2 n03995372 1 2 3 4 \nv_1,n01440764 0 0 9 9\n"
)
FILES = {
    "list": "A_1 1 1 9\nB_1 2 1 9\n",
    "named": "id,breed,age\na,pug,3\n",
    "unsure": "eins,zwei,drei\na,x,1\nb,y,2\n",
}
# What a file has, the images' names, and their labels.
CASES = [
    ("cat\ndog\n", "b.jpg a.jpg", "dog cat"),  # a list in the order of names
    ("big cat\nsea lion\nbig cat\n", "a b c", "big cat;sea lion;big cat"),
    ('"tench, Tinca tinca"\n"cock"\n', "a b", "tench, Tinca tinca;cock"),
    ("my a.jpg big cat\nmy b.jpg dog\n", "my b.jpg;my a.jpg", "dog;big cat"),
    ("image,label\na,1.0\nb,3.0\n", "b a", "3 1"),  # the numbers of pandas
    ("list,label=2", "A_1.jpg B_1.jpg", "1 2"),
    ("named,label=breed", "a.jpg", "pug"),
    ("unsure,label=zwei", "a.jpg b.jpg", "x y"),
    ("a/1.jpg,cat\nb/1.jpg,dog\n", "b/1.jpg a/1.jpg", "dog cat"),
    ("a/1,cat\nb/1,dog\n", "x/b/1.png x/a/1.png", "dog cat"),
    (BOXES, "v_1.JPEG v_2.JPEG", "n01440764 n03995372"),
    ("a/1.jpg,cat\nb/2.jpg,dog\nc/1.jpg,ox\n", "a/1.jpg b/2.jpg", "cat dog"),
    ("image,label\n1.jpg,2\n2.jpg,1\n", "1.jpg 2.jpg", "2 1"),  # labels that are others' names
]


def test_labels_of_these(tmp_path):
    for content, *lists in CASES:
        names, expected = (each.split(";" if ";" in each else " ") for each in lists)
        name, _, option = content.partition(",")
        path = written(tmp_path / "labels.csv", FILES.get(name, content))
        found = read_labels(f"{path},{option}" if name in FILES else path, names)
        assert found == expected, content


def test_labels_that_are_not_sure_are_refused(tmp_path):
    several = "i,PredictionString\na,n00000001 1 2 3 4 n00000002 1 2 3 4\nb,n00000001 1 2 3 4\n"
    twice, again = "x/a.jpg,cat\ny/a.jpg,dog\nb.jpg,dog\n", "line 2: 'y/a.jpg' is 'dog', but 'cat'"
    cases = [
        ("a,cat\nb\nc,dog\n", "1 cells in line 2, by commas, but 2 in others"),
        ("a,cat;x\nb,dog;x\n", "commas as well as semicolons"),
        ('a,"cat\nb,dog\n', "commas do not divide"),
        ("x,cat\ny,dog\n", r"no column names images such as 'a.jpg': found '1' \('x'"),
        ("1 1\n2 2\n", "'1 1' may be a class, or an image and its class"),
        ("a.jpg cat\ndog\n", "'dog' names no image and class"),
        ("a,cat\n", "says nothing of 1 images, such as 'b.jpg'"),
        ("a.png,cat\nb.jpg,dog\n", r"says nothing of 1 images, such as 'a.jpg' .column '1' names"),
        (twice, f"{again} in line 1"),
        ("a,cat\nb,\n", "line 2: 'b' has no label"),
        ("a,cat\nb,dog\na,ox\n", "line 3: 'a' is 'ox', but 'cat' in line 1"),
        ("image,sex,age\na,m,1\nb,f,2\n", r"2 columns that may be labels .*,label=sex"),
        ("image,label,class\na,m,1\nb,f,2\n", "3 columns|2 columns that may be labels"),
        ("image\na\nb\n", "no column names|no column of labels|has 3 labels"),
        ("a,b\nb,a\n", "both name the images, differently"),
        (several, "line 2 has boxes of several classes"),
        ("label,label,image\n1,2,a\n1,2,b\n", "two columns 'label'"),
        (b"a,caf\xe9\nb,x\n", "is no file of labels in UTF-8"),
        (b"a\0,\0c\0", "it is no text"),
        (b"PAR1abcdPAR1", "is no file of labels"),
        ("[1, 2]", "expected a JSON object"),
        ('{"image": "a", "image": "b"}', "'image' twice"),
    ]
    file = tmp_path / "l,x=1.csv"
    refused(lambda it: read_labels(written(file, it), ["a.jpg", "b.jpg"]), cases)
    path = written(file, "image,label\na,cat\n")
    assert read_labels(path, ["a.jpg"]) == ["cat"]
    cases = [(option, "did you mean 'label'") for option in ("lable=x", "label=lable")]
    cases += [("label=a,label=b", "label= once")]
    refused(lambda option: read_labels(f"{path},{option}", ["a.jpg"]), cases)
    assert options("~/x,root=y", ("root",))[0].startswith("/")


WNIDS = ("n01440764", "n01443537")
WORDS = f"{WNIDS[0]}\ttench, Tinca\n{WNIDS[1]}\tgoldfish\n"
INDEX = json.dumps({"1": [WNIDS[1], "goldfish"], "0": [WNIDS[0], "tench"]})
LISTS = [
    ("dog\ncat\n", ("dog", "cat")),
    ("tench, Tinca\ncat\ndog\n", ("tench, Tinca", "cat", "dog")),
    ("dog, hound\ncat, puss\n", ("dog, hound", "cat, puss")),  # one comma each
    ("1,cat\n0,dog\n", ("dog", "cat")),
    ("cat,2\ndog,1\n", ("dog", "cat")),
    ("index,name\n0,dog\n1,cat\n", ("dog", "cat")),
    ("class\ndog\ncat\n", ("dog", "cat")),
    (f"{WNIDS[0]} tench, Tinca tinca\n{WNIDS[1]} goldfish\n", WNIDS),  # synsets
    (WORDS, ("tench, Tinca", "goldfish")),
    (INDEX, WNIDS),
    ('["dog", "cat"]', ("dog", "cat")),
    ('{"cat": 1, "dog": 0}', ("dog", "cat")),
    ('{"1": "cat", "0": "dog"}', ("dog", "cat")),
    ("1,cat\n0,dog\n", ("0", "1")),  # numbers and names
    ("e\u0301pagneul\ncat\n", ("\u00e9pagneul", "cat")),  # decomposed
    (pa.table({"i": [1, 0], "n": ["cat", "dog"]}), ("dog", "cat")),
]


def test_classes_are_in_their_order(tmp_path):
    path = tmp_path / "classes"
    for content, expected in LISTS:
        assert read_classes(written(path, content), sorted(expected)[-2:]) == expected, content
    cases = [
        ("0,dog\n2,cat\n", "the numbers of its 2 classes are not 0 to 1, nor 1 to 2"),
        ("0,dog\n1,ox\n", "no column with all classes of the data in it: .*not such as 'cat'"),
        ("dog\ncat\ndog\n", "names a class twice"),
        ("dog,cat\ncat,dog\n", "in more than one column"),
        ("cat,0,1\ndog,1,0\n", "two columns of numbers"),
        ('{"a": {"b": 1}}', "expected a JSON list of names"),
        ("", "is no file of class names: it is empty"),
    ]
    refused(lambda content: read_classes(written(path, content), ["cat", "dog"]), cases)


def test_pairs(tmp_path):
    for content, expected in [
        ("cat\ndog\n", [("cat",), ("dog",)]),
        ("0,cat\n1,dog\n", [("0", "cat"), ("1", "dog")]),
        ("from\tto\nname\tx\n", [("from", "to"), ("name", "x")]),
        ("class,name\na,x\n", [("a", "x")]),
        (f"{WNIDS[0]} tench, Tinca\n", [(WNIDS[0], "tench, Tinca")]),
        ("tench, Tinca\ncat, puss\n", [("tench, Tinca",), ("cat, puss",)]),
        ('{"1": ["b", "cat"], "0": ["a", "dog"]}', [("a", "dog"), ("b", "cat")]),
        ('{"tabby": "cat"}', [("tabby", "cat")]),
    ]:
        assert read_pairs(written(tmp_path / "pairs", content)) == expected, content


def test_tables_say_where_a_row_is(tmp_path):
    table = read_table(written(tmp_path / "t", 'a;"x\ny"\n\nb;z\n'))
    assert table.columns == {"1": ("a", "b"), "2": ("x\ny", "z")}
    assert table.at(1).endswith("line 4")
    lists = pa.table({"path": ["a"], "n": pa.array([2.0]), "labels": [["x", "y"]], "b": [True]})
    table = read_table(written(tmp_path / "p", lists))
    assert table.columns == {"path": ("a",), "n": ("2",), "b": ("1",)} and table.header
    assert table.lists == {"labels": (("x", "y"),)}


def test_numbers_are_sorted_by_value():
    assert sorted_names(["10", "2", "1"]) == ("1", "2", "10")
    assert sorted_names(["0", "2", "3"]) == ("0", "1", "2", "3")
    assert sorted_names(["b", "10", "9"]) == ("10", "9", "b")
