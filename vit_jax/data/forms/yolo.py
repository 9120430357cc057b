"""The source `yolo:`, images and text files of boxes beside them, as of Ultralytics' data.yaml."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from vit_jax.data import storage
from vit_jax.data.boxes import Boxes
from vit_jax.data.forms.box_files import (
    BoxSource,
    Folders,
    Listed,
    box_source,
    check_names,
    note,
    some,
)
from vit_jax.data.forms.cells import decoded, read_text
from vit_jax.data.forms.files import WHOLE, PassedOver, image_files, parse_split
from vit_jax.data.forms.layout import few, split_kind
from vit_jax.data.forms.yolo_labels import Counts, boxes_in
from vit_jax.errors import UserError, check_refused, nearest

_SPLITS = ("train", "val", "test", "minival")
_YAML = (".yaml", ".yml")
_KNOWN = ("data.yaml", "dataset.yaml")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where images are, and what their classes are called.

    Attributes:
      root: the folder below which they are.
      splits: their folders, files and lists.
      names: of the classes, in order.
      points: numbers of a line behind its box, of keypoints; None where there are none.
      notes: what was taken otherwise than it is written, for the user.
    """

    root: str
    splits: Mapping[str, tuple[str, ...]]
    names: tuple[str, ...]
    points: int | None = None
    notes: tuple[str, ...] = ()


def yolo(argument: str, split: str) -> BoxSource:
    """Images, and a text file for each with a line a box: class, x, y, width, height.

    x and y are of its centre, and all are shares of the image's width and height. A line with more
    corners is an outline, whose box is taken. PATH is a file such as data.yaml (`path`, `train`,
    `val`, `test`, `names`), a folder with one, or a folder of images/, labels/ and classes.txt. The
    file of images/a/1.jpg is labels/a/1.txt: the last folder `images` of the path is `labels`. An
    image without it has no boxes.

    Args:
      split: train, val or test, as the file has them; "all" where there are none. A part of it is
        "train[:90%]", by a hash of the image's name.

    Raises:
      UserError: no such file or split, an image or class that is not there, no label file at all,
        or a line that is no box.
    """
    where, (name, _, _) = f"yolo:{argument}", parse_split(split)
    layout = _layout(where, argument)
    if name not in layout.splits:
        raise UserError(f"{where} has no split {name!r}; {nearest(name, layout.splits)}")
    passed, found = PassedOver(), {}
    for each in layout.splits[name]:
        for path, size in _images(where, layout.root, each, passed):
            found[path] = size
    if not found:
        raise UserError(f"{where} has no image in {', '.join(layout.splits[name])}")
    return _source(where, split, layout, dict(sorted(found.items())), passed)


def yolo_splits(argument: str) -> tuple[str, ...]:
    """The splits of a data set, or "all"."""
    return tuple(_layout(f"yolo:{argument}", argument).splits)


def is_yolo(root: str) -> bool:
    """Whether a folder has a data.yaml as of Ultralytics."""
    path = next((f"{root}/{name}" for name in _KNOWN if storage.is_file(f"{root}/{name}")), None)
    try:
        found = yaml.safe_load(read_text(path, "YAML file") or "") if path else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and any(found.get(key) for key in _SPLITS)


def _source(
    where: str, split: str, layout: Layout, images: Mapping[str, int], passed: PassedOver
) -> BoxSource:
    folders, files, owner = Folders(layout.root), {}, {}
    for path in images:
        label = label_path(os.path.join(layout.root, path))
        label = os.path.relpath(label, layout.root) if not storage.is_url(label) else label
        label = label.removeprefix(f"{layout.root}/")
        if (other := owner.setdefault(label, path)) != path:
            raise UserError(f"{where}: {other} and {path} would both have the boxes of {label}")
        if folders[label] is not None:
            files[path] = label
    if not files:
        first = next(iter(images))
        raise UserError(
            f"{where}: none of its {len(images):,} images has a file of boxes: that of {first} "
            f"would be {label_path(os.path.join(layout.root, first))}"
        )
    counts, k = Counts(), len(layout.names)
    boxes = dict.fromkeys(images, Boxes.of([], []))
    for path, text in zip(files, _texts(layout.root, list(files.values())), strict=True):
        boxes[path] = boxes_in(
            os.path.join(layout.root, files[path]), text, k, layout.points, counts
        )
    notes = [*layout.notes, *counts.notes()]
    if without := [path for path in images if path not in files]:
        notes.append(note("images without a file of boxes", len(without), without[0]))
    spare = folders.beside(set(owner), (".txt",))
    if spare := [path for path in spare if os.path.basename(path) != "classes.txt"]:
        notes.append(note("files of boxes without an image", len(spare), spare[0]))
    listed = [Listed(path, size, boxes[path]) for path, size in images.items()]
    return box_source(where, split, layout.root, listed, layout.names, notes, passed, shares=True)


def label_path(image: str) -> str:
    """The file of an image's boxes: its last folder `images` is `labels`."""
    before, there, after = f"/{image}".rpartition("/images/")
    path = f"{before}/labels/{after}"[1:] if there else image
    return f"{os.path.splitext(path)[0]}.txt"


def _texts(root: str, files: Sequence[str]) -> Iterator[str]:
    """The texts of files of boxes; of a bucket, many are read at once."""
    if not storage.is_url(root):
        yield from (_text(root, file) for file in files)
        return
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        yield from pool.map(lambda file: _text(root, file), files)


def _text(root: str, file: str) -> str:
    path = os.path.join(root, file)
    try:
        data = storage.read(path)
    except OSError as error:
        check_refused(error, path)
        raise UserError(f"{path} could be listed but not read ({error.strerror})") from None
    return decoded(path, data, "file of boxes") if data.strip() else ""


def _images(where: str, root: str, entry: str, passed: PassedOver) -> Iterator[tuple[str, int]]:
    """(path below the root, bytes) of the images of a folder, a list or a file."""
    path = os.path.join(root, entry)
    if storage.is_folder(path):
        for image, size in image_files(root, entry.rstrip("/") or ".", passed):
            yield os.path.normpath(image), size
        return
    if not storage.is_file(path):
        raise UserError(f"{where}: there is no {path}")
    if not path.lower().endswith(".txt"):
        raise UserError(f"{where}: {path} is no folder, and no list of images (.txt)")
    lines = [line.strip() for line in (read_text(path, "list of images") or "").splitlines()]
    lines = [line.replace("\\", "/") for line in lines if line]
    folders, missing = Folders(root), []
    for line in lines:
        # Relative to the list, or to the root.
        beside = os.path.join(os.path.dirname(entry), line)
        choices = (os.path.normpath(each) for each in (beside, line))
        there = next((each for each in choices if folders[each] is not None), None)
        if there is None:
            missing.append(line)
        else:
            yield there, folders[there]
    if missing:
        what = f"of the {len(lines):,} images in {path} are not there"
        raise UserError(f"{where}: {some(len(missing), what, missing[0])}")


def _layout(where: str, argument: str) -> Layout:
    path = argument.rstrip("/") or "/"
    if storage.is_file(path):
        if not path.lower().endswith(_YAML):
            raise UserError(f"{where}: {path} is no .yaml file, and no folder")
        return _of_yaml(where, path)
    if not storage.is_folder(path):
        raise UserError(f"{where}: there is no file or folder {path}")
    found = [name for name in storage.files(path) if name.lower().endswith(_YAML)]
    known = [name for name in _KNOWN if name in found]
    found = known[:1] or found
    if len(found) > 1:
        raise UserError(f"{where} has {few(found)}: name one, yolo:{path}/{found[0]}")
    if found:
        return _of_yaml(where, f"{path}/{found[0]}")
    lists = [
        each for each in ("classes.txt", "labels/classes.txt") if storage.is_file(f"{path}/{each}")
    ]
    if not storage.is_folder(f"{path}/images") or not lists:
        raise UserError(
            f"{where}: {path} has no data.yaml, nor images/, labels/ and classes.txt (the names of "
            "the classes, one a line)"
        )
    text = read_text(f"{path}/{lists[0]}", "list of classes") or ""
    names = [line.strip() for line in text.splitlines()]
    names = names[: max((i + 1 for i, name in enumerate(names) if name), default=0)]
    check_names(f"{path}/{lists[0]}", names)
    inside = [each.name for each in storage.scan(f"{path}/images") if each.is_dir()]
    if inside and all(map(split_kind, inside)):
        return Layout(path, {n: (f"images/{n}",) for n in inside}, tuple(names))
    return Layout(path, {WHOLE: ("images",)}, tuple(names))


def _of_yaml(where: str, path: str) -> Layout:
    try:
        found = yaml.safe_load(read_text(path, "YAML file") or "")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        text = " ".join(str(error).split())
        raise UserError(f"{path} is no YAML: {text}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} has no keys; expected train, val and names")
    splits = {key: _entries(path, key, found[key]) for key in _SPLITS if found.get(key)}
    if not splits:
        raise UserError(f"{path} names no images; expected train and val, folders or lists")
    here, notes = os.path.dirname(path) or ".", []
    root = here
    if (said := found.get("path")) is not None:
        if not isinstance(said, str):
            raise UserError(f"{path}: path is {said!r}; expected a folder")
        root = os.path.normpath(os.path.join(here, said)) if not storage.is_url(here) else here
        root = f"{here}/{said}".removesuffix("/.") if storage.is_url(here) else root
    first = next(iter(splits.values()))[0]
    if root != here and not storage.exists(os.path.join(root, first)):
        if not storage.exists(os.path.join(here, first)):
            raise UserError(
                f"{where}: there is no {os.path.join(root, first)}: `path` in {path} is the folder "
                "below which the images are, from that file on"
            )
        notes.append(f"there is no {os.path.join(root, first)}, and images are below {here}")
        root = here
    placed = {}
    for key, entries in splits.items():
        placed[key] = tuple(_there(root, entry, notes) for entry in entries)
    names = _names(path, found.get("names"), found.get("nc"), notes)
    shape = found.get("kpt_shape")
    points = None
    if shape is not None:
        whole = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
        if not whole or len(shape) != 2:
            raise UserError(f"{path}: kpt_shape is {shape!r}; expected two whole numbers")
        points = shape[0] * shape[1]
        notes.append("of keypoints, the boxes alone are read")
    return Layout(root, placed, names, points, tuple(dict.fromkeys(notes)))


def _entries(path: str, key: str, value: Any) -> tuple[str, ...]:
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in entries):
        raise UserError(f"{path}: {key} is {value!r}; expected a folder, a list of them, or a .txt")
    if web := [each for each in entries if each.startswith(("http://", "https://"))]:
        raise UserError(f"{path}: {key} is {web[0]}, on the web: fetch it, and name its folder")
    return tuple(each.replace("\\", "/") for each in entries)


def _there(root: str, entry: str, notes: list[str]) -> str:
    """A folder or list below the root; ../train of an export that lies in train's own folder."""
    entry = os.path.normpath(entry)
    inside = entry.removeprefix("../")
    if storage.exists(os.path.join(root, entry)) or inside == entry:
        return entry
    if storage.exists(os.path.join(root, inside)):
        notes.append(f"{entry} is not there, and {inside} is taken, as Ultralytics does")
        return inside
    return entry


def _names(path: str, value: Any, count: Any, notes: list[str]) -> tuple[str, ...]:
    """The names of classes, of a list or of numbers from 0 on."""
    if value is None:
        if type(count) is not int or count < 1:
            raise UserError(f"{path} has no names of classes; expected names: [cat, dog]")
        notes.append(f"nothing names the classes: they are called 0 to {count - 1}")
        return tuple(map(str, range(count)))
    if isinstance(value, dict):
        try:
            numbers = {int(key): name for key, name in value.items()}
        except (TypeError, ValueError):
            raise UserError(f"{path}: names is {value!r}; expected numbers and names") from None
        if sorted(numbers) != list(range(len(value))):
            raise UserError(
                f"{path}: names has the numbers {few(map(str, numbers))}; expected all from 0 to "
                f"{len(value) - 1}"
            )
        value = [numbers[number] for number in range(len(numbers))]
    if not isinstance(value, list):
        raise UserError(f"{path}: names is {value!r}; expected a list, or numbers and names")
    for number, name in enumerate(value):
        if isinstance(name, bool) or name is None:
            raise UserError(
                f"{path}: YAML reads the name of class {number} as {name}: put it in quotes, as "
                "'no' and 'yes'"
            )
    names = [str(name) if isinstance(name, int | float) else name for name in value]
    check_names(path, names)
    if count is not None and count != len(names):
        raise UserError(f"{path}: nc is {count!r}, and there are {len(names)} names")
    return tuple(names)
