"""How large a model's weights are, for a learning rate that is no larger than they bear."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from prunus.checkpoint import Checkpoint


def of_layers(model: Checkpoint) -> float:
    """`size_of` the matrices of a model's layers, read from its files."""
    layers = (tensor for name, tensor in model.tensors() if model.family.split(name)[0] is not None)
    return size_of(tensor.read() for tensor in layers if len(tensor.shape) > 1)


def size_of(matrices: Iterable[Iterable[Tensor]]) -> float:
    """Size of a model's weights for a step that moves all of them alike: (mean of 1 / rms²)^-½ over the matrices, each
    as often as it has weights. The smaller ones count most, as what a step does to them is the most.

    Args:
        matrices: each in parts.
    """
    count = inverse = 0.0
    for parts in matrices:
        number = square = 0.0
        for part in parts:
            number, square = number + part.numel(), square + float(part.detach().float().square().sum())
        if square:  # one of zeros has no size that a step could be compared with
            count, inverse = count + number, inverse + number * number / square
    return math.sqrt(count / inverse) if inverse else math.inf
