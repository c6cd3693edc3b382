"""Documents to train on and documents to judge by: a held-out file, or a share of the training text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

from prunus.documents import Render, documents, is_held_out, mixed
from prunus.recipe import Data, Source

FEW_DOCUMENTS = 100
"""With fewer, the tail of each is held out; a share of so few documents could be none."""


def sides(data: Data, render: Render | None) -> dict[str, Iterator[str]]:
    """Documents of `train` and `heldout`. A source that is split gives them none in common."""
    if data.heldout is None:
        return {
            name: mixed([(_side(part, data, render, held_out=held_out), part.weight) for part in data.sources])
            for name, held_out in (("train", False), ("heldout", True))
        }
    return {
        "train": mixed([(_all(part, render), part.weight) for part in data.sources]),
        "heldout": documents(data.heldout, text_field=data.text_field, render=render),
    }


def _all(part: Source, render: Render | None) -> Iterator[str]:
    return documents(part.source, text_field=part.text_field, render=render)


def _side(part: Source, data: Data, render: Render | None, *, held_out: bool) -> Iterator[str]:
    """The documents of one side of the split of a training source."""
    docs, share = _all(part, render), data.heldout_share
    first = list(islice(docs, FEW_DOCUMENTS))
    if len(first) < FEW_DOCUMENTS:
        for document in first:
            border = _border(document, int(len(document) * (1 - share)))
            yield document[border:] if held_out else document[:border]
    else:
        yield from (document for document in chain(first, docs) if is_held_out(document, share=share) == held_out)


def _border(document: str, wanted: int) -> int:
    """Where to divide a document: at the end of a line, or else of a word, not far before the character wanted."""
    found = (document.rfind(mark, wanted - wanted // 10, wanted) + 1 for mark in ("\n", " "))
    return next(filter(None, found), wanted)
