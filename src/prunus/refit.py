"""Refit a cut student's projections to its teacher, layer by layer, in closed form.

Shapes: N tokens, H teacher channels, K student inputs, O outputs of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunus import anatomy, experts, hardware, layerwise, repair
from prunus.architecture import Architecture
from prunus.families import Branch, Family
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
    scale = math.sqrt(len(kept.hidden) / walk.sizes.hidden) if family.scaled_embedding else 1.0
    hidden = torch.tensor(kept.hidden, device=student.device)
    for number, layer in enumerate(anatomy.layers_of(student)):
        source, seen = walk.next_layer(number)
        entering: list[Tensor] = []
        for branch in layerwise.branches_of(layer, family):
            added_scale = layerwise.added_scale(student.config, family, branch)
            norm, teacher_side = layerwise.norm_of(layer, branch), seen[branch.name]
            if not branch.beside:
                entering = [batch.stream_BSH for batch in batches]
            normed = [norm(stream_BSH) for stream_BSH in entering]
            if branch.post_norm:  # the norm behind sets the scale, so only the direction counts
                targets_NK = _flat(teacher_side.written)[:, hidden]
            else:
                own_NK = _flat([batch.stream_BSH for batch in batches]).float()
                before_NK = _flat(teacher_side.before)[:, hidden].float() * scale
                after_NK = _flat(teacher_side.after)[:, hidden].float() * scale
                targets_NK = (after_NK - torch.lerp(before_NK, own_NK, FEEDBACK)) / added_scale
                targets_NK = targets_NK.to(normed[0].dtype)
            inputs = [batch.layer_inputs[number] for batch in batches]
            fit = _BranchFit(source, layer, branch, family, kept, number, walk.sizes, damping)
            for batch, written_BSK in zip(
                batches, fit.fitted(normed, inputs, _flat(teacher_side.normed), targets_NK), strict=True
            ):
                batch.stream_BSH = batch.stream_BSH + layerwise.behind(layer, branch, written_BSK) * added_scale
        progress(number + 1, len(kept.layers))


class Projection(Protocol):
    """A linear map of a layer: nn.Linear, a router, or GPT-2's Conv1D."""

    weight: Tensor

    def __call__(self, x: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class _BranchFit:
    """Fits one branch of a student's layer to the layer that it was cut out of.

    Attributes:
        source, layer: of the teacher, and of the student, changed in place.
        number: of the student's layer.
        sizes: of the teacher.
    """

    source: nn.Module
    layer: nn.Module
    branch: Branch
    family: Family
    kept: Kept
    number: int
    sizes: Architecture
    damping: float

    def fitted(
        self, normed: list[Tensor], inputs: list[dict[str, Any]], teacher_NH: Tensor, targets_NK: Tensor
    ) -> list[Tensor]:
        """What the fitted branch writes, [B, S, K] of each batch.

        Args:
            normed: what it reads, [B, S, K] of each batch.
            inputs: what else its module is called with.
            teacher_NH: what the teacher's branch reads.
            targets_NK: what it should write.
        """
        layer, branch, student_NK = self.layer, self.branch, _flat(normed)
        self._fit_reads(student_NK, teacher_NH)
        if branch.experts:
            self._fit_experts(student_NK, teacher_NH)
        if branch.write is None:
            return self._outputs(normed, inputs)
        inner = [
            layerwise.branch_inner(layer, branch, normed_BSK, each)
            for normed_BSK, each in zip(normed, inputs, strict=True)
        ]
        projection, inner_NF = _projection(layer, branch.write), torch.cat([part.flatten(0, -2) for part in inner])
        if not branch.experts:
            _fit_write(projection, inner_NF, targets_NK, self.damping)
            return [projection(inner_BSF) for inner_BSF in inner]
        if branch.write_gate:
            inner_NF = inner_NF * torch.sigmoid(layer.get_submodule(branch.write_gate)(student_NK))
        # A shared expert sees every token, so it makes good what the routed ones leave.
        others_NK = _flat(self._outputs(normed, inputs)) - inner_NF @ layerwise.weight_of(projection).T
        _fit_write(projection, inner_NF, targets_NK - others_NK, self.damping)
        return self._outputs(normed, inputs)

    def _outputs(self, normed: list[Tensor], inputs: list[dict[str, Any]]) -> list[Tensor]:
        return [
            layerwise.branch_output(self.layer, self.branch, normed_BSK, each)
            for normed_BSK, each in zip(normed, inputs, strict=True)
        ]

    def _fit_reads(self, student_NK: Tensor, teacher_NH: Tensor) -> None:
        """Fit q, k, v (or gate, up, router) to the teacher's outputs from the student's norm output."""
        inputs, targets = _with_ones(student_NK), _with_ones(teacher_NH)
        gram_KK = layerwise.gram(inputs)
        cross_HK = hardware.matmul_float32(targets.T, inputs)
        solvers: dict[bool, repair.LeastSquares] = {}

        def solved(original_OH: Tensor, start_OK: Tensor, *, biased: bool) -> Tensor:
            columns = slice(None) if biased else slice(-1)
            if biased not in solvers:
                solvers[biased] = repair.LeastSquares(gram_KK[columns, columns], damping=self.damping)
            return solvers[biased](original_OH @ cross_HK[columns, columns], start_OK)

        for name in self.branch.reads:
            original, projection = _projection(self.source, name), _projection(self.layer, name)
            rows = self.kept.index(self.family.outputs(name), self.number, self.sizes)
            weight_OH = _joined(original)
            kept_OH = weight_OH if rows is None else weight_OH[rows.to(weight_OH.device)]
            _set(projection, solved(kept_OH, _joined(projection), biased=_bias(projection) is not None))
        if self.branch.experts:
            theirs, mine = (experts.of(layer, self.branch.experts) for layer in (self.source, self.layer))
            name = experts.read_of(mine)
            origin, neurons = self.kept.inner["experts"][self.number], self._neurons(name)
            for place, (expert, rows) in enumerate(zip(origin, neurons, strict=True)):
                kept_OH = experts.joined(theirs, name, expert)[rows]
                fitted = solved(kept_OH, experts.joined(mine, name, place), biased=mine.has_bias)
                experts.put(mine, name, place, fitted)

    def _fit_experts(self, student_NK: Tensor, teacher_NH: Tensor) -> None:
        """Fit each expert's write to what the teacher's makes of the tokens that the student sends there. The fewer
        these are, the stronger is the pull to the sliced weights."""
        assert self.branch.experts
        theirs, mine = (experts.of(layer, self.branch.experts) for layer in (self.source, self.layer))
        origin, hidden = self.kept.inner["experts"][self.number], torch.tensor(self.kept.hidden)

        def fit(routed: experts.Routed) -> None:
            expert = origin[routed.expert]
            inner_NF = experts.inner(theirs, expert, teacher_NH[routed.tokens_N])
            targets_NH = experts.written(theirs, expert, inner_NF)
            weight_N1 = routed.weight_N[:, None].to(targets_NH.dtype)
            inputs_NF = routed.inner_NF if not mine.has_bias else _with_ones(routed.inner_NF)
            inputs_NF = inputs_NF * weight_N1
            targets_NK = targets_NH[:, hidden.to(targets_NH.device)] * weight_N1
            damping = self.damping * (1 + inputs_NF.shape[1] / len(inputs_NF))
            solve = repair.LeastSquares(layerwise.gram(inputs_NF), damping=damping)
            cross_KF = hardware.matmul_float32(targets_NK.T, inputs_NF)
            start_KF = experts.joined(mine, experts.WRITE, routed.expert)
            experts.put(mine, experts.WRITE, routed.expert, solve(cross_KF, start_KF))

        with experts.observed(mine, fit):
            self.layer.get_submodule(self.branch.module)(student_NK[None])

    def _neurons(self, name: str) -> Tensor:
        """Which outputs of their first weight the student's experts keep, int64 [E, O]."""
        units = self.family.layer_weights[f"{self.branch.experts}.{name}"]
        formula = next(unit for unit in units if "expert_ffn" in unit)
        index = self.kept.index(formula, self.number, self.sizes)
        assert index is not None
        return index


@dataclass
class _Seen:
    """What the teacher computed in one branch, a tensor per batch.

    Attributes:
        before: the stream before the branch, [B, S, H].
        normed: the norm's output.
        written: what the branch makes of it, before a post-norm.
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
        self.config = teacher.config
        self.layers = anatomy.layers_of(teacher)
        self.sizes = family.architecture(teacher.config)
        self.done = 0

    def next_layer(self, number: int) -> tuple[nn.Module, dict[str, _Seen]]:
        """Run the layer that student layer `number` came from, and those dropped before and behind it."""
        self._skip_to(self.kept.layers[number])
        layer, seen = self.layers[self.done], {}
        entering: list[Tensor] = []
        branches = layerwise.branches_of(layer, self.family)
        for branch in branches:
            seen[branch.name] = _Seen([], [], [], [])
            if not branch.beside:
                entering = [batch.stream_BSH for batch in self.batches]
            scale = layerwise.added_scale(self.config, self.family, branch)
            for batch, entering_BSH in zip(self.batches, entering, strict=True):
                seen[branch.name].before.append(batch.stream_BSH)
                normed_BSH = layerwise.norm_of(layer, branch)(entering_BSH)
                written_BSH = layerwise.branch_output(layer, branch, normed_BSH, batch.layer_inputs[self.done])
                batch.stream_BSH = batch.stream_BSH + layerwise.behind(layer, branch, written_BSH) * scale
                seen[branch.name].normed.append(normed_BSH)
                seen[branch.name].written.append(written_BSH)
                seen[branch.name].after.append(batch.stream_BSH)
        self.done += 1
        last = number + 1 == len(self.kept.layers)
        self._skip_to(len(self.layers) if last else self.kept.layers[number + 1])
        seen[branches[-1].name].after = [batch.stream_BSH for batch in self.batches]
        return layer, seen

    def _skip_to(self, layer: int) -> None:
        for index in range(self.done, layer):
            for batch in self.batches:
                batch.stream_BSH = layerwise.run_layer(self.layers[index], batch.stream_BSH, batch.layer_inputs[index])
        self.done = layer


def _fit_write(projection: Projection, inner_NK: Tensor, targets_NO: Tensor, damping: float) -> None:
    """Fit o_proj (or down_proj) to what should be added to the student's stream."""
    inputs = inner_NK if _bias(projection) is None else _with_ones(inner_NK)
    cross_OK = hardware.matmul_float32(targets_NO.T, inputs)
    solve = repair.LeastSquares(layerwise.gram(inputs), damping=damping)
    _set(projection, solve(cross_OK, _joined(projection)))


def _flat(parts_BSH: list[Tensor]) -> Tensor:
    """[N, H] of all batches."""
    return torch.cat([part.flatten(0, 1) for part in parts_BSH])


def _with_ones(x_ND: Tensor) -> Tensor:
    """A last column of ones, so that a bias is one more weight."""
    return torch.cat([x_ND, x_ND.new_ones(len(x_ND), 1)], dim=1)


def _projection(layer: nn.Module, name: str) -> Projection:
    return cast(Projection, layer.get_submodule(name))


def _bias(projection: Projection) -> Tensor | None:
    return getattr(projection, "bias", None)  # a router may have none by that name


def _joined(projection: Projection) -> Tensor:
    """float32 [O, K] weight, or [O, K+1] with the bias as last column."""
    weight = layerwise.weight_of(projection).float()
    bias = _bias(projection)
    return weight if bias is None else torch.cat([weight, bias.float()[:, None]], dim=1)


def _set(projection: Projection, joined: Tensor) -> None:
    bias = _bias(projection)
    if bias is not None:
        bias.copy_(joined[:, -1])
        joined = joined[:, :-1]
    layerwise.weight_of(projection).copy_(joined)
