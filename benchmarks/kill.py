"""Kill one run of a tiny random model again and again, in every stage, and compare its result with an undisturbed run.

Usage: python benchmarks/kill.py [KILLS, default 10] [--seed 0]
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import add_tokenizer, make_text, small_flags, tiny_model
from killing import finish, kill_inside, start
from transformers.utils import logging

from prunus.recipe import STAGES

SETTINGS = ["distill.tokens=16384", "distill.checkpoint_seconds=0", "evaluate.speed=false"]
RESULTS = [
    "0-text/train",
    "0-text/heldout",
    "1-statistics.safetensors",
    "1-scores.safetensors",
    "2-candidates.json",
    "3-pruned/model.safetensors",
    "4-distilled/model.safetensors",
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", type=int, nargs="?", default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if same_bits(Path(folder), options.kills, random.Random(options.seed)) else 1)


def same_bits(folder: Path, kills: int, moments: random.Random) -> bool:
    logging.disable_progress_bar()
    tiny_model("llama", folder / "model")
    add_tokenizer(folder / "model")
    text = make_text(folder / "text.jsonl", 400, seed=0)

    def command(name: str) -> list[str]:
        settings = (part for setting in SETTINGS for part in ("--set", setting))
        return ["compress", str(folder / "model"), *small_flags(text, folder / name), *settings]

    finish(*command("undisturbed"))
    seconds = json.loads((folder / "undisturbed" / "run.json").read_text())["stages"]
    stages = planned(kills, moments)
    for number, stage in enumerate(stages, start=1):
        # Distillation goes on where it was killed, so its kills share its time.
        share = 1 / (1 + stages.count(stage)) if stage == "distill" else 1
        delay = moments.random() * share * seconds[stage]["seconds"]
        process = start(*command("killed"))
        at = kill_inside(process, folder / "killed", stage, delay)
        place = f"in {at}" if at else "too late, it had finished"
        print(f"kill {number}: aimed at {stage} + {delay:.2f} s, came {place}", flush=True)
    finish(*command("killed"))
    different = [
        name for name in RESULTS if contents(folder / "killed" / name) != contents(folder / "undisturbed" / name)
    ]
    left = [path.name for path in (folder / "killed").rglob(".*") if path.name != ".lock"]
    print(f"bitwise different: {', '.join(different) or 'nothing'}; left behind: {', '.join(left) or 'nothing'}")
    return not different and not left


def contents(path: Path) -> list[bytes]:
    return [file.read_bytes() for file in (sorted(path.glob("*.[sn]*")) if path.is_dir() else [path])]


def planned(kills: int, moments: random.Random) -> list[str]:
    """Stages to be killed in, in their order: every one once, distillation with the rest; of few kills a sample."""
    stages = [*STAGES, *["distill"] * (kills - len(STAGES))]
    return sorted(moments.sample(stages, kills), key=STAGES.index)


if __name__ == "__main__":
    main()
