"""Scores + Architecture → kept indices → a new checkpoint.

Shapes: L layers, H channels of the residual stream, F FFN neurons, A query heads, G key-value groups, N tokens.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from prunus import dims, hardware, memory, refit, repair, weights
from prunus.architecture import Architecture
from prunus.checkpoint import Checkpoint, from_config, save
from prunus.families import Family
from prunus.layerwise import TokenBlocks
from prunus.scores import Scores
from prunus.selection import Kept, check_legal, select
from prunus.source import Source, in_memory, on_disk
from prunus.weights import Parts

KEPT_FILE = "prunus.json"


@dataclass(frozen=True)
class Student:
    """A cut model: config, parameters by name (a tied head left out), and what was kept.

    Attributes:
        tensors: cut out of the teacher's files when they are read.
    """

    config: PreTrainedConfig
    architecture: Architecture
    tensors: dict[str, Parts]
    kept: Kept


def cut(
    teacher: Checkpoint,
    scores: Scores,
    target: Architecture,
    *,
    norm_correction: bool = True,
    head_residuals: bool = False,
) -> Student:
    """Slice the teacher's weights to `target`.

    Args:
        norm_correction: scale norm weights for the channels that left (`repair.norm_scale`).
        head_residuals: fold dropped query heads into kept ones (`repair.head_residuals`).
    Raises:
        BudgetUnreachable: the architecture is illegal for this family; says why.
    """
    family, source = teacher.family, teacher.architecture
    check_legal(family, source, target)
    kept = select(scores, source, target)
    student_layer = {layer: number for number, layer in enumerate(kept.layers)}
    tensors: dict[str, Parts] = {}
    queries_of = next((branch.reads[0] for branch in family.branches if branch.inner == "heads"), "")
    leave_groups = "heads" in target and target.heads * source.kv_heads < source.heads * target.kv_heads
    for name, tensor in teacher.tensors():
        layer, local = family.split(name)
        if layer is not None and layer not in student_layer:
            continue
        number = student_layer.get(layer, 0) if layer is not None else 0
        if head_residuals and leave_groups and local.startswith(queries_of):
            queries = dims.owner(teacher.layout[name][0], source, "heads") >= 0
            tensor = _with_head_residuals(tensor, queries, scores["heads"][layer], source, target)
        indices = [kept.index(formula, number, source) for formula in teacher.layout[name]]
        groups = source.get(family.gated_norms.get(local.removesuffix(".weight"), ""), 1)
        then = (
            _correction(family, layer, local, scores, next(iter(indices), None), kept, groups)
            if norm_correction
            else _as_it_is
        )
        student = name if layer is None else f"{family.layer_prefix}{number}.{local}"
        tensors[student] = weights.cut(tensor, indices, then)
    others = _branch_layers(family, tensors, target.layers)
    config = family.cut_config(teacher.config.to_dict(), target, kept.layers, others)
    return Student(type(teacher.config).from_dict(config), target, tensors, kept)


def _branch_layers(family: Family, tensors: Iterable[str], layers: int) -> dict[str, list[int]]:
    """Config key → the layers that have its branch."""
    having = {
        key: next(b.mark for b in family.branches if b.name == name) for key, name in family.branch_layers.items()
    }
    names = list(tensors)
    return {
        key: [n for n in range(layers) if any(name.startswith(f"{family.layer_prefix}{n}.{mark}.") for name in names)]
        for key, mark in having.items()
    }


def build(student: Student, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model of a cut student, in evaluation mode."""
    model = from_config(student.config, dtype)
    state = {name: tensor.whole() for name, tensor in student.tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(model.all_tied_weights_keys)
    assert not unexpected, unexpected
    assert set(missing) <= tied, missing
    for name, buffer in model.named_buffers():  # as transformers loads them, a wider type stays
        if name in state:
            buffer.data = state[name].to(torch.promote_types(state[name].dtype, dtype))
    return model


def prune(
    teacher: Checkpoint,
    scores: Scores,
    target: Architecture,
    *,
    to: Path | str,
    calibration: TokenBlocks | None = None,
    norm_correction: bool = True,
    head_residuals: bool = False,
    damping: float = repair.DAMPING,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Checkpoint:
    """Cut the teacher to `target`, repair it, and write a plain checkpoint.

    Args:
        to: folder to write; appears whole or not at all.
        calibration: text for the least-squares repair; without it only the norms are corrected.
    Returns:
        the written student, compared with what was meant to be written (see `checkpoint.save`).
    Raises:
        DoesNotFit: the repair would take more memory than is free; says how much text would do.
    """
    hardware.keep_freed_memory()
    if target == teacher.architecture:
        calibration = None  # nothing is lost
    source = None
    if calibration is not None:
        block_size = calibration.batch([0])[0].shape[-1]
        fits = memory.check_repair(teacher, target, blocks=len(calibration), block_size=block_size)
        source = on_disk(teacher) if fits.streamed else None
    student = cut(teacher, scores, target, norm_correction=norm_correction, head_residuals=head_residuals)
    tensors: Mapping[str, Tensor | Parts] = student.tensors
    if calibration is not None:
        model = repaired(teacher, student, calibration, source=source, damping=damping, progress=progress)
        state = model.state_dict()
        tensors = {name: _fitted(state[name], tensor) for name, tensor in student.tensors.items()}
    kept = json.dumps({"teacher": teacher.fingerprint, "kept": vars(student.kept)})
    return save(Path(to), student.config, tensors, like=teacher, extra_files={KEPT_FILE: kept})


def _fitted(now: Tensor, before: Parts) -> Tensor | Parts:
    """A tensor as the repair left it, in the type that it is stored in; with all of its bits, if it left it alone."""
    if torch.promote_types(before.dtype, now.dtype) != now.dtype and torch.equal(
        now.cpu(), before.whole().to(now.dtype)
    ):
        return before
    return now.to("cpu", before.dtype)


def repaired(
    teacher: Checkpoint,
    student: Student,
    calibration: TokenBlocks,
    *,
    source: Source | None = None,
    damping: float = repair.DAMPING,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PreTrainedModel:
    """The student as a transformers model after `repair_layers`, in the dtype of `hardware.fast_dtype`.

    Args:
        source: where the teacher is found in that dtype; loaded whole otherwise.
    """
    device = hardware.device()
    dtype = hardware.fast_dtype(teacher.dtype)
    model = hardware.place(build(student, dtype), device=device)
    source = source or in_memory(teacher.module(dtype, device))
    refit.repair_layers(source, model, teacher.family, student.kept, calibration, damping=damping, progress=progress)
    return model


def _with_head_residuals(
    tensor: Parts, queries: Tensor, scores_A: Tensor, teacher: Architecture, target: Architecture
) -> Parts:
    """The query projection with what leaves folded into what stays. Heads mix, so it is read whole.

    Args:
        queries: bool, which of its rows are queries.
    """

    def read() -> Iterator[Tensor]:
        whole = tensor.whole().clone()
        groups = whole[queries].float().view(teacher.kv_heads, per_group, -1)
        folded = [repair.head_residuals(heads, rank, kept) for heads, rank in zip(groups, ranks.tolist(), strict=True)]
        whole[queries] = torch.stack(folded).view(whole[queries].shape).to(whole.dtype)
        yield whole

    per_group = teacher.heads // teacher.kv_heads
    ranks = torch.argsort(scores_A.view(teacher.kv_heads, per_group), dim=1, descending=True, stable=True)
    kept = target.heads // target.kv_heads
    return dataclasses.replace(tensor, read=read)


def _as_it_is(part: Tensor) -> Tensor:
    return part


def _correction(
    family: Family, layer: int | None, local: str, scores: Scores, index: Tensor | None, kept: Kept, groups: int
) -> Callable[[Tensor], Tensor]:
    """What scales a norm's weight for the channels that left; other tensors, and uncut norms, stay as they are.

    Where the embedding is scaled by √hidden the student's stream is smaller than the teacher's by √(H′/H). Norms that
    read it undo that by themselves; what is written to it must shrink alike.

    Args:
        index: what stays of the tensor's first dimension.
        groups: that a gated norm norms apart.
    """
    module = local.removesuffix(".weight")
    share = len(kept.hidden) / scores["hidden"].numel()
    stream_scale = math.sqrt(share) if family.scaled_embedding else 1.0
    written = module.removesuffix(".bias")  # of a norm alone the weight is scaled
    writes = any(written == branch.write and branch.post_norm is None for branch in family.branches)
    if writes or local in family.connectors:
        return _as_it_is if stream_scale == 1.0 else lambda part: (part.float() * stream_scale).to(part.dtype)
    energy = scores.energy(module, layer)
    if energy is None or index is None or len(index) == len(energy):
        return _as_it_is
    if module in family.gated_norms:
        return _gated_correction(energy, index, groups)
    scale = repair.norm_scale(energy, index)
    if any(module == branch.post_norm for branch in family.branches):
        scale *= stream_scale
    offset = family.norm_offset
    return lambda part: ((part.float() + offset) * scale - offset).to(part.dtype)


def _gated_correction(energy_D: Tensor, index: Tensor, groups: int) -> Callable[[Tensor], Tensor]:
    """The same for a norm that norms groups of channels apart: each has its own factor."""
    kept = index.view(groups, -1)
    scales = [
        repair.norm_scale(energy, places - place * len(energy))
        for place, (energy, places) in enumerate(zip(energy_D.chunk(groups), kept, strict=True))
    ]
    factors = torch.tensor(scales).repeat_interleave(kept.shape[1])
    return lambda part: (part.float() * factors).to(part.dtype)
