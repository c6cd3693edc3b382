"""Tensors in parts: weights are read, cut and written a few rows at a time, so that none has to be in memory whole."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

PART_BYTES = 64 * 1024**2
SHARD_BYTES = 4 * 1000**3
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights that can be cut, by their safetensors names."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Parts:
    """A tensor as parts along its first dimension.

    Attributes:
        read: gives them in order, anew at each call. A part may lie in a file that is mapped: it is not to be changed.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> Tensor:
        parts = list(self.read())
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(self.shape, dtype=self.dtype)

    def numbered(self) -> Iterator[tuple[slice, Tensor]]:
        """Each part with the rows that it holds."""
        start = 0
        for part in self.read():
            yield slice(start, start + len(part)), part
            start += len(part)


def of(tensor: Tensor | Parts) -> Parts:
    """A tensor in memory as one part."""
    return tensor if isinstance(tensor, Parts) else Parts(tuple(tensor.shape), tensor.dtype, lambda: iter((tensor,)))


def stored(file: Path, name: str) -> Parts:
    """A tensor of a safetensors file. The file is opened for each part anew: pages of a mapped file count as the
    process's memory until it is closed.

    Raises:
        KeyError: a type that is not in `DTYPES`.
    """
    with safe_open(file, framework="pt") as opened:
        found = opened.get_slice(name)
        shape, dtype = tuple(found.get_shape()), DTYPES[found.get_dtype()]
    if not shape:
        return of(_read(file, name, None))
    rows = max(1, PART_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))

    def read() -> Iterator[Tensor]:
        for start in range(0, shape[0], rows):
            yield _read(file, name, slice(start, start + rows))

    return Parts(shape, dtype, read)


def _read(file: Path, name: str, rows: slice | None) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        found: Tensor = opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows]
        return found


def cut(tensor: Parts, indices: Sequence[Tensor | None], then: Callable[[Tensor], Tensor] = lambda part: part) -> Parts:
    """What stays of a tensor.

    Args:
        indices: of each dimension, int64 ascending; None keeps all.
        then: on each part that stays; must not mix rows.
    """
    rows, *columns = indices or [None]
    shape = tuple(size if index is None else len(index) for size, index in zip(tensor.shape, indices, strict=True))

    def read() -> Iterator[Tensor]:
        for place, part in tensor.numbered():
            if rows is not None:
                here = rows[torch.searchsorted(rows, place.start) : torch.searchsorted(rows, place.stop)]
                if not len(here):
                    continue
                part = part.index_select(0, here - place.start)
            for dim, index in enumerate(columns, start=1):
                part = part if index is None else part.index_select(dim, index)
            yield then(part)

    return Parts(shape, tensor.dtype, read)


def write(folder: Path, tensors: Mapping[str, Parts]) -> None:
    """Safetensors shards, and their index where there are several.

    Raises:
        KeyError: a type that is not in `DTYPES`.
    """
    shards = _shards(tensors)
    for number, names in enumerate(shards, start=1):
        _write_shard(folder / _shard_name(number, len(shards)), {name: tensors[name] for name in names})
    if len(shards) > 1:
        numbered = enumerate(shards, start=1)
        weight_map = {name: _shard_name(number, len(shards)) for number, names in numbered for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def _shards(tensors: Mapping[str, Parts]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_shard(file: Path, tensors: Mapping[str, Parts]) -> None:
    """Length of the header, header, values: https://huggingface.co/docs/safetensors. The library itself wants all
    tensors of a file in memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for part in tensor.read():
                stream.write(part.contiguous().flatten().view(torch.uint8).numpy().data)
        assert stream.tell() == 8 + len(text) + end, "parts do not add up to their tensor"
