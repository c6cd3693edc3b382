"""A large file's digest is computed once, and anew when the file is another; folders appear whole."""

import hashlib
import os
from pathlib import Path

import pytest

from prunus import files


def test_a_digest_is_kept_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "REMEMBERED_BYTES", 4)
    computed: list[Path] = []
    compute = files._sha256
    monkeypatch.setattr(files, "_sha256", lambda file: computed.append(file) or compute(file))
    file = tmp_path / "weights"
    for content in (b"first", b"other"):
        file.write_bytes(content)
        os.utime(file, ns=(len(computed), len(computed)))  # two writes may fall into one tick of the clock
        for _ in range(2):
            assert files.sha256(file) == hashlib.sha256(content).digest()
    assert len(computed) == 2
    (tmp_path / "copy").write_bytes(b"other")
    files.sha256(tmp_path / "copy")
    assert len(computed) == 3


def test_a_small_file_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "weights").write_bytes(b"few")
    files.sha256(tmp_path / "weights")
    assert not (tmp_path / "cache").exists()


def test_a_folder_appears_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with files.atomic_folder(tmp_path / "out") as partial:
        (partial / "weights").write_bytes(b"few")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "weights").read_bytes() == b"few"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
