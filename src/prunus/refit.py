"""Refit a cut student's projections to its teacher, layer by layer, in closed form.

Shapes: N tokens, H teacher channels, K student inputs, O outputs of a projection.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
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
from prunus.source import Source

BATCH_BLOCKS = 4
FEEDBACK = 0.5
"""Share of the error that the student's stream has gathered so far which a write is asked to make good. Fitting all of
it overfits the calibration text, none lets errors add up; measured on SmolLM2-135M, see LOG.md."""


@torch.no_grad()
def repair_layers(
    teacher: Source,
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
    dropped, the last write before the gap is fitted to the stream behind it. A write with a post-norm, which sets the
    size of what is added, is fitted to what the teacher's own branch writes alone.

    Args:
        teacher: whole, or its layers one at a time.
        student: changed in place.
        kept: what the student keeps of the teacher.
        blocks: calibration text.
    """
    batches = layerwise.enter_all(student, blocks, batch_blocks=BATCH_BLOCKS)
    walk = _TeacherWalk(teacher, family, kept, blocks)
    # A student whose embedding is scaled by √hidden has a stream smaller than the teacher's by this factor.
    stream_scale = math.sqrt(len(kept.hidden) / walk.sizes.hidden) if family.scaled_embedding else 1.0
    hidden = torch.tensor(kept.hidden, device=student.device)
    for number, layer in enumerate(anatomy.layers_of(student)):
        inputs = [batch.layer_inputs[number] for batch in batches]
        entering: list[Tensor] = []
        for branch, source, seen in walk.branches(number):
            if not layerwise.has(layer, branch.mark):
                continue
            added_scale = layerwise.added_scale(student.config, family, branch)
            if not branch.beside:
                entering = [batch.stream_BSH for batch in batches]
            scale = added_scale * layerwise.module_scale(layer, branch)
            targets = _Targets(seen, [batch.stream_BSH for batch in batches], hidden, stream_scale, scale)
            fit = _BranchFit(source, layer, branch, family, kept, number, walk.sizes, damping)
            written = fit.fitted(entering, inputs, seen.entering, targets)
            for batch, written_BSK in zip(batches, written, strict=True):
                batch.stream_BSH = batch.stream_BSH + layerwise.behind(layer, branch, written_BSK) * added_scale
        progress(number + 1, len(kept.layers))


@dataclass(frozen=True)
class _Targets:
    """What a branch of the student should write, batch by batch.

    Attributes:
        seen: what the teacher's branch did.
        streams: the student's, before the branch.
        hidden: int64 [K], channels that stay.
        stream_scale: of the student's stream, as a share of the teacher's.
        added_scale: factor on what the write adds.
    """

    seen: _Seen
    streams: list[Tensor]
    hidden: Tensor
    stream_scale: float
    added_scale: float

    def __getitem__(self, number: int) -> Tensor:
        """[N, K] of one batch."""
        own_NK = self.streams[number].flatten(0, 1)
        if self.seen.written:  # a post-norm sets the scale, so only the direction counts
            return self.seen.written[number].flatten(0, 1)[:, self.hidden]
        before_NK, after_NK = (
            each[number].flatten(0, 1)[:, self.hidden].float() * self.stream_scale
            for each in (self.seen.before, self.seen.after)
        )
        targets_NK = (after_NK - torch.lerp(before_NK, own_NK.float(), FEEDBACK)) / self.added_scale
        return targets_NK.to(own_NK.dtype)


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
        self, entering: list[Tensor], inputs: list[dict[str, Any]], teacher_entering: list[Tensor], targets: _Targets
    ) -> Iterable[Tensor]:
        """What the fitted branch writes, [B, S, K] of each batch.

        Args:
            entering: the stream that its norm reads, [B, S, K] of each batch.
            inputs: what else its module is called with.
            teacher_entering: the stream that the teacher's norm reads, [B, S, H] of each batch.
            targets: what it should write.
        """
        layer, branch = self.layer, self.branch
        mine = _Normed(layerwise.norm_of(layer, branch), entering)
        self._fit_reads(mine, _Normed(layerwise.norm_of(self.source, branch), teacher_entering))
        if branch.experts:
            self._fit_experts(mine, _Normed(layerwise.norm_of(self.source, branch), teacher_entering))
        if branch.write is None:
            return self._outputs(mine, inputs)
        inner = [
            layerwise.branch_inner(layer, branch, normed_BSK, each)
            for normed_BSK, each in zip(mine, inputs, strict=True)
        ]
        projection, sums = _projection(layer, branch.write), _Sums()
        # A shared expert sees every token, so it makes good what the routed ones leave.
        wholes = self._outputs(mine, inputs) if branch.experts else itertools.repeat(None)
        for place, (normed_BSK, inner_BSF, whole_BSK) in enumerate(zip(mine, inner, wholes, strict=False)):
            inner_NF, targets_NK = inner_BSF.flatten(0, -2), targets[place]
            inputs_NF = inner_NF if _bias(projection) is None else _with_ones(inner_NF)
            if branch.experts and branch.write_gate:
                gate = layer.get_submodule(branch.write_gate)
                inputs_NF = inputs_NF * torch.sigmoid(gate(normed_BSK.flatten(0, 1)))
            if whole_BSK is not None:
                own_NK = inputs_NF @ _joined(projection).to(inputs_NF.dtype).T
                targets_NK = targets_NK - (whole_BSK.flatten(0, 1) - own_NK)
            sums.add(inputs_NF, targets_NK)
        _set(projection, sums.solver(self.damping)(sums.cross_OK, _joined(projection)))
        if branch.experts:
            return self._outputs(mine, inputs)
        scale = layerwise.module_scale(layer, branch)
        return map(projection, inner) if scale == 1 else (projection(inner_BSF) * scale for inner_BSF in inner)

    def _outputs(self, normed: Iterable[Tensor], inputs: list[dict[str, Any]]) -> Iterator[Tensor]:
        for normed_BSK, each in zip(normed, inputs, strict=True):
            yield layerwise.branch_output(self.layer, self.branch, normed_BSK, each)

    def _fit_reads(self, mine: _Normed, theirs: _Normed) -> None:
        """Fit q, k, v (or gate, up, router) to the teacher's outputs from the student's norm output."""
        sums = _Sums()
        for mine_BSK, theirs_BSH in zip(mine, theirs, strict=True):
            sums.add(_with_ones(mine_BSK.flatten(0, 1)), _with_ones(theirs_BSH.flatten(0, 1)))
        solvers: dict[bool, repair.LeastSquares] = {}

        def solved(original_OH: Tensor, start_OK: Tensor, *, biased: bool) -> Tensor:
            columns = slice(None) if biased else slice(-1)
            if biased not in solvers:
                solvers[biased] = sums.solver(self.damping, columns)
            return solvers[biased](original_OH @ sums.cross_OK[columns, columns], start_OK)

        for name in self.branch.reads:
            original, projection = _projection(self.source, name), _projection(self.layer, name)
            rows = self.kept.index(self.family.outputs(name), self.number, self.sizes)
            weight_OH = _joined(original)
            kept_OH = weight_OH if rows is None else weight_OH[rows.to(weight_OH.device)]
            _set(projection, solved(kept_OH, _joined(projection), biased=_bias(projection) is not None))
        if self.branch.experts:
            origin, own = (experts.of(layer, self.branch.experts) for layer in (self.source, self.layer))
            name = experts.read_of(own)
            numbers, neurons = self.kept.inner["experts"][self.number], self._neurons(name)
            for place, (expert, rows) in enumerate(zip(numbers, neurons, strict=True)):
                kept_OH = experts.joined(origin, name, expert)[rows]
                fitted = solved(kept_OH, experts.joined(own, name, place), biased=own.has_bias)
                experts.put(own, name, place, fitted)

    def _fit_experts(self, mine: _Normed, theirs: _Normed) -> None:
        """Fit each expert's write to what the teacher's makes of the tokens that the student sends there. The fewer
        these are, the stronger is the pull to the sliced weights."""
        assert self.branch.experts
        origin, own = (experts.of(layer, self.branch.experts) for layer in (self.source, self.layer))
        numbers, hidden = self.kept.inner["experts"][self.number], torch.tensor(self.kept.hidden)
        # An expert wants all of its tokens at once.
        student_NK, teacher_NH = (torch.cat([part.flatten(0, 1) for part in parts]) for parts in (mine, theirs))

        def fit(routed: experts.Routed) -> None:
            expert = numbers[routed.expert]
            inner_NF = experts.inner(origin, expert, teacher_NH[routed.tokens_N])
            targets_NH = experts.written(origin, expert, inner_NF)
            weight_N1 = routed.weight_N[:, None].to(targets_NH.dtype)
            inputs_NF = routed.inner_NF if not own.has_bias else _with_ones(routed.inner_NF)
            inputs_NF = inputs_NF * weight_N1
            targets_NK = targets_NH[:, hidden.to(targets_NH.device)] * weight_N1
            damping = self.damping * (1 + inputs_NF.shape[1] / len(inputs_NF))
            solve = repair.LeastSquares(layerwise.gram(inputs_NF), damping=damping)
            cross_KF = hardware.matmul_float32(targets_NK.T, inputs_NF)
            start_KF = experts.joined(own, experts.WRITE, routed.expert)
            experts.put(own, experts.WRITE, routed.expert, solve(cross_KF, start_KF))

        with experts.observed(own, fit):
            self.layer.get_submodule(self.branch.module)(student_NK[None])

    def _neurons(self, name: str) -> Tensor:
        """Which outputs of their first weight the student's experts keep, int64 [E, O]."""
        units = self.family.layer_weights[f"{self.branch.experts}.{name}"]
        formula = next(unit for unit in units if "expert_ffn" in unit)
        index = self.kept.index(formula, self.number, self.sizes)
        assert index is not None
        return index


@dataclass(frozen=True)
class _Normed:
    """What a norm makes of each batch's stream, [B, S, H]; computed anew each time, which is cheaper than to keep."""

    norm: nn.Module
    streams: list[Tensor]

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.norm, self.streams)


class _Sums:
    """Of inputs and targets, batch by batch.

    Attributes:
        gram_KK: float32, XᵀX.
        cross_OK: float32, TᵀX.
    """

    gram_KK: Tensor
    cross_OK: Tensor

    def __init__(self) -> None:
        self.empty = True

    def add(self, inputs_NK: Tensor, targets_NO: Tensor) -> None:
        gram_KK, cross_OK = layerwise.gram(inputs_NK), hardware.matmul_float32(targets_NO.T, inputs_NK)
        if self.empty:
            self.gram_KK, self.cross_OK, self.empty = gram_KK, cross_OK, False
        else:
            self.gram_KK += gram_KK
            self.cross_OK += cross_OK

    def solver(self, damping: float, columns: slice = slice(None)) -> repair.LeastSquares:
        return repair.LeastSquares(self.gram_KK[columns, columns], damping=damping)


@dataclass(frozen=True)
class _Seen:
    """What the teacher computed in one branch, [B, S, H] of each batch.

    Attributes:
        entering: the stream that its norm reads.
        before: the stream before the branch.
        after: the stream behind the branch; behind the last one of a layer, also behind dropped layers that follow.
        written: what the branch writes, where a post-norm follows; else empty.
    """

    entering: list[Tensor]
    before: list[Tensor]
    after: list[Tensor]
    written: list[Tensor]


class _TeacherWalk:
    """The teacher's side of `repair_layers`."""

    def __init__(self, teacher: Source, family: Family, kept: Kept, blocks: TokenBlocks) -> None:
        self.teacher, self.family, self.kept = teacher, family, kept
        with teacher.outer():
            self.batches = layerwise.enter_all(teacher.model, blocks, batch_blocks=BATCH_BLOCKS)
        self.config = teacher.model.config
        self.sizes = family.architecture(self.config)
        self.done = 0

    def branches(self, number: int) -> Iterator[tuple[Branch, nn.Module, _Seen]]:
        """Run the layer that student layer `number` came from, branch by branch, and those dropped before and behind
        it. Yields each branch with the layer, when it has run."""
        self._skip_to(self.kept.layers[number])
        with self.teacher.layer(self.done) as layer:
            yield from self._branches(number, layer)

    def _branches(self, number: int, layer: nn.Module) -> Iterator[tuple[Branch, nn.Module, _Seen]]:
        inputs = [batch.layer_inputs[self.done] for batch in self.batches]
        branches = layerwise.branches_of(layer, self.family)
        entering: list[Tensor] = []
        for branch in branches:
            before, written = [batch.stream_BSH for batch in self.batches], []
            if not branch.beside:
                entering = before
            scale = layerwise.added_scale(self.config, self.family, branch)
            normed = _Normed(layerwise.norm_of(layer, branch), entering)
            for batch, normed_BSH, each in zip(self.batches, normed, inputs, strict=True):
                written_BSH = layerwise.branch_output(layer, branch, normed_BSH, each)
                batch.stream_BSH = batch.stream_BSH + layerwise.behind(layer, branch, written_BSH) * scale
                if branch.post_norm:
                    written.append(written_BSH)
            if branch is branches[-1]:
                self.done += 1
                last = number + 1 == len(self.kept.layers)
                self._skip_to(len(self.teacher) if last else self.kept.layers[number + 1])
            yield branch, layer, _Seen(entering, before, [batch.stream_BSH for batch in self.batches], written)

    def _skip_to(self, number: int) -> None:
        for index in range(self.done, number):
            with self.teacher.layer(index) as layer:
                for batch in self.batches:
                    batch.stream_BSH = layerwise.run_layer(layer, batch.stream_BSH, batch.layer_inputs[index])
        self.done = number


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
