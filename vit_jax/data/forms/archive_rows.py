"""The images of an archive as columns: names, offsets, sizes, and the files beside them."""

import array
import collections
import os

from vit_jax.data.forms.files import WHOLE, PassedOver, parse_split, percentile
from vit_jax.data.forms.layout import TEXTS, out_of_the_way, unknown_format
from vit_jax.data.forms.members import Member, members
from vit_jax.data.forms.origins import BESIDE, Beside, Said
from vit_jax.data.images import SUFFIXES, sniff
from vit_jax.errors import UserError


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

    def hint(self) -> str:
        """For messages: the keys of a .json without a label."""
        keys = ", ".join(self.other_keys[:8])
        return f" (a .json beside them has {keys}: ,label=json.KEY reads one)" if keys else ""


def scan(path: str, number: int, split: str, key: str, passed: PassedOver) -> Rows:
    """Reads an archive's table of contents: the images of a split, and the files beside them."""
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


def _below(path: str, folder_name: str) -> tuple[str, str] | None:
    """The parts of a path before and after a folder; None if it is not in the path."""
    path = os.path.normpath("/" + path.lstrip("/"))
    if folder_name == WHOLE:
        return "", path[1:]
    above, found, after = path.partition(f"/{folder_name.strip('/')}/")
    return (above, after) if found else None
