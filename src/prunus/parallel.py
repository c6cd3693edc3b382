"""Several processes on one model: FSDP2 shards, who does what, and checkpoints that any number of ranks can read.

A process that torchrun started knows its rank from the environment; every other process is a world of one, for which
all of this does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from prunus import anatomy, hardware
from prunus.errors import BadOutput
from prunus.files import full_disk_is_an_error

TIMEOUT = timedelta(days=2)
"""How long a rank waits for the first to finish what it does alone: measuring and cutting a large model takes hours."""
STATE = "state.json"

Value = TypeVar("Value")


_acting_alone: ContextVar[bool] = ContextVar("acting_alone", default=False)
"""True while the first rank does what the others wait for."""


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1


ALONE = World(0, 1)


def world() -> World:
    """The ranks that torchrun started, connected; or this process alone."""
    return ALONE if _acting_alone.get() else _ranks()


@functools.cache
def _ranks() -> World:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gloo beside nccl: checkpoints and small objects travel on the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    return World(dist.get_rank(), size)


def first_alone(task: Callable[[], object]) -> None:
    """The first rank does it while the others wait; what it trains meanwhile, it trains in a world of its own.

    Raises:
        SystemExit: in the other ranks, where the first one failed: it says why.
    """
    here = world()
    if not here.several:
        task()
        return
    failed = [True]
    try:
        if here.first:
            token = _acting_alone.set(True)
            try:
                task()
            finally:
                _acting_alone.reset(token)
            failed = [False]
    finally:
        dist.broadcast_object_list(failed)
    if failed[0]:
        raise SystemExit(2)


def first_says(value: Value) -> Value:
    """The value of the first rank, which alone may know."""
    if not world().several:
        return value
    said = [value]
    dist.broadcast_object_list(said)
    return said[0]


def together(value: bool) -> bool:
    """Whether it is true in any rank."""
    if not world().several:
        return value
    flag = torch.tensor(float(value))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def total(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over the ranks."""
    if not world().several:
        return dict(values)
    stacked = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(stacked)
    return dict(zip(values, stacked.tolist(), strict=True))


def share(items: list[Value]) -> list[Value]:
    """What this rank takes of the items of a step: each its own run of them, the same number for all."""
    here = world()
    part = len(items) // here.size
    return items[here.rank * part : (here.rank + 1) * part]


def shard(root: nn.Module, model: PreTrainedModel, dtype: torch.dtype, fill: Callable[[Iterable[str]], None]) -> None:
    """Spread a model's float32 parameters over the ranks; each layer is gathered in `dtype` when it runs.

    Gradients are summed over the ranks, not averaged: the losses are divided by the tokens of all of them already. They
    are summed after every micro-batch: to wait for the last would leave each rank with a whole gradient in float32.

    Args:
        root: the module whose forward uses the embedding and the output head, tied or not; they are gathered together
            with it and stay gathered until its backward pass.
        model: the part of `root` that holds the layers.
        fill: gives tensors of `model` their values, by their names; so of a model that is not whole yet no rank ever
            holds more than what is around the layers and one of them.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(hardware.device().type, (world().size,))
    names = {module: f"{name}." for name, module in model.named_modules()}
    layers = {names[layer]: layer for layer in anatomy.layers_of(model)}
    tensors = list(anatomy.stored_tensors(model))
    fill(name for name in tensors if not name.startswith(tuple(layers)))
    hardware.place(model)
    for prefix, layer in layers.items():
        fill(name for name in tensors if name.startswith(prefix))
        fully_shard(hardware.place(layer), mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
            module.set_gradient_divide_factor(1.0)


@contextlib.contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """Inside, the embedding and the head of a sharded model are whole, and its parts can be called one by one."""
    if isinstance(root, FSDPModule):
        # Where a part runs before the root ever did, it would take itself for the root.
        root._get_fsdp_state()._lazy_init()
        root.unshard()
    yield
    if isinstance(root, FSDPModule):
        root.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered on every rank; another one as it is."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


class Saver:
    """Writes the state of a run into `folder`, as its newest version; the one before is then removed.

    The files are safetensors, one per rank; `load_state` reads them on any number of ranks. A version appears whole or
    not at all, and one is there at any time once the first is written.

    Args:
        background: copy the state to the CPU, and write while the training goes on. The version appears at the next
            `save` or `settle`. Worth it for a GPU; on a CPU it would double the memory.
    """

    def __init__(self, folder: Path, *, background: bool) -> None:
        self.folder, self.background = folder, background
        self.pending: Future[Any] | None = None
        # Its own group: the thread that writes must not come between the messages of the training.
        self.group = dist.new_group(backend="gloo") if background and world().several else None
        if background:  # what `_alone_is_meant` does ends before the thread that writes warns
            _ignore_being_alone()

    @property
    def _partial(self) -> Path:
        return self.folder / ".partial"

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Tensors, sharded or not, and a JSON record."""
        self.settle()
        if world().first:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            with full_disk_is_an_error(self.folder):
                (self._partial / STATE).write_text(json.dumps(record))
        _barrier()
        writer = HuggingFaceStorageWriter(str(self._partial), save_distributed=True)
        options: dict[str, Any] = {"storage_writer": writer, "no_dist": not world().several}
        with full_disk_is_an_error(self.folder), _bare_errors(), _alone_is_meant():
            if self.background:
                started = async_save(dict(tensors), process_group=self.group, **options)
                self.pending = started if isinstance(started, Future) else started.upload_completion
            else:
                save(dict(tensors), **options)
                self._publish()

    def settle(self) -> None:
        """Wait for what is being written in the background."""
        if self.pending is not None:
            with full_disk_is_an_error(self.folder), _bare_errors():
                self.pending.result()
            self.pending = None
            self._publish()

    def _publish(self) -> None:
        _barrier()
        if world().first:
            before = _versions(self.folder)
            number = int(before[-1].name) + 1 if before else 0
            self._partial.replace(self.folder / f"{number}")
            for version in before:
                shutil.rmtree(version)
        _barrier()


def has_state(folder: Path) -> bool:
    return bool(_versions(folder))


def load_record(folder: Path) -> dict[str, Any]:
    """The record that a `Saver` wrote last. Raises BadOutput where it cannot be read."""
    try:
        record: dict[str, Any] = json.loads((_versions(folder)[-1] / STATE).read_text())
        return record
    except (OSError, ValueError) as error:
        raise unreadable(folder, error) from error


def load_state(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill the tensors, sharded or not, with what a `Saver` wrote last. Raises BadOutput if that is damaged."""
    try:
        with _bare_errors(), _alone_is_meant():
            reader = HuggingFaceStorageReader(str(_versions(folder)[-1]))
            load(dict(tensors), storage_reader=reader, no_dist=not world().several)
    except Exception as error:
        raise unreadable(folder, error) from error


@contextlib.contextmanager
def _bare_errors() -> Iterator[None]:
    """PyTorch wraps what goes wrong with a state in an exception that is none of `Exception`; inside, it is that of the
    first rank that failed."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


@contextlib.contextmanager
def _alone_is_meant() -> Iterator[None]:
    """Without the warning that a world of one gets even where it asks for no_dist."""
    with warnings.catch_warnings():
        _ignore_being_alone()
        yield


def _ignore_being_alone() -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _versions(folder: Path) -> list[Path]:
    """Whole versions, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if path.name.isdigit()), key=lambda path: int(path.name))


def unreadable(folder: Path, error: Exception) -> BadOutput:
    return BadOutput(f"{folder} cannot be read ({error}); delete it and run the command again")


def _barrier() -> None:
    if world().several:
        dist.barrier()
