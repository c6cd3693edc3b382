"""Peak memory of a distillation, and of a repair, predicted beside measured, for several shapes and settings.

Usage: python benchmarks/memory.py [MODEL ...] [--only repair]
Without a model: random ones of a few shapes. Each training (of a few steps) and each repair has a process of its own,
whose resident memory is read before and at its peak. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import prunus as pr
from prunus import hardware, memory
from prunus.distill import distill
from prunus.measure import load_statistics, save_statistics
from prunus.prune import cut, repaired
from prunus.schedule import Settings
from prunus.text import Blocks

BLOCK_SIZE = 512
STATISTICS = "statistics.safetensors"
SHAPES = {
    "wide vocabulary": {"hidden_size": 320, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 131072},
    "deep": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 24, "vocab_size": 16384},
    "wide": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 32768},
}
SETTINGS = {
    "1 block, bfloat16": {"micro_blocks": 1, "dtype": "bfloat16"},
    "4 blocks, bfloat16": {"micro_blocks": 4, "dtype": "bfloat16"},
    "4 blocks, checkpointing": {"micro_blocks": 4, "dtype": "bfloat16", "gradient_checkpointing": True},
    "2 blocks, float32": {"micro_blocks": 2, "dtype": "float32"},
    "repair, 16k tokens": {"repair_blocks": 32},
    "repair, 64k tokens": {"repair_blocks": 128},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        arguments = json.loads(options.measure)
        print(json.dumps((measured_repair if "repair_blocks" in arguments else measured)(**arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        models = {name: name for name in options.models} or {
            name: str(random_model(shape, Path(folder) / name)) for name, shape in SHAPES.items()
        }
        print(f"{'':52}{'predicted':>12}{'measured':>12}{'ratio':>8}")
        for name, model in models.items():
            save_statistics(pr.measure(pr.load(model), random_text(pr.load(model), 2)), Path(folder) / STATISTICS)
            for setting, values in SETTINGS.items():
                if options.only not in setting:
                    continue
                arguments = json.dumps({"model": model, "folder": folder, **values})
                command = [sys.executable, __file__, "--measure", arguments]
                run = subprocess.run(command, capture_output=True, check=True, text=True)
                result = json.loads(run.stdout.splitlines()[-1])
                predicted, seen = result["predicted"] / 2**20, result["measured"] / 2**20
                print(f"{name[-26:]:26}{setting:26}{predicted:8.0f} MiB{seen:8.0f} MiB{predicted / seen:8.2f}")


def random_model(shape: dict[str, int], folder: Path) -> Path:
    config = LlamaConfig(num_attention_heads=shape["hidden_size"] // 64, num_key_value_heads=1, head_dim=64, **shape)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def random_text(model: pr.Checkpoint, count: int) -> Blocks:
    tokens = np.random.default_rng(0).integers(0, model.architecture.vocab, (count, BLOCK_SIZE))
    positions = np.broadcast_to(np.arange(BLOCK_SIZE), tokens.shape).copy()
    return Blocks(tokens.astype("<u4"), positions.astype("<u2"), np.ones(count, np.int64), "random")


def peak() -> int:
    """Most that this process has held, in bytes. Not getrusage: its maximum includes the process that started it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def measured_repair(model: str, folder: str, repair_blocks: int) -> dict[str, int]:
    """Bytes beyond what the process held before: predicted, and at the peak of the repair of a cut to about a half."""
    opened = pr.load(model)
    hardware.keep_freed_memory()
    sizes = opened.architecture
    target = sizes.replace(layers=sizes.layers // 2, hidden=sizes.hidden * 3 // 4, ffn=sizes.ffn * 3 // 4)
    text, scores = random_text(opened, repair_blocks), pr.score(load_statistics(Path(folder) / STATISTICS))
    need = memory.repair(opened, target, blocks=repair_blocks, block_size=BLOCK_SIZE)
    before = psutil.Process().memory_info().rss
    repaired(opened, cut(opened, scores, target), text)
    return {"predicted": sum(need.values()), "measured": peak() - before}


def measured(
    model: str, folder: str, micro_blocks: int, dtype: str, gradient_checkpointing: bool = False
) -> dict[str, int]:
    """Bytes beyond what the process held before: predicted, and at the peak of three steps."""
    opened = pr.load(model)
    hardware.keep_freed_memory()
    blocks, number = random_text(opened, 3 * micro_blocks), getattr(torch, dtype)
    need = memory.training(
        opened,
        opened,
        block_size=BLOCK_SIZE,
        blocks=micro_blocks,
        dtype=number,
        gradient_checkpointing=gradient_checkpointing,
    )
    settings = Settings(batch_tokens=micro_blocks * BLOCK_SIZE, micro_blocks=micro_blocks)
    before, peaks = psutil.Process().memory_info().rss, []
    with tempfile.TemporaryDirectory(dir=folder) as student:
        distill(
            opened,
            opened,
            blocks,
            to=Path(student) / "student",
            settings=settings,
            dtype=number,
            gradient_checkpointing=gradient_checkpointing,
            progress=lambda _: peaks.append(peak()),
        )
    return {"predicted": memory.total(need), "measured": peaks[-1] - before}


if __name__ == "__main__":
    main()
