"""Experiment trackers: the steps of a training, as TensorBoard, Weights & Biases or trackio show them."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prunus import parallel
from prunus.distill import Progress
from prunus.errors import BadRecipe

Track = Callable[[Progress], None]
PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


@contextlib.contextmanager
def tracked(names: Sequence[str], run: str) -> Iterator[Track]:
    """Inside, the function that is given shows a step in all of these trackers.

    Raises:
        BadRecipe: a tracker's package is not installed.
    """
    with contextlib.ExitStack() as stack:
        names = names if parallel.world().first else ()
        writers = [stack.enter_context(_OPEN[name](_package(name), run)) for name in names]

        def track(at: Progress) -> None:
            for write in writers:
                write(_values(at), at.tokens)

        yield track


def check(names: Sequence[str]) -> None:
    """Raises BadRecipe where a tracker's package is not installed."""
    for name in names:
        _package(name)


def _values(at: Progress) -> dict[str, float]:
    names = ("loss", "learning_rate", "norm", "heldout_loss")
    return {name: getattr(at, name) for name in names if getattr(at, name) is not None}


def _package(name: str) -> Any:
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError as error:
        raise BadRecipe(f"distill.trackers: {name} is not installed; pip install 'prunus[{name}]'") from error


@contextlib.contextmanager
def _tensorboard(package: Any, run: str) -> Iterator[Callable[[dict[str, float], int], None]]:
    with contextlib.closing(package.SummaryWriter(comment=f" {run}")) as writer:

        def write(values: dict[str, float], tokens: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, tokens)

        yield write


@contextlib.contextmanager
def _wandb(package: Any, run: str) -> Iterator[Callable[[dict[str, float], int], None]]:
    """trackio has the same functions as Weights & Biases."""
    with contextlib.redirect_stdout(sys.stderr):  # where our own output may be read by a program
        package.init(project="prunus", name=run)
    try:
        yield lambda values, tokens: package.log(values, step=tokens)
    finally:
        with contextlib.redirect_stdout(sys.stderr):
            package.finish()


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _wandb}
