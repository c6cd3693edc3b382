"""What a benchmark has measured: a JSON file a row, which outlives the runs, so that nothing is measured twice."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from prunus import hardware
from prunus.files import atomic_file


def kept(file: Path, measure: Callable[[], Any]) -> Any:
    """What the file holds; measured and written first, where there is none."""
    if not file.exists():
        write(file, measure())
    return read(file)


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")


def conditions() -> dict[str, Any]:
    """What a row was measured with."""
    return {"threads": torch.get_num_threads(), "dtype": str(hardware.compute_dtype())}


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table; the first line is its head."""
    head, *body = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def shapes(architectures: Iterable[str]) -> dict[str, str]:
    """Architecture → the axes in which they differ, as a table says it: 'layers 24, ffn 1200'."""
    found = {text: dict(axis.split("=") for axis in text.split(",")) for text in architectures}
    differ = {axis for shape in found.values() for axis in shape if len({each[axis] for each in found.values()}) > 1}
    return {
        text: ", ".join(f"{axis} {size}" for axis, size in shape.items() if axis in differ)
        for text, shape in found.items()
    }
