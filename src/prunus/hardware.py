"""What this machine computes fast, and how to keep its allocator out of the way."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from prunus import attention, containers, faster, norms, rotary

MATMUL_SIZE = 1024
_sharers = ContextVar("sharers", default=1)

Model = TypeVar("Model", bound=torch.nn.Module)


@functools.cache
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def compute_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, float32 elsewhere (bf16 emulation is slower than fp32)."""
    if device().type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def fast_dtype(stored: torch.dtype) -> torch.dtype:
    """`stored`, or float32 where it is a short type that this machine multiplies more slowly: bfloat16 on most CPUs,
    float16 on all of them."""
    if stored not in (torch.bfloat16, torch.float16):
        return stored
    native = stored == compute_dtype() or (stored == torch.float16 and device().type == "cuda")
    return stored if native else torch.float32


def free_memory() -> int:
    """Free bytes of the device, after what the allocators keep for nobody was given back; of `shared` memory a part."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        return free // _sharers.get()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(min(psutil.virtual_memory().available, containers.free_memory())) // _sharers.get()


@contextlib.contextmanager
def shared(processes: int) -> Iterator[None]:
    """Inside, so many processes, each as large as this one, begin on this device at once."""
    before = _sharers.set(processes)
    try:
        yield
    finally:
        _sharers.reset(before)


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of returning them to the kernel.

    A training step frees and takes the same hundreds of megabytes again; with glibc's defaults each time costs a page
    fault per 4 KiB, up to half of the step. Without glibc (macOS, musl) there is nothing to tell.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def place(model: Model, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Model:
    """`model.to(device)`, and its parameters in this type, with the fastest attention, norms and rotary embeddings."""
    torch.nn.Module.to(model, device=device)
    if dtype is not None:  # buffers stay as transformers keeps them, rotary frequencies in float32
        for weight in model.parameters():
            if weight.is_floating_point():
                weight.data = weight.data.to(dtype)
    attention.install(model)
    norms.install(model)
    rotary.install(model)
    return model


@contextlib.contextmanager
def plain(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Inside, these models run as transformers alone would run them."""
    models = list(models)
    with attention.uninstalled(models), faster.uninstalled(models):
        yield


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b to float32 precision, whatever the dtype of a and b.

    A CPU's bfloat16 GEMM sums in float32 but rounds its result to 8 bits. A second one that subtracts the first result
    inside its float32 sum gives what was rounded off, so the two together are exact to about 2⁻¹⁸, and on hardware
    that multiplies bfloat16 natively they are faster than one float32 GEMM.
    """
    if a.dtype == torch.bfloat16 and a.device.type == "cpu" and compute_dtype() == torch.bfloat16:
        rounded = a @ b
        return torch.addmm(rounded, a, b, beta=-1).float() + rounded
    return a.float() @ b.float()


def matmul_flops_per_second(dtype: torch.dtype, *, seconds: float = 0.5) -> float:
    """Rate of a square GEMM on this machine now, best of the tries that fit in `seconds`."""
    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device()).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * MATMUL_SIZE**3 / best
