"""Maps the classes of a data set to those of a model: by name, or as the user says."""

import dataclasses
import functools
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import numpy as np

from vit_jax.data.boxes import Boxes
from vit_jax.data.forms.class_lists import read_pairs
from vit_jax.data.labels import imagenet_labels, imagenet_synsets
from vit_jax.data.masks import IGNORED, Palette, check_classes
from vit_jax.data.sources import Source
from vit_jax.errors import UserError

IN_ORDER = "in_order"
_ADVICE = (
    "Say which is which: classes=FILE, a table of the data's and the model's names, or "
    "classes=in_order where both are in the same order (--config.data.val.classes=FILE)"
)
# A split's `classes`: IN_ORDER, a file, or the mapping in it, as a run saves it.
How = str | Mapping[str, str] | None

_SYNSET = re.compile(r"(n\d{8})(?![^ _\-])")


@dataclasses.dataclass(frozen=True)
class Matched:
    """The class `names[i]` of the data is class `classes[i]` of the model's `labels`.

    `rule` says how they were matched. As a string, it is a line for messages.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    classes: tuple[int, ...]
    rule: str

    @property
    def pairs(self) -> dict[str, str]:
        """The data's name of a class -> the model's."""
        return {
            name: self.labels[label] for name, label in zip(self.names, self.classes, strict=True)
        }

    @property
    def is_identity(self) -> bool:
        return self.names == self.labels and self.classes == tuple(range(len(self.labels)))

    def __str__(self) -> str:
        shown = [f"{name} is {label}" for name, label in list(self.pairs.items())[:5]]
        more = ", ..." if len(self.names) > len(shown) else ""
        text = f"{len(self.names)} classes of {len(self.labels)}, {self.rule}: "
        return text + "; ".join(shown) + more


def match(names: Sequence[str], labels: Sequence[str], how: How = None) -> Matched:
    """Finds the model's class for each class of a data set, which may have fewer.

    The rules, in order: the same name; the same but for case, `_` and `-`; the same first of the
    names separated by commas, unless both have others and share none; the same class of ImageNet,
    by its name or WordNet id (n01440764, n01440764-tench). If the data's classes are the numbers
    0 to N-1 and the model has N, they are matched by number.

    Args:
      names, labels: the class names of the data and of the model.
      how: None; "in_order"; or a file: a table of the data's and the model's names, or a list of
        the names of numbered classes (see `renamed`).

    Raises:
      UserError: a class has no match or an ambiguous one, or two have the same. The message begins
        with a verb, to follow the name of the split.
    """
    names, labels = tuple(names), tuple(labels)
    if how == IN_ORDER:
        if len(names) != len(labels):
            raise UserError(
                f"has {len(names)} classes, the model {len(labels)}: they cannot be taken in order"
            )
        return Matched(names, labels, tuple(range(len(labels))), "in order, as asked for")
    if how is not None:
        new, _ = renamed(names, how)
        found = match(tuple(dict.fromkeys(new)), labels).pairs
        numbers = {label: number for number, label in enumerate(labels)}
        rule = "as data.SPLIT.classes says"
        return Matched(names, labels, tuple(numbers[found[name]] for name in new), rule)
    if names == labels:
        return Matched(names, labels, tuple(range(len(labels))), "by name")
    found, rule = _by_name(names, labels)
    if None in found and (numbers := _by_number(names, labels)) is not None:
        found, rule = numbers, "by number"
    if None in found:
        unknown = [name for name, label in zip(names, found, strict=True) if label is None]
        raise UserError(
            f"has {len(names)} classes, the model {len(labels)}, and the model knows no "
            + ", ".join(repr(name) for name in unknown[:3])
            + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            + f", but {', '.join(map(repr, labels[:3]))}{', ...' if len(labels) > 3 else ''}. "
            + _ADVICE
        )
    seen: dict[int, str] = {}
    for name, label in zip(names, found, strict=True):
        if label in seen:
            other = seen[label]
            raise UserError(
                f"has {other!r} and {name!r}, which would both be the model's {labels[label]!r}: "
                "say so by classes=FILE, a table of the data's and the model's names"
            )
        seen[label] = name
    return Matched(names, labels, tuple(found), rule)


def _by_name(names: Sequence[str], labels: Sequence[str]) -> tuple[list[int | None], str]:
    """The label of each name, None if there is none or more than one; and the rule."""
    found: list[int | None] = [None] * len(names)
    by = "by name"
    for form, rule in _FORMS.items():
        waiting = [i for i, label in enumerate(found) if label is None]
        if not waiting:
            break
        theirs, ours = form(labels), form(names)
        where: dict[str, list[int]] = {}
        for number, key in enumerate(theirs):
            where.setdefault(key, []).append(number)
        for i in waiting:
            there = where.get(ours[i], []) if ours[i] else []
            if len(there) == 1 and not _differ(names[i], labels[there[0]]):
                found[i], by = there[0], rule
    return found, by


def plain(name: str) -> str:
    """A class name normalized in case, `_`, `-` and spaces."""
    name = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(re.split(r"[\s_\-]+", name)).strip()


def _differ(name: str, label: str) -> bool:
    """Whether both have further names behind a comma, and share none of them."""
    rests = [{plain(each) for each in text.split(",")[1:]} for text in (name, label)]
    return all(rests) and not rests[0] & rests[1]


def _first(name: str) -> str:
    return plain(name.partition(",")[0])


def _synsets(names: Sequence[str]) -> list[str]:
    """The WordNet id of each class, "" if it is unknown."""
    known = _imagenet()
    if len(names) == 1000 and [_first(n) for n in names] == [
        _first(re.sub(r" \[n\d{8}\]$", "", n)) for n in imagenet_labels()
    ]:  # all of ImageNet, in order, which tells its two cranes apart
        return list(imagenet_synsets())
    found = [_SYNSET.match(name) for name in names]
    return [
        match[1] if match else known.get(plain(name)) or known.get(_first(name), "")
        for match, name in zip(found, names, strict=True)
    ]


@functools.cache
def _imagenet() -> dict[str, str]:
    """Name -> WordNet id, for whole names, and for first names that only one class has."""
    ids, names = imagenet_synsets(), imagenet_labels()
    firsts = [_first(name) for name in names]
    known = {first: one for first, one in zip(firsts, ids, strict=True) if firsts.count(first) == 1}
    return known | {plain(name): one for name, one in zip(names, ids, strict=True)}


_FORMS: dict[Callable[[Sequence[str]], Sequence[str]], str] = {
    list: "by name",
    lambda names: [plain(name) for name in names]: "by name, but for case, _ and -",
    lambda names: [_first(name) for name in names]: "by the first of several names",
    _synsets: "by WordNet id",
}


def _by_number(names: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """The labels of numbered classes; None if they do not match by number."""
    ours, theirs = _numbers(names), _numbers(labels)
    if ours is None or len(set(ours)) < len(ours):
        return None
    if theirs is not None:
        if len(set(theirs)) < len(theirs) or not set(ours) <= set(theirs):
            return None
        where = {number: label for label, number in enumerate(theirs)}
        return [where[number] for number in ours]
    return ours if sorted(ours) == list(range(len(labels))) else None


def _numbers(names: Sequence[str]) -> list[int] | None:
    if all(re.fullmatch(r"\d{1,9}", name, re.ASCII) for name in names):
        return [int(name) for name in names]
    return None


def renamed(names: Sequence[str], how: How) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Renames classes by a split's `classes`; also returns all new names, in order.

    A file with two columns, in either order, maps each class to its new name; several may have the
    same one. A file with one column has the names of classes 0, 1, ... if the data's classes are
    numbers, else the data's own names in their new order.

    Raises:
      UserError: no such file, or it does not match the data.
    """
    if how is None:
        return tuple(names), tuple(names)
    if how == IN_ORDER:
        raise UserError(
            "has classes=in_order, which says that its classes are a model's in their order: there "
            "is no such model (init_from with model.head=keep)"
        )
    rows = read_pairs(os.path.expanduser(how)) if isinstance(how, str) else list(how.items())
    origin = f"classes={how}" if isinstance(how, str) else "what the run kept of classes"
    if all(len(row) == 1 for row in rows):
        given = [row[0] for row in rows]
        if len(set(given)) < len(given):
            raise UserError(f"{origin} names a class twice")
        if set(names) <= set(given):
            return tuple(names), tuple(given)
        numbers = _numbers(names)
        if numbers is None or max(numbers) >= len(given) or len(set(numbers)) < len(numbers):
            raise UserError(
                f"{origin} has {len(given)} names in one column, which are those of classes 0 to "
                f"{len(given) - 1}, but the data's are called {', '.join(map(repr, names[:3]))}: "
                "expected two columns, the data's names and the model's"
            )
        return tuple(given[number] for number in numbers), tuple(given)
    sides = [dict(rows), {theirs: ours for ours, theirs in rows}]
    fits = [set(names) <= set(side) for side in sides]
    if not any(fits):
        side = max(sides, key=lambda side: len(set(names) & set(side)))
        missing = next(name for name in names if name not in side)
        raise UserError(f"{origin} says nothing of the data's class {missing!r}")
    if all(fits) and any(sides[0][name] != sides[1][name] for name in names):
        raise UserError(
            f"{origin} has the data's names in both columns: which one is meant is not clear"
        )
    side = sides[fits.index(True)]
    ours = [row[fits.index(True)] for row in rows]
    if len(set(ours)) < len(ours):
        twice = next(name for name in ours if ours.count(name) > 1)
        raise UserError(f"{origin} has {twice!r} twice")
    return tuple(side[name] for name in names), tuple(dict.fromkeys(side.values()))


@dataclasses.dataclass(frozen=True, eq=False)
class Relabelled:
    """A source with its class c renumbered to `matched.classes[c]`."""

    source: Source
    matched: Matched

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.matched.labels

    @property
    def palette(self) -> Palette | None:
        """The colours of the model's classes, if the data has some for all of them."""
        given = getattr(self.source, "palette", None)
        if given is None or set(self.matched.classes) != set(range(len(self.matched.labels))):
            return None
        colours = dict(zip(self.matched.classes, given, strict=True))
        return tuple(colours[number] for number in range(len(colours)))

    @property
    def category_ids(self) -> tuple[int, ...] | None:
        """The numbers of the model's classes in a COCO file, if the data has one for each."""
        given = getattr(self.source, "category_ids", None)
        if given is None or sorted(self.matched.classes) != list(range(len(self.matched.labels))):
            return None
        numbers = dict(zip(self.matched.classes, given, strict=True))
        return tuple(numbers[number] for number in range(len(numbers)))

    def boxes_of(self, index: int) -> Boxes:
        """The boxes of an example, where the source has boxes."""
        return self._boxes(self.source.boxes_of(index))

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        if name in ("source", "matched") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.source, name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        label = example["label"]
        if isinstance(label, Boxes):
            return {**example, "label": self._boxes(label)}
        if isinstance(label, np.ndarray):
            count = len(self.matched.classes)
            check_classes(example.get("name", f"example {index}"), label, count)
            classes = np.full(256, IGNORED, np.uint8)
            classes[:count] = self.matched.classes
            return {**example, "label": classes[label]}
        if isinstance(label, tuple):
            return {**example, "label": tuple(dict.fromkeys(self._class(each) for each in label))}
        return {**example, "label": self._class(label)}

    def _boxes(self, boxes: Boxes) -> Boxes:
        classes = np.array([self._class(each) for each in boxes.classes.tolist()], np.int32)
        return dataclasses.replace(boxes, classes=classes)

    def _class(self, label: int) -> int:
        # A label out of range stays invalid, and raises an error when it is read.
        return self.matched.classes[label] if 0 <= label < len(self.matched.classes) else -1


class RelabelledEndless(Relabelled):
    """The same for an endless source."""

    __len__ = None


def relabelled(source: Source, matched: Matched) -> Source:
    """Wraps a source to have the classes that its own were matched with."""
    if matched.is_identity:
        return source
    return (Relabelled if isinstance(source, Sized) else RelabelledEndless)(source, matched)


def with_labels(source: Source, labels: Sequence[str], how: How = None) -> Source:
    """Wraps a source to have a model's classes, found by `match`.

    Raises:
      UserError: as `match`.
    """
    return relabelled(source, match(source.label_names, labels, how))
