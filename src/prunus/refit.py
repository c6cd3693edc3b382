"""Refit a cut student's projections to its teacher, layer by layer, in closed form.

Shapes: N tokens, H teacher channels, K student inputs, O outputs of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunus import hardware, layerwise, repair
from prunus.architecture import from_config
from prunus.families import Family
from prunus.layerwise import TokenBlocks
from prunus.selection import Kept

BATCH_BLOCKS = 4
FEEDBACK = 0.5
"""Share of the error that the student's stream has gathered so far which a write is asked to make good. Fitting all of
it overfits the calibration text, none lets errors add up; measured on SmolLM2-135M, see LOG.md."""


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
    teacher's outputs from the student's own norm, then the projection that writes is fitted to what the teacher adds
    to the stream, and to part of what the student's stream lacks from earlier layers (`FEEDBACK`). Where layers were
    dropped, the last write before the gap is fitted to the stream behind it.

    Args:
        student: changed in place.
        kept: what the student keeps of the teacher.
        blocks: calibration text.
    """
    batches = layerwise.enter_all(student, blocks, batch_blocks=BATCH_BLOCKS)
    walk = _TeacherWalk(teacher, family, kept, layerwise.enter_all(teacher, blocks, batch_blocks=BATCH_BLOCKS))
    # A student whose embedding is scaled by √hidden has a stream smaller than the teacher's by this factor.
    scale = math.sqrt(len(kept.hidden) / teacher.config.hidden_size) if family.scaled_embedding else 1.0
    added_scale = getattr(student.config, family.residual_scale) if family.residual_scale else 1.0
    hidden = torch.tensor(kept.hidden, device=student.device)
    for number, layer in enumerate(layerwise.layers_of(student)):
        source, seen = walk.next_layer(number)
        entering = [batch.stream_BSH for batch in batches]
        for branch in family.branches:
            norm, teacher_side = layerwise.norm_of(layer, branch), seen[branch.name]
            read = entering if family.parallel else [batch.stream_BSH for batch in batches]
            normed = [norm(stream_BSH) for stream_BSH in read]
            units = {name: family.layer_weights[f"{name}.weight"][0] for name in branch.reads}
            rows = {name: kept.index(unit, number, walk.sizes) for name, unit in units.items()}
            _fit_reads(source, layer, rows, _flat(normed), _flat(teacher_side.normed), damping)
            inner = [
                layerwise.branch_inner(layer, branch, normed_BSK, batch.layer_inputs[number])
                for normed_BSK, batch in zip(normed, batches, strict=True)
            ]
            if branch.post_norm:  # the norm behind sets the scale, so only the direction counts
                targets_NK = _flat(teacher_side.written)[:, hidden]
            else:
                own_NK = _flat([batch.stream_BSH for batch in batches]).float()
                before_NK = _flat(teacher_side.before)[:, hidden].float() * scale
                after_NK = _flat(teacher_side.after)[:, hidden].float() * scale
                targets_NK = (after_NK - torch.lerp(before_NK, own_NK, FEEDBACK)) / added_scale
                targets_NK = targets_NK.to(normed[0].dtype)
            _fit_write(_linear(layer, branch.write), _flat(inner), targets_NK, damping)
            for batch, inner_BSD in zip(batches, inner, strict=True):
                added_BSK = layerwise.branch_written(layer, branch, inner_BSD)[1]
                batch.stream_BSH = batch.stream_BSH + added_BSK * added_scale
        progress(number + 1, len(kept.layers))


@dataclass
class _Seen:
    """What the teacher computed in one branch, a tensor per batch.

    Attributes:
        before: the stream before the branch, [B, S, H].
        normed: the norm's output.
        written: the write projection's output.
        after: the stream behind the branch; behind the last one of a layer, also behind dropped layers that follow.
    """

    before: list[Tensor]
    normed: list[Tensor]
    written: list[Tensor]
    after: list[Tensor]


class _TeacherWalk:
    """The teacher's side of `repair_layers`."""

    def __init__(self, teacher: PreTrainedModel, family: Family, kept: Kept, batches: list[layerwise.Batch]) -> None:
        self.family, self.kept, self.batches = family, kept, batches
        self.added_scale = getattr(teacher.config, family.residual_scale) if family.residual_scale else 1.0
        self.layers = layerwise.layers_of(teacher)
        self.sizes = from_config(teacher.config.to_dict(), family.fields)
        self.done = 0

    def next_layer(self, number: int) -> tuple[nn.Module, dict[str, _Seen]]:
        """Run the layer that student layer `number` came from, and those dropped before and behind it."""
        self._skip_to(self.kept.layers[number])
        layer, seen = self.layers[self.done], {}
        entering = [batch.stream_BSH for batch in self.batches]
        for branch in self.family.branches:
            seen[branch.name] = _Seen([], [], [], [])
            for batch, entering_BSH in zip(self.batches, entering, strict=True):
                seen[branch.name].before.append(batch.stream_BSH)
                read_BSH = entering_BSH if self.family.parallel else batch.stream_BSH
                normed_BSH = layerwise.norm_of(layer, branch)(read_BSH)
                inner_BSD = layerwise.branch_inner(layer, branch, normed_BSH, batch.layer_inputs[self.done])
                written_BSH, added_BSH = layerwise.branch_written(layer, branch, inner_BSD)
                batch.stream_BSH = batch.stream_BSH + added_BSH * self.added_scale
                seen[branch.name].normed.append(normed_BSH)
                seen[branch.name].written.append(written_BSH)
                seen[branch.name].after.append(batch.stream_BSH)
        self.done += 1
        last = number + 1 == len(self.kept.layers)
        self._skip_to(len(self.layers) if last else self.kept.layers[number + 1])
        seen[self.family.branches[-1].name].after = [batch.stream_BSH for batch in self.batches]
        return layer, seen

    def _skip_to(self, layer: int) -> None:
        for index in range(self.done, layer):
            for batch in self.batches:
                batch.stream_BSH = layerwise.run_layer(self.layers[index], batch.stream_BSH, batch.layer_inputs[index])
        self.done = layer


def _fit_reads(
    source: nn.Module,
    layer: nn.Module,
    rows: Mapping[str, Tensor | None],
    student_NK: Tensor,
    teacher_NH: Tensor,
    damping: float,
) -> None:
    """Fit q, k, v (or gate, up) to the teacher's outputs from the student's norm output.

    Args:
        rows: projection → which of the teacher's outputs it keeps.
    """
    inputs, targets = _with_ones(student_NK), _with_ones(teacher_NH)
    gram_KK = layerwise.gram(inputs)
    cross_HK = hardware.matmul_float32(targets.T, inputs)
    for name, index in rows.items():
        original, projection = _linear(source, name), _linear(layer, name)
        columns = slice(None) if projection.bias is not None else slice(-1)
        weight_OH = _joined(original)
        kept_OH = weight_OH if index is None else weight_OH[index.to(weight_OH.device)]
        wanted_OK = kept_OH @ cross_HK[columns, columns]
        _set(
            projection,
            repair.least_squares(gram_KK[columns, columns], wanted_OK, _joined(projection), damping=damping),
        )


def _fit_write(projection: nn.Linear, inner_NK: Tensor, targets_NO: Tensor, damping: float) -> None:
    """Fit o_proj (or down_proj) to what should be added to the student's stream."""
    inputs = inner_NK if projection.bias is None else _with_ones(inner_NK)
    cross_OK = hardware.matmul_float32(targets_NO.T, inputs)
    _set(projection, repair.least_squares(layerwise.gram(inputs), cross_OK, _joined(projection), damping=damping))


def _flat(parts_BSH: list[Tensor]) -> Tensor:
    """[N, H] of all batches."""
    return torch.cat([part.flatten(0, 1) for part in parts_BSH])


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
