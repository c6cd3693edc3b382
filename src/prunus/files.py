"""Writing that leaves nothing half-written: beside, then renamed; and a full disk as a clear error."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from prunus.errors import BadOutput


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: written beside, then renamed.

    Raises:
        BadOutput: the disk is full.
    """
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


def save_file(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file that others may read, as far as the umask lets them; the library makes it private."""
    safetensors.torch.save_file(dict(tensors), file, metadata=dict(metadata))
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
