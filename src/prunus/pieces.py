"""A SentencePiece model (`tokenizer.model`) with some of its pieces alone.

It is a protocol buffer whose n-th field 1 is the piece of id n; the other fields are settings, which stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator

from prunus.errors import BadCheckpoint

PIECE = 1
NUMBER, WITH_LENGTH = 0, 2
FIXED = {1: 8, 5: 4}
"""How a field is stored: as a number, as a length and so many bytes, or in so many bytes."""


def kept(model: bytes, ids: Container[int]) -> bytes:
    """The model with the pieces of these ids, which are numbered anew.

    Raises:
        BadCheckpoint: it is no protocol buffer.
    """
    count = itertools.count()
    return b"".join(field for number, field in _fields(model) if number != PIECE or next(count) in ids)


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each field."""
    place = 0
    while place < len(message):
        start = place
        key, place = _number(message, place)
        kind = key & 7
        if kind == WITH_LENGTH:
            length, place = _number(message, place)
            place += length
        elif kind == NUMBER:
            _, place = _number(message, place)
        else:
            place += FIXED.get(kind, len(message))
        if place > len(message):
            raise BadCheckpoint("tokenizer.model is damaged; download it again, or remove it: tokenizer.json will do")
        yield key >> 3, message[start:place]


def _number(message: bytes, place: int) -> tuple[int, int]:
    """Seven bits of it a byte, lowest first, and where it ends."""
    end = next((end for end in range(place, len(message)) if message[end] < 128), len(message))
    digits = message[place : end + 1]
    return sum((byte & 127) << 7 * power for power, byte in enumerate(digits)), end + 1
