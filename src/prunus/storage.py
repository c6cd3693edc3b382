"""Which tensors of a checkpoint's files make up which tensor of the model, and back: names may differ, and experts that
the model holds as one tensor lie apart in the files.

Shapes: E experts, O outputs and K inputs of a projection.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from prunus import weights
from prunus.families import Family
from prunus.weights import Entry, Parts


@dataclass(frozen=True)
class Place:
    """A tensor in a safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """Where a tensor of the model lies.

    Attributes:
        places: of each expert those whose rows, one behind the other, are its own; or a single one.
        stacked: a dimension for the experts goes ahead of the others.
    """

    places: tuple[tuple[Place, ...], ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.places[0]
        if not self.stacked:
            return first[0].shape
        return (len(self.places), sum(place.shape[0] for place in first), *first[0].shape[1:])

    def moved(self, folder: Path) -> Stored:
        """The same, after its files were moved to a folder."""
        moved = (tuple(replace(place, file=folder / place.file.name) for place in expert) for expert in self.places)
        return Stored(tuple(moved), self.stacked)

    def parts(self) -> Parts:
        """To be read; an expert at a time, or some rows."""
        own = [[weights.stored(place.file, place.name) for place in expert] for expert in self.places]
        if not self.stacked:
            return own[0][0]
        return Parts(self.shape, own[0][0].dtype, lambda: (_joined(expert)[None] for expert in own))


def _joined(expert: list[Parts]) -> Tensor:
    return torch.cat([piece.whole() for piece in expert])


def gathered(family: Family, found: list[Place]) -> dict[str, Stored]:
    """Tensors of the model by name, in the order of their first places.

    Raises:
        KeyError: an expert lacks a tensor that others have; its argument says which.
    """
    whole: dict[str, Stored] = {}
    apart: dict[str, dict[tuple[int, int], Place]] = {}
    prefix = _missing_prefix(family, found)
    for place in found:
        name = _known(family, place.name)
        layer, local = family.split(prefix + name)
        if any(fnmatch(local, pattern) for pattern in family.unread):
            continue
        own, number, expert = _origin(family, local)
        name = own if layer is None else f"{family.layer_prefix}{layer}.{own}"
        if expert is None:
            whole[name] = Stored(((place,),), stacked=False)
        else:
            whole.setdefault(name, Stored((), stacked=True))  # its place in the order
            apart.setdefault(name, {})[expert, number] = place
    whole |= {name: _stack(family, name, places) for name, places in apart.items()}
    return {unfolded: whole[name] for name, unfolded in _unfolded(family, whole).items()}


def may_be_tied(family: Family, stored: Mapping[str, Stored]) -> bool:
    """Whether the head, if it is stored at all, is the embedding."""
    head, embedding = (stored.get(f"{module}.weight") for module in (family.head, family.embedding))
    if head is None or embedding is None:
        return True
    mine, other = head.parts(), embedding.parts()
    return mine.shape == other.shape and all(map(torch.equal, mine.read(), other.read()))


def _known(family: Family, name: str) -> str:
    """The model's name of what has another prefix in a checkpoint."""
    if name.startswith(tuple(here for here, _ in family.stored_prefixes)):
        return name
    fitting = [(here, stored) for here, stored in family.stored_prefixes if name.startswith(stored)]
    here, stored = max(fitting, key=lambda pair: len(pair[1]), default=("", ""))
    return here + name.removeprefix(stored)


def _written(family: Family, name: str) -> str:
    """The other way round."""
    fitting = ((here, stored) for here, stored in family.stored_prefixes if name.startswith(here))
    here, stored = next(fitting, ("", ""))
    return stored + name.removeprefix(here)


def _missing_prefix(family: Family, found: list[Place]) -> str:
    """What a checkpoint of the body alone, without the head, leaves out of every name."""
    prefix = f"{family.embedding.partition('.')[0]}."
    bare = any(prefix + place.name == f"{family.embedding}.weight" for place in found)
    return prefix if bare else ""


def _stack(family: Family, name: str, places: Mapping[tuple[int, int], Place]) -> Stored:
    layer, local = family.split(name)
    names = family.stored_as[local]
    count = 1 + max(expert for expert, _ in places)
    for expert in range(count):
        for number, pattern in enumerate(names):
            if (expert, number) not in places:
                raise KeyError(f"{family.layer_prefix}{layer}.{pattern.replace('*', str(expert))}")
    return Stored(tuple(tuple(places[expert, n] for n in range(len(names))) for expert in range(count)), stacked=True)


def _origin(family: Family, local: str) -> tuple[str, int, int | None]:
    """The model's name of a tensor, its number among those that are joined, and its expert."""
    for own, names in family.stored_as.items():
        for number, pattern in enumerate(names):
            if match := _compiled(pattern).fullmatch(local):
                return own, number, int(match[1]) if match.groups() else None
    return local, 0, None


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))


def _unfolded(family: Family, names: Iterable[str]) -> dict[str, str]:
    """Names in files → names in memory, where each branch is a layer of its own if the family folds them."""
    found = _branches(family, names)
    number = {branch: place for place, branch in enumerate(sorted(filter(None, set(found.values()))))}
    return {
        name: name if branch is None else f"{family.layer_prefix}{number[branch]}.{family.split(name)[1]}"
        for name, branch in found.items()
    }


def _folded(family: Family, names: Iterable[str]) -> dict[str, str]:
    """The inverse: a branch that comes later in a layer than the one before it is in the same layer."""
    found = _branches(family, names)
    layers: dict[tuple[int, int], int] = {}
    layer, last = -1, -1
    for branch in sorted(filter(None, set(found.values()))):
        layer, last = layer + (branch[1] <= last or layer < 0), branch[1]
        layers[branch] = layer
    return {
        name: name if branch is None else f"{family.layer_prefix}{layers[branch]}.{family.split(name)[1]}"
        for name, branch in found.items()
    }


def _branches(family: Family, names: Iterable[str]) -> dict[str, tuple[int, int] | None]:
    """Of each name its layer and the place of its branch among the family's; None outside the layers, and of families
    that do not fold them."""

    def branch(name: str) -> tuple[int, int] | None:
        layer, local = family.split(name)
        if layer is None or family.folding is None:
            return None
        parts = ((f"{branch.module}.", f"{branch.norm}.") for branch in family.branches)
        return layer, next(place for place, own in enumerate(parts) if local.startswith(own))

    return {name: branch(name) for name in names}


def scattered(family: Family, tensors: Mapping[str, Parts]) -> list[Entry]:
    """The model's tensors as they are written."""
    names = _folded(family, tensors)
    return [_entry(family, names[name], tensor) for name, tensor in tensors.items()]


def _entry(family: Family, name: str, tensor: Parts) -> Entry:
    layer, local = family.split(name)
    prefix = "" if layer is None else f"{family.layer_prefix}{layer}."
    names = [_written(family, prefix + pattern) for pattern in family.stored_as.get(local, (local,))]
    if "*" not in names[0]:
        return weights.entry(names[0], tensor)
    count, outputs, *rest = tensor.shape
    shape = (outputs // len(names), *rest)
    shapes = {name.replace("*", str(expert)): shape for expert in range(count) for name in names}

    def read() -> Iterator[Tensor]:
        return (piece for part in tensor.read() for expert in part for piece in expert.chunk(len(names)))

    return Entry(shapes, tensor.dtype, read)
