"""The memory that a container leaves, told from the kernel's files of both versions of control groups."""

import math
from pathlib import Path

import pytest

from prunus import containers, hardware


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Writes the files of a group; of the process by these lines."""
    monkeypatch.setattr(containers, "MOUNT", tmp_path / "mount")
    monkeypatch.setattr(containers, "GROUPS_OF_PROCESS", tmp_path / "cgroup")

    def write(lines: str, folders: dict[str, dict[str, str]]) -> None:
        (tmp_path / "cgroup").write_text(lines)
        for name, files in folders.items():
            folder: Path = tmp_path / "mount" / name
            folder.mkdir(parents=True, exist_ok=True)
            for file, content in files.items():
                (folder / file).write_text(content + "\n")

    return write


def second(limit: str, used: int, cache: int = 0) -> dict[str, str]:
    stat = f"anon {used - cache}\ninactive_file {cache}\nactive_file 0"
    return {"memory.max": limit, "memory.current": str(used), "memory.stat": stat}


def first(limit: int, used: int, cache: int = 0) -> dict[str, str]:
    stat = f"cache {cache}\ntotal_inactive_file 0\ntotal_active_file {cache}"
    return {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(used), "memory.stat": stat}


@pytest.mark.parametrize(
    ("lines", "folders", "expected"),
    [
        ("0::/", {"": {"cgroup.procs": "1"}}, math.inf),  # a machine's root has no limit
        ("0::/", {"": second("8000", 3000, 1000)}, 6000),
        ("0::/job/step", {"job/step": second("max", 10), "job": second("5000", 1000)}, 4000),
        ("0::/job/step", {"job/step": second("2000", 500), "job": second("5000", 1000)}, 1500),
        ("3:cpu,cpuacct:/\n2:memory:/docker/ab\n0::/", {"memory": first(8000, 5000, 500)}, 3500),
        ("2:memory:/docker/ab", {"memory/docker/ab": first(900, 1000), "memory": first(2**63 - 4096, 0)}, 0),
        ("3:cpu:/", {}, math.inf),
    ],
)
def test_the_tightest_limit_counts_and_page_cache_is_free(group, lines, folders, expected):
    group(lines, folders)
    assert containers.free_memory() == expected


def test_without_such_files_nothing_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "GROUPS_OF_PROCESS", tmp_path / "missing")
    assert containers.free_memory() == math.inf


def test_plans_keep_to_it(monkeypatch):
    monkeypatch.setattr(hardware, "device", lambda: hardware.torch.device("cpu"))
    monkeypatch.setattr(containers, "free_memory", lambda: 5000)
    assert hardware.free_memory() == 5000
