"""Forward KL of the output head: prunus.fused beside plain torch, at the sizes of SmolLM2-135M.

    python benchmarks/head_loss.py [--threads 1] [--memory]

Everything is measured in one run, the tries interleaved, because a shared machine drifts by a factor of two. "floor"
is the four GEMMs that no method avoids (two logits, dH, dW) in bf16; a time of 1.5 is 1.5 times that. "plain torch" is
what a 20-line distillation loop does: bf16 logits, .float(), log_softmax, autograd; its fp32 twin is `losses`. With one
thread, times are CPU time, so that neighbours on the machine count less. Linux only.

--memory: growth of the resident memory instead, at the vocabulary of Gemma 3 and 4096 tokens. What plain torch needs
there (some 20 GB) is a straight line through its growth at two smaller numbers of tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prunus import fused, hardware, losses, row_blocks
from prunus.head import Dense, Head

TOKENS, VOCAB, HIDDEN = 1024, 49152, 576
DISTANCE = 0.1  # of the student from its teacher, relative
TRIES = 5
GEMMA = 4096, 262144, 640
MEASURED_TOKENS = 256, 768


def make(tokens: int, vocab: int = VOCAB, width: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student hidden, student head, teacher hidden, teacher head, in bf16."""
    torch.manual_seed(0)
    teacher_hidden, teacher = torch.randn(tokens, width), torch.randn(vocab, width) * 0.15
    hidden = teacher_hidden + DISTANCE * torch.randn_like(teacher_hidden)
    student = teacher + DISTANCE * 0.15 * torch.randn_like(teacher)
    values = [value.bfloat16() for value in (hidden, student, teacher_hidden, teacher)]
    return values[0].requires_grad_(), values[1].requires_grad_(), values[2], values[3]


def ours(hidden: Tensor, student: Tensor, teacher_hidden: Tensor, teacher: Tensor) -> None:
    targets = Dense(teacher_hidden, Head(teacher))
    fused.divergence("forward_kl", hidden, Head(student), targets, num_tokens=len(hidden)).backward()


def ours_far(*inputs: Tensor) -> None:
    """The same with the student's logits computed apart from the teacher's, from the second row block on."""
    near, row_blocks.FAR = row_blocks.FAR, -1.0
    ours(*inputs)
    row_blocks.FAR = near


def plain_torch(hidden: Tensor, student: Tensor, teacher_hidden: Tensor, teacher: Tensor) -> None:
    log_q = F.log_softmax((hidden @ student.T).float(), dim=-1)
    with torch.no_grad():
        log_p = F.log_softmax((teacher_hidden @ teacher.T).float(), dim=-1)
    F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).backward()


def reference(hidden: Tensor, student: Tensor, teacher_hidden: Tensor, teacher: Tensor) -> None:
    logits = losses.head_logits(hidden, student), losses.head_logits(teacher_hidden, teacher)
    losses.divergence("forward_kl", *logits, num_tokens=len(hidden)).backward()


def floor(hidden: Tensor, student: Tensor, teacher_hidden: Tensor, teacher: Tensor) -> None:
    with torch.no_grad():
        logits = hidden @ student.T
        torch.mm(teacher_hidden, teacher.T, out=logits)
        torch.mm(logits, student)
        torch.mm(logits.T, hidden)


def clear(inputs: tuple[Tensor, ...]) -> None:
    for value in inputs:
        value.grad = None


def seconds(method: Callable[..., None], inputs: tuple[Tensor, ...]) -> float:
    clear(inputs)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    method(*inputs)
    return clock() - start


def growth_MiB(method: Callable[..., None], inputs: tuple[Tensor, ...]) -> float:
    """Peak resident memory during one call, gradients included, above that before it."""
    clear(inputs)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_MiB("VmRSS")
    method(*inputs)
    return resident_MiB("VmHWM") - before


def resident_MiB(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def gradient_error(method: Callable[..., None]) -> float:
    """Relative error of the head's gradient over 64 tokens, against fp32 throughout."""
    inputs, exact = make(64), make(64)
    method(*inputs)
    reference(*exact)
    return ((inputs[1].grad.float() - exact[1].grad.float()).norm() / exact[1].grad.float().norm()).item()


METHODS: dict[str, Callable[..., None]] = {
    "floor": floor,
    "prunus.fused": ours,
    "prunus.fused, far student": ours_far,
    "plain torch, bf16 logits": plain_torch,
    "plain torch, fp32 logits": reference,
}


def compare_times() -> None:
    hardware.keep_freed_memory()
    inputs = make(TOKENS)
    memory_MiB = {name: growth_MiB(method, inputs) for name, method in METHODS.items()}
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(TRIES):
        for name, method in METHODS.items():
            times[name].append(seconds(method, inputs))
    typical = {name: statistics.median(tries) for name, tries in times.items()}
    tera = 8 * HIDDEN * VOCAB * TOKENS / typical["floor"] / 1e12
    print(f"{TOKENS} tokens, V {VOCAB}, H {HIDDEN}, {torch.get_num_threads()} threads, floor {tera:.2f} TFLOP/s")
    print(f"{'':26}{'time / floor':>14}{'floor share':>14}{'peak memory':>14}{'dW error':>10}")
    for name, method in METHODS.items():
        ratio = typical[name] / typical["floor"]
        error = "" if method in (floor, reference) else f"{gradient_error(method):.2%}"
        print(f"{name:26}{ratio:14.2f}{1 / ratio:14.0%}{memory_MiB[name]:10.0f} MiB{error:>10}")


def compare_memory() -> None:
    tokens, vocab, width = GEMMA
    small, larger = (growth_MiB(plain_torch, make(part, vocab, width)) for part in MEASURED_TOKENS)
    per_token = (larger - small) / (MEASURED_TOKENS[1] - MEASURED_TOKENS[0])
    plain = small + per_token * (tokens - MEASURED_TOKENS[0])
    mine = growth_MiB(ours, make(tokens, vocab, width))
    print(f"{tokens} tokens, V {vocab}, H {width}, bf16, gradients included")
    print(f"plain torch  {plain:8.0f} MiB ({small:.0f} and {larger:.0f} MiB at {MEASURED_TOKENS} tokens)")
    print(f"prunus.fused {mine:8.0f} MiB   {mine / plain:.1%} of it (limit 25 %)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    (compare_memory if options.memory else compare_times)()
