"""Tokens per second of a distillation step, ours beside others, on the same teacher, student, tokens and dtype.

Usage: python benchmarks/kd_step.py MODEL [--dtype bfloat16|float32] [--rounds 9] [--student FOLDER]

Others are compared where they are installed, without their dependencies: pip install --no-deps trl==1.16.0
liger-kernel==0.8.5 torchtune==0.6.1 torchao==0.9.0 omegaconf antlr4-python3-runtime==4.9.3 sentencepiece
tiktoken blobfile

Each method lives in a process of its own, since one of ours changes the C allocator for the whole process; they take
turns (A B A B), one step of 2 × 512 tokens each, and medians are compared. Four at a time, so that 24 GB hold them;
ours is one of each four.

Others run in the loop that their users write: a float32 student under autocast (the usual mixed precision), teacher in
the short type, fused AdamW, as it is or with the allocator's thresholds raised as ours raises them ("+malloc"). Loss:
forward KL; Liger has only JSD there. The floor is 2 N_teacher + 6 N_student FLOPs a token at the GEMM rate measured in
the same turns; "at best" is the fastest step against the fastest GEMMs, which says more of the code and less of the
neighbours on a shared machine.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import prunus as pr
from prunus import hardware, layerwise
from prunus.checkpoint import Checkpoint
from prunus.frozen import freeze
from prunus.masters import Masters
from prunus.schedule import Settings, plan
from prunus.step import Losses, accumulate
from prunus.teacher import Live, Teacher, describe, open_cache, write_cache
from prunus.text import Blocks, load_blocks

BLOCKS, BLOCK_SIZE = 2, 512
TOKENS = BLOCKS * BLOCK_SIZE
Step = Callable[[int], None]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Student logits and teacher logits [B, S, V], labels [B, S] → loss."""


def ours(
    teacher: Checkpoint,
    student: Checkpoint,
    blocks: Blocks,
    dtype: torch.dtype,
    *,
    cache: str = "",
    compiled: bool = False,
) -> Step:
    hardware.keep_freed_memory()
    cached = Path(os.environ["CACHES"]) / cache if cache else None
    source: Teacher = open_cache(cached) if cached else Live(freeze(teacher.module(dtype)))
    settings = Settings(batch_tokens=TOKENS)
    schedule = plan(settings, hidden=student.architecture.hidden, num_blocks=len(blocks), block_size=BLOCK_SIZE)
    model = student.module(torch.float32)
    losses = Losses(model, source, blocks, settings, None, BLOCKS)
    masters = Masters(model, dtype, weight_decay=0.0)
    masters.publish()
    for each in (model, source.model) if compiled else ():
        layerwise.compile_layers(each)

    curve: list[dict[str, Any]] = []

    def step(_: int) -> None:
        curve.append(accumulate(losses, masters, curve, schedule))
        masters.clip(1.0)
        masters.step(1e-5)
        masters.forget_gradients()

    return step


def plain_loop(
    teacher: Checkpoint, student: Checkpoint, blocks: Blocks, dtype: torch.dtype, *, loss: str, malloc: bool
) -> Step:
    """What a user of transformers writes, around one of the losses."""
    if malloc:
        hardware.keep_freed_memory()
    compute = LOSSES[loss]()
    source, model = teacher.module(dtype).requires_grad_(False), student.module(torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(number: int) -> None:
        tokens, _ = blocks.batch([(number * BLOCKS + place) % len(blocks) for place in range(BLOCKS)])
        # Without our attention and norms, forwards and backwards.
        with hardware.plain([source, model]), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            compute(model, source, tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def on_logits(loss: Loss) -> Callable[..., Tensor]:
    def compute(model: torch.nn.Module, source: torch.nn.Module, tokens: Tensor) -> Tensor:
        student = model(input_ids=tokens, use_cache=False).logits
        with torch.no_grad():
            teacher = source(input_ids=tokens, use_cache=False).logits
        return loss(student[:, :-1], teacher[:, :-1], tokens[:, 1:])

    return compute


def naive() -> Callable[..., Tensor]:
    def loss(student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        log_q, log_p = (F.log_softmax(logits.float(), dim=-1).flatten(0, 1) for logits in (student, teacher))
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    return on_logits(loss)


def trl() -> Callable[..., Tensor]:
    from trl.experimental.gkd import GKDTrainer

    return on_logits(lambda student, teacher, labels: GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=0))


def torchtune() -> Callable[..., Tensor]:
    from torchtune.modules.loss import ForwardKLLoss

    kl = ForwardKLLoss()
    return on_logits(lambda student, teacher, labels: kl(student.flatten(0, 1), teacher.flatten(0, 1), labels))


def liger() -> Callable[..., Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)

    def compute(model: torch.nn.Module, source: torch.nn.Module, tokens: Tensor) -> Tensor:
        student = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        with torch.no_grad():
            teacher = source.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        weight = model.lm_head.weight.to(student.dtype)
        return jsd(student, weight, teacher.to(student.dtype), source.lm_head.weight, tokens[:, 1:].flatten())

    return compute


LOSSES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "naive": naive,
    "TRL": trl,
    "torchtune": torchtune,
    "Liger": liger,
}
METHODS: dict[str, Callable[..., Step]] = {
    "prunus": ours,
    "prunus, compiled": partial(ours, compiled=True),
    "prunus, samples": partial(ours, cache="samples"),
    "prunus, hidden": partial(ours, cache="hidden"),
} | {
    name: partial(plain_loop, loss=name.split()[0], malloc="+malloc" in name)
    for name in ("naive", "TRL", "TRL +malloc", "Liger", "Liger +malloc", "torchtune")
}
TOGETHER = (
    ("prunus", "prunus, compiled", "prunus, samples", "prunus, hidden"),
    ("prunus", "naive", "TRL", "TRL +malloc"),
    ("prunus", "Liger", "Liger +malloc", "torchtune"),
)


def worker(
    pipe: Connection, method: str, teacher: str, student: str, text: str, dtype: torch.dtype, threads: int
) -> None:
    """Does a step for each number that it is sent, and sends back its seconds; or why it cannot."""
    torch.set_num_threads(threads)
    try:
        step = METHODS[method](pr.load(teacher), pr.load(student), load_blocks(Path(text)), dtype)
        step(0)
        pipe.send(None)
        while (number := pipe.recv()) is not None:
            start = time.perf_counter()
            step(number)
            pipe.send(time.perf_counter() - start)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        traceback.print_exc(file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--student", help="a pruned student; default: FFN cut to half, repaired on a little text")
    parser.add_argument("--only", help="methods, separated by semicolons")
    options = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # for all, as the command line has it; the workers inherit it
    chosen = [options.only.split(";")] if options.only else TOGETHER
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        teacher = pr.load(options.model)
        words = " ".join(Path(torch.__file__).with_name("functional.py").read_text().split())
        blocks = pr.tokenise([words], teacher.tokenizer(), block_size=BLOCK_SIZE, to=text, label="source code")
        student = options.student or str(cut(teacher, blocks, Path(folder) / "student"))
        os.environ["CACHES"] = folder
        for kind in ("samples", "hidden"):
            if any(f"prunus, {kind}" in methods for methods in chosen):
                write_cache(teacher, blocks, describe(teacher, blocks, kind=kind, dtype=dtype), to=Path(folder) / kind)
        for methods in chosen:
            compare(methods, options, teacher, pr.load(student), str(text), dtype)


def cut(teacher: Checkpoint, blocks: Blocks, to: Path) -> Path:
    hardware.keep_freed_memory()
    few = blocks.head(8)
    scores = pr.score(pr.measure(teacher, few))
    target = teacher.architecture.replace(ffn=teacher.architecture.ffn // 2)
    return pr.prune(teacher, scores, target, to=to, calibration=few).folder


def compare(
    methods: Sequence[str],
    options: argparse.Namespace,
    teacher: Checkpoint,
    student: Checkpoint,
    text: str,
    dtype: torch.dtype,
) -> None:
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    workers = []
    for method in methods:
        pipe, other = context.Pipe()
        arguments = (other, method, options.model, str(student.folder), text, dtype, torch.get_num_threads())
        workers.append(context.Process(target=worker, args=arguments, daemon=True))
        workers[-1].start()
        other.close()  # so that a worker that is killed ends the waiting
        try:
            problem = pipe.recv()
        except EOFError:
            problem = "it was killed; too little memory?"
        if problem is None:
            pipes[method] = pipe
        else:
            print(f"{method}: could not run, {problem}")
    seconds: dict[str, list[float]] = {method: [] for method in pipes}
    rates = []
    for number in range(1, options.rounds + 1):
        rates.append(hardware.matmul_flops_per_second(dtype))
        for method, pipe in pipes.items():
            pipe.send(number)
            seconds[method].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(None)
    for process in workers:
        process.join()
    rate = statistics.median(rates)
    floor = rate / (2 * teacher.parameters + 6 * student.parameters)
    print(
        f"{options.dtype}, {torch.get_num_threads()} threads, GEMM {rate / 1e9:.0f} GFLOP/s; teacher "
        f"{teacher.parameters / 1e6:.1f}M, student {student.parameters / 1e6:.1f}M; floor {floor:.0f} tokens/s"
    )
    share = 6 * student.parameters / (2 * teacher.parameters + 6 * student.parameters)
    speed = {method: TOKENS / statistics.median(values) for method, values in seconds.items()}
    for method, value in speed.items():
        beside = f"   prunus {speed['prunus'] / value:.2f} ×" if "prunus" in speed else ""
        undisturbed = TOKENS / min(seconds[method]) / (floor * max(rates) / rate)
        print(
            f"{method:18} {value:6.0f} tokens/s   {value / floor:4.0%} of the floor, {undisturbed:4.0%} at best{beside}"
        )
    for method in ("prunus, samples", "prunus, hidden"):
        if method in speed and "prunus" in speed:
            print(f"{method}: {speed['prunus'] / speed[method]:.2f} of a live step (its own FLOPs are {share:.2f})")


if __name__ == "__main__":
    main()
