"""Work done one after another, or side by side on Ray where the user asks for workers."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from prunus.errors import BadRecipe

Task = TypeVar("Task")
Result = TypeVar("Result")


def each(work: Callable[[Task], Result], tasks: Mapping[str, Task], *, workers: int) -> Iterator[tuple[str, Result]]:
    """(name, result) of each task, as they come.

    Args:
        work: with several workers it runs in other processes, so it and its tasks must be picklable. A worker has its
            share of the machine's cores and a GPU of its own, or a share of one; RAY_ADDRESS names a cluster.
    Raises:
        BadRecipe: see `check`.
    """
    check(workers)
    if workers == 1:
        yield from ((name, work(task)) for name, task in tasks.items())
        return
    import ray

    mine = not ray.is_initialized()
    if mine:
        alone = {"env_vars": {"WORLD_SIZE": "1"}}  # a worker is none of torchrun's ranks, though the first starts it
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, runtime_env=alone)
    try:
        have = ray.cluster_resources()
        cores, gpus = max(1, int(have.get("CPU", 1)) // workers), min(1, have.get("GPU", 0) / workers)
        remote = ray.remote(num_cpus=cores, num_gpus=gpus)(work)
        waiting = {remote.remote(task): name for name, task in tasks.items()}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(ready), ray.get(ready)
    finally:
        if mine:
            ray.shutdown()


def check(workers: int) -> None:
    """Raises BadRecipe where several are asked for and Ray is not installed."""
    if workers > 1 and importlib.util.find_spec("ray") is None:
        raise BadRecipe(
            "search.workers: candidates go side by side on Ray; pip install 'prunus[ray]', or leave it at 1"
        )
