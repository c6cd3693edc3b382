"""Peak memory of a distillation, predicted from sizes alone, and what to do where it does not fit.

All numbers are bytes. N_t and N_s are the parameters of teacher and student, b the bytes of a value in the short type.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from prunus import attention, fused, hardware, row_blocks
from prunus.architecture import Architecture
from prunus.checkpoint import Checkpoint
from prunus.errors import DoesNotFit
from prunus.families import Family

LARGEST_MICRO_BATCH = {"cpu": 1024, "cuda": 16384}
"""Tokens beyond which a larger micro-batch is not faster."""
CHUNKS = tuple(fused.CHUNK_TOKENS // parts for parts in (1, 4, 16))
"""Tokens of a chunk of the loss that are tried: a shorter one is slower, but keeps less of a large vocabulary."""
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
        parameters, teacher_parameters: of the whole models.
        block_size: tokens of a block.
        itemsize: bytes of a value in the type that is computed in.
        blocks: of a micro-batch.
        chunk_tokens: of the fused loss (see `fused.divergence`).
        live_teacher: it is in memory, rather than in a cache.
        gradient_checkpointing: only the layers' inputs are kept for the backward pass.
        ranks: over which everything is sharded.
    """

    family: Family
    student: Architecture
    parameters: int
    teacher_parameters: int
    block_size: int
    itemsize: int
    blocks: int = 1
    chunk_tokens: int = fused.CHUNK_TOKENS
    live_teacher: bool = True
    gradient_checkpointing: bool = False
    ranks: int = 1

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.blocks * self.block_size


def peak(training: Training) -> dict[str, int]:
    """Bytes of each part at the moment when most is in use; their sum is the peak beyond what the process holds now.

    That is the end of the forward pass, with all activations and the chunk of logits: the backward pass hands each
    gradient over to the masters as soon as it is there.
    """
    here, ranks, holes = training, training.ranks, HOLES[hardware.device().type]
    short = here.itemsize * here.parameters if ranks == 1 else _gathered(here)
    return {
        "teacher": here.live_teacher * here.itemsize * here.teacher_parameters // ranks,
        # In float32 the student is its own master.
        "student": short if here.itemsize < 4 or ranks > 1 else 0,
        "masters, gradients, Adam": 16 * here.parameters // ranks,
        "activations": int(holes * activations(here)),
        "head": int(holes * head(here)),
    }


def activations(training: Training) -> int:
    """What a layer keeps for its backward pass, in every layer; or with checkpointing in one, and all inputs."""
    sizes, b = training.student, training.itemsize
    family = training.family
    # A norm keeps its input, and what reads it the output; only a sum reads what a post-norm makes.
    norms = b * sum(2 * bool(branch.norm) + bool(branch.post_norm) for branch in family.branches) * sizes.hidden
    if any("q_norm" in name for name in family.layer_weights):
        norms += b * (sizes.heads + sizes.kv_heads) * sizes.head_dim
    # Attention keeps q, k, v and its output; a gated FFN gate, act(gate), up and their product, a plain one two.
    qkv = 2 * b * (sizes.heads + sizes.kv_heads) * sizes.head_dim
    gated = any("gate" in name for name in family.layer_weights)
    ffn = (4 if gated else 2) * b * sizes.ffn
    layer = norms + qkv + ffn + b * sizes.heads * _kept_keys(training)
    kept = layer + sizes.layers * b * sizes.hidden if training.gradient_checkpointing else sizes.layers * layer
    return training.tokens * kept


def _kept_keys(training: Training) -> int:
    """Probabilities that our attention keeps, per token and head."""
    if hardware.device().type != "cpu" or training.itemsize != 2 or training.block_size > attention.KEEP_TOKENS:
        return 0
    return (training.block_size + min(training.block_size, attention.CHUNK_ROWS)) // 2


def head(training: Training) -> int:
    """Buffers of the fused loss: gradients to the logits of a chunk, logits of a row block, and the head's gradient."""
    sizes, b = training.student, training.itemsize
    chunk = min(training.tokens, training.chunk_tokens)
    rows = min(chunk, row_blocks.ROW_TOKENS)
    logits = 2 * rows * (2 * b if b < 4 else 4)
    return sizes.vocab * (chunk * b + logits + sizes.hidden * (b if training.tokens <= chunk else 4))


def _gathered(training: Training) -> int:
    """Of a sharded model: two layers (one ahead) and the embedding with the head."""
    sizes = training.student
    outside = sizes.vocab * sizes.hidden
    layer = (training.parameters - outside) // sizes.layers
    return training.itemsize * (outside + 2 * layer)


def training(
    teacher: Checkpoint | None,
    student: Checkpoint,
    *,
    block_size: int,
    dtype: torch.dtype,
    blocks: int = 1,
    gradient_checkpointing: bool = False,
    ranks: int = 1,
) -> Training:
    """Of two opened checkpoints; without a teacher one that is cached."""
    return Training(
        family=student.family,
        student=student.architecture,
        parameters=student.parameters,
        teacher_parameters=teacher.parameters if teacher else 0,
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
    free = int(ROOM * (hardware.free_memory() if free is None else free))
    most = max(1, min(batch_blocks // need.ranks, LARGEST_MICRO_BATCH[hardware.device().type] // need.block_size))
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


def _advice(need: Training, free: int) -> str:
    """What is missing, and the changes that alone would be enough."""
    changes: dict[str, dict[str, Any]] = {
        "distill.gradient_checkpointing=true": {"gradient_checkpointing": True},
        "distill.teacher_cache=samples": {"live_teacher": False},
        "both of these": {"gradient_checkpointing": True, "live_teacher": False},
    }
    changes |= {f"torchrun with {ranks} GPUs": {"ranks": ranks} for ranks in (2, 4, 8, 16) if ranks > need.ranks}
    options = {name: total(dataclasses.replace(need, **change)) for name, change in changes.items()}
    enough = [f"{name} ({size / 1e9:.1f} GB)" for name, size in options.items() if size <= free]
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in peak(need).items())
    return f"training needs {total(need) / 1e9:.1f} GB ({parts}), but {free / 1e9:.1f} GB are free. " + (
        f"This would fit: {'; '.join(enough[:4])}." if enough else "Use shorter blocks or a smaller student."
    )
