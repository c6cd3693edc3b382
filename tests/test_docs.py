"""What the documentation says was measured is what the rows of the benchmarks hold."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "rows" / "smollm2-135m"


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("share", sorted(path.name for path in ROWS.iterdir() if path.is_dir()))
def test_tables_of_methods_are_made_of_their_rows(share):
    quality_rows = script("quality_rows")
    teacher = quality_rows.read(ROWS / "teacher.json")
    assert quality_rows.table(ROWS / share, teacher) in (ROOT / "docs" / "quality.md").read_text()
