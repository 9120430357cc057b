"""The source `coco:`, images and their boxes in a JSON file as of COCO."""

import os
from collections.abc import Sequence

from vit_jax.data import storage
from vit_jax.data.forms.box_files import BoxSource, Folders, Listed, box_source, note, some
from vit_jax.data.forms.coco_json import START, annotations
from vit_jax.data.forms.files import WHOLE, PassedOver, parse_split
from vit_jax.data.forms.layout import few, options, split_kind
from vit_jax.errors import UserError, nearest

# Options and their values, where these are words.
_OPTIONS = {"images": None, "bbox": ("xywh", "xyxy"), "crowds": ("objects",), "missing": ("skip",)}
_ROBOFLOW = "_annotations.coco.json"
_LOOKED_AT = 20  # images by which the folder is found


def coco(argument: str, split: str) -> BoxSource:
    """Images and the boxes that a JSON file in COCO's format has for them.

    PATH is such a file, or a folder: of annotations/instances_SPLIT.json and the images in SPLIT/,
    as COCO has them; of SPLIT/_annotations.coco.json beside its images, as Roboflow exports them;
    or of one JSON file. The classes are the categories, in the order of their ids. Behind the path
    may be `images=FOLDER` (below which the files are, if it is not found), `missing=skip` (leaves
    out images that are not there), `bbox=xyxy` (boxes are of two corners) and `crowds=objects`
    (what is marked iscrowd is learned as one object).

    Args:
      split: of a folder, such as train2017, or its beginning; "all" for a file. A part of it is
        "train2017[:90%]", by a hash of the image's name.

    Raises:
      UserError: no such file or split, another kind of JSON, images that are not there, or boxes
        that cannot be right.
    """
    where, (path, given) = f"coco:{argument}", _options(argument)
    name, _, _ = parse_split(split)
    file = _file(where, path, name)
    found = annotations(file, given.get("bbox"), "crowds" in given)
    root = _images(where, path, file, given.get("images"), [each[0] for each in found.images])
    folders, passed, listed, missing = Folders(root), PassedOver(), [], []
    for (image, h, w), boxes in zip(found.images, found.boxes, strict=True):
        path = _inside(root, image)
        if folders[path] is None:
            path = _inside(root, image.replace("\\", "/"))
        if (size := folders[path]) is None:
            missing.append(path)
        else:
            listed.append(Listed(path, size, boxes, (h, w)))
    if missing and given.get("missing") != "skip":
        what = f"of the {len(found.images):,} images in {file} are not below {root}"
        raise UserError(
            f"{where}: {some(len(missing), what, missing[0])}: fetch them, or say "
            "images=FOLDER where they are, or missing=skip to leave them out"
        )
    for each in missing:
        passed.add(each, "not there")
    notes = [*found.notes]
    if other := folders.beside({each.path for each in listed}):
        notes.append(note(f"images beside that are not in {file}", len(other), other[0]))
    ids = found.category_ids
    return box_source(where, split, root, listed, found.names, notes, passed, category_ids=ids)


def coco_splits(argument: str) -> tuple[str, ...]:
    """The splits of a folder, or "all"."""
    path, _ = _options(argument)
    found = _files(path) if storage.is_folder(path) else {}
    return tuple(found) or (WHOLE,)


def is_coco(root: str) -> bool:
    """Whether a folder has the files of COCO or of Roboflow's exports of it."""
    files = map(os.path.basename, _files(root).values())
    return any(name.startswith(START) or name == _ROBOFLOW for name in files)


def _options(argument: str) -> tuple[str, dict[str, str]]:
    path, given = options(argument, tuple(_OPTIONS))
    for name, known in _OPTIONS.items():
        if name in given and known and given[name] not in known:
            raise UserError(f"coco:{argument}: {name} is {given[name]!r}; {nearest('', known)}")
    return path.rstrip("/") or "/", given


def _files(root: str) -> dict[str, str]:
    """Split -> JSON file, of a folder."""
    inside = {n: f"{root}/annotations/{n}" for n in sorted(storage.files(f"{root}/annotations"))}
    inside = {name: path for name, path in inside.items() if name.lower().endswith(".json")}
    if any(name.startswith(START) for name in inside):
        inside = {name: path for name, path in inside.items() if name.startswith(START)}
    if inside:
        return {os.path.splitext(n)[0].removeprefix(START): path for n, path in inside.items()}
    if not storage.is_folder(root):
        return {}
    outer = [each.name for each in storage.scan(root) if split_kind(each.name)]
    exports = {name: f"{root}/{name}/{_ROBOFLOW}" for name in outer}
    exports = {name: path for name, path in exports.items() if storage.is_file(path)}
    alone = [name for name in storage.files(root) if name.lower().endswith(".json")]
    return exports or ({WHOLE: f"{root}/{alone[0]}"} if len(alone) == 1 else {})


def _file(where: str, path: str, split: str) -> str:
    """The JSON file of a split."""
    if not storage.is_folder(path):
        if not storage.is_file(path):
            raise UserError(f"{where}: there is no file or folder {path}")
        if split != WHOLE:
            raise UserError(
                f"{where} is one file, without the split {split!r}: say all, or a part of it, such "
                "as all[:90%]"
            )
        return path
    known = _files(path)
    if not known:
        raise UserError(
            f"{where}: {path} has no annotations/{START}SPLIT.json, and no SPLIT/{_ROBOFLOW}: "
            "name the JSON file, coco:FILE.json"
        )
    fits = [split] if split in known else [each for each in known if each.startswith(split)]
    if len(fits) != 1:
        hint = f"has the splits {few(fits)}: name one" if fits else nearest(split, known)
        raise UserError(f"{where} has no split {split!r}; {hint}")
    return known[fits[0]]


def _inside(root: str, path: str) -> str:
    """The path from the root on, of an image below it that is named by the way around."""
    if not (os.path.isabs(path) or "./" in path):
        return path
    found = os.path.relpath(os.path.join(root, path), root)
    return path if found.startswith("..") else found


def _images(where: str, path: str, file: str, given: str | None, names: Sequence[str]) -> str:
    """The folder below which the images are."""
    if given is not None:
        base = path if storage.is_folder(path) else os.path.dirname(path)
        inside = os.path.join(base, os.path.expanduser(given)).rstrip("/")
        for folder in (inside, given):
            if storage.is_folder(folder):
                return folder
        raise UserError(f"{where}: there is no folder {inside}")
    here = os.path.dirname(file) or "."
    base = os.path.dirname(here) or "." if os.path.basename(here) == "annotations" else here
    split = os.path.splitext(os.path.basename(file))[0].removeprefix(START)
    split = split.removesuffix(".coco").removesuffix("_annotations")
    folders = (f"{base}/{split}", f"{base}/images/{split}", f"{base}/images", f"{base}/data", base)
    folders = dict.fromkeys(each.rstrip("/") for each in (*folders, here))
    folders = [each for each in folders if storage.is_folder(each)]
    some_names = [n.replace("\\", "/") for n in names[:: max(1, len(names) // _LOOKED_AT)]]
    there = {
        folder: sum(storage.is_file(os.path.join(folder, n)) for n in some_names)
        for folder in folders
    }
    best = [folder for folder in folders if there[folder] == max(there.values()) > 0]
    if not best:
        raise UserError(
            f"{where}: the images of {file}, such as {names[0]}, are not below "
            f"{', '.join(folders)}: say where, coco:{path},images=FOLDER"
        )
    if len({os.path.normpath(os.path.join(folder, some_names[0])) for folder in best}) > 1:
        raise UserError(
            f"{where}: {names[0]} is in {' and in '.join(best[:2])}: say which are meant by "
            "images=FOLDER"
        )
    return best[0]
