"""Reads and writes `tf.train.Example`, the message in the records of TFDS and `prepare`.

In protocol buffers' encoding, features (field 1) is a map; its entries (field 1) are a name (1)
and a feature (2): a list of bytes (1), floats (2) or integers (3).
"""

import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


def parse_example(data: bytes) -> dict[str, bytes | int | None]:
    """The first value of each feature of a serialised `tf.train.Example`; None if empty or floats.

    Raises:
      ValueError: the bytes are not such a message.
    """
    found: dict[str, bytes | int | None] = {}
    try:
        for _, features in _fields(data, 0, len(data)):
            for _, entry in _fields(data, *features):
                name, value = "", None
                for number, part in _fields(data, *entry):
                    if number == 1:
                        name = data[slice(*part)].decode()
                    else:
                        value = _first_value(data, part)
                found[name] = value
    except (TypeError, IndexError):  # a number instead of a message, so no (start, end); or cut off
        raise ValueError("no tf.train.Example") from None
    return found


def _first_value(data: bytes, feature: tuple[int, int]) -> bytes | int | None:
    for kind, values in _fields(data, *feature):
        for _, value in _fields(data, *values):
            if kind == 1:
                return data[slice(*value)]
            if kind == 3 and (isinstance(value, int) or value[0] < value[1]):
                # One by one, or packed.
                number = value if isinstance(value, int) else _varint(data, value[0])[0]
                return number - 2**64 if number >= 2**63 else number
    return None


def feature_values(data: bytes, name: str) -> list[bytes] | list[float] | list[int]:
    """All values of a feature of a serialised `tf.train.Example`; [] if it is missing.

    Raises:
      ValueError: the bytes are not such a message.
    """
    found, key = [], name.encode()
    try:
        for _, features in _fields(data, 0, len(data)):
            for _, entry in _fields(data, *features):
                parts = dict(_fields(data, *entry))
                if 2 in parts and data[slice(*parts.get(1, (0, 0)))] == key:
                    found = list(_values(data, parts[2]))
    except (TypeError, IndexError):  # as above
        raise ValueError("no tf.train.Example") from None
    return found


def _values(data: bytes, feature: tuple[int, int]) -> Iterator[bytes | float | int]:
    for kind, values in _fields(data, *feature):
        for _, value in _fields(data, *values):
            if kind == 1:
                yield data[slice(*value)]
            elif kind == 2:  # one by one and packed look the same
                yield from np.frombuffer(data[slice(*value)], "<f4").tolist()
            elif isinstance(value, int):
                yield _signed(value)
            else:
                at, end = value
                while at < end:
                    number, at = _varint(data, at)
                    yield _signed(number)
                if at > end:
                    raise ValueError("a tf.train.Example that is cut off")


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def _fields(data: bytes, at: int, end: int) -> list[tuple[int, Any]]:
    """The fields of a message in data[at:end]: its number, and a number or a (start, end)."""
    fields = []
    while at < end:
        tag, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at)
        kind = tag & 7
        if kind in (1, 5):  # a double or a float
            value = (at, at + (8 if kind == 1 else 4))
            at = value[1]
        elif kind in (0, 2):
            value, at = _varint(data, at)
            if kind == 2:
                value, at = (at, at + value), at + value
        else:
            raise ValueError("no tf.train.Example")
        if at > end:
            raise ValueError("a tf.train.Example that is cut off")
        fields.append((tag >> 3, value))
    return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("no tf.train.Example")


def write_example(features: Mapping[str, bytes | int]) -> bytes:
    """Serialises a `tf.train.Example`, its features sorted by name as TFDS writes them."""
    entries = io.BytesIO()
    for name in sorted(features):
        value = features[name]
        if isinstance(value, bytes):
            feature = _message(1, _message(1, value))
        else:
            feature = _message(3, _message(1, _number(value)))
        entries.write(_message(1, _message(1, name.encode()) + _message(2, feature)))
    return _message(1, entries.getvalue())


def _message(field: int, data: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _number(len(data)) + data


def _number(value: int) -> bytes:
    value %= 2**64
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
