"""Cut SmolLM2-135M without training: slicing alone, with the norm correction, with the repair. Perplexity of each.

Usage: python benchmarks/repair.py MODEL TEXT_FILE [--calibration-blocks 64]
The first blocks of the text calibrate, the last 40 measure.
"""

import argparse
import tempfile
import time
from pathlib import Path

import prunus as pr
from prunus import hardware, text
from prunus.documents import documents
from prunus.evaluate import quality
from prunus.importance import score
from prunus.measure import measure
from prunus.prune import build, cut, repaired
from prunus.source import in_memory

HELD_OUT_BLOCKS = 40
CUTS = {
    "ffn=768": [("plain", "activation"), ("repaired", "tempered_fisher")],
    "ffn=1024": [("plain", "activation"), ("repaired", "activation"), ("repaired", "tempered_fisher")],
    "hidden=540": [
        ("plain", "norm_output"),
        ("plain", "norm_share"),
        ("norm-corrected", "norm_share"),
        ("repaired", "norm_share"),
    ],
    "hidden=504": [("plain", "norm_share"), ("norm-corrected", "norm_share"), ("repaired", "norm_share")],
    "layers=24": [("plain", "block_influence"), ("repaired", "block_influence")],
    "heads=6": [("plain", "output"), ("repaired", "output"), ("repaired", "tempered_fisher")],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--calibration-blocks", type=int, default=64)
    parser.add_argument("--cuts", default=",".join(key.replace("=", ":") for key in CUTS))
    options = parser.parse_args()
    hardware.keep_freed_memory()
    teacher = pr.load(options.model)
    with tempfile.TemporaryDirectory() as folder:
        docs = documents(str(options.text))
        blocks = text.tokenise(docs, teacher.tokenizer(), block_size=512, to=Path(folder) / "text", label="benchmark")
        calibration = blocks.head(options.calibration_blocks)
        heldout = blocks.select(range(len(blocks) - HELD_OUT_BLOCKS, len(blocks)))
        run(teacher, calibration, heldout, [key.replace(":", "=") for key in options.cuts.split(",")])


def run(teacher: pr.Checkpoint, calibration: text.Blocks, heldout: text.Blocks, cuts: list[str]) -> None:
    model = teacher.module(hardware.fast_dtype(teacher.dtype))
    print(f"calibration {calibration.num_tokens} tokens, held out {heldout.num_tokens} tokens")
    print(f"teacher {quality(model, heldout).perplexity:.2f}")
    statistics = measure(teacher, calibration, source=in_memory(model))
    for key in cuts:
        axis, _, size = key.partition("=")
        target = teacher.architecture.replace(**{axis: int(size)})
        for method, function in CUTS[key]:
            scores = score(statistics, **{"ffn": "activation", axis: function})
            student = cut(teacher, scores, target, norm_correction=method != "plain")
            start = time.perf_counter()
            if method == "repaired":
                candidate = repaired(teacher, student, calibration, source=in_memory(model))
            else:
                candidate = build(student, hardware.compute_dtype())
            seconds = time.perf_counter() - start
            print(f"{key:12} {function:16} {method:15} {quality(candidate, heldout).perplexity:8.2f}  {seconds:6.1f} s")


if __name__ == "__main__":
    main()
