"""COCO's JSON as people have it: from exports of many tools, with what is wrong in them."""

import copy
import json
import logging
import pickle

import numpy as np
import pytest
from made import noise, refused, saved, turned, written

from vit_jax.data.config import Split
from vit_jax.data.contents import check_splits, content, image_hash
from vit_jax.data.describe import report
from vit_jax.data.inputs import find_images
from vit_jax.data.pipeline import BatchReader
from vit_jax.data.prepare import prepare
from vit_jax.data.sources import located, open_source, open_splits, splits_of, understood
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError

H, W = 30, 40


def photo(i, **options):
    return saved(noise(H, W, 3, seed=i), "JPEG", **options)


def box(number, image, category, *bbox, **more):
    return dict(id=number, image_id=image, category_id=category, bbox=list(bbox), **more)


def plain(count=3):
    """Images 10, 11, ... of which the second has no box, and categories 7 and 3."""
    return dict(
        images=[dict(id=10 + i, file_name=f"{i}.jpg", height=H, width=W) for i in range(count)],
        categories=[dict(id=7, name="dog", supercategory="animal"), dict(id=3, name="cat")],
        annotations=[
            box(1, 12, 7, 1, 2, 10, 12.5, area=60.5, iscrowd=0, segmentation=[[1, 2, 3, 4, 5, 6]]),
            box(2, 10, 3, 0, 0, 40, 30),
            box(3, 12, 3, 5.25, 5, 10, 3, iscrowd=1, area=9, segmentation=dict(counts=[1, 2])),
        ],
    )


def made(root, found=None, name="annotations/instances_val2017.json", images="val2017", count=3):
    for i in range(count):
        written(root / images / f"{i}.jpg", photo(i))
    text = found if isinstance(found, str | bytes) else json.dumps(found or plain(count))
    written(root / name, text)
    return f"coco:{root}"


def test_the_folders_of_coco(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vit_jax")
    spec = made(tmp_path)
    made(tmp_path, name="annotations/instances_train2017.json", images="train2017")
    written(tmp_path / "annotations" / "captions_val2017.json", "{}")
    assert splits_of(spec) == ["train2017", "val2017"] and understood(str(tmp_path)) == spec
    source = open_source(spec, "val2017")
    # By their ids, which need not be in order, nor without gaps.
    assert source.label_names == ("cat", "dog") and source.category_ids == (3, 7)
    assert source.boxes and not hasattr(source, "masks") and len(source) == 3
    first, none, last = (source[i] for i in range(3))
    assert first["image"] == photo(0) and first["file"] == "0.jpg"
    assert first["name"] == str(tmp_path / "val2017" / "0.jpg") and first["size"] == (H, W)
    assert first["label"].corners.tolist() == [[0, 0, 40, 30]] and len(none["label"]) == 0
    label = last["label"]
    assert label.corners.tolist() == [[1, 2, 11, 14.5], [5.25, 5, 15.25, 8]]
    assert label.classes.tolist() == [1, 0] and label.crowd.tolist() == [False, True]
    assert label.area.tolist() == [60.5, 9] and first["label"].area.tolist() == [1200]
    for i in range(3):
        np.testing.assert_array_equal(source.boxes_of(i).corners, source[i]["label"].corners)
        assert source.image_size_of(i) == (H, W)
    assert source.box_counts.tolist() == [1, 0, 1]  # without crowds
    assert (
        "val2017: 3 images with 3 boxes (images without boxes: 1, such as 1.jpg; boxes around "
        "crowds (not learned): 1)" in caplog.text
    )
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[2]["label"].corners, label.corners)
    assert open_source(spec, "val").fingerprint == source.fingerprint  # but one begins so
    assert content(source).tolist() == [image_hash(photo(i)) for i in range(3)]
    assert find_images(spec, split="val2017").names[1] == str(tmp_path / "val2017" / "1.jpg")
    lines = "\n".join(report(open_splits(spec)))
    assert "boxes         3 in 2 images, up to 2 in one; images without any: 1" in lines
    assert "cat: 2, dog: 1" in lines and "read as       images without boxes: 1" in lines
    assert "3 of the 3 images of val2017 are in train2017 too" in lines
    written(tmp_path / "photos" / "annotations" / "notes.json", "{}")
    assert understood(str(tmp_path / "photos")).startswith("folder:")
    cases = [
        ("all", "has no split 'all'; known: train2017, val2017"),
        ("trian2017", "did you mean 'train2017'"),
    ]
    refused(lambda split: open_source(spec, split), cases)
    with pytest.raises(UserError, match="has boxes for labels, which records do not hold"):
        prepare(str(tmp_path), str(tmp_path / "out"), split="val2017")


def test_the_fingerprint_is_that_of_the_boxes(tmp_path):
    spec, prints = made(tmp_path), set()
    for key, value in {"iscrowd": 1, "bbox": [1, 2, 10, 12], "category_id": 3, "area": 4}.items():
        found = plain()
        prints.add(open_source(spec, "val2017").fingerprint)
        found["annotations"][0][key] = value
        made(tmp_path, found)
        prints.add(open_source(spec, "val2017").fingerprint)
    assert len(prints) == 5


def test_parts_of_a_file(tmp_path):
    made(tmp_path, count=12)
    spec = f"coco:{tmp_path / 'annotations' / 'instances_val2017.json'}"
    assert splits_of(spec) == [] and understood(spec.removeprefix("coco:")) == spec
    parts = [open_source(spec, f"all[{part}]") for part in (":50%", "50%:")]
    names = [name for part in parts for name in part.names]
    assert sorted(names) == sorted(f"{i}.jpg" for i in range(12)) and all(map(len, parts))
    whole = open_source(spec, "all")
    theirs = {name: whole.boxes_of(i).corners.tolist() for i, name in enumerate(whole.names)}
    for part in parts:
        for i, name in enumerate(part.names):
            assert part.boxes_of(i).corners.tolist() == theirs[name]
    with pytest.raises(UserError, match="is one file, without the split 'train': say all"):
        open_source(spec, "train")
    assert located("coco:x/y.json").startswith("coco:/")


@pytest.mark.parametrize(
    ("name", "images", "split", "prefix"),
    [
        ("train/_annotations.coco.json", "train", "train", ""),  # Roboflow
        ("annotations/instances_default.json", "images/default", "default", ""),  # CVAT
        ("annotations/val.json", "val", "val", ""),  # MMDetection
        ("result.json", "images", "all", "images/"),  # Label Studio
        ("result.json", "images", "all", "images\\"),
        ("labels.json", "data", "all", ""),  # FiftyOne
        ("annotations/instances_val.json", "val/a/b", "val", "a/b/"),
        ("annotations/instances_val.json", "val", "val", "val/"),
    ],
)
def test_the_folders_of_other_tools(tmp_path, name, images, split, prefix):
    found = plain()
    for image in found["images"]:
        image["file_name"] = prefix + image["file_name"]
    spec = made(tmp_path, found, name, images)
    source = open_source(spec, split)
    assert len(source) == 3 and source[1]["image"] == photo(1)
    alone = open_source(f"coco:{tmp_path / name}", "all")
    assert alone[2]["image"] == photo(2)


def test_where_images_are_is_said_or_asked(tmp_path):
    spec = made(tmp_path, images="elsewhere/here")
    cases = [
        (spec, r"the images of .*, such as 0\.jpg, are not below .*images=FOLDER"),
        (f"{spec},images=no", "there is no folder .*/no"),
        (f"{spec},image=no", r"has an option 'image'; did you mean 'images'\?"),
    ]
    refused(lambda spec: open_source(spec, "val2017"), cases)
    for folder in ("elsewhere/here", tmp_path / "elsewhere" / "here"):
        assert open_source(f"{spec},images={folder}", "val2017")[0]["image"] == photo(0)
    made(tmp_path, images="images")
    found = plain()
    for i, image in enumerate(found["images"]):  # from two folders on, the same file
        image["file_name"] = rf"..\images\{i}.jpg"
    found["images"][2]["file_name"] = "../images/2.jpg"
    found["images"][1]["file_name"] = str(tmp_path / "images" / "1.jpg")
    source = open_source(made(tmp_path, found, images="images"), "val2017")
    assert source[0]["image"] == photo(0) and list(source.names) == ["0.jpg", "1.jpg", "2.jpg"]
    assert "beside" not in source.how
    made(tmp_path, images="val2017")
    with pytest.raises(UserError, match=r"0\.jpg is in .*val2017 and in .*images: say which"):
        open_source(spec, "val2017")


def test_images_that_are_not_there(tmp_path, caplog):
    spec = made(tmp_path, plain(5))
    with pytest.raises(UserError, match=r"2 of the 5 images in .* are not below .*, such as 3.jpg"):
        open_source(spec, "val2017")
    source = open_source(f"{spec},missing=skip", "val2017")
    assert len(source) == 3 and source.passed_over.counts == {"not there": 2}
    made(tmp_path, plain(2))
    caplog.set_level(logging.INFO, "vit_jax")
    assert len(open_source(spec, "val2017")) == 2
    assert "images beside that are not in" in caplog.text and ": 1, such as 2.jpg" in caplog.text


def test_the_same_name_in_two_folders(tmp_path):
    found = plain(2)
    found["images"][0]["file_name"], found["images"][1]["file_name"] = "a/1.jpg", "b/1.jpg"
    found["annotations"] = found["annotations"][1:2]
    for i, name in enumerate("ab"):
        written(tmp_path / "val2017" / name / "1.jpg", photo(i))
    source = open_source(made(tmp_path, found, count=0), "val2017")
    assert source[1]["image"] == photo(1) and source.box_counts.tolist() == [1, 0]
    found["images"][1]["file_name"] = "a/1.jpg"
    made(tmp_path, found, count=0)
    with pytest.raises(UserError, match=r"lists a/1\.jpg twice, with the ids 10 and 11"):
        open_source(f"coco:{tmp_path}", "val2017")


def test_what_is_ignored_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vit_jax")
    found = plain()
    found["annotations"] += [
        box(10, 10, 3, 1, 1, 0, 5),  # as two of COCO 2017
        box(11, 10, 3, 1, 1, 5, -2),
        box(12, 10, 3, float("nan"), 1, 5, 5),
        box(13, 10, 3, 41, 1, 5, 5),
        box(14, 10, 3, -8, 1, 5, 5),
        box(15, 99, 3, 1, 1, 5, 5),
        box(16, 10, 3, 35, 1, 9, 5, area=float("nan"), iscrowd=None),  # partly inside
    ]
    found["annotations"].append(dict(id=17, image_id=11, category_id=3))
    found["annotations"][-1]["segmentation"] = [[2, 3, 9, 3, 9, 8], [4, 4, 12, 4, 4, 6]]
    source = open_source(made(tmp_path, found), "val2017")
    assert [len(source.boxes_of(i)) for i in range(3)] == [2, 1, 2]
    assert source.boxes_of(0).corners.tolist() == [[0, 0, 40, 30], [35, 1, 44, 6]]
    assert source.boxes_of(0).area.tolist() == [1200, 45]
    assert source.boxes_of(1).corners.tolist() == [[2, 3, 12, 8]]
    for text in (
        "boxes without width or height (ignored): 2, such as annotation 10",
        "boxes of no finite numbers (ignored): 1, such as annotation 12",
        "boxes outside of their image (ignored): 2, such as annotation 13",
        "boxes of images that are not listed (ignored): 1, such as annotation 15 with image_id 99",
        "boxes around outlines, where there is no bbox: 1",
    ):
        assert text in source.how and text in caplog.text, source.how
    # Where sizes are not known, nothing is outside.
    for image in found["images"]:
        image.pop("width"), image.update(height=-1)
    found["images"][0].update(height=H - 1)  # of one side alone neither is known
    source = open_source(made(tmp_path, found), "val2017")
    assert [len(source.boxes_of(i)) for i in range(3)] == [3, 1, 2]
    assert "size" not in source[0] and source.image_size_of(0) == (H, W)


def test_no_box_at_all(tmp_path):
    found = {**plain(), "annotations": []}
    source = open_source(made(tmp_path, found), "val2017")
    assert source.box_counts.tolist() == [0, 0, 0] and len(source[1]["label"]) == 0
    label = BatchReader.of(source, Split("x", "y"), Preprocess((8, 8)))(np.arange(2), np.arange(2))
    assert (label["label"][..., 0] == -1).all()
    with pytest.raises(UserError, match=r"data\.train has no box to learn in its 3 images"):
        check_splits({"data.train": source})


def test_categories(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vit_jax")
    found = plain()
    # Roboflow's first category is the project; people's ids may be text, or begin with 0.
    found["categories"] = [
        dict(id=0, name="pets", supercategory="none"),
        dict(id=7, name="dog", supercategory="pets"),
        dict(id=3, name="cat", supercategory="pets"),
    ]
    source = open_source(made(tmp_path, found), "val2017")
    assert source.label_names == ("cat", "dog") and source.category_ids == (3, 7)
    assert "no class: pets, a supercategory without boxes" in caplog.text
    found["annotations"][0]["category_id"] = 0
    assert open_source(made(tmp_path, found), "val2017").label_names == ("pets", "cat", "dog")
    alone = plain()  # as person, which is a supercategory of itself
    alone["categories"].append(dict(id=9, name="person", supercategory="person"))
    assert open_source(made(tmp_path, alone), "val2017").label_names == ("cat", "dog", "person")
    text = plain()
    for each in text["categories"]:
        each["id"] = f"c{each['id']}"
    for each in text["annotations"]:
        each["category_id"] = f"c{each['category_id']}"
    source = open_source(made(tmp_path, text), "val2017")
    assert source.label_names == ("dog", "cat") and source.category_ids is None


def changed(change):
    found = copy.deepcopy(plain())
    change(found)
    return found


def put(*keys, value):
    """A change of plain() at a place."""

    def change(found):
        for key in keys[:-1]:
            found = found[key]
        found[keys[-1]] = value

    return change


FIRST = ("annotations", 0)
REFUSED = {
    "another id": (put(*FIRST, "category_id", value=5), r"1 boxes are of categories .* \(3, 7 are"),
    "no category": (put(*FIRST, "category_id", value=None), "annotation 1 with category_id None"),
    "a list as id": (put(*FIRST, "category_id", value=[3]), r"category_id \[3\]"),
    "no bbox": (
        put("annotations", 1, "bbox", value=None),
        "1 of its 3 annotations have no bbox, such as annotation 2 with bbox None",
    ),
    "three numbers": (put(*FIRST, "bbox", value=[1, 2, 3]), r"\[1, 2, 3\]; expected \[x, y, width"),
    "text": (put(*FIRST, "bbox", value=["1", 2, 3, 4]), "expected .x, y, width, height"),
    "same names": (put("categories", 0, "name", value="cat"), "has two classes called 'cat'"),
    "no name": (put("categories", 0, "name", value=None), "class 1 is called None"),
    "same ids": (put("categories", 0, "id", value=3), "two categories with the id 3"),
    "same image": (
        put("images", 1, "id", value=10),
        r"two images with the id 10, 0\.jpg and 1\.jp",
    ),
    "no file": (put("images", 1, "file_name", value=""), r"images\[1\] has no id and file_name"),
    "web": (put("images", 1, "file_name", value="https://x/1.jpg"), "is on the web: fetch it"),
    "odd image": (put("images", 1, value=3), r"images\[1\] is 3; expected an object"),
    "no images": (put("images", value=[]), "lists no image"),
    "no categories": (put("categories", value=[]), "has no categories"),
    "image info": (lambda found: found.pop("annotations"), "has no annotations, as that of images"),
    "all crowds": (
        lambda found: [each.update(iscrowd=1) for each in found["annotations"]],
        "all its 3 boxes are marked iscrowd, .*: crowds=objects takes them",
    ),
    "ids as text": (
        lambda found: [
            each.update(image_id=str(each["image_id"])) for each in found["annotations"]
        ],
        r"images that are not listed .*: 3, .* image_id '12'; the ids of images are 10, 11",
    ),
    "shares": (
        lambda found: [each.update(bbox=[0.1, 0.1, 0.5, 1.0]) for each in found["annotations"]],
        r"all boxes are of numbers up to 1, such as \[0\.1, .*: COCO's are pixels",
    ),
    "two corners": (
        lambda found: [each.update(bbox=[20, 10, 39, 29]) for each in found["annotations"]],
        r"3 boxes reach beyond their images, such as \[20, 10, 39, 29\] of .* 1, .*bbox=xyxy",
    ),
    "captions": (
        put("annotations", value=[dict(id=1, image_id=10, caption="a dog")]),
        r"is of captions: the boxes of COCO are in instances_SPLIT\.json",
    ),
    "panoptic": (
        put("annotations", value=[dict(image_id=10, segments_info=[], file_name="0.png")]),
        "is of panoptic segments: the boxes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused(tmp_path, case):
    change, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        open_source(made(tmp_path, changed(change)), "val2017")


def test_files_of_other_kinds_are_named(tmp_path):
    cases = [
        ("[1, 2]", "is a list, as of detections"),
        ("{}", "has no list of images"),
        ('{"images": [', "is no JSON, or not all of it"),
        ("", "is no COCO file: it is empty"),
        ("[" * 99999, "nested too deeply|no JSON"),
        ("version https://git-lfs.github.com/spec/v1", "is no JSON"),
        ("\ufeff" + json.dumps(plain()), ""),  # a byte order mark does no harm
    ]
    for text, message in cases:
        spec = made(tmp_path, text.encode())
        if message:
            refused(lambda spec: open_source(spec, "val2017"), [(spec, message)])
        else:
            assert len(open_source(spec, "val2017")) == 3
    (tmp_path / "empty").mkdir()
    cases = [
        (f"coco:{tmp_path / 'empty'}", r"has no annotations/instances_SPLIT\.json"),
        (f"coco:{tmp_path / 'none.json'}", "there is no file or folder"),
    ]
    refused(lambda spec: open_source(spec, "all"), cases)


def test_options_say_what_boxes_are(tmp_path):
    found = changed(
        lambda found: [e.update(bbox=[20, 10, 39, 29], iscrowd=1) for e in found["annotations"]]
    )
    spec = made(tmp_path, found)
    source = open_source(f"{spec},bbox=xyxy,crowds=objects", "val2017")
    assert source.boxes_of(0).corners.tolist() == [[20, 10, 39, 29]]
    assert source.box_counts.tolist() == [1, 0, 2]
    source = open_source(f"{spec},bbox=xywh,crowds=objects", "val2017")
    assert source.boxes_of(0).corners.tolist() == [[20, 10, 59, 39]]
    with pytest.raises(UserError, match="bbox is 'xxyy'; known: xywh, xyxy"):
        open_source(f"{spec},bbox=xxyy", "val2017")


def test_photographs_that_exif_turns(tmp_path):
    """Their size in the file must be that of the upright image, as nothing else tells the two."""
    spec = made(tmp_path)
    written(tmp_path / "val2017" / "0.jpg", photo(0, exif=turned(6)))
    read = BatchReader.of(open_source(spec, "val2017"), Split("x", "y"), Preprocess((20, 20)))
    with pytest.raises(UserError, match=r"0\.jpg is of 40 x 30 pixels .*of 30 x 40: EXIF turns"):
        read(np.arange(1), np.arange(1))
    assert "EXIF turns" in "\n".join(report(open_splits(spec)))
    found = plain()
    found["images"][0].update(height=W, width=H)
    made(tmp_path, found)
    written(tmp_path / "val2017" / "0.jpg", photo(0, exif=turned(6)))
    source = open_source(spec, "val2017")
    label = BatchReader.of(source, Split("x", "y"), Preprocess((20, 20)))(
        np.arange(1), np.arange(1)
    )
    # A box of 40 x 30 in an image that is 30 wide and 40 high.
    np.testing.assert_allclose(label["label"][0, 0], [0, 0, 0, 20, 15])
    found["images"][0].update(height=2 * W, width=2 * H)
    made(tmp_path, found)
    read = BatchReader.of(open_source(spec, "val2017"), Split("x", "y"), Preprocess((20, 20)))
    with pytest.raises(UserError, match=r"of 80 x 60: was it resized afterwards"):
        read(np.arange(1), np.arange(1))
