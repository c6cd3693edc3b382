"""What a benchmark has measured: a JSON file a row, which outlives the runs, so that nothing is measured twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prunus import hardware
from prunus.files import atomic_file


def kept(file: Path, measure: Callable[[], Any]) -> Any:
    """What the file holds; measured and written first, where there is none."""
    if not file.exists():
        write(file, measure())
    return json.loads(file.read_text())


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")


def conditions() -> dict[str, Any]:
    """What a row was measured with."""
    return {"threads": torch.get_num_threads(), "dtype": str(hardware.compute_dtype())}
