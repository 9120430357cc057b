"""`find_images`: which images arguments name, in which order, and what is refused."""

import io
import re
import tarfile
import zipfile

import numpy as np
import PIL.Image
import pytest

from vit_jax.data.images import encode
from vit_jax.data.inputs import find_images
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError


def pixels(number):
    return np.full((4, 5, 3), number, np.uint8)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of images whose pixels are their number, with files that are none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets" / "b" / "deep").mkdir(parents=True)
    names = ("b/deep/0.png", "b/1.png", "a.png", "no_ending", "b/deep/.hidden.png")
    for number, name in enumerate(names):
        (tmp_path / "pets" / name).write_bytes(encode(pixels(number)))
    (tmp_path / "pets" / "README.md").write_text("no image")
    (tmp_path / "pets" / "b" / "empty").touch()
    return tmp_path


FOLDER = ["pets/a.png", "pets/b/1.png", "pets/b/deep/0.png", "pets/no_ending"]


def found(*arguments, split=None):
    """The names of the images, whose pixels must be what their names say."""
    inputs = find_images(*arguments, split=split)
    numbers = {"a": 2, "no_ending": 3}
    read = [image() for _, image in inputs.readers()]
    assert len(read) == len(inputs) == len(inputs.names)
    assert [name for name, _ in inputs.readers()] == inputs.names
    for i, (name, image) in enumerate(zip(inputs.names, read, strict=True)):
        assert np.array_equal(inputs[i], image)
        stem = name.split("/")[-1].removesuffix(".png")
        if isinstance(image, bytes) and re.fullmatch(r"\d|a|no_ending", stem):
            number = numbers.get(stem) if stem in numbers else int(stem)
            assert np.array_equal(PIL.Image.open(io.BytesIO(image)), pixels(number))
    return inputs.names


def test_a_folder_is_all_images_in_it_sorted(here):
    assert found("pets") == found("pets/") == FOLDER
    assert found(str(here / "pets")) == [str(here / name) for name in FOLDER]
    passed = find_images("pets").passed_over
    assert dict(passed.files) == {
        "pets/README.md": "of no known format (.md)",
        "pets/b/deep/.hidden.png": "hidden",
        "pets/b/empty": "empty",
    }


def test_order_is_that_of_the_arguments(here):
    files = ["pets/b/deep/0.png", "pets/a.png", "pets/b/deep/0.png"]
    assert found(*files) == files
    assert found("pets/b", "pets/a.png", "pets") == [*FOLDER[1:3], "pets/a.png", *FOLDER]


def test_patterns(here):
    assert found("pets/**/*.png") == FOLDER[:3]
    assert found("pets/**") == FOLDER
    assert found("pets/b*") == FOLDER[1:3]  # the folder that matches
    assert "pets/README.md" in dict(find_images("pets/*").passed_over.files)
    (here / "[1].png").write_bytes(encode(pixels(1)))
    assert found("[1].png") == ["[1].png"]  # a file is no pattern


def test_lists(here, monkeypatch):
    (here / "list.txt").write_bytes(b"pets/a.png\r\n\npets/b\ndigits\n")
    names = found("@list.txt", "pets/a.png", split="test")
    assert names[:3] == ["pets/a.png", *FOLDER[1:3]] and names[3] == "digits/test/0"
    assert names[-1] == "pets/a.png"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"pets/a.png")))
    assert [name for name, _ in find_images("@-").readers()] == ["pets/a.png"]
    (here / "list.txt").write_text("pets/a.png\nnone.png")
    with pytest.raises(UserError, match=r"line 2 of list\.txt: there is no 'none\.png'"):
        find_images("@list.txt")


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "zip"])
def test_archives(here, ending):
    members = ["pets/b/1.png", "pets/a.png", "pets/README.md", "pets/no_ending"]
    if ending == "zip":
        with zipfile.ZipFile("x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in members:
                archive.write(name)
    else:
        with tarfile.open(f"x.{ending}", "w:gz" if ending == "tar.gz" else "w") as archive:
            for name in members:
                archive.add(name)
    images = [f"x.{ending}/{name}" for name in members if name != "pets/README.md"]
    assert found(f"x.{ending}") == found(f"x.{ending[:2]}*") == images
    passed = find_images(f"x.{ending}").passed_over
    assert passed.files == [(f"x.{ending}: pets/README.md", "of no known format (.md)")]


def test_sources(here):
    digits = open_source("digits", "test")
    inputs = find_images("pets/a.png", "digits", split="test")
    assert inputs.names[:3] == ["pets/a.png", "digits/test/0", "digits/test/1"]
    assert len(inputs) == 1 + len(digits)
    np.testing.assert_array_equal(inputs[5], digits[4]["image"])
    (here / "c" / "x").mkdir(parents=True)
    (here / "c" / "x" / "1.png").write_bytes(encode(pixels(1)))
    assert found("folder:c") == ["c/x/1.png"]
    (here / "t.csv").write_text("image,label\nc/x/1.png,x\n")
    assert found("t.csv") == found("table:t.csv") == ["./c/x/1.png"]
    np.savez("a.npz", test_images=np.stack([pixels(1)[..., 0]] * 2), test_labels=[0, 0])
    assert found("a.npz") == ["arrays:a.npz/test/0", "arrays:a.npz/test/1"]


def test_what_names_no_image_is_refused(here):
    (here / "empty").mkdir()
    (here / "notes").mkdir()
    (here / "notes" / "a.md").touch()
    (here / "digits").mkdir()
    with tarfile.open("no.tar", "w") as archive:
        archive.add("pets/README.md")
    for arguments, why in (
        (["none.png"], "there is no 'none.png'; expected an image file, a folder"),
        (["none/*.png"], "no file matches 'none/[*].png'"),
        (["empty"], "the folder empty has no image in it"),
        (["notes"], "the folder notes has no image in it .1 files passed over"),
        (["no.tar"], "no.tar has no image in it .1 files passed over: 1 of no known format"),
        (["notes/*"], "no image is named .1 files passed over"),
        ([], "no image is named"),
        (["@none.txt"], "there is no list 'none.txt'"),
        (
            ["digits"],
            "'digits' is a file or folder here, and a data source: write ./digits .*, or digits: ",
        ),
        (["digits:"], "digits: has the splits train, val, test: name one of them by --split"),
        (["fractals:classes=3"], "has the splits train, val, test"),
    ):
        with pytest.raises(UserError, match=why):
            find_images(*arguments)
    with pytest.raises(UserError, match=r"split 'test' is of a data source .* none is named"):
        find_images("pets", split="test")
    with pytest.raises(UserError, match="split train is endless: name a finite split"):
        find_images("fractals:classes=3", split="train")
