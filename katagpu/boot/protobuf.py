"""The wire format of Protocol Buffers, for messages of a few plain fields.

https://protobuf.dev/programming-guides/encoding/: a field is a key (number and wire type) and a
value. A message type is known to its caller only; fields that it does not ask for are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from katagpu.errors import StepError

Value = int | bytes
T = TypeVar("T", int, bytes)
VARINT, I64, BYTES, I32 = 0, 1, 2, 5


def encode(fields: Mapping[int, int | bool | str | bytes]) -> bytes:
    """A message: integers (not negative), booleans, strings, and bytes or nested messages.

    Fields that have their default value are left out, as proto3 does.
    """
    out = bytearray()
    for number, value in fields.items():
        if not value:
            continue
        if isinstance(value, int):
            out += _varint(number << 3 | VARINT) + _varint(int(value))
        else:
            data = value.encode() if isinstance(value, str) else value
            out += _varint(number << 3 | BYTES) + _varint(len(data)) + data
    return bytes(out)


def decode(data: bytes) -> dict[int, list[Value]]:
    """The values of a message by field number; fixed-size fields are integers.

    Raises `StepError` when the bytes are no message.
    """
    found: dict[int, list[Value]] = {}
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, kind = key >> 3, key & 7
        value: Value
        if kind == VARINT:
            value, at = _read_varint(data, at)
        else:
            if kind == BYTES:
                size, at = _read_varint(data, at)
            elif kind in (I64, I32):
                size = 8 if kind == I64 else 4
            else:
                raise StepError(f"a protobuf field of the unknown wire type {kind}")
            if not number or at + size > len(data):
                raise StepError("a protobuf message is cut off")
            value = data[at:at + size]
            at += size
            if kind != BYTES:
                value = int.from_bytes(value, "little")
        found.setdefault(number, []).append(value)
    return found


def text(fields: Mapping[int, list[Value]], number: int) -> str:
    """A string field, empty by default."""
    return (strings(fields, number) or [""])[-1]


def strings(fields: Mapping[int, list[Value]], number: int) -> list[str]:
    """A repeated string field. Raises `StepError` when it is of another type."""
    try:
        return [value.decode() for value in _of(fields, number, bytes)]
    except UnicodeDecodeError:
        raise StepError(f"protobuf field {number} is no UTF-8 text") from None


def integer(fields: Mapping[int, list[Value]], number: int) -> int:
    """An integer, boolean or enumeration, 0 by default."""
    return (_of(fields, number, int) or [0])[-1]


def message(fields: Mapping[int, list[Value]], number: int) -> dict[int, list[Value]]:
    """A nested message, empty by default; one that comes in parts is put together."""
    return decode(b"".join(_of(fields, number, bytes)))


def raw(fields: Mapping[int, list[Value]], number: int) -> bytes:
    """A bytes field, empty by default."""
    return (_of(fields, number, bytes) or [b""])[-1]


def _of(fields: Mapping[int, list[Value]], number: int, kind: type[T]) -> list[T]:
    values = fields.get(number, [])
    found = [value for value in values if isinstance(value, kind)]
    if len(found) != len(values):
        raise StepError(f"protobuf field {number} is not of the expected type")
    return found


def _varint(value: int) -> bytes:
    if value < 0:
        raise ValueError("negative integers are not needed here")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A varint and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise StepError("a protobuf message is cut off")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise StepError("a protobuf integer of more than 64 bits")
