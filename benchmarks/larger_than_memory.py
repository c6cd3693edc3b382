"""Measure and cut a model of the shape of Llama-3.1-8B (random weights, 16 GB) with little memory.

Usage: python benchmarks/larger_than_memory.py FOLDER [--keep]

FOLDER needs 40 GB of disk. Each part runs in a process of its own, whose peak of resident memory is reported; pages of
mapped files count. The cut is timed beside `cp` of as many bytes as it reads and writes, both from a cold page cache
and until the disk has them. The model takes some minutes to be written.
"""

import argparse
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

import prunus as pr
from prunus import dims, weights
from prunus.architecture import from_config
from prunus.families import family_of
from prunus.scores import load_scores, save_scores
from prunus.source import on_disk
from prunus.weights import Parts

CONFIG = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    tie_word_embeddings=False,
)  # fmt: skip
TARGET = {"layers": 28, "hidden": 3072, "ffn": 9216}
BLOCKS, BLOCK_SIZE = 4, 512
ROUNDS = 3
GIB = 1024**3


class RandomBlocks:
    """What a walk needs of text."""

    fingerprint = "random"

    def __len__(self) -> int:
        return BLOCKS

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(CONFIG.vocab_size, (BLOCKS, BLOCK_SIZE), generator=torch.Generator().manual_seed(0))
        return tokens[indices], torch.arange(BLOCK_SIZE).expand(len(indices), -1)


def random_weights(shape: tuple[int, ...]) -> Parts:
    rows = max(1, weights.PART_BYTES // (2 * math.prod(shape[1:])))

    def read() -> Iterator[Tensor]:
        for start in range(0, shape[0], rows):
            part = (min(rows, shape[0] - start), *shape[1:])
            yield torch.ones(part).bfloat16() if len(shape) == 1 else torch.empty(part).bfloat16().normal_(std=0.02)

    return Parts(shape, torch.bfloat16, read)


def make(folder: Path) -> None:
    folder.mkdir(parents=True)
    family, sizes = family_of(CONFIG.model_type), from_config(CONFIG.to_dict(), family_of(CONFIG.model_type).fields)
    names = dict(family.outer_weights) | {
        f"{family.layer_prefix}{layer}.{name}": formulas
        for layer in range(sizes.layers)
        for name, formulas in family.layer_weights.items()
    }
    shapes = {name: tuple(dims.size(formula, sizes) for formula in formulas) for name, formulas in names.items()}
    weights.write(folder, [weights.entry(name, random_weights(shape)) for name, shape in shapes.items()])
    CONFIG.save_pretrained(folder)


def measure(model: Path, scores: Path) -> None:
    teacher = pr.load(model)
    statistics = pr.measure(teacher, RandomBlocks(), source=on_disk(teacher))
    save_scores(pr.score(statistics, ffn="activation"), scores)


def cut(model: Path, scores: Path, to: Path) -> None:
    teacher = pr.load(model)
    pr.prune(teacher, load_scores(scores), teacher.architecture.replace(**TARGET), to=to)


def copy(model: Path, to: Path, *, most: int) -> None:
    """`cp` of files, and of the beginning of the last, up to so many bytes."""
    to.mkdir()
    for file in sorted(model.glob("*.safetensors")):
        part = min(most, file.stat().st_size)
        if part == file.stat().st_size:
            subprocess.run(["cp", file, to], check=True)
        elif part:
            command = ["dd", f"if={file}", f"of={to / file.name}", "bs=1M", f"count={part // 2**20}", "status=none"]
            subprocess.run(command, check=True)
        most -= part


def cold(model: Path) -> None:
    """Nothing of the model in the page cache, and nothing left to be written."""
    os.sync()
    for file in model.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(function: Callable[..., None], *arguments: Any) -> float:
    """Seconds until all is on the disk."""
    start = time.perf_counter()
    function(*arguments)
    os.sync()
    return time.perf_counter() - start


def alone(function: Callable[..., None], *arguments: Path) -> tuple[float, float]:
    """Run it in a fresh process: its seconds, less those in which Python starts, and its peak of resident memory in
    GiB."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_reporting, args=(answers, function, *arguments))
    process.start()
    process.join()
    assert process.exitcode == 0
    seconds, peak = answers.get()
    return seconds, peak


def _reporting(answers: Any, function: Callable[..., None], *arguments: Path) -> None:
    seconds = timed(function, *arguments)
    answers.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave the model there for the next time")
    options = parser.parse_args()
    model, scores, student, copied = (options.folder / name for name in ("model", "scores", "student", "copied"))
    if not model.exists():
        make(model)
    print(f"{sum(file.stat().st_size for file in model.glob('*.safetensors')) / 1e9:.1f} GB on disk")
    seconds, peak = alone(measure, model, scores)
    print(f"measured on {BLOCKS} blocks of {BLOCK_SIZE} tokens: peak {peak:.2f} GiB, {seconds:.0f} s")
    for _ in range(ROUNDS):
        cold(model)
        seconds, peak = alone(cut, model, scores, student)
        written = pr.load(student)
        moved = pr.load(model).bytes + written.bytes
        cold(model)
        beside = timed(partial(copy, model, copied, most=moved // 2))
        print(
            f"cut to {written.parameters / 1e9:.2f}B ({written.bytes / 1e9:.1f} GB): peak {peak:.2f} GiB, "
            f"{seconds:.1f} s; cp of {moved / 2e9:.1f} GB, which reads and writes as much: {beside:.1f} s; "
            f"{seconds / beside:.2f} ×"
        )
        shutil.rmtree(student)
        shutil.rmtree(copied)
    if not options.keep:
        shutil.rmtree(model)


if __name__ == "__main__":
    main()
