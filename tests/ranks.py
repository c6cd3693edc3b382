"""What each process of tests/test_parallel.py does: a rank of one distillation, as torchrun would have started it."""

import os
import signal
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

import prunus as pr
from prunus import anatomy, hidden, parallel
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

    if not options.get("random_init"):  # which is made whole
        parallel.shard = watched(parallel.shard)

    def progress(at: object) -> None:
        if at.step == options.get("stop_after") and parallel.world().first:
            os.kill(os.getpid(), signal.SIGTERM)

    distill(
        student,
        teacher,
        blocks,
        to=options["to"],
        settings=settings,
        random_init=options.get("random_init", False),
        pairs=hidden.pairs(student, teacher, count=2) if settings.hidden_loss else None,
        validation=blocks.head(4) if settings.evaluate_every else None,
        dtype=getattr(torch, options["dtype"]),
        checkpoint_seconds=options.get("checkpoint_seconds", 1e9),
        progress=progress,
    )


def watched(shard: object) -> object:
    """`parallel.shard`, with an eye on how much of the model is in this process at once."""

    def watching(root: object, model: torch.nn.Module, dtype: torch.dtype, fill: object) -> None:
        most = 0

        def filled(names: object) -> None:
            nonlocal most
            fill(names)
            here = [weight for weight in model.parameters() if not (weight.is_meta or isinstance(weight, DTensor))]
            most = max(most, size(here))

        shard(root, model, dtype, filled)
        layers = [size(layer.parameters()) for layer in anatomy.layers_of(model)]
        assert most == size(model.parameters()) - sum(layers) + max(layers)

    return watching


def size(weights: object) -> int:
    return sum(weight.numel() for weight in weights)
