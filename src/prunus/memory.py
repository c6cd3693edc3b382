"""Peak memory of distillation, repair and search, predicted from sizes alone, and what to do where it does not fit.

All numbers are bytes. N_t and N_s are the parameters of teacher and student, b the bytes of a value in the short type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from prunus import attention, cost, dims, fused, hardware, refit, row_blocks
from prunus.architecture import Architecture
from prunus.checkpoint import Checkpoint
from prunus.errors import DoesNotFit
from prunus.families import Branch, Family
from prunus.schedule import Settings

LARGEST_MICRO_BATCH = {"cpu": 1024, "cuda": 16384}
"""Tokens beyond which a larger micro-batch is not faster."""
CHUNKS = tuple(fused.CHUNK_TOKENS // parts for parts in (1, 4, 16))
"""Tokens of a chunk of the loss that are tried: a shorter one is slower, but keeps less of a large vocabulary."""
LEAST_TOKENS = 8192
"""Less text to measure or repair on is not worth a proposal."""
ROOM = 0.9
"""Share of the free memory that a plan may fill."""
HOLES = {"cpu": 1.33, "cuda": 1.05}
"""What activations and buffers take, as a multiple of what they hold: freed blocks between them fit nothing. glibc
cannot give a freed block to an aligned request of the same size. Measured on the CPU, see LOG.md; a guess on CUDA."""


@dataclass(frozen=True)
class Training:
    """What the peak depends on.

    Attributes:
        family, student: of the model that is trained.
        branches: branch → how many layers have it.
        parameters: that are trained.
        teacher_parameters: of the whole teacher.
        untrained: parameters of the student that stay as they are.
        gathered, teacher_gathered: of each the parameters that a rank of several holds whole at once.
        settings: of the training.
        block_size: tokens of a block.
        itemsize: bytes of a value in the type that is computed in.
        blocks: of a micro-batch.
        chunk_tokens: of the fused loss (see `fused.divergence`).
        live_teacher: it is in memory, rather than in a cache.
        gradient_checkpointing: only the layers' inputs are kept for the backward pass.
        ranks: over which everything is sharded.
        device: "cpu" or "cuda", which need not be here.
    """

    family: Family
    student: Architecture
    branches: Mapping[str, int]
    parameters: int
    teacher_parameters: int
    block_size: int
    itemsize: int
    untrained: int = 0
    gathered: int = 0
    teacher_gathered: int = 0
    settings: Settings = field(default_factory=Settings)
    blocks: int = 1
    chunk_tokens: int = fused.CHUNK_TOKENS
    live_teacher: bool = True
    gradient_checkpointing: bool = False
    ranks: int = 1
    device: str = field(default_factory=lambda: hardware.device().type)

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.blocks * self.block_size


def peak(training: Training) -> dict[str, int]:
    """Bytes of each part at the moment when most is in use; their sum is the peak beyond what the process holds now.

    That is the end of the forward pass, with all activations and the chunk of logits: the backward pass hands each
    gradient over to the masters as soon as it is there.
    """
    here, ranks, holes = training, training.ranks, HOLES[training.device]
    alone = ranks == 1
    teacher = here.teacher_parameters // ranks + (0 if alone else here.teacher_gathered)
    own = 0 if here.itemsize == 4 else here.parameters  # in float32 the student is its own master
    copies = own if alone else here.gathered
    return {
        "teacher": here.live_teacher * here.itemsize * teacher,
        "student": here.itemsize * (copies + here.untrained // ranks),
        "masters, gradients, Adam": 16 * here.parameters // ranks,
        "activations": int(holes * activations(here)),
        "head": int(holes * head(here)),
    }


def activations(training: Training) -> int:
    """What a layer keeps for its backward pass, in every layer; or with checkpointing in one, and all inputs."""
    sizes, b = training.student, training.itemsize
    family = training.family
    kept = {branch: b * _kept_by(branch, training) for branch in family.branches if branch.name in training.branches}
    if training.gradient_checkpointing:
        # No layer has more than attention and the largest of the others.
        largest = [max((kept[b] for b in kept if (b.inner == "heads") is heads), default=0) for heads in (True, False)]
        return training.tokens * (sum(largest) + sizes.layers * b * sizes.hidden)
    return training.tokens * sum(training.branches[branch.name] * size for branch, size in kept.items())


def _kept_by(branch: Branch, training: Training) -> int:
    """Values that a branch keeps of a token. A norm keeps its input, and what reads it the output; only a sum reads
    what a post-norm makes."""
    family, sizes = training.family, training.student
    norms = (2 * bool(branch.norm) + bool(branch.post_norm)) * sizes.hidden
    if branch.inner == "mamba_heads":
        return norms + _mamba(training)
    if branch.inner != "heads":
        return norms + _neurons(branch, family, sizes)
    normed = (sizes.heads + sizes.kv_heads) * sizes.get("head_dim", 0)
    qk_norms = normed * any("q_norm" in name for name in family.layer_weights)
    return norms + qk_norms + _between(branch, family, sizes) + sizes.heads * _kept_keys(training)


def _between(branch: Branch, family: Family, sizes: Architecture) -> int:
    """What attention keeps of a token: the outputs of its projections, and what the last one reads."""
    owned = {name: units for name, units in family.layer_weights.items() if name.startswith(f"{branch.module}.")}
    reads, (side, other) = 0, ((-1, 0) if family.transposed else (0, -1))
    for name, units in owned.items():
        if len(units) == 2:
            reads += dims.size(units[other if name == f"{branch.write}.weight" else side], sizes)
    # What latents are made into is put together anew: keys, as large as queries, beside the latents' norms.
    reads += sum(sizes[axis] for axis in family.latents if axis in sizes)
    return reads + (sizes.heads * (sizes.nope_dim + sizes.rope_dim) if family.latents else 0)


def _neurons(branch: Branch, family: Family, sizes: Architecture) -> int:
    """What an FFN keeps of a token: the outputs of its projections, act(gate), and their product if it is gated."""
    kept = 0
    if branch.write:
        inner = sizes[branch.inner]
        formulas = [family.outputs(read) for read in branch.reads]
        reads = sum(dims.size(formula, sizes) for formula in formulas if branch.inner in dims.names(formula))
        kept = reads + (2 if reads > inner else 1) * inner
    if branch.experts:  # each copies its tokens, and keeps its output for the router's gradient
        kept += sizes.top_k * (4 * sizes.expert_ffn + 2 * sizes.hidden)
    return kept


def _mamba(training: Training) -> int:
    """What a Mamba layer keeps of a token: its projection's parts, the convolution's output and what it is multiplied
    with; and where no kernel for it is installed, as on a CPU, float32 products of all states in a chunk."""
    sizes, inner = training.student, training.student.mamba_heads * training.student.mamba_head_dim
    if "dt_rank" in sizes:
        return _mamba1(training)
    convolved = inner + 2 * sizes.mamba_groups * sizes.state
    kept = 2 * inner + 3 * convolved + sizes.mamba_heads
    if training.device == "cpu":
        chunk = min(sizes.chunk, training.block_size)
        kept += chunk * sizes.mamba_heads * (sizes.state + 3) * 4 // training.itemsize
    return kept


def _mamba1(training: Training) -> int:
    """The same of the first Mamba: x and z, x behind the convolution and its activation, dt, B and C; and without a
    kernel what its loop over tokens makes of every state: decay, input, and the state, in float32."""
    sizes, inner = training.student, training.student.mamba_heads
    kept = 6 * inner + 2 * sizes.dt_rank + 4 * sizes.state
    if training.device == "cpu":
        kept += inner * (3 * sizes.state + 6) * 4 // training.itemsize
    return kept


def _kept_keys(training: Training) -> int:
    """Probabilities that our attention keeps, per token and head."""
    if training.device != "cpu" or training.itemsize != 2 or training.block_size > attention.KEEP_TOKENS:
        return 0
    return (training.block_size + min(training.block_size, attention.CHUNK_ROWS)) // 2


def head(training: Training) -> int:
    """Buffers of the fused loss: gradients to the logits of a chunk, logits of a row block, float32 ones of what is
    worked on, and the head's gradient, which is rounded at the end where chunks were summed."""
    sizes, b = training.student, training.itemsize
    chunk = min(training.tokens, training.chunk_tokens)
    rows = min(chunk, row_blocks.ROW_TOKENS)
    logits = 2 * rows * (2 * b if b < 4 and training.device == "cpu" else 4)
    worked_on = min(rows, row_blocks.CACHED_TOKENS) if training.device == "cpu" else rows
    worked_on *= 4 * (3 if training.settings.divergence == "forward_kl" else 9)
    gradient = sizes.hidden * (b if training.tokens <= chunk else 4 + b)
    return sizes.vocab * (chunk * b + logits + worked_on + gradient)


def training(
    teacher: Checkpoint | None,
    student: Checkpoint,
    *,
    block_size: int,
    dtype: torch.dtype,
    blocks: int = 1,
    gradient_checkpointing: bool = False,
    ranks: int = 1,
    settings: Settings | None = None,
) -> Training:
    """Of two opened checkpoints; without a teacher one that is cached."""
    mine = (student.family, student.layout, student.architecture)
    untrained = cost.parameters_by_group(*mine).get("vision", 0)
    return Training(
        family=student.family,
        student=student.architecture,
        branches={name: len(having) for name, having in cost.branch_layers(student.family, student.layout).items()},
        parameters=student.parameters - untrained,
        untrained=untrained,
        gathered=cost.at_once(*mine),
        teacher_parameters=teacher.parameters if teacher else 0,
        teacher_gathered=cost.at_once(teacher.family, teacher.layout, teacher.architecture) if teacher else 0,
        settings=settings or Settings(),
        block_size=block_size,
        blocks=blocks,
        itemsize=dtype.itemsize,
        live_teacher=teacher is not None,
        gradient_checkpointing=gradient_checkpointing,
        ranks=ranks,
    )


def fitting(need: Training, *, batch_blocks: int, free: int | None = None) -> Training:
    """With the largest power of two of blocks in a micro-batch whose peak fits, at most what is worth it and what a
    rank's step holds, and the largest chunk beside it.

    Raises:
        DoesNotFit: not even one block with the smallest chunk does; says what would.
    """
    free = room(free)
    most = max(1, min(batch_blocks // need.ranks, LARGEST_MICRO_BATCH[need.device] // need.block_size))
    options = (
        dataclasses.replace(need, blocks=2**power, chunk_tokens=chunk)
        for power in reversed(range(most.bit_length()))
        for chunk in CHUNKS
    )
    found = next((option for option in options if total(option) <= free), None)
    if found is None:
        raise DoesNotFit(_advice(dataclasses.replace(need, blocks=1, chunk_tokens=CHUNKS[-1]), free))
    return found


def total(need: Training) -> int:
    return sum(peak(need).values())


class Fits(NamedTuple):
    """What fits.

    Attributes:
        parts: bytes by what they hold.
        streamed: the teacher's layers come from the disk one at a time.
    """

    parts: dict[str, int]
    streamed: bool


def repair(
    teacher: Checkpoint,
    student: Architecture,
    *,
    blocks: int,
    block_size: int,
    device: str | None = None,
    streamed: bool = False,
) -> dict[str, int]:
    """Bytes of each part while a cut student is repaired (see `refit.repair_layers`).

    Of all tokens there are both models' streams, before and behind a branch, what its last projection reads, and what
    layers are called with: a mask of a byte for each key, and rotary tables. Of one batch there is what that is made
    from; of a projection's inputs, the widest, their products in float32 and float64.

    Args:
        device: "cpu" or "cuda", which need not be here (default: this machine's).
        streamed: the teacher's layers come from the disk one at a time.
    """
    family, layout, here = teacher.family, teacher.layout, hardware.device().type
    device = device or here
    dtype, holes = hardware.fast_dtype(teacher.dtype) if device == here else teacher.dtype, HOLES[device]
    itemsize, stored = dtype.itemsize, teacher.dtype.itemsize
    hidden, whole = student.hidden, teacher.architecture.hidden
    having = cost.branch_layers(family, layout)
    branches = [branch for branch in family.branches if branch.name in having]
    widest = max((written_from(branch, family, student) for branch in branches if branch.write), default=hidden)
    streams = 2 * hidden + (3 if any(branch.post_norm for branch in branches) else 2) * whole + widest
    if any(branch.experts for branch in branches):  # these want their tokens at once
        streams += hidden + whole
    called_with = block_size + 2 * itemsize * student.get("head_dim", 0)
    return {
        "teacher": itemsize * (cost.at_once(family, layout, teacher.architecture) if streamed else teacher.parameters),
        # built on the CPU from a copy of its weights as stored
        "student": (itemsize + (stored if device == "cpu" else 0)) * cost.parameters(family, layout, student),
        "streams": int(holes * blocks * block_size * (itemsize * streams + 2 * called_with)),
        # four values in float32, as wide as an FFN: gate, up, their product, and its copy for the sums
        "a batch": int(holes * 16 * widest * min(blocks, refit.BATCH_BLOCKS) * block_size),
        # a product and its sum in float32, the equation and its factor in float64
        "products": 24 * widest * (widest + hidden),
    }


def check_repair(
    teacher: Checkpoint,
    student: Architecture,
    *,
    blocks: int,
    block_size: int,
    device: str | None = None,
    free: int | None = None,
) -> Fits:
    """How the repair fits: with the whole teacher, or streamed.

    Args:
        device: see `repair`.
        free: bytes (default: what is free now).
    Raises:
        DoesNotFit: says how much text would.
    """
    free = room(free)
    found = _first_fitting(teacher, student, free, blocks=blocks, block_size=block_size, device=device)
    for_text = free - sum(found.parts.values()) + found.parts["streams"]
    fitting = blocks * block_size * for_text // max(1, found.parts["streams"])
    advice = f"prune.tokens={fitting // 1024}k" if fitting >= LEAST_TOKENS else "prune.repair=false"
    return checked("the repair", found, free, f"This would fit: {advice}.")


def check_search(
    teacher: Checkpoint,
    built: Iterable[Architecture],
    *,
    blocks: int,
    block_size: int,
    device: str | None = None,
    free: int | None = None,
) -> Fits:
    """How the largest of these architectures is built and repaired; the teacher by itself is judged whole before.

    Args:
        blocks: of text for the repair; 0 without one.
        device, free: see `check_repair`.
    Raises:
        DoesNotFit: then an architecture has to be named.
    """
    free = room(free)
    largest = max(built, key=lambda sizes: cost.parameters(teacher.family, teacher.layout, sizes))
    found = _first_fitting(teacher, largest, free, blocks=blocks, block_size=block_size, device=device)
    judged = repair(teacher, largest, blocks=0, block_size=1, device=device)["teacher"]
    most = max(found, Fits({"teacher": judged}, found.streamed), key=lambda each: sum(each.parts.values()))
    return checked("the search", most, free, "Name the architecture (--arch): then there is no search.")


def _first_fitting(teacher: Checkpoint, student: Architecture, free: int, **options: Any) -> Fits:
    """With the whole teacher if that fits, else streamed."""
    ways = [Fits(repair(teacher, student, streamed=streamed, **options), streamed) for streamed in (False, True)]
    return next((way for way in ways if sum(way.parts.values()) <= free), ways[-1])


def checked(stage: str, found: Fits, free: int, advice: str) -> Fits:
    """Raises DoesNotFit, with the advice, if what was found takes more bytes."""
    need = sum(found.parts.values())
    if need > free:
        listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in found.parts.items())
        raise DoesNotFit(f"{stage} needs {need / 1e9:.1f} GB ({listed}), but {free / 1e9:.1f} GB are free. {advice}")
    return found


def room(free: int | None) -> int:
    """Bytes that may be filled of those that are free (default: now)."""
    return int(ROOM * (hardware.free_memory() if free is None else free))


def written_from(branch: Branch, family: Family, sizes: Architecture) -> int:
    """Values of a token that a branch's last projection reads."""
    formula = family.layer_weights[f"{branch.write}.weight"][0 if family.transposed else -1]
    return dims.size(formula, sizes)


def _advice(need: Training, free: int) -> str:
    """What is missing, and the changes that alone would be enough."""
    changes: dict[str, dict[str, Any]] = {
        "distill.gradient_checkpointing=true": {"gradient_checkpointing": True},
        "distill.teacher_cache=samples": {"live_teacher": False},
        "both of these": {"gradient_checkpointing": True, "live_teacher": False},
    }
    if not need.settings.learns_from_samples:
        changes = {name: change for name, change in changes.items() if "live_teacher" not in change}
    changes |= {f"torchrun with {ranks} GPUs": {"ranks": ranks} for ranks in (2, 4, 8, 16) if ranks > need.ranks}
    options = {name: total(dataclasses.replace(need, **change)) for name, change in changes.items()}
    enough = [f"{name} ({size / 1e9:.1f} GB)" for name, size in options.items() if size <= free]
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in peak(need).items())
    return f"training needs {total(need) / 1e9:.1f} GB ({parts}), but {free / 1e9:.1f} GB are free. " + (
        f"This would fit: {'; '.join(enough[:4])}." if enough else "Use shorter blocks or a smaller student."
    )
