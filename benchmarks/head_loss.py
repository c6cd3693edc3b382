"""Forward KL of the output head: prunus.fused beside plain torch, on the states of real models.

    python benchmarks/head_loss.py MODEL STUDENT TEXT [--threads 1]
    python benchmarks/head_loss.py --memory

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

import prunus as pr
from prunus import fused, hardware, losses
from prunus.head import Dense, Head
from prunus.text import load_blocks

BLOCKS = 2
NEAR = 0.01  # relative distance of the near student's states and head from the teacher's
TRIES = 5
GEMMA = 4096, 262144, 640
MEASURED_TOKENS = 256, 768


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Method = Callable[..., Tensor | None]


def from_models(model: str, student: str, text: str) -> dict[str, Inputs]:
    """A far and a near student: its hidden states and head, the teacher's, in bf16, and labels."""
    teacher = pr.load(model)
    tokens = load_blocks(Path(text)).batch(range(BLOCKS))[0]
    states = []
    for checkpoint in (pr.load(student), teacher):
        network = checkpoint.module(torch.bfloat16)
        with torch.no_grad():
            hidden = network.base_model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
        states.append((hidden, network.get_output_embeddings().weight.detach()))
    labels = tokens.roll(-1, dims=1).flatten()
    torch.manual_seed(0)
    near = tuple(value + NEAR * value.std() * torch.randn_like(value) for value in states[1])
    return {name: (*map(leaf, mine), *states[1], labels) for name, mine in (("far", states[0]), ("near", near))}


def leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def random(tokens: int, vocab: int, width: int) -> Inputs:
    torch.manual_seed(0)
    values = [torch.randn(size, width).bfloat16() for size in (tokens, vocab, tokens, vocab)]
    return leaf(values[0]), leaf(values[1]), values[2], values[3], torch.randint(vocab, (tokens,))


def ours(hidden: Tensor, student: Tensor, teacher_hidden: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    targets = Dense(teacher_hidden, Head(teacher))
    settings = {"num_tokens": len(hidden), "label_N": labels}
    loss = fused.divergence("forward_kl", hidden, Head(student), targets, **settings)
    loss.backward()
    return loss


def plain_torch(hidden: Tensor, student: Tensor, teacher_hidden: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
    log_q = F.log_softmax((hidden @ student.T).float(), dim=-1)
    with torch.no_grad():
        log_p = F.log_softmax((teacher_hidden @ teacher.T).float(), dim=-1)
    loss = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    loss.backward()
    return loss


def reference(hidden: Tensor, student: Tensor, teacher_hidden: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
    logits = losses.head_logits(hidden, student), losses.head_logits(teacher_hidden, teacher)
    loss = losses.divergence("forward_kl", *logits, num_tokens=len(hidden))
    loss.backward()
    return loss


def floor(hidden: Tensor, student: Tensor, teacher_hidden: Tensor, teacher: Tensor, _: Tensor) -> None:
    with torch.no_grad():
        logits = hidden @ student.T
        torch.mm(teacher_hidden, teacher.T, out=logits)
        torch.mm(logits, student)
        torch.mm(logits.T, hidden)


def clear(inputs: Inputs) -> None:
    for value in inputs:
        value.grad = None


def seconds(method: Method, inputs: Inputs) -> float:
    clear(inputs)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    method(*inputs)
    return clock() - start


def growth_MiB(method: Method, inputs: Inputs) -> float:
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


def gradient_error(method: Method, inputs: Inputs) -> float:
    """Relative error of the head's gradient, against fp32 throughout."""
    clear(inputs)
    reference(*inputs)
    exact = inputs[1].grad.float()
    clear(inputs)
    method(*inputs)
    return ((inputs[1].grad.float() - exact).norm() / exact.norm()).item()


METHODS: dict[str, tuple[Method, str]] = {
    "floor": (floor, "far"),
    "prunus.fused": (ours, "far"),
    "prunus.fused, near student": (ours, "near"),
    "plain torch, bf16 logits": (plain_torch, "far"),
    "plain torch, fp32 logits": (reference, "far"),
}


def compare_times(states: dict[str, Inputs]) -> None:
    hardware.keep_freed_memory()
    memory_MiB = {name: growth_MiB(method, states[which]) for name, (method, which) in METHODS.items()}
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(TRIES):
        for name, (method, which) in METHODS.items():
            times[name].append(seconds(method, states[which]))
    typical = {name: statistics.median(tries) for name, tries in times.items()}
    tokens, (vocab, width) = len(states["far"][0]), states["far"][1].shape
    tera = 8 * width * vocab * tokens / typical["floor"] / 1e12
    print(f"{tokens} tokens, V {vocab}, H {width}, {torch.get_num_threads()} threads, floor {tera:.2f} TFLOP/s")
    print(f"{'':26}{'time / floor':>14}{'floor share':>14}{'peak memory':>14}{'KL':>7}{'dW error':>10}")
    for name, (method, which) in METHODS.items():
        ratio = typical[name] / typical["floor"]
        print(f"{name:26}{ratio:14.2f}{1 / ratio:14.0%}{memory_MiB[name]:10.0f} MiB", end="")
        clear(states[which])
        loss = method(*states[which])
        print("" if loss is None else f"{loss.item():7.3f}{gradient_error(method, states[which]):10.2%}")


def compare_memory() -> None:
    tokens, vocab, width = GEMMA
    small, larger = (growth_MiB(plain_torch, random(part, vocab, width)) for part in MEASURED_TOKENS)
    per_token = (larger - small) / (MEASURED_TOKENS[1] - MEASURED_TOKENS[0])
    plain = small + per_token * (tokens - MEASURED_TOKENS[0])
    mine = growth_MiB(ours, random(tokens, vocab, width))
    print(f"{tokens} tokens, V {vocab}, H {width}, bf16, gradients included")
    print(f"plain torch  {plain:8.0f} MiB ({small:.0f} and {larger:.0f} MiB at {MEASURED_TOKENS} tokens)")
    print(f"prunus.fused {mine:8.0f} MiB   {mine / plain:.1%} of it (limit 25 %)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("models_and_text", nargs="*", metavar="MODEL STUDENT TEXT")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        compare_memory()
    elif len(options.models_and_text) == 3:
        compare_times(from_models(*options.models_and_text))
    else:
        parser.error("give MODEL, STUDENT and TEXT, or --memory")
