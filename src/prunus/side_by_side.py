"""Work done one after another, or side by side on Ray where the user asks for workers."""

from __future__ import annotations

import importlib.util
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from prunus import hardware
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
        part = share([node["Resources"] for node in ray.nodes() if node["Alive"]], workers)

        def sharing(task: Task) -> Result:
            with hardware.shared(part.sharers):
                return work(task)

        remote, queue = ray.remote(num_cpus=part.cores, num_gpus=part.gpus)(sharing), iter(tasks.items())
        under_way = {remote.remote(task): name for name, task in itertools.islice(queue, workers)}
        while under_way:
            (ready,), _ = ray.wait(list(under_way), num_returns=1)
            yield under_way.pop(ready), ray.get(ready)
            under_way |= {remote.remote(task): name for name, task in itertools.islice(queue, 1)}
    finally:
        if mine:
            ray.shutdown()


class Share(NamedTuple):
    """What a worker gets.

    Attributes:
        cores, gpus: of one node, since a task cannot be spread.
        sharers: workers that may share its memory, on one GPU or on one node.
    """

    cores: int
    gpus: float
    sharers: int


def share(nodes: Sequence[Mapping[str, float]], workers: int) -> Share:
    """Equal parts of a cluster, of whose nodes we know CPU and GPU, none more than its smallest node has."""
    cpus, gpus = ([int(node.get(kind, 0)) for node in nodes] for kind in ("CPU", "GPU"))
    cores = max(1, min(sum(cpus) // workers, *filter(None, cpus)))
    part = min(1, sum(gpus) / workers)
    return Share(cores, part, min(workers, int(1 / part) if part else max(cpus) // cores))


def check(workers: int) -> None:
    """Raises BadRecipe where several are asked for and Ray is not installed."""
    if workers > 1 and importlib.util.find_spec("ray") is None:
        raise BadRecipe(
            "search.workers: candidates go side by side on Ray; pip install 'prunus[ray]', or leave it at 1"
        )
