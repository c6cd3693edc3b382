"""Where a walk finds a model's layers: in memory, or on disk, one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunus import anatomy, hardware
from prunus.checkpoint import Checkpoint

SHARE_OF_MEMORY = 0.7
"""A model that takes more of what is free is read layer by layer."""

Fill = Callable[[str], AbstractContextManager[nn.Module]]


class Source:
    """A model whose parts have their weights while they are used.

    Attributes:
        model: the transformers model; of one that is read layer by layer, without weights but where `filled`.
        filled: name of a module → a context in which it can be called.
        around: modules around the layers, but for the head.
    """

    def __init__(self, model: PreTrainedModel, filled: Fill, around: Iterable[str] = ()) -> None:
        self.model, self.filled, self.around = model, filled, tuple(around)
        names = {module: name for name, module in model.named_modules()}
        self._layers = [names[layer] for layer in anatomy.layers_of(model)]

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self._layers)

    def layer(self, number: int) -> AbstractContextManager[nn.Module]:
        return self.filled(self._layers[number])

    @property
    def whole(self) -> bool:
        """Whether all weights are there at once."""
        return not any(weight.is_meta for weight in self.model.parameters())

    @contextlib.contextmanager
    def outer(self) -> Iterator[None]:
        """Inside, all that stands around the layers has its weights, but for the head."""
        with contextlib.ExitStack() as stack:
            for name in self.around:
                stack.enter_context(self.filled(name))
            yield

    def layers(self) -> Iterator[nn.Module]:
        """The decoder layers in order, each until the next is asked for."""
        for number in range(len(self)):
            with self.layer(number) as module:
                yield module


def opened(teacher: Checkpoint) -> Source:
    """A checkpoint on the device, or on disk where it would take much of the free memory."""
    dtype = hardware.fast_dtype(teacher.dtype)
    if too_large(teacher, dtype.itemsize, hardware.free_memory()):
        return on_disk(teacher)
    return in_memory(teacher.module(dtype, hardware.device()))


def too_large(teacher: Checkpoint, itemsize: int, free: int) -> bool:
    """Whether a checkpoint is read layer by layer.

    Args:
        itemsize: bytes of a value in the type that is computed in.
        free: bytes of the device.
    """
    return teacher.bytes * itemsize // teacher.dtype.itemsize > SHARE_OF_MEMORY * free


def in_memory(model: PreTrainedModel) -> Source:
    return Source(model, lambda name: contextlib.nullcontext(model.get_submodule(name)))


def on_disk(teacher: Checkpoint) -> Source:
    """A model that is never in memory whole."""
    dtype = hardware.fast_dtype(teacher.dtype)
    model = hollow(teacher, dtype).requires_grad_(False)

    @contextlib.contextmanager
    def filled(name: str) -> Iterator[nn.Module]:
        module = model.get_submodule(name)
        empty = {f"{name}.{own}": value for own, value in anatomy.stored_tensors(module).items()}
        _fill(model, teacher, empty, dtype)
        try:
            yield hardware.place(module)
        finally:
            _assign(model, empty)

    outer = teacher.stored.keys() & teacher.family.outer_weights.keys()  # of these what text runs through
    around = {name.rpartition(".")[0] for name in outer if not name.startswith(teacher.family.vision)}
    return Source(model, filled, around - {teacher.family.head})


def hollow(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """A model without its weights, which lie on the meta device; its buffers are on the device."""
    model = hardware.place(checkpoint.skeleton(dtype))
    for name, buffer in model.named_buffers():
        module, _, own = name.rpartition(".")
        model.get_submodule(module)._buffers[own] = buffer.to(hardware.device())
    return model


def filling(model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> Callable[[Iterable[str]], None]:
    """What gives tensors of a hollow model their values for good, by their names; those of a whole one have theirs."""

    def fill(names: Iterable[str]) -> None:
        _fill(model, checkpoint, names, dtype)
        model.tie_weights()

    return fill if any(weight.is_meta for weight in model.parameters()) else lambda _: None


def _fill(model: PreTrainedModel, checkpoint: Checkpoint, names: Iterable[str], dtype: torch.dtype) -> None:
    """What is stored in a wider type than the others stays in it. A tied head has the embedding's weights under another
    name."""
    embedding = f"{checkpoint.family.embedding}.weight"

    def read(name: str) -> Tensor:
        weight = checkpoint.tensor(name if name in checkpoint.stored else embedding)
        return weight.to(dtype if weight.dtype == checkpoint.dtype else torch.promote_types(weight.dtype, dtype))

    _assign(model, {name: read(name) for name in names})


def _assign(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Let these be the model's parameters and buffers, without a copy where they are in place already."""
    for name, value in weights.items():
        path, _, own = name.rpartition(".")
        owner, here = model.get_submodule(path), value if value.is_meta else value.to(hardware.device())
        if own in owner._buffers:
            owner._buffers[own] = here
        else:
            owner._parameters[own] = nn.Parameter(here, requires_grad=owner.get_parameter(own).requires_grad)
