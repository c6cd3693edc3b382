"""Tensors in parts: weights are read, cut and written a few rows at a time, so that none has to be in memory whole."""

from __future__ import annotations

import functools
import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunus.errors import BadCheckpoint

PART_BYTES = 8 * 1024**2
"""Reading 64 MiB at once makes a cut a quarter slower: disk, cut and disk take turns."""
AHEAD_BYTES = 8 * PART_BYTES
"""How much is read before it is asked for."""
CACHED_SHARE = 0.5
"""Of the machine's memory; of a larger model nothing stays in the page cache."""
SHARD_BYTES = 4 * 1000**3
SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights that can be cut, by their safetensors names."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Parts:
    """A tensor as parts along its first dimension.

    Attributes:
        read: gives them in order, anew at each call.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> Tensor:
        whole = torch.empty(self.shape, dtype=self.dtype)
        start = 0
        for part in self.read():
            if part.shape == whole.shape:
                return part
            whole[start : start + len(part)] = part
            start += len(part)
        return whole

    def numbered(self) -> Iterator[tuple[slice, Tensor]]:
        """Each part with the rows that it holds; a single number as one row."""
        start = 0
        for part in self.read():
            rows = len(part) if self.shape else 1
            yield slice(start, start + rows), part
            start += rows


def of(tensor: Tensor | Parts) -> Parts:
    """A tensor in memory as one part."""
    return tensor if isinstance(tensor, Parts) else Parts(tuple(tensor.shape), tensor.dtype, lambda: iter((tensor,)))


def stored(file: Path, name: str) -> Parts:
    """A tensor of a safetensors file, by plain reads: the pages of a mapped file would count as the process's memory,
    and come slower from a disk.

    Raises:
        KeyError: no such tensor, or a type that is not in `DTYPES`. BadCheckpoint, when read: a file that is cut off.
    """
    header, start = _header(file)
    shape, dtype = tuple(header[name]["shape"]), DTYPES[header[name]["dtype"]]
    start += header[name]["data_offsets"][0]
    row = math.prod(shape[1:]) * dtype.itemsize
    rows, count = max(1, PART_BYTES // max(1, row)), shape[0] if shape else 1

    def read() -> Iterator[Tensor]:
        with file.open("rb") as stream:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            stream.seek(start)
            for first in range(0, count, rows):
                some = min(rows, count - first)
                part = torch.empty(some * row, dtype=torch.uint8)
                if stream.readinto(part.numpy().data) != len(part):
                    raise BadCheckpoint(f"{file} is shorter than its header says; download it again")
                if _fills_memory(file.parent):
                    os.posix_fadvise(stream.fileno(), stream.tell() - len(part), len(part), os.POSIX_FADV_DONTNEED)
                yield part.view(dtype).view(some, *shape[1:]) if shape else part.view(dtype).view(())

    return Parts(shape, dtype, read)


@functools.cache
def _fills_memory(folder: Path) -> bool:
    """Whether a model would take up much of the page cache. Then what was read is dropped at once: to make room for it
    later takes the system a third of the time of a cut."""
    if not hasattr(os, "posix_fadvise"):
        return False
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) > CACHED_SHARE * memory


def names(file: Path) -> list[str]:
    """The tensors of a safetensors file, in the order in which they lie there."""
    header, _ = _header(file)
    return sorted(header.keys() - {METADATA}, key=lambda name: header[name]["data_offsets"])


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where their values begin."""
    state = file.stat()
    return _read_header(file, state.st_ino, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=16)
def _read_header(file: Path, *_: int) -> tuple[dict[str, Any], int]:
    """Once for as long as the file stays the same: every tensor asks for it, and it may list thousands of experts."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(length)), 8 + length


def cut(tensor: Parts, indices: Sequence[Tensor | None], then: Callable[[Tensor], Tensor] = lambda part: part) -> Parts:
    """What stays of a tensor.

    Args:
        indices: of each dimension, int64 ascending; None keeps all. Behind the first also one row for each that stays
            of the first, where they differ.
        then: on each part that stays; must not mix rows.
    """
    rows, *columns = indices or [None]
    shape = tuple(size if index is None else index.shape[-1] for size, index in zip(tensor.shape, indices, strict=True))

    def read() -> Iterator[Tensor]:
        for place, part in tensor.numbered():
            stays = place
            if rows is not None:
                stays = slice(*(int(torch.searchsorted(rows, end)) for end in (place.start, place.stop)))
                if stays.start == stays.stop:
                    continue
                part = part.index_select(0, rows[stays] - place.start)
            for dim, index in enumerate(columns, start=1):
                if index is not None:
                    part = _take(part, dim, index if index.ndim == 1 else index[stays])
            yield then(part)

    return Parts(shape, tensor.dtype, read)


def _take(part: Tensor, dim: int, index: Tensor) -> Tensor:
    """index_select on a CPU, but for the first dimension by NumPy, which takes a fifth of the time; it knows no
    bfloat16, so the values are read as whole numbers."""
    if index.ndim == 2:
        return torch.stack([_take(row, dim - 1, own) for row, own in zip(part, index, strict=True)])
    if dim == 0:
        return part.index_select(0, index)
    shape = (*part.shape[:dim], len(index), *part.shape[dim + 1 :])
    out, numbers = torch.empty(shape, dtype=part.dtype), _INTEGERS[part.dtype.itemsize]
    np.take(part.view(numbers).numpy(), index.numpy(), axis=dim, out=out.view(numbers).numpy(), mode="clip")
    return out


def _ahead(parts: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same parts, some of them made by a thread while the one before is used."""
    with ThreadPoolExecutor(1) as thread:
        pending = deque([thread.submit(next, parts, None)])
        while (part := pending.popleft().result()) is not None:
            wanted = max(1, AHEAD_BYTES // max(1, part.nbytes))
            pending.extend(thread.submit(next, parts, None) for _ in range(min(wanted, 8) - len(pending)))
            yield part


@dataclass(frozen=True)
class Entry:
    """Tensors that are written together.

    Attributes:
        shapes: name → shape, in the order in which `read` gives their values.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    read: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(map(math.prod, self.shapes.values())) * self.dtype.itemsize


def entry(name: str, tensor: Parts) -> Entry:
    """A tensor that is written as it is."""
    return Entry({name: tensor.shape}, tensor.dtype, tensor.read)


def write(folder: Path, entries: Sequence[Entry]) -> None:
    """Safetensors shards, and their index where there are several.

    Raises:
        KeyError: a type that is not in `DTYPES`.
    """
    shards = _shards(entries)
    for number, shard in enumerate(shards, start=1):
        _write_shard(folder / _shard_name(number, len(shards)), shard)
    if len(shards) > 1:
        numbered = enumerate(shards, start=1)
        weight_map = {
            name: _shard_name(number, len(shards))
            for number, shard in numbered
            for entry in shard
            for name in entry.shapes
        }
        total = sum(entry.nbytes for entry in entries)
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def _shards(entries: Sequence[Entry]) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_shard(file: Path, entries: Sequence[Entry]) -> None:
    """Length of the header, header, values: https://huggingface.co/docs/safetensors. The library itself wants all
    tensors of a file in memory."""
    header: dict[str, object] = {METADATA: {"format": "pt"}}
    end = 0
    for entry in entries:
        for name, shape in entry.shapes.items():
            begin, end = end, end + math.prod(shape) * entry.dtype.itemsize
            header[name] = {"dtype": _NAMES[entry.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for part in _ahead(part.contiguous() for entry in entries for part in entry.read()):
            stream.write(part.flatten().view(torch.uint8).numpy().data)
        assert stream.tell() == 8 + len(text) + end, "parts do not add up to their tensor"
