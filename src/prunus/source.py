"""Where a walk finds a model's layers: in memory, or on disk, one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

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
    need = teacher.bytes * dtype.itemsize // teacher.dtype.itemsize
    fits = need <= SHARE_OF_MEMORY * hardware.free_memory()
    return in_memory(teacher.module(dtype, hardware.device())) if fits else on_disk(teacher)


def in_memory(model: PreTrainedModel) -> Source:
    return Source(model, lambda name: contextlib.nullcontext(model.get_submodule(name)))


def on_disk(teacher: Checkpoint) -> Source:
    """A model that is never in memory whole."""
    dtype = hardware.fast_dtype(teacher.dtype)
    model = hardware.place(teacher.skeleton(dtype))
    for name, buffer in model.named_buffers():
        module, _, own = name.rpartition(".")
        model.get_submodule(module)._buffers[own] = buffer.to(hardware.device())

    @contextlib.contextmanager
    def filled(name: str) -> Iterator[nn.Module]:
        module, prefix = model.get_submodule(name), f"{name}."
        empty = anatomy.stored_tensors(module)
        # A tied head has the embedding's weights under another name.
        stored = {own: prefix + own if prefix + own in teacher.stored else _tied_to(teacher) for own in empty}
        weights = {own: teacher.tensor(full) for own, full in stored.items()}
        _assign(module, {own: w.to(dtype) if w.dtype == teacher.dtype else w for own, w in weights.items()})
        try:
            yield hardware.place(module)
        finally:
            _assign(module, empty)

    outer = teacher.stored.keys() & teacher.family.outer_weights.keys()  # of these what text runs through
    around = {name.rpartition(".")[0] for name in outer if not name.startswith(teacher.family.vision)}
    return Source(model, filled, around - {teacher.family.head})


def _assign(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Let these be the module's parameters and buffers, without a copy where they are in place already."""
    for name, value in weights.items():
        path, _, own = name.rpartition(".")
        owner, here = module.get_submodule(path), value if value.is_meta else value.to(hardware.device())
        if own in owner._buffers:
            owner._buffers[own] = here
        else:
            owner._parameters[own] = nn.Parameter(here, requires_grad=False)


def _tied_to(teacher: Checkpoint) -> str:
    return f"{teacher.family.embedding}.weight"
