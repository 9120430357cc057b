"""The images of an archive as columns: names, offsets, sizes, and the files beside them."""

import array
import collections
import concurrent.futures
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from vit_jax.data import storage
from vit_jax.data.forms.files import WHOLE, PassedOver, parse_split, percentile
from vit_jax.data.forms.layout import TEXTS, out_of_the_way, unknown_format
from vit_jax.data.forms.members import Member, members
from vit_jax.data.forms.origins import BESIDE, Beside, Said, Wrong
from vit_jax.data.images import SUFFIXES, sniff
from vit_jax.errors import UserError

_AT_ONCE = 32  # archives of a bucket
_FORMAT = 1  # of what is kept of an archive
_COLUMNS = ("names", "places", "inners")


class Rows:
    """Images as columns rather than objects, as ImageNet-21k has 14 million."""

    def __init__(self):
        self.names: list[str] = []
        self.places: list[str] = []  # paths below the split's folder
        self.inners: list[str] = []
        self.said: dict[str, list[Said]] = {kind: [] for kind in BESIDE}
        names = ("archive", "offset", "size", "deflated", "crc")
        self.numbers = {name: array.array("q") for name in names}
        self.holes: dict[int, tuple[tuple[int, int], ...]] = {}
        self.above: set[str] = set()  # the parents of the split's folder
        self.lost: set[str] = set()  # folders with files that are not images
        self.other_keys: tuple[str, ...] = ()

    def add(self, archive: int, member: Member, above: str, place: str) -> None:
        inner = os.path.basename(member.outer)
        if member.holes is not None:
            self.holes[len(self.names)] = member.holes
        self.names.append(f"{inner}/{member.name}" if inner else member.name)
        self.places.append(place)
        self.inners.append(inner)
        self.above.add(above)
        row = (archive, member.offset, member.size, member.deflated, member.crc)
        for column, value in zip(self.numbers.values(), row, strict=True):
            column.append(value)

    def extend(self, other: "Rows") -> None:
        """Adds the rows of another archive, in the order of their offsets."""
        start, offsets = len(self.names), other.numbers["offset"]
        order = sorted(range(len(offsets)), key=offsets.__getitem__)
        for mine, theirs in [
            *((getattr(self, key), getattr(other, key)) for key in ("names", "places", "inners")),
            *((self.said[key], other.said[key]) for key in BESIDE),
            *((self.numbers[key], other.numbers[key]) for key in self.numbers),
        ]:
            mine.extend(theirs[row] for row in order)
        if other.holes:
            at = {row: start + i for i, row in enumerate(order)}
            self.holes |= {at[row]: holes for row, holes in other.holes.items()}
        self.above |= other.above
        self.lost |= other.lost
        self.other_keys = self.other_keys or other.other_keys

    def to_json(self) -> dict[str, Any]:
        """All of it, as `of_json` takes it."""
        return {
            **{key: getattr(self, key) for key in _COLUMNS},
            "said": {kind: [_said_to(one) for one in self.said[kind]] for kind in BESIDE},
            "numbers": {key: column.tolist() for key, column in self.numbers.items()},
            "holes": list(self.holes.items()),
            "above": sorted(self.above),
            "lost": sorted(self.lost),
            "other_keys": self.other_keys,
        }

    @classmethod
    def of_json(cls, found: dict[str, Any], archive: int) -> "Rows":
        """The rows of archive number `archive`."""
        rows = cls()
        for key in _COLUMNS:
            setattr(rows, key, found[key])
        rows.said = {kind: [_said_of(one) for one in found["said"][kind]] for kind in BESIDE}
        rows.numbers = {key: array.array("q", found["numbers"][key]) for key in rows.numbers}
        rows.numbers["archive"] = array.array("q", [archive] * len(rows.names))
        rows.holes = {row: tuple(map(tuple, holes)) for row, holes in found["holes"]}
        rows.above, rows.lost = set(found["above"]), set(found["lost"])
        rows.other_keys = tuple(found["other_keys"])
        return rows

    def hint(self) -> str:
        """For messages: the keys of a .json without a label."""
        keys = ", ".join(self.other_keys[:8])
        return f" (a .json beside them has {keys}: ,label=json.KEY reads one)" if keys else ""


def scan_all(files: Sequence[str], split: str, key: str, passed: PassedOver) -> Rows:
    """Reads the tables of contents of archives: the images of a split, and the files beside them.

    Those in buckets are read at once, and what was found is kept (see `storage.kept`).
    """
    rows = Rows()
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        several = pool.map if any(map(storage.is_url, files)) else map
        scan_one = functools.partial(_scan_kept, split=split, key=key)
        for found, skipped in several(scan_one, files, range(len(files))):
            rows.extend(found)
            passed.update(skipped)
    return rows


def _scan_kept(path: str, number: int, split: str, key: str) -> tuple[Rows, PassedOver]:
    passed = PassedOver()
    if not storage.is_url(path):
        return _scan(path, number, split, key, passed), passed
    name = hashlib.sha256(f"{_FORMAT} {split} {key}".encode()).hexdigest()[:16]

    def content() -> str:
        skipped = PassedOver()
        rows = _scan(path, number, split, key, skipped)
        return json.dumps([rows.to_json(), skipped.files, skipped.counts])

    found, files, counts = json.loads(storage.text(path, f"{name}.json", content))
    passed.files, passed.counts = [tuple(each) for each in files], collections.Counter(counts)
    return Rows.of_json(found, number), passed


def _scan(path: str, number: int, split: str, key: str, passed: PassedOver) -> Rows:
    rows, beside, paths = Rows(), Beside(key), []
    folder_name, low, high = parse_split(split)
    for member in members(path):
        where = member.path
        found = _below(where, folder_name)
        if found is None:
            continue
        ending = os.path.splitext(member.name)[1].lower()
        why = out_of_the_way(where) or member.why
        if why is None and ending[1:] in BESIDE:
            beside.add(where, member.read)
            continue
        if why is None and ending not in SUFFIXES:
            seen = ending not in TEXTS and member.size and sniff(member.read(32))
            why = None if seen else unknown_format(where) if member.size else "empty"
        if why is not None:
            passed.add(f"{path}: {where}", why)
            if not why.startswith("of a folder"):
                rows.lost.add(os.path.dirname(found[1]))
        elif (low, high) == (0, 100) or low <= percentile(member.name) < high:
            rows.add(number, member, *found)
            paths.append(where)
    if len(set(paths)) < len(paths):
        twice = next(one for one, count in collections.Counter(paths).items() if count > 1)
        raise UserError(f"{path} has {twice} twice, and which one counts is not certain")
    for one in beside.alone(paths) if (low, high) == (0, 100) else ():
        passed.add(f"{path}: {one}", unknown_format(one))
        rows.lost.add(os.path.dirname(_below(one, folder_name)[1]))
    for kind, column in rows.said.items():
        column.extend(beside.of(kind, paths))
    rows.other_keys = beside.other_keys
    return rows


def _said_to(said: Said) -> Any:
    return {"wrong": said} if isinstance(said, Wrong) else said


def _said_of(found: Any) -> Said:
    if isinstance(found, dict):
        return Wrong(found["wrong"])
    return tuple(found) if isinstance(found, list) else found


def _below(path: str, folder_name: str) -> tuple[str, str] | None:
    """The parts of a path before and after a folder; None if it is not in the path."""
    path = os.path.normpath("/" + path.lstrip("/"))
    if folder_name == WHOLE:
        return "", path[1:]
    above, found, after = path.partition(f"/{folder_name.strip('/')}/")
    return (above, after) if found else None
