"""Reads tables (CSV and the like, Parquet, JSON) as columns of text."""

import codecs
import collections
import csv
import dataclasses
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from vit_jax.data.forms.open_files import open_file
from vit_jax.data.images import SUFFIXES
from vit_jax.errors import UserError, check_refused, nearest

_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_WORDS = frozenset(  # the last words of column names
    "id idx index image images img picture photo file filename name names path filepath label "
    "labels class classes category categories target targets breed species split subset set fold "
    "partition tag tags prediction string synset wnid".split()
)
_INTEGRAL = re.compile(r"(-?\d{1,18})(\.0*)?")


class NoTable(UserError):
    """Text with ambiguous columns."""


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Columns of stripped cells, all of the same length.

    Attributes:
      path: the file.
      columns: name -> cells. Without a certain header the names are "1", "2", ..., and an uncertain
        header is the first row: see `headed`.
      header: whether the columns have names.
      lines: the line of the file, or the number of the row, at which each row begins.
      lists: columns of a Parquet or JSON file with lists as cells.
      binary: columns of a Parquet file with bytes as cells, which are not read.
    """

    path: str
    columns: dict[str, tuple[str, ...]]
    header: bool
    lines: Sequence[int]
    lists: dict[str, tuple[tuple[str, ...], ...]] = dataclasses.field(default_factory=dict)
    binary: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.lines)

    def at(self, row: int) -> str:
        """The place of a row, for messages."""
        return f"{self.path}, line {self.lines[row]}"

    def known(self, name: str) -> str:
        """Returns `name`. UserError: there is no such column."""
        every = [*self.columns, *self.lists]
        if name not in every:
            raise UserError(f"{self.path} has no column {name!r}; {nearest(name, every)}")
        return name

    def headed(self) -> "Table":
        """The table with its first row as header."""
        names = [cells[0] for cells in self.columns.values()]
        rows = [cells[1:] for cells in self.columns.values()]
        return dataclasses.replace(
            self, columns=_named(self.path, names, rows), header=True, lines=self.lines[1:]
        )

    def summary(self) -> str:
        """The columns with their first cells, for messages."""
        shown = [f"{name!r} ({cells[0]!r}, ...)" for name, cells in self.columns.items() if cells]
        shown += [f"{name!r} (lists)" for name in self.lists]
        return ", ".join(shown[:9]) + (f" and {len(shown) - 9} more" if len(shown) > 9 else "")


def read_table(path: str, what: str = "table", spaces: bool = False) -> Table:
    """Reads a table in any of these formats, detected by content:

    Parquet; JSON (a list of objects, an object a line, or an object of image files and labels);
    text with the same number of cells in each line, delimited by commas, tabs, semicolons or bars,
    with quotes; else text of one column. It may be compressed, and in UTF-8, or in UTF-16 or 32
    with a byte order mark. Columns without name and cells, the row numbers of pandas, and the ".0"
    in columns of whole numbers are left out.

    Args:
      what: what the file should be, for messages.
      spaces: whether spaces may be the delimiter, if nothing else is.

    Raises:
      UserError: no such file, or another format.
      NoTable: lines with different numbers of cells, or two possible delimiters.
    """
    data = _read(path, what)
    if data[:4] == b"PAR1":
        return _parquet(path, what)
    text = decoded(path, data, what)
    value = parsed_json(text)
    if value is not None:
        return _objects(path, value, what)
    rows, lines = _divide(path, text, spaces)
    columns = [whole(tuple(cells)) for cells in zip(*rows, strict=True)]
    names = [str(number + 1) for number in range(len(columns))]
    table = Table(path, dict(zip(names, columns, strict=True)), False, tuple(lines))
    if _is_header([cells[0] for cells in columns], columns):
        table = table.headed()
    if not len(table):
        raise UserError(f"{path} is no {what}: it has no row")
    return table


def read_text(path: str, what: str) -> str | None:
    """The text of a file, None for Parquet; raises as `read_table` does."""
    data = _read(path, what)
    return None if data[:4] == b"PAR1" else decoded(path, data, what)


def _read(path: str, what: str) -> bytes:
    try:
        with open_file(os.path.expanduser(path)) as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"{path} is no {what}: there is no such file") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        check_refused(error, path)
        raise UserError(f"{path} is no {what}: {error}") from None


def decoded(path: str, data: bytes, what: str) -> str:
    """Decodes bytes by their byte order mark, else as UTF-8."""
    encoding = next((name for bom, name in _BOMS.items() if data.startswith(bom)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no {what} in UTF-8: {error}") from None
    if not text.strip() or "\0" in text:
        raise UserError(f"{path} is no {what}: it {'is no text' if text.strip() else 'is empty'}")
    return text


def parsed_json(text: str) -> Any:
    """Parses JSON, or an object a line; None if it is neither."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text, object_pairs_hook=_once)
    except UserError:
        raise
    except (ValueError, RecursionError):
        pass
    try:
        return [json.loads(line, object_pairs_hook=_once) for line in text.splitlines() if line]
    except UserError:
        raise
    except (ValueError, RecursionError):
        return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise UserError(f"JSON has the key {twice!r} twice in one object")
    return found


def _objects(path: str, value: Any, what: str) -> Table:
    """The table of a list of JSON objects, or of one object of image files and labels."""
    if isinstance(value, dict) and all(name.lower().endswith(SUFFIXES) for name in value):
        value = [{"image": name, "label": label} for name, label in value.items()]
    rows = value if isinstance(value, list) else [value]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is no {what}: expected a JSON object for each row")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _typed(path, {name: [row.get(name) for row in rows] for name in names}, len(rows))


def _parquet(path: str, what: str) -> Table:
    try:
        with pyarrow.parquet.ParquetFile(os.path.expanduser(path)) as file:
            kinds = {field.name: field.type for field in file.schema_arrow}
            binary = [name for name, kind in kinds.items() if _has_bytes(kind)]
            read = [name for name in kinds if name not in binary]
            values = file.read(read).to_pydict()
            rows = file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no {what}: {error}") from None
    if not rows:
        raise UserError(f"{path} is no {what}: it has no row")
    return dataclasses.replace(_typed(path, values, rows), binary=tuple(binary))


def _has_bytes(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_struct(kind):
        return any(_has_bytes(field.type) for field in kind)
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _typed(path: str, values: dict[str, list[Any]], rows: int) -> Table:
    """A table of typed values; columns of objects are left out."""
    columns, lists = {}, {}
    for name, cells in values.items():
        if any(isinstance(cell, dict) for cell in cells):
            continue
        if any(isinstance(cell, list) for cell in cells):
            cells = [
                [] if cell is None else cell if isinstance(cell, list) else [cell] for cell in cells
            ]
            lists[name] = tuple(tuple(map(_cell, cell)) for cell in cells)
        else:
            columns[name] = whole(tuple(map(_cell, cells)))
    return Table(path, columns, True, range(1, rows + 1), lists)


def _cell(value: Any) -> str:
    if value is None or value != value:  # None or NaN
        return ""
    return str(int(value)) if isinstance(value, bool) else str(value).strip()


def whole(cells: tuple[str, ...]) -> tuple[str, ...]:
    """Strips ".0" from cells if all are whole numbers or empty."""
    if not any("." in cell for cell in cells):
        return cells
    matches = [_INTEGRAL.fullmatch(cell) for cell in cells]
    if not all(match or not cell for match, cell in zip(matches, cells, strict=True)):
        return cells
    return tuple(match[1] if match else "" for match in matches)


def _divide(path: str, text: str, spaces: bool) -> tuple[list[list[str]], list[int]]:
    """The cells of every row, and the line at which each row begins."""
    fits, odd = {}, {}
    for delimiter in _DELIMITERS:
        if delimiter not in text:
            continue
        try:
            rows, lines = _split(text, delimiter)
        except csv.Error as error:
            odd[delimiter] = (0, f"a line that {_DELIMITERS[delimiter]} do not divide: {error}")
            continue
        widths = collections.Counter(map(len, rows))
        usual, most = widths.most_common(1)[0]
        if len(widths) == 1:
            if usual > 1:
                fits[delimiter] = rows, lines
        elif usual > 1 and 2 * most > len(rows):
            first = next(row for row, cells in enumerate(rows) if len(cells) != usual)
            why = (
                f"{len(rows[first])} cells in line {lines[first]}, by {_DELIMITERS[delimiter]}, "
                f"but {usual} in others"
            )
            odd[delimiter] = (most, why)
    if "\t" in fits:  # no name has a tab in it
        fits = {"\t": fits["\t"]}
    # "tench, Tinca tinca" is one name.
    tight = {d: found for d, found in fits.items() if not _loose(text, d)}
    if len(tight or fits) > 1:
        both = " as well as ".join(_DELIMITERS[d] for d in tight or fits)
        raise NoTable(f"{path} is divided into columns by {both}: put its cells in quotes")
    for found in (tight or fits).values():
        return found
    if odd:
        _, why = max(odd.values())
        raise NoTable(f"{path} has {why}; cells with a delimiter in them go in quotes")
    if spaces:
        rows, lines = _words(text)
        if len(rows[0]) > 1 and len(set(map(len, rows))) == 1:
            return rows, lines
    try:
        rows, lines = _split(text, ",")
    except csv.Error:
        rows = []
    if set(map(len, rows)) != {1}:
        kept = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        lines, rows = [n for n, _ in kept], [[line] for _, line in kept]
    return rows, lines


def _split(text: str, delimiter: str) -> tuple[list[list[str]], list[int]]:
    rows, lines, line = [], [], 1
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True
    )
    for row in reader:
        cells = [cell.strip() for cell in row]
        if any(cells):
            rows.append(cells)
            lines.append(line)
        line = reader.line_num + 1
    return rows, lines


def _words(text: str) -> tuple[list[list[str]], list[int]]:
    kept = [(n, line.split()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    return [cells for _, cells in kept], [n for n, _ in kept]


def _loose(text: str, delimiter: str) -> bool:
    """Whether a space follows each delimiter, and there are no quotes."""
    return '"' not in text and text.count(delimiter) == text.count(f"{delimiter} ")


def is_word(cell: str) -> bool:
    """Whether a cell looks like the name of a column: "ImageId", "file_name", "label"."""
    parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", cell)
    return bool(parts and re.fullmatch(r"#?[A-Za-z_ -]+", cell) and parts[-1].lower() in _WORDS)


def _is_header(first: Sequence[str], columns: Sequence[tuple[str, ...]]) -> bool:
    """Whether the first row is certainly a header."""
    if len(first) < 2 or any(first[i] in cells[1:] for i, cells in enumerate(columns) if first[i]):
        return False
    words = [is_word(cell) for cell in first]
    if sum(words) > 1:
        return True
    if not first[0] and all(re.fullmatch(r"[A-Za-z_ -]+", cell) for cell in first[1:]):
        return True
    kept = [cells[1:] for cells, word in zip(columns, words, strict=True) if word]
    return any(cells and all(re.search(r"[\d./]", cell) for cell in cells) for cells in kept)


def _named(
    path: str, names: Sequence[str], columns: Iterable[tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for number, (name, cells) in enumerate(zip(names, columns, strict=True), 1):
        if not name and (not any(cells) or cells == tuple(map(str, range(len(cells))))):
            continue
        name = name.lstrip("#").strip() or str(number)
        if name in found:
            raise UserError(f"{path} has two columns {name!r}")
        found[name] = whole(cells)
    return found
