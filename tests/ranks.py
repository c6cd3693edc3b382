"""Run by torchrun in tests/test_parallel.py: one distillation, as many ranks as were started."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

import prunus as pr
from prunus import hidden, parallel
from prunus.distill import distill
from prunus.schedule import Settings
from prunus.text import load_blocks


def main() -> None:
    torch.set_num_threads(1)
    options = json.loads(sys.argv[1])
    teacher, student = pr.load(options["teacher"]), pr.load(options["student"])
    settings = Settings(**options["settings"])
    blocks = load_blocks(Path(options["text"]))

    if options.get("background"):
        plain = parallel.Saver
        parallel.Saver = lambda folder, background: plain(folder, background=True)

    def progress(at: object) -> None:
        if at.step == options.get("stop_after") and parallel.world().first:
            os.kill(os.getpid(), signal.SIGTERM)

    distill(
        student,
        teacher,
        blocks,
        to=options["to"],
        settings=settings,
        pairs=hidden.pairs(student, teacher, count=2) if settings.hidden_loss else None,
        validation=blocks.head(4) if settings.evaluate_every else None,
        dtype=getattr(torch, options["dtype"]),
        checkpoint_seconds=options.get("checkpoint_seconds", 1e9),
        progress=progress,
    )


if __name__ == "__main__":
    main()
