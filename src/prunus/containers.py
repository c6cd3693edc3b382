"""What a container, or a scheduler's limit, leaves of the machine's memory: psutil tells of the whole machine only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

GROUPS_OF_PROCESS = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


class _Version(NamedTuple):
    """Of the kernel's control groups: where they are mounted, and how their files and values are called."""

    mount: str
    limit: str
    usage: str
    prefix: str


VERSIONS = {
    "": _Version("", "memory.max", "memory.current", ""),
    "memory": _Version("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}
"""By the controller that a line of `GROUPS_OF_PROCESS` names; version 2 names none."""


def free_memory() -> float:
    """Bytes that the groups of this process and those above them leave; infinite where nothing is limited."""
    if not GROUPS_OF_PROCESS.is_file():
        return math.inf
    lines = [line.split(":", 2) for line in GROUPS_OF_PROCESS.read_text().splitlines()]
    found = [
        (VERSIONS[controller], path)
        for _, controllers, path in lines
        for controller in controllers.split(",")
        if controller in VERSIONS
    ]
    return min((_left(version, path) for version, path in found), default=math.inf)


def _left(version: _Version, path: str) -> float:
    """Inside a container the path may be that on its host, and what is mounted the container's own group."""
    top = MOUNT / version.mount
    group = top / path.lstrip("/")
    groups = [group, *(parent for parent in group.parents if parent.is_relative_to(top))]
    return min(_left_by(each, version) for each in groups)


def _left_by(group: Path, version: _Version) -> float:
    limit, usage, stat = (group / name for name in (version.limit, version.usage, "memory.stat"))
    if not all(file.is_file() for file in (limit, usage, stat)) or limit.read_text().strip() == "max":
        return math.inf
    values = dict(line.split() for line in stat.read_text().splitlines())
    cache = sum(int(values.get(f"{version.prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return max(0, int(limit.read_text()) - (int(usage.read_text()) - cache))  # cache makes room when asked
