"""Depth cut to two thirds, then distilled on the same tokens with and without the hidden-state loss.

Usage: python benchmarks/hidden_loss.py MODEL TEXT_FILE [--layers 20] [--tokens 60000] [--only "logits alone;cosine"]
The first blocks of the text calibrate, the last 40 measure, those between train. Everything else is the default.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import prunus as pr
from prunus import hardware, hidden, text
from prunus.distill import distill
from prunus.documents import documents
from prunus.evaluate import quality
from prunus.schedule import Settings

BLOCK_SIZE, CALIBRATION_BLOCKS, HELD_OUT_BLOCKS, BATCH_TOKENS = 512, 64, 40, 1024
VARIANTS: dict[str, dict[str, Any]] = {
    "logits alone": {},
    "cosine": {"hidden_loss": "cosine"},
    "mse": {"hidden_loss": "mse"},
    "cosine, weight 0.3": {"hidden_loss": "cosine", "hidden_weight": 0.3},
    "cosine, weight 3": {"hidden_loss": "cosine", "hidden_weight": 3.0},
    "cosine, 20 layers": {"hidden_loss": "cosine", "hidden_layers": 20},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--only", help="variants, separated by semicolons")
    options = parser.parse_args()
    hardware.keep_freed_memory()
    teacher = pr.load(options.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        docs = documents(str(options.text))
        blocks = text.tokenise(docs, teacher.tokenizer(), block_size=BLOCK_SIZE, to=folder / "text", label="benchmark")
        end = len(blocks) - HELD_OUT_BLOCKS
        calibration, heldout = blocks.head(CALIBRATION_BLOCKS), blocks.select(range(end, len(blocks)))
        training = blocks.select(range(CALIBRATION_BLOCKS, end))
        scores = pr.score(pr.measure(teacher, calibration))
        target = teacher.architecture.replace(layers=options.layers)
        student = pr.prune(teacher, scores, target, to=folder / "student", calibration=calibration)
        judge = teacher.module(hardware.compute_dtype())
        print(f"{teacher.architecture.layers} → {options.layers} layers, {options.tokens} tokens")

        def show(label: str, checkpoint: pr.Checkpoint) -> None:
            seen = quality(checkpoint.module(hardware.compute_dtype()), heldout, teacher=judge)
            print(
                f"{label:20} perplexity {seen.perplexity:7.2f}   KL to the teacher {seen.kl_to_teacher:.4f}", flush=True
            )

        show("repaired", student)
        for label in options.only.split(";") if options.only else VARIANTS:
            settings = Settings(tokens=options.tokens, batch_tokens=BATCH_TOKENS, **VARIANTS[label])
            pairs = (
                hidden.pairs_of_cut(student, teacher, count=settings.hidden_layers) if settings.hidden_loss else None
            )
            show(label, distill(student, teacher, training, to=folder / label, settings=settings, pairs=pairs))


if __name__ == "__main__":
    main()
