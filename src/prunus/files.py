"""Writing that leaves nothing half-written: beside, then renamed; and a full disk as a clear error."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from prunus.errors import BadOutput

REMEMBERED_BYTES = 2 * 10**8
"""Files from which on a digest is worth keeping: a tenth of a second."""


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: written beside, then renamed.

    Raises:
        BadOutput: the disk is full.
    """
    folder = folder.resolve()  # "." has no name, and a link cannot be replaced by what it stands for
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with full_disk_is_an_error(folder):
            partial.mkdir(parents=True)
            yield partial
            if folder.exists():
                shutil.rmtree(folder)
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def share(folder: Path, to: Path) -> None:
    """The same files under another name: links, or copies where the disk knows none."""
    with atomic_folder(to) as partial:
        shutil.copytree(folder, partial, copy_function=_link, dirs_exist_ok=True)


def copy_matching(folder: Path, to: Path, patterns: Iterable[str]) -> None:
    """Copy what files match a pattern, to the same place in the other folder."""
    for file in sorted({found for pattern in patterns for found in folder.glob(pattern) if found.is_file()}):
        place = to / file.relative_to(folder)
        place.parent.mkdir(exist_ok=True)
        shutil.copy(file, place)


def _link(file: str, to: str) -> None:
    try:
        os.link(file, to)
    except OSError:
        shutil.copy2(file, to)


@contextlib.contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A file that appears whole or not at all. Raises BadOutput when the disk is full."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with full_disk_is_an_error(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk_is_an_error(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error).lower()
        if not full:
            raise
        raise BadOutput(
            f"{target}: the disk is full; nothing was left half-written. Free some space and run the command again."
        ) from error


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prunus"


def sha256(file: Path) -> bytes:
    """Of a file's bytes. Of a large one it is computed once and kept, until its size, time or inode is another."""
    state = file.stat()
    if state.st_size < REMEMBERED_BYTES:
        return _sha256(file)
    key = f"{file.resolve()}|{state.st_size}|{state.st_mtime_ns}|{state.st_ino}"
    kept = cache_folder() / "sha256" / hashlib.sha256(key.encode()).hexdigest()
    if not kept.exists():
        digest = _sha256(file)
        # Where there is no place to keep it, it is computed again.
        with contextlib.suppress(OSError, BadOutput), atomic_file(kept) as partial:
            partial.write_text(digest.hex())
        return digest
    return bytes.fromhex(kept.read_text())


def _sha256(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def save_file(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file that others may read, as far as the umask lets them; the library makes it private."""
    safetensors.torch.save_file(dict(tensors), file, metadata=dict(metadata))
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
