"""What a JSON file as of COCO says: images, their boxes, and classes."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from vit_jax.data import storage
from vit_jax.data.boxes import Boxes
from vit_jax.data.forms.box_files import check_names, note, some
from vit_jax.data.forms.cells import read_text
from vit_jax.data.forms.layout import few
from vit_jax.errors import UserError

_MOST = 1e9  # pixels; what is beyond is no place in an image
START = "instances_"  # of the names of COCO's files that have boxes


class Annotations(NamedTuple):
    """What a JSON file has: (file_name, h, w) of images, their boxes, classes, and what to say."""

    images: tuple[tuple[str, int, int], ...]
    boxes: tuple[Boxes, ...]
    names: tuple[str, ...]
    category_ids: tuple[int, ...] | None
    notes: tuple[str, ...]


def annotations(path: str, bbox: str | None, crowds: bool) -> Annotations:
    """Reads a JSON file, once for each version of it; see `coco`."""
    return _annotations(path, storage.version(path), bbox, crowds)


@functools.lru_cache(4)
def _annotations(path: str, version: str, bbox: str | None, crowds: bool) -> Annotations:
    try:
        found = json.loads(read_text(path, "COCO file") or "", object_hook=_bare)
    except RecursionError:
        raise UserError(f"{path} is no COCO file: it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON, or not all of it: {error}") from None
    images, entries, categories = _parts(path, found)
    ids, files, notes = {}, [], []
    for number, image in enumerate(images):
        file, one = image.get("file_name"), _id(image, "id")
        if not isinstance(file, str) or not file or one is None:
            raise UserError(f"{path}: images[{number}] has no id and file_name")
        if file.startswith(("http://", "https://")):
            raise UserError(f"{path}: the image {file} is on the web: fetch it, and name its file")
        if one in ids:
            raise UserError(
                f"{path} has two images with the id {one!r}, {files[ids[one]]} and {file}"
            )
        ids[one] = number
        files.append(file)
    if len(set(files)) < len(files):
        first: dict[str, Any] = {}
        twice = next(i for i in images if first.setdefault(i["file_name"], i["id"]) != i["id"])
        raise UserError(
            f"{path} lists {twice['file_name']} twice, with the ids {first[twice['file_name']]!r} "
            f"and {twice['id']!r}: give all its boxes to one of them"
        )
    entries = _listed(path, entries, ids, notes)
    names, numbers, category_ids = _classes(path, entries, categories, notes)
    unknown = [each for each in entries if _id(each, "category_id") not in numbers]
    if unknown:
        what = f"boxes are of categories that are not listed ({_few_ids(numbers)} are)"
        raise UserError(f"{path}: {some(len(unknown), what, _called(unknown[0], 'category_id'))}")
    sizes = [(_side(image, "height"), _side(image, "width")) for image in images]
    sizes = [size if all(size) else (0, 0) for size in sizes]
    whose = np.array([ids[each["image_id"]] for each in entries], np.int64)
    corners = _corners(path, entries, bbox, np.array(sizes, float).reshape(-1, 2)[whose], notes)
    kept = _kept(entries, corners, sizes, whose, notes)
    corners[~kept] = 0
    crowd = np.array([bool(each.get("iscrowd")) for each in entries], bool)
    if crowd.any() and not crowds:
        if crowd.all():
            raise UserError(
                f"{path}: all its {len(crowd):,} boxes are marked iscrowd, as around many objects, "
                "and none would be learned: crowds=objects takes them as objects"
            )
        notes.append(f"boxes around crowds (not learned): {np.count_nonzero(crowd):,}")
    every = Boxes.of(
        corners,
        [numbers[each["category_id"]] for each in entries],
        crowd & (not crowds),
        _areas(entries, corners),
    )
    order = np.argsort(whose, kind="stable")
    order = order[kept[order]]
    parts = np.split(order, np.searchsorted(whose[order], np.arange(1, len(images))))
    return Annotations(
        tuple((file, *size) for file, size in zip(files, sizes, strict=True)),
        tuple(every[part] for part in parts),
        names,
        category_ids,
        tuple(notes),
    )


def _bare(entry: dict[str, Any]) -> dict[str, Any]:
    """An object of the JSON without its outline, which takes memory; of no box, that of it."""
    outline = entry.pop("segmentation", None)
    if isinstance(outline, list) and "image_id" in entry and not entry.get("bbox"):
        entry["outline"] = outline
    return entry


def _parts(path: str, found: Any) -> tuple[list, list, list]:
    """The images, annotations and categories; says what another JSON is."""
    expected = "expected COCO's images, annotations and categories"
    if isinstance(found, list):
        raise UserError(f"{path} is a list, as of detections: {expected}")
    if not isinstance(found, dict) or not isinstance(found.get("images"), list):
        raise UserError(f"{path} has no list of images: {expected}")
    entries = found.get("annotations")
    if not isinstance(entries, list):
        raise UserError(f"{path} has no annotations, as that of images without labels: {expected}")
    for key in ("images", "annotations"):
        odd = next((i for i, each in enumerate(found[key]) if not isinstance(each, dict)), None)
        if odd is not None:
            raise UserError(f"{path}: {key}[{odd}] is {found[key][odd]!r}; expected an object")
    first = entries[0] if entries else {}
    for key, kind in {"segments_info": "panoptic segments", "caption": "captions"}.items():
        if key in first:
            raise UserError(f"{path} is of {kind}: the boxes of COCO are in {START}SPLIT.json")
    categories = found.get("categories")
    if not isinstance(categories, list) or not categories:
        raise UserError(f"{path} has no categories: {expected}")
    if not found["images"]:
        raise UserError(f"{path} lists no image")
    return found["images"], entries, categories


def _listed(
    path: str, entries: list, known: Mapping[Any, int], notes: list[str]
) -> list[dict[str, Any]]:
    """The annotations of images that are listed."""
    there = [_id(each, "image_id") in known for each in entries]
    if all(there):
        return entries
    lost = note(
        "boxes of images that are not listed (ignored)",
        there.count(False),
        _called(entries[there.index(False)], "image_id"),
    )
    if not any(there):
        raise UserError(f"{path} has but {lost}; the ids of images are {_few_ids(known)}")
    notes.append(lost)
    return [each for each, is_there in zip(entries, there, strict=True) if is_there]


def _id(entry: Mapping[str, Any], key: str) -> int | float | str | None:
    found = entry.get(key)
    return found if isinstance(found, int | float | str) else None


def _few_ids(known: Mapping[Any, Any]) -> str:
    """The first ids as they stand in the file: text in quotes."""
    return ", ".join(map(repr, list(known)[:3])) + ", ..." * (len(known) > 3)


def _called(entry: Mapping[str, Any], key: str) -> str:
    return f"annotation {entry.get('id')!r} with {key} {entry.get(key)!r}"


def _classes(
    path: str, entries: list, categories: list, notes: list[str]
) -> tuple[tuple[str, ...], dict[Any, int], tuple[int, ...] | None]:
    """The names, the number of each id, and the ids if they are whole numbers, in their order."""
    for number, each in enumerate(categories):
        if not isinstance(each, dict) or _id(each, "id") is None:
            raise UserError(f"{path}: categories[{number}] is {each!r}; expected an id and a name")
    ids = [each["id"] for each in categories]
    if len(set(ids)) < len(ids):
        raise UserError(f"{path} has two categories with the id {max(ids, key=ids.count)!r}")
    used = {_id(each, "category_id") for each in entries}
    above = {_id(e, "supercategory") for e in categories if e.get("supercategory") != e.get("name")}
    groups = [e for e in categories if _id(e, "name") in above - {None} and e["id"] not in used]
    if groups and len(groups) < len(categories):  # the first category of Roboflow's exports
        said = few(each["name"] for each in groups)
        notes.append(f"no class: {said}, a supercategory without boxes")
        categories = [each for each in categories if each not in groups]
    whole = all(type(each["id"]) is int for each in categories)
    if whole:
        categories = sorted(categories, key=lambda each: each["id"])
    check_names(path, [each.get("name") for each in categories])
    ids = [each["id"] for each in categories]
    names = tuple(each["name"] for each in categories)
    return names, {one: i for i, one in enumerate(ids)}, tuple(ids) if whole else None


def _side(image: Mapping[str, Any], key: str) -> int:
    """A height or width; 0 where it is not known."""
    value = image.get(key)
    return int(value) if isinstance(value, int | float) and 0 < value < 2**31 else 0


def _areas(entries: list, corners: Float64[np.ndarray, "m 4"]) -> Float64[np.ndarray, " m"]:
    """COCO's `area` where it is a positive number, else the box's."""
    own = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
    given = [each.get("area") for each in entries]
    good = [isinstance(a, int | float) and 0 < a < _MOST**2 for a in given]
    return np.array([a if ok else b for a, ok, b in zip(given, good, own, strict=True)], float)


def _corners(
    path: str,
    entries: list,
    bbox: str | None,
    sizes: Float64[np.ndarray, "m 2"],
    notes: list[str],
) -> Float64[np.ndarray, "m 4"]:
    """x0, y0, x1, y1 of each annotation; refuses what is surely meant otherwise."""
    rows = []
    outlined = np.array([not each.get("bbox") for each in entries], bool)
    for each in entries:
        row = each.get("bbox") or _around(each.get("outline"))
        if row is None:
            without = sum(not e.get("bbox") and not _around(e.get("outline")) for e in entries)
            what = f"of its {len(entries):,} annotations have no bbox"
            raise UserError(f"{path}: {some(without, what, _called(each, 'bbox'))}")
        numbers = isinstance(row, list) and len(row) == 4
        if not numbers or not all(isinstance(n, int | float) for n in row):
            raise UserError(f"{path}: {_called(each, 'bbox')}; expected [x, y, width, height]")
        rows.append(row)
    if outlined.any():
        notes.append(f"boxes around outlines, where there is no bbox: {outlined.sum():,}")
    found = np.array(rows, float).reshape(-1, 4)
    with np.errstate(invalid="ignore"):
        if len(found) and bbox is None and (np.abs(found) <= 1).all():
            raise UserError(
                f"{path}: all boxes are of numbers up to 1, such as {rows[0]}, as shares of the "
                "image: COCO's are pixels (bbox=xywh if these are)"
            )
        ends, known = found[:, :2] + found[:, 2:], sizes[:, ::-1] > 0
        beyond = (known & (ends > sizes[:, ::-1] + 1)).any(axis=1)
        inside = (found[:, 2:] <= np.where(known, sizes[:, ::-1] + 1, np.inf)).all(axis=1)
        ordered = (found[:, 2:] > found[:, :2]).all(axis=1)
    if bbox is None and beyond.any() and (inside & ordered).all():
        first = int(np.flatnonzero(beyond)[0])
        such = f"{rows[first]} of annotation {entries[first].get('id')!r}"
        raise UserError(
            f"{path}: {some(int(beyond.sum()), 'boxes reach beyond their images', such)}, and all "
            "would be inside as two corners: bbox=xyxy reads them so, bbox=xywh as COCO's x, y, "
            "width, height"
        )
    if bbox == "xyxy":
        ends = np.where(outlined[:, None], ends, found[:, 2:])
    return np.concatenate([found[:, :2], ends], axis=1)


def _around(outline: Any) -> list[int | float] | None:
    """The box of polygons, as COCO's; None if it is none."""
    if (
        not isinstance(outline, list)
        or not outline
        or not all(isinstance(p, list) for p in outline)
    ):
        return None
    numbers = [n for polygon in outline for n in polygon]
    if any(len(polygon) % 2 for polygon in outline) or len(numbers) < 6:
        return None
    if not all(isinstance(n, int | float) for n in numbers):
        return None
    xs, ys = numbers[::2], numbers[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _kept(
    entries: list,
    corners: Float64[np.ndarray, "m 4"],
    sizes: Sequence[tuple[int, int]],
    whose: Int64[np.ndarray, " m"],
    notes: list[str],
) -> Bool[np.ndarray, " m"]:
    """Which boxes are not ignored: those that are finite, have an area, and touch their image."""
    h, w = np.array(sizes, float).reshape(-1, 2)[whose].T
    with np.errstate(invalid="ignore"):
        finite = (np.abs(corners) < _MOST).all(axis=1)
        empty = finite & (corners[:, 2:] <= corners[:, :2]).any(axis=1)
        beside = (corners[:, 2:] <= 0).any(axis=1)
        beside |= ((corners[:, 0] >= w) & (w > 0)) | ((corners[:, 1] >= h) & (h > 0))
    reasons = {
        "boxes of no finite numbers (ignored)": ~finite,
        "boxes without width or height (ignored)": empty,
        "boxes outside of their image (ignored)": finite & ~empty & beside,
    }
    for why, which in reasons.items():
        if which.any():
            first = entries[int(np.flatnonzero(which)[0])]
            notes.append(note(why, int(which.sum()), f"annotation {first.get('id')!r}"))
    return ~np.any(list(reasons.values()), axis=0)
