"""Tensors in parts are the tensors: read, cut and written by parts of any size."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from prunus import weights
from prunus.errors import BadCheckpoint
from prunus.weights import Parts

TENSORS = {
    "matrix": torch.randn(13, 6).bfloat16(),
    "vector": torch.randn(9),
    "kernel": torch.randn(5, 1, 4).half(),
    "number": torch.tensor(2.5, dtype=torch.float64),
}
INDICES = [None, torch.tensor([0]), torch.tensor([0, 3, 4, 12]), torch.arange(13)]


@pytest.fixture(params=[1, 24, 10**6], ids="parts of {} bytes".format, autouse=True)
def part_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PART_BYTES", request.param)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", TENSORS)
def test_what_is_stored(file: Path, name: str) -> None:
    parts, expected = weights.stored(file, name), TENSORS[name]
    assert (parts.shape, parts.dtype, parts.nbytes) == (tuple(expected.shape), expected.dtype, expected.nbytes)
    for _ in range(2):
        assert torch.equal(parts.whole(), expected)


@pytest.mark.parametrize("rows", INDICES)
@pytest.mark.parametrize("columns", [None, torch.tensor([1, 4])])
def test_what_stays(file: Path, rows: Tensor | None, columns: Tensor | None) -> None:
    parts = weights.cut(weights.stored(file, "matrix"), [rows, columns], lambda part: part * 2)
    expected = TENSORS["matrix"]
    for dim, index in enumerate((rows, columns)):
        expected = expected if index is None else expected.index_select(dim, index)
    assert torch.equal(parts.whole(), expected * 2)
    assert parts.shape == tuple(expected.shape)
    assert all(torch.equal(expected[place] * 2, part) for place, part in parts.numbered())


@pytest.mark.parametrize("shard_bytes", [10**6, 100])
def test_what_is_written(file: Path, tmp_path: Path, shard_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", shard_bytes)
    (tmp_path / "out").mkdir()
    weights.write(tmp_path / "out", [weights.entry(name, weights.stored(file, name)) for name in TENSORS])
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    found = {name: tensor for each in files for name, tensor in safetensors.torch.load_file(each).items()}
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    index = tmp_path / "out" / weights.INDEX
    assert index.exists() == (len(files) > 1) == (shard_bytes == 100)
    if index.exists():
        listed = json.loads(index.read_text())
        assert listed["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
        assert set(listed["weight_map"].values()) == {each.name for each in files}


def test_a_transposed_tensor_is_written_in_order(tmp_path: Path) -> None:
    weights.write(tmp_path, [weights.entry("turned", weights.of(TENSORS["matrix"].T))])
    assert torch.equal(weights.stored(tmp_path / "model.safetensors", "turned").whole(), TENSORS["matrix"].T)


def test_parts_that_do_not_add_up_are_no_tensor(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="do not add up"):
        weights.write(tmp_path, [weights.entry("short", Parts((3,), torch.float32, lambda: iter([torch.ones(2)])))])


def test_a_header_is_read_once_until_the_file_changes(file: Path, tmp_path: Path) -> None:
    """With those of 3072 tensors it took 37 ms a tensor."""
    weights._read_header.cache_clear()
    assert len([weights.stored(file, name) for name in weights.names(file)]) == len(TENSORS)
    assert weights._read_header.cache_info().misses == 1
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"matrix": torch.ones(2, 2)}, other)
    other.replace(file)
    assert weights.names(file) == ["matrix"]
    assert weights.stored(file, "matrix").shape == (2, 2)


def test_a_file_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    weights.write(tmp_path, [weights.entry("vector", weights.of(TENSORS["vector"]))])
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    parts = weights.stored(file, "vector")
    with pytest.raises(BadCheckpoint, match="shorter than its header says"):
        parts.whole()


def test_a_model_that_fills_the_memory_reads_the_same(tmp_path, monkeypatch):
    values = torch.randn(1000, 64)
    safetensors.torch.save_file({"a": values}, tmp_path / "model.safetensors")
    dropped = []
    monkeypatch.setattr(weights, "PART_BYTES", 64 * 1024)
    monkeypatch.setattr(weights, "CACHED_SHARE", 0.0)
    monkeypatch.setattr(weights.os, "posix_fadvise", lambda *call: dropped.append(call))
    assert torch.equal(weights.stored(tmp_path / "model.safetensors", "a").whole(), values)
    drops = [(start, length) for _, start, length, advice in dropped if advice == os.POSIX_FADV_DONTNEED]
    assert sum(length for _, length in drops) == values.nbytes
    assert len(drops) == 4
