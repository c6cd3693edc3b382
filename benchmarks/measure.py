"""What measuring costs beside a plain forward pass of the same tokens, in one run.

Usage: python benchmarks/measure.py MODEL [--blocks 16]
Plain is transformers' own forward with labels (what a perplexity costs). Turns are taken A B A B; medians and ratios.
"""

import argparse
import random
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel
from turns import timed

import prunus as pr
from prunus import hardware, text
from prunus.depth import leave_one_out
from prunus.measure import measure
from prunus.sensitivity import TOKENS, sensitivity
from prunus.source import in_memory

ROUNDS = 3
BATCH_BLOCKS = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--blocks", type=int, default=16)
    options = parser.parse_args()
    hardware.keep_freed_memory()
    teacher = pr.load(options.model)
    model = teacher.module(hardware.fast_dtype(teacher.dtype))
    words = random.Random(0).choices(Path(__file__).read_text().split(), k=options.blocks * 600)
    with tempfile.TemporaryDirectory() as folder:
        blocks = text.tokenise(
            [" ".join(words)], teacher.tokenizer(), block_size=512, to=Path(folder) / "text", label="words"
        ).head(options.blocks)
        gradients = f"gradients of {min(TOKENS, blocks.num_tokens)} tokens"
        one_pass = timed(
            {
                "plain forward": lambda: plain(model, blocks),
                "measure": lambda: measure(teacher, blocks, source=in_memory(model), gradients=False),
                gradients: lambda: sensitivity(model, teacher.family, blocks),
            },
            rounds=ROUNDS,
        )
        show(one_pass, blocks.num_tokens, limit={"measure": 1.15})
        few, layers = blocks.head(BATCH_BLOCKS), teacher.architecture.layers
        alone = timed(
            {
                "plain forward": lambda: plain(model, few),
                "leave one out": lambda: leave_one_out(teacher, few, source=in_memory(model)),
            },
            rounds=ROUNDS,
        )
        share = alone["leave one out"] / alone["plain forward"] / layers
        print(f"leave-one-out of {layers} layers: {share:.2f} · {layers} forwards (limit 0.60)")


@torch.no_grad()
def plain(model: PreTrainedModel, blocks: text.Blocks) -> None:
    with hardware.plain([model]):
        for start in range(0, len(blocks), BATCH_BLOCKS):
            tokens, _ = blocks.batch(list(range(start, min(start + BATCH_BLOCKS, len(blocks)))))
            model(input_ids=tokens, labels=tokens, use_cache=False)


def show(seconds: dict[str, float], tokens: int, *, limit: dict[str, float]) -> None:
    base = seconds["plain forward"]
    for name, value in seconds.items():
        bound = f" (limit {limit[name]})" if name in limit else ""
        print(f"{name:28} {tokens / value:7.0f} tokens/s   {value / base:.2f} × plain{bound}")


if __name__ == "__main__":
    main()
