"""What each process of tests/test_parallel.py does: a rank of one distillation, as torchrun would have started it."""

import os
import signal
from pathlib import Path

import torch

import prunus as pr
from prunus import hidden, parallel
from prunus.distill import distill
from prunus.schedule import Settings
from prunus.text import load_blocks


def run(rank: int, ranks: int, port: int, options: dict[str, object]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} if ranks > 1 else {}
    torch.set_num_threads(1)
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
