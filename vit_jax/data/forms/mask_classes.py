"""The classes of masks: what the numbers in their files mean, and which numbers there are."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from vit_jax.data import storage
from vit_jax.data.images import BadImage
from vit_jax.data.masks import IGNORED, Colours, Mask, Palette, decode_mask, palette_of
from vit_jax.errors import UserError, check_refused

REDUCED = (IGNORED, *range(IGNORED - 1), IGNORED)  # 0 is of no class, 1 is class 0
_SAMPLE = 64  # masks that are looked at for how they count


@dataclasses.dataclass(frozen=True)
class Classes:
    """What the numbers in mask files mean.

    Attributes:
      names: of the classes; none where it is not known yet.
      how: where they are from, and how numbers are read, for the user.
      palette: a colour for each class, or None.
      table: number in a file -> class, 255 of none, -1 if it must not occur; None keeps numbers.
      colours: the class of each colour, where masks are read by their colours.
    """

    names: tuple[str, ...]
    how: str
    palette: Palette | None = None
    table: tuple[int, ...] | None = None
    colours: Colours | None = None

    def added(self, how: str, **changes: Any) -> "Classes":
        """Changed, and with more to tell the user."""
        return dataclasses.replace(self, how="; ".join(filter(None, (self.how, how))), **changes)

    @property
    def identity(self) -> tuple[str, ...]:
        """What a fingerprint has of it."""
        return (*self.names, repr(self.table), repr(self.colours))

    def decode(self, where: str, data: bytes) -> Mask:
        """Decodes a mask file's bytes; raises as `decode_mask`, with `where`, and as `numbered`."""
        return self.numbered(where, numbers_of(where, data, self.colours))

    def numbered(self, where: str, mask: Mask) -> Mask:
        """The classes of a file's numbers. UserError: some that are no class."""
        if self.table is not None:
            classes = np.array(self.table, np.int16)[mask]
            if (odd := mask[classes < 0]).size:
                raise UserError(f"{where} has the number {odd[0]}; {self.how}")
            mask = classes.astype(np.uint8)
        if (odd := mask[(mask >= len(self.names)) & (mask != IGNORED)]).size:
            raise UserError(
                f"{where} has the class {odd[0]}, but there are {len(self.names)}, 0 to "
                f"{len(self.names) - 1}; {self.how}"
            )
        return mask


def read_numbers(path: str, colours: Colours | None = None) -> Mask:
    """Reads the numbers in a mask file; raises as `decode_mask`, with the path."""
    try:
        return numbers_of(f"the mask {path}", storage.read(path), colours)
    except OSError as error:
        check_refused(error, path)
        raise UserError(
            f"{path} could be listed but not read ({error.strerror}): did the folder change?"
        ) from None


def numbers_of(where: str, data: bytes, colours: Colours | None) -> Mask:
    """The numbers in a mask's bytes; raises as `decode_mask`, with `where` in front."""
    try:
        return decode_mask(data, colours)
    except BadImage as error:
        raise BadImage(f"{where}: {error}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def few_numbers(numbers: Sequence[int]) -> str:
    """The first five, and how many more there are, for messages."""
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return ", ".join(map(str, numbers[:5])) + more


def spread(masks: Sequence[str]) -> tuple[str, ...]:
    """At most 64 of them."""
    chosen = np.unique(np.linspace(0, len(masks) - 1, min(len(masks), _SAMPLE)).astype(int))
    return tuple(masks[i] for i in chosen.tolist())


@functools.lru_cache(16)
def _occurring(masks: tuple[str, ...], versions: tuple[str, ...]) -> Bool[np.ndarray, "256"]:
    found = np.zeros(256, bool)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for values in pool.map(_numbers_in, masks):
            found[values] = True
    return found


def _numbers_in(path: str) -> np.ndarray:
    try:
        return np.unique(read_numbers(path))
    except BadImage:
        return np.zeros(0, np.uint8)  # which is said when the mask is read


def occurring(masks: Sequence[str], colours: Colours | None) -> Bool[np.ndarray, "256"]:
    """Which numbers occur in masks."""
    if colours is not None:  # all are known
        return np.isin(np.arange(256), list(colours.values()))
    return _occurring(tuple(masks), tuple(map(storage.version, masks)))


def palette_in(path: str) -> list[tuple[int, int, int]]:
    """The colours of an indexed mask; none of another, or of one that cannot be read."""
    try:
        return palette_of(storage.read(path)) or []
    except (UserError, OSError):
        return []  # which is said when the mask is read


def own_palette(path: str, classes: Classes) -> Palette | None:
    """The colours of an indexed mask, if it has one for each class, and all differ."""
    found = palette_in(path)
    table = range(256) if classes.table is None else classes.table
    chosen = [found[n] for n in map(table.index, range(len(classes.names))) if n < len(found)]
    return tuple(chosen) if len(set(chosen)) == len(classes.names) else None
