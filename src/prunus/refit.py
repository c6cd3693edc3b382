"""Refit a cut student's projections to its teacher, layer by layer, in closed form.

Shapes: N tokens, H teacher channels, K student inputs, O outputs of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunus import hardware, layerwise, repair
from prunus.families import Branch, Family
from prunus.layerwise import TokenBlocks
from prunus.selection import Kept

BATCH_BLOCKS = 4


@torch.no_grad()
def repair_layers(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    family: Family,
    kept: Kept,
    blocks: TokenBlocks,
    *,
    damping: float = repair.DAMPING,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Refit the student's projections, layer by layer, to what the teacher computes on the same text.

    Both models walk the text together. In each branch the projections that read the stream are fitted to the
    teacher's outputs from the student's own norm, then the projection that writes is fitted to bring the student's
    stream back to the teacher's, so that an error made in one layer is made good in the next ones. Where layers were
    dropped, the last write before the gap is fitted to the stream behind it.

    Args:
        student: changed in place.
        kept: what the student keeps of the teacher.
        blocks: calibration text.
    """
    teacher_batches = layerwise.enter_all(teacher, blocks, batch_blocks=BATCH_BLOCKS)
    student_batches = layerwise.enter_all(student, blocks, batch_blocks=BATCH_BLOCKS)
    walk = _Walk(teacher, family, kept, teacher_batches)
    for number, layer in enumerate(layerwise.body(student).layers):
        walk.to_layer(number)
        for branch in family.branches:
            walk.fit_reads(number, layer, branch, student_batches, damping)
            walk.fit_write(number, layer, branch, student_batches, damping)
        for batch in student_batches:
            batch.stream_BSH = layerwise.run_layer(layer, batch.stream_BSH, batch.layer_inputs[number])
        progress(number + 1, len(kept.layers))


class _Walk:
    """The teacher's side of `repair_layers`: its streams, and what its branches saw and wrote in the current layer."""

    def __init__(self, teacher: PreTrainedModel, family: Family, kept: Kept, batches: list[layerwise.Batch]) -> None:
        self.family, self.kept, self.batches = family, kept, batches
        self.layers = layerwise.body(teacher).layers
        self.head_dim = teacher.config.head_dim
        self.next_layer = 0
        hidden = teacher.config.hidden_size
        # A student whose embedding is scaled by √hidden has a stream smaller than the teacher's by this factor.
        self.stream_scale = math.sqrt(len(kept.hidden) / hidden) if family.scaled_embedding else 1.0

    def to_layer(self, number: int) -> None:
        """Run the teacher through the layer that student layer `number` came from, and through dropped ones behind."""
        last = number + 1 == len(self.kept.layers)
        behind = len(self.layers) if last else self.kept.layers[number + 1]
        self._advance(self.kept.layers[number])
        self.layer = self.layers[self.next_layer]
        self.norm_outputs: dict[str, list[Tensor]] = {branch.name: [] for branch in self.family.branches}
        self.written: dict[str, list[Tensor]] = {branch.name: [] for branch in self.family.branches}
        streams: dict[str, list[Tensor]] = {branch.name: [] for branch in self.family.branches}
        observers: dict[str, Callable[[Tensor, Tensor], None]] = {}
        for branch in self.family.branches:

            def see_norm(stream: Tensor, output: Tensor, name: str = branch.name) -> None:
                streams[name].append(stream.flatten(0, 1))
                self.norm_outputs[name].append(output.flatten(0, 1))

            def see_write(_: Tensor, output: Tensor, name: str = branch.name) -> None:
                self.written[name].append(output.flatten(0, 1))

            observers[branch.norm] = see_norm
            if branch.post_norm:
                observers[branch.write] = see_write
        with layerwise.observe(self.layer, observers):
            self._advance(self.next_layer + 1)
        self._advance(behind)
        after = [batch.stream_BSH.flatten(0, 1) for batch in self.batches]
        following = [streams[branch.name] for branch in self.family.branches[1:]] + [after]
        self.stream_after = dict(zip(streams, following, strict=True))

    def _advance(self, layer: int) -> None:
        while self.next_layer < layer:
            for batch in self.batches:
                inputs = batch.layer_inputs[self.next_layer]
                batch.stream_BSH = layerwise.run_layer(self.layers[self.next_layer], batch.stream_BSH, inputs)
            self.next_layer += 1

    def fit_reads(
        self, number: int, layer: nn.Module, branch: Branch, batches: list[layerwise.Batch], damping: float
    ) -> None:
        """Fit q, k, v (or gate, up) to the teacher's outputs from the student's norm output."""
        equations = None
        for batch, teacher_NH in zip(batches, self.norm_outputs[branch.name], strict=True):
            student_NK = layerwise.input_of(layer, branch.reads[0], batch, number).flatten(0, 1)
            inputs, targets = _with_ones(student_NK), _with_ones(teacher_NH)
            equations = equations or _zeros(inputs, targets)
            _add(equations, inputs, targets)
        assert equations is not None
        for name in branch.reads:
            source, projection = _linear(self.layer, name), _linear(layer, name)
            rows = self.kept.index(self.family.layer_weights[f"{name}.weight"][0], number, self.head_dim)
            bias = projection.bias is not None
            columns = slice(None) if bias else slice(-1)
            weight_OH = _joined(source)[rows]
            _set(
                projection,
                repair.least_squares(
                    equations.gram_KK[columns, columns],
                    weight_OH @ equations.cross_OK[columns, columns],
                    _joined(projection),
                    damping=damping,
                ),
            )

    def fit_write(
        self, number: int, layer: nn.Module, branch: Branch, batches: list[layerwise.Batch], damping: float
    ) -> None:
        """Fit o_proj (or down_proj) so that the stream behind it is the teacher's."""
        projection = _linear(layer, branch.write)
        bias, hidden = projection.bias is not None, torch.tensor(self.kept.hidden)
        equations = None
        for place, batch in enumerate(batches):
            inner_NK = layerwise.input_of(layer, branch.write, batch, number).flatten(0, 1)
            if branch.post_norm:  # the norm behind sets the scale, so only the direction counts
                target_NH = self.written[branch.name][place][:, hidden]
            else:
                first = branch is self.family.branches[0]
                stream = batch.stream_BSH if first else layerwise.input_of(layer, branch.norm, batch, number)
                wanted_NH = self.stream_after[branch.name][place][:, hidden].float() * self.stream_scale
                target_NH = (wanted_NH - stream.flatten(0, 1).float()).to(inner_NK.dtype)
            inputs = _with_ones(inner_NK) if bias else inner_NK
            equations = equations or _zeros(inputs, target_NH)
            _add(equations, inputs, target_NH)
        assert equations is not None
        fitted = repair.least_squares(equations.gram_KK, equations.cross_OK, _joined(projection), damping=damping)
        _set(projection, fitted)


def _with_ones(x_ND: Tensor) -> Tensor:
    """A last column of ones, so that a bias is one more weight."""
    return torch.cat([x_ND, x_ND.new_ones(len(x_ND), 1)], dim=1)


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear), name
    return module


def _joined(projection: nn.Linear) -> Tensor:
    """float32 [O, K] weight, or [O, K+1] with the bias as last column."""
    weight = projection.weight.float()
    return weight if projection.bias is None else torch.cat([weight, projection.bias.float()[:, None]], dim=1)


def _set(projection: nn.Linear, joined: Tensor) -> None:
    if projection.bias is not None:
        projection.bias.copy_(joined[:, -1])
        joined = joined[:, :-1]
    projection.weight.copy_(joined)


def _zeros(inputs_NK: Tensor, targets_NO: Tensor) -> repair.NormalEquations:
    return repair.NormalEquations.zeros(inputs_NK.shape[1], targets_NO.shape[1], device=inputs_NK.device)


def _add(equations: repair.NormalEquations, inputs_NK: Tensor, targets_NO: Tensor) -> None:
    equations.gram_KK += layerwise.gram(inputs_NK)
    equations.cross_OK += hardware.matmul_float32(targets_NO.T, inputs_NK)
