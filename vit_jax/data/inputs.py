"""The images that a user names: files, folders, patterns, lists, archives and data sources."""

import bisect
import dataclasses
import functools
import glob
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

from vit_jax.data import storage
from vit_jax.data.forms.archives import TarSource, unlabelled
from vit_jax.data.forms.box_files import BoxSource
from vit_jax.data.forms.files import (
    WHOLE,
    FolderSource,
    Packed,
    PassedOver,
    file_example,
    image_files,
    judged,
)
from vit_jax.data.forms.listed import TableSource
from vit_jax.data.forms.open_files import is_compressed
from vit_jax.data.forms.pairs import PairSource
from vit_jax.data.sources import SOURCES, Source, open_source, splits_of, understood
from vit_jax.errors import UserError, check_refused
from vit_jax.objects import check

Read = Callable[[], Any]  # an image, as `Preprocess.read` takes it, or a UserError
_ARCHIVES = ("tar:", "zip:")
_MAGIC = re.compile(r"[*?[]")  # as glob's


@dataclasses.dataclass(frozen=True, eq=False)
class _Files:
    """Image files by their paths, without labels."""

    names: Packed

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return file_example("", self.names[index], 0)


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one argument names: `source[i]["image"]` is an image, `name(i)` what to call it.

    `below(i)` is its path below the folder, archive or source that was named; of a file its name.
    `in_order` marks a source that is slow unless it is read from its first image to its last.
    """

    source: Any
    name: Callable[[int], str]
    below: Callable[[int], str]
    in_order: bool = False


class Inputs(Sequence):
    """Images by their names, in order. `inputs[i]` is the bytes of a file, or uint8 [h w c].

    Attributes:
      passed_over: the files beside them that are no images.
    """

    def __init__(self, parts: Sequence[_Part], passed_over: PassedOver):
        self.passed_over = passed_over
        self._parts = tuple(parts)
        self._ends = list(itertools.accumulate(len(part.source) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no image {index}: there are {len(self)}")
        which = bisect.bisect_right(self._ends, index)
        source = self._parts[which].source
        return source[index - self._ends[which] + len(source)]["image"]

    @property
    def names(self) -> list[str]:
        """The name of each image: its path, ARCHIVE/MEMBER, or SOURCE/SPLIT/NUMBER."""
        return [part.name(i) for part in self._parts for i in range(len(part.source))]

    @property
    def below(self) -> list[str]:
        """The path of each image below what was named; a file's name, if it was named itself."""
        return [part.below(i) for part in self._parts for i in range(len(part.source))]

    def readers(self) -> Iterator[tuple[str, Read]]:
        """Yields a name and a function that reads the image, for any thread to call.

        Of a compressed archive the bytes are read here, in order.
        """
        for part in self._parts:
            for i in range(len(part.source)):
                read = functools.partial(_image, part.source, i)
                yield part.name(i), _read_now(read) if part.in_order else read


def _image(source: Any, index: int) -> Any:
    return source[index]["image"]


def _read_now(read: Read) -> Read:
    """Reads an image; returns a function that returns it, or raises what reading it raised."""
    try:
        image = read()
    except UserError as error:
        return functools.partial(_throw, error)
    return lambda: image


def _throw(error: UserError) -> Any:
    raise error


def find_images(*arguments: str | os.PathLike, split: str | None = None) -> Inputs:
    """Finds the images that arguments name, in the order of the arguments.

    Nothing is decoded yet. Each argument is one of these:
      - an image file;
      - a folder: the images in it, at any depth, in the order of their paths. Links are followed;
        hidden files and what is no image by its ending or first bytes are passed over;
      - an archive (.tar, .tar.gz and the like, .zip): the images in it, in its order;
      - a pattern such as `pets/**/*.jpg` (two stars are any depth): the files, archives and,
        without two stars, folders that match, sorted;
      - "@FILE": a list with an argument a line, or "@-" for standard input;
      - a data source such as "digits" or "records:/data/pets": the images of a split. A folder of
        shards, an .npz or a table is such a source without its kind, too.

    Args:
      split: of the data sources; needed where a source has several.

    Raises:
      UserError: an argument names nothing, a folder or an archive without an image, or a data
        source that cannot be opened; there is no image at all.
    """
    found = _Finder(split)
    for argument in arguments:
        found.add(os.fspath(argument))
    return found.inputs()


class _Finder:
    """Collects parts, with neighbouring files as one."""

    def __init__(self, split: str | None):
        self._split, self._split_used = split, False
        self._parts: list[_Part] = []
        self._files: list[str] = []
        self._below: list[str] = []
        self._passed = PassedOver()

    def add(self, argument: str) -> None:
        if argument.startswith("@"):
            where = "standard input" if argument == "@-" else argument[1:]
            for number, line in enumerate(_lines(argument[1:]), 1):
                try:
                    if line:
                        self._one(line)
                except UserError as error:
                    raise UserError(f"line {number} of {where}: {error}") from None
        else:
            self._one(argument)

    def inputs(self) -> Inputs:
        self._close_files()
        if self._split is not None and not self._split_used:
            raise UserError(
                f"split {self._split!r} is of a data source such as records:PATH, and none is named"
            )
        inputs = Inputs(self._parts, self._passed)
        if not len(inputs):
            raise UserError("no image is named" + _beside(self._passed))
        return inputs

    def _one(self, argument: str) -> None:
        path, kind = os.path.expanduser(argument), argument.partition(":")[0]
        if storage.is_url(path):
            check(path)
        if storage.exists(path):
            if argument in SOURCES:
                raise UserError(
                    f"{argument!r} is a file or folder here, and a data source: write "
                    f"./{argument} for the first, or {argument}: for the second"
                )
            self._there(path)
        elif kind in SOURCES:
            self._source(argument)
        elif glob.has_magic(path):
            self._pattern(path)
        else:
            raise UserError(
                f"there is no {argument!r}; expected an image file, a folder, an archive, a "
                "pattern, @LIST or a data source such as records:PATH"
            )

    def _there(self, path: str) -> None:
        spec = understood(path)
        if spec.startswith(_ARCHIVES) and storage.is_file(path):
            self._archive(path)
        elif spec.startswith("folder:"):
            self._folder(path)
        elif spec != path:
            self._source(spec)
        else:
            self._file(path, os.path.basename(path))

    def _file(self, path: str, below: str) -> None:
        self._files.append(path)
        self._below.append(below)

    def _pattern(self, pattern: str) -> None:
        matches = storage.matches(pattern, recursive=True)
        if not matches:
            raise UserError(f"no file matches {pattern!r}")
        fixed = pattern[: _MAGIC.search(pattern).start()]
        start = fixed.rfind("/") + 1  # the folder whose files are matched
        for path in matches:
            if storage.is_folder(path):
                if "**" not in pattern:  # which matches the files in the folder as well
                    self._folder(path, alone=False)
            elif understood(path).startswith(_ARCHIVES):
                self._archive(path)
            elif why := judged(path)[1]:
                self._passed.add(path, why)
            else:
                self._file(path, path[start:])

    def _folder(self, path: str, alone: bool = True) -> None:
        above, name = os.path.split(path.rstrip(os.sep) or os.sep)
        passed = PassedOver()
        files = sorted(file for file, _ in image_files(above or ".", name, passed))
        if alone and not files:
            raise UserError(f"the folder {path} has no image in it" + _beside(passed))
        self._passed.update(passed)
        for file in files:
            self._file(os.path.join(above, file), file[len(name) + 1 :])

    def _archive(self, path: str) -> None:
        source = unlabelled(path)
        if not len(source):
            raise UserError(f"{path} has no image in it" + _beside(source.passed_over))
        self._close_files()
        below = source.names.__getitem__
        self._parts.append(_Part(source, _names(source, path), below, is_compressed(path)))
        self._passed.update(source.passed_over)

    def _source(self, spec: str) -> None:
        split = self._split or _only_split(spec)
        source = open_source(spec, split)
        self._split_used = True
        if not isinstance(source, Sized):
            raise UserError(f"{spec}, split {split} is endless: name a finite split")
        self._close_files()
        called = _names(source, f"{spec}/{split}")
        self._parts.append(_Part(source, called, _below(source)))
        self._passed.update(getattr(source, "passed_over", PassedOver()))

    def _close_files(self) -> None:
        if self._files:
            names, below = Packed.of(self._files), Packed.of(self._below)
            self._parts.append(_Part(_Files(names), names.__getitem__, below.__getitem__))
            self._files, self._below = [], []


def _names(source: Source, where: str) -> Callable[[int], str]:
    """What to call the images of a source: paths where it has them, else WHERE/NUMBER."""
    if isinstance(source, (FolderSource, PairSource, BoxSource, TableSource)):
        return lambda i: os.path.join(source.root, source.names[i])
    if isinstance(source, TarSource):
        paths = source.files.paths
        return lambda i: f"{paths[int(source.archive[i])]}/{source.names[i]}"
    return lambda i: f"{where}/{i}"


def _below(source: Source) -> Callable[[int], str]:
    """The names of a source's files, or its numbers."""
    files = isinstance(source, (FolderSource, PairSource, BoxSource, TableSource, TarSource))
    return source.names.__getitem__ if files else str


def _only_split(spec: str) -> str:
    """The one split that a source has, or all of it."""
    try:
        known = splits_of(spec)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        known = []  # opening it raises the error
    if len(known) > 1:
        raise UserError(f"{spec} has the splits {', '.join(known)}: name one of them by --split")
    return known[0] if known else WHOLE


def _lines(path: str) -> Iterable[str]:
    """The lines of a list; names of files may be no text."""
    if path == "-":
        lines = sys.stdin.buffer.readlines()
    else:
        try:
            lines = storage.read(os.path.expanduser(path)).split(b"\n")
        except FileNotFoundError:
            raise UserError(f"there is no list {path!r}") from None
        except OSError as error:
            check_refused(error, path)
            raise
    return [os.fsdecode(line.rstrip(b"\r\n")) for line in lines]


def _beside(passed: PassedOver) -> str:
    return f" ({passed})" if passed else ""
