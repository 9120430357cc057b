"""Where the labels of images in archives come from: the same origin for all, or an error."""

import collections
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence

from vit_jax.data.forms.layout import few, split_kind
from vit_jax.errors import UserError

logger = logging.getLogger(__name__)

# Endings of label files beside images, as in WebDataset's shards.
BESIDE = ("cls", "json", "txt")
# Values of `label=`, and their names in messages.
ORIGINS = {
    "cls": ".cls beside it",
    "json": "label in a .json beside it",
    "txt": ".txt beside it",
    "folder": "folder of a class",
    "tar": "tar inside the archive",
    "shard": "archive of its own",
}
_MOST = 200  # characters of a class name
_SEVERAL = re.compile(r"[\d.+-]+([\s,;]+[\d.+-]+)+")
_WORDNET = re.compile(r"n\d+")


class Wrong(str):
    """Why a file beside an image is no label."""


Said = str | tuple[str, ...] | None  # a class, several, or none


class Beside:
    """The label files of one archive.

    A file belongs to an image if their names are equal without the last ending. If they are equal
    only up to the first full stop, which is WebDataset's rule, it is ambiguous.

    Args:
      key: the key of the label in a .json.
    """

    def __init__(self, key: str = "label"):
        self._key = key
        self._said: dict[str, dict[str, Said]] = {kind: {} for kind in BESIDE}
        self._samples: dict[str, dict[str, str]] = {kind: {} for kind in BESIDE}
        self._paths: list[str] = []
        self.other_keys: tuple[str, ...] = ()  # of a .json without a label

    def add(self, path: str, read: Callable[[int], bytes]) -> None:
        self._paths.append(path)
        stem, ending = os.path.splitext(path)
        kind = ending[1:].lower()
        text = read(2**20).decode("utf-8", "replace").lstrip("\ufeff").strip()
        said: Said = self._of_json(text) if kind == "json" else _of_text(text)
        if said is None:
            return
        twice = stem in self._said[kind]
        self._said[kind][stem] = Wrong(f"is there twice: {path}") if twice else said
        self._samples[kind].setdefault(_sample(path), path)

    def of(self, kind: str, paths: Sequence[str]) -> list[Said]:
        """The labels of all images, given by their paths, from the files of one kind."""
        said, samples = self._said[kind], self._samples[kind]
        if not said:
            return [None] * len(paths)
        found: list[Said] = []
        taken: dict[str, str] = {}
        for path in paths:
            stem = os.path.splitext(path)[0]
            one, other = said.get(stem), taken.setdefault(stem, path)
            if one is not None and other != path:
                one = Wrong(f"is also that of {other}")
            elif one is None and (file := samples.get(_sample(path))):
                one = Wrong(
                    f"may be {file}, or not: the names agree up to the first full stop alone"
                )
            found.append(one)
        return found

    def alone(self, paths: Sequence[str]) -> list[str]:
        """The files that belong to none of the images."""
        samples = set(map(_sample, paths)) if self._paths else set()
        return [path for path in self._paths if _sample(path) not in samples]

    def _of_json(self, text: str) -> Said:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict):
            return None
        if self._key not in found:
            self.other_keys = self.other_keys or tuple(map(str, found))
            return None
        value = found[self._key]
        if not isinstance(value, list):
            return _of_value(value)
        each = [Wrong() if isinstance(one, float) else _of_value(one) for one in value]
        if any(isinstance(one, Wrong) for one in each) or len(set(each)) < len(each):
            return Wrong(f"says {_short(value)}; expected whole numbers or names, each once")
        return tuple(each)


def _sample(path: str) -> str:
    """WebDataset's key: a path up to the first full stop in the file name."""
    dot = path.find(".", path.rfind("/") + 2)
    return path if dot < 0 else path[:dot]


def _of_text(text: str) -> str:
    if not text:
        return Wrong("is empty")
    if len(text) > _MOST:
        return Wrong(f"says {_short(text)}: a class name has at most {_MOST} characters")
    if "\0" in text or "\ufffd" in text:
        return Wrong("is no text in UTF-8")
    if len(text.splitlines()) > 1:
        return Wrong(f"says {_short(text)}: several lines, where one class was expected")
    if _SEVERAL.fullmatch(text):
        return Wrong(f"says {text!r}: several numbers, where one class was expected")
    try:
        return _of_value(float(text)) if re.fullmatch(r"[+-]?\d+\.\d*|-\d+", text) else text
    except OverflowError:
        return text


def _of_value(value: object) -> str:
    """The label of a JSON value."""
    if isinstance(value, str) and value.strip():
        return _of_text(value.strip())
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and 0 <= value < 2**53 and value == int(value):
        return str(int(value))
    return Wrong(f"says {_short(value)}; expected a name or a whole number from 0 on")


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def choose(
    where: str,
    names: Sequence[str],
    said: Mapping[str, Sequence[Said]],
    wanted: str | None,
    hint: str = "",
) -> tuple[str, Sequence[str] | Sequence[tuple[str, ...]]]:
    """Returns the origin of the labels, and the class, or the classes, of every image.

    Args:
      said: origin -> the label of every image.
      wanted: the origin that the user selected, or None.
      hint: the end of the message that there are no labels.

    Raises:
      UserError: images have labels from different origins, two that differ, none, or an invalid
        one.
    """
    origin = wanted or _only(where, names, said, hint)
    column = said.get(origin, [None] * len(names))
    if None in column:
        raise UserError(f"{where}: {names[column.index(None)]} has no {ORIGINS[origin]}")
    for name, one in zip(names, column, strict=True):
        if isinstance(one, Wrong):
            raise UserError(f"{where}: {name}: its {_kind(origin)} {one}")
    if any(isinstance(one, tuple) for one in column):
        column = [one if isinstance(one, tuple) else (one,) for one in column]
        distinct = {label for one in column for label in one}
        if set(column) == {("0", "1"), ("1", "0")}:
            raise UserError(
                f"{where}: the labels are [0, 1] or [1, 0] of every image: are they one-hot? "
                "Expected the numbers or names of classes"
            )
    else:
        distinct = set(column)
    if origin in BESIDE:
        _check_numbers(where, names, column, distinct, wanted is not None)
    if not distinct:
        raise UserError(f"{where}: no image has a label")
    if origin in ("shard", "tar") and wanted is None:
        _check_numbered(where, names, column, origin)
    if origin == "shard" and wanted is None:
        logger.info("%s: each archive is a class: %s", where, few(distinct))
    if origin == "txt" and wanted is None:
        logger.info("%s: the .txt beside the images are their classes: %s", where, few(distinct))
    return origin, column


def _only(where: str, names: Sequence[str], said: Mapping[str, Sequence[Said]], hint: str) -> str:
    """The only origin that all images have."""
    present = [one for one in ("cls", "json", "tar") if any(x is not None for x in said[one])]
    if len(set(said["folder"])) > 1:
        present.append("folder")
    if not present:
        return _last_resort(where, names, said, hint)
    if all(said[one] == said[present[0]] for one in present) and None not in said[present[0]]:
        return present[0]
    for one in present:
        if None in said[one]:
            name, other = (names[i] for i in _without_and_with(said[one]))
            kind = ORIGINS[one]
            choices = f", or which counts with ,label={'|'.join(present)} behind the path"
            raise UserError(
                f"{where}: {name} has no {kind}, as {other} has: say the classes with "
                f"--labels=FILE{choices if len(present) > 1 else ''}"
            )
    rows = zip(*(said[one] for one in present), strict=True)
    at = next(i for i, row in enumerate(rows) if len(set(row)) > 1)
    text = " and ".join(f"{_show(said[one][at])} by its {_kind(one)}" for one in present)
    raise UserError(
        f"{where}: {names[at]} is of class {text}: say which counts with "
        f",label={'|'.join(present)} behind the path"
    )


def _last_resort(
    where: str, names: Sequence[str], said: Mapping[str, Sequence[Said]], hint: str
) -> str:
    """Repeated texts, the one folder of all images, or the names of the archives."""
    texts = said["txt"]
    if any(text is not None for text in texts):
        if None in texts:
            name, other = (names[i] for i in _without_and_with(texts))
            raise UserError(
                f"{where}: {name} has no .txt beside it, as {other} has: say the classes with "
                "--labels=FILE"
            )
        distinct = len(set(texts))
        if 2 * distinct > len(texts) or any(isinstance(text, Wrong) for text in texts):
            raise UserError(
                f"{where}: the .txt beside the images are not taken for classes ({distinct} texts "
                f"of {len(texts)} images, such as {_short(texts[0])}): say the classes with "
                "--labels=FILE, or ,label=txt behind the path"
            )
        return "txt"
    if None not in said["folder"]:
        return "folder"
    stems = said["shard"]
    if len(set(stems)) < 2:
        raise UserError(
            f"{where}: {names[0]} is in no folder of a class: say with --labels=FILE which classes "
            f"the images have{hint}"
        )
    return "shard"


def _check_numbered(where: str, names: Sequence[str], stems: Sequence[str], option: str) -> None:
    distinct = sorted({stem for stem in stems if not _WORDNET.fullmatch(stem)})
    counts = collections.Counter(re.sub(r"\d+", "", stem) for stem in distinct)
    odd = [
        stem
        for stem in distinct
        if counts[re.sub(r"\d+", "", stem)] > 1 or split_kind(re.sub(r"[\d_.-]+$", "", stem))
    ]
    if odd:
        raise UserError(
            f"{where}: {names[stems.index(odd[0])]} has no class but the name of its archive, "
            f"{odd[0]!r}, which is a number or a split's: say the classes with --labels=FILE, or "
            f",label={option} behind the path if it is a class"
        )


def _check_numbers(
    where: str, names: Sequence[str], column: Sequence[Said], distinct: set[str], sure: bool
) -> None:
    """Raises a UserError for numbers among names, unless `sure`, or numbers written in two ways."""
    numbers = {one for one in distinct if re.fullmatch(r"\d+", one, re.ASCII)}
    if numbers and numbers != distinct and not sure:
        pair = min(numbers), min(distinct - numbers)
        raise UserError(
            f"{where}: some labels are numbers, others names: {_first(names, column, pair[0])} has "
            f"{pair[0]!r}, {_first(names, column, pair[1])} {pair[1]!r}; write ,label=cls (or what "
            "else says it) behind the path if all of them are names"
        )
    values: dict[int, str] = {}
    for one in sorted(numbers):
        other = values.setdefault(int(one), one)
        if other != one:
            raise UserError(f"{where}: are the labels {other!r} and {one!r} one class, or two?")


def _first(names: Sequence[str], column: Sequence[Said], label: str) -> str:
    return next(
        name
        for name, one in zip(names, column, strict=True)
        if label in (one if isinstance(one, tuple) else (one,))
    )


def _without_and_with(column: Sequence[Said]) -> tuple[int, int]:
    """The indices of the first image without a label, and the first with one."""
    return column.index(None), next(i for i, one in enumerate(column) if one is not None)


def _kind(origin: str) -> str:
    return f".{origin}" if origin in BESIDE else origin


def _show(said: Said) -> str:
    return repr(list(said)) if isinstance(said, tuple) else repr(str(said))
