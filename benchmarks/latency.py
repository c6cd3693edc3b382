"""Asked for a share of the teacher's time per token, does the student take it?

Usage: python benchmarks/latency.py MODEL --text TEXT [--share 0.6] [--turns 25] [--rounds 3] --to FOLDER

`prunus compress --latency` up to the cut, which times models while it searches; then student and teacher generate in
turns, several rounds of it. The run lies in FOLDER and is not made again.
"""

import argparse
from pathlib import Path

import prunus as pr
from prunus import hardware
from prunus import recipe as recipes
from prunus.evaluate import speed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    changes = {
        "model": options.model,
        "to": str(options.to),
        "latency": f"{options.share}x",
        "data.train": options.text,
        "data.heldout_tokens": 24576,
        "distill.tokens": 32768,  # of which all is calibration
        "stop_after": "prune",
    }
    made = pr.compress(recipes.parse(recipes.override({}, changes), source="latency"))
    checkpoints = {"teacher": pr.load(options.model), "student": made.pruned}
    models = {
        name: hardware.place(checkpoint.module(checkpoints["teacher"].dtype), device=hardware.device())
        for name, checkpoint in checkpoints.items()
    }
    print(f"asked for {options.share} of the teacher's time per token; found {made.pruned.architecture}", flush=True)
    for number in range(options.rounds):
        found = speed(models, repeats=options.turns)
        teacher, student = (found[name].decode_tokens_per_second for name in ("teacher", "student"))
        print(f"round {number}: {teacher / student:.3f} (teacher {teacher:.1f} tokens/s)", flush=True)


if __name__ == "__main__":
    main()
