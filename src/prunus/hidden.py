"""The hidden-state loss: a student's residual stream beside its teacher's.

A pruned student needs no projector: its channels are some of the teacher's, and behind each of its layers its stream
should be what the teacher's is behind the layer it came from and the dropped ones that followed. Other students get a
linear map per pair of layers, which starts as the least-squares fit and is trained with them.

Shapes: B blocks, S tokens, H student channels, E teacher channels, N = B·S tokens.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunus import anatomy, losses
from prunus.checkpoint import Checkpoint
from prunus.errors import BadCheckpoint
from prunus.prune import KEPT_FILE
from prunus.selection import Kept
from prunus.teacher import Live

RIDGE = 1e-3
"""Of the fit of a projector, as a share of the mean diagonal: some thousand tokens do not determine every direction."""


@dataclass(frozen=True)
class Pairs:
    """What is compared with what.

    Attributes:
        layers: (student layer, teacher layer) whose outputs correspond.
        channels: the teacher's channels that the student keeps; None where nothing says which: then a projector leads
            from the student's to the teacher's.
        scale: of the student's stream beside the teacher's (see `Family.scaled_embedding`).
    """

    layers: tuple[tuple[int, int], ...]
    channels: Tensor | None
    scale: float = 1.0


def pairs(student: Checkpoint, teacher: Checkpoint, *, count: int, cut: bool = True) -> Pairs:
    """`pairs_of_cut` of a student that a cut made, otherwise layers at the same share of the depth, with projectors.

    Args:
        cut: whether a student that a cut made was cut out of this teacher.
    Raises:
        BadCheckpoint: as `pairs_of_cut`.
    """
    if cut and (student.folder / KEPT_FILE).exists():
        return pairs_of_cut(student, teacher, count=count)
    mine, theirs = student.architecture.layers, teacher.architecture.layers
    behind = [math.ceil((layer + 1) * theirs / mine) - 1 for layer in range(mine)]
    return Pairs(_spread(behind, count), None)


def _spread(behind: Sequence[int], count: int) -> tuple[tuple[int, int], ...]:
    """`count` pairs of layers spread evenly over a student, its last among them."""
    count = min(count, len(behind))
    chosen = sorted({round((place + 1) * len(behind) / count) - 1 for place in range(count)})
    return tuple((layer, behind[layer]) for layer in chosen)


def pairs_of_cut(student: Checkpoint, teacher: Checkpoint, *, count: int) -> Pairs:
    """Of a student that Prunus cut out of this teacher, as its folder tells.

    Raises:
        BadCheckpoint: the folder does not tell, or tells of another teacher.
    """
    try:
        record = json.loads((student.folder / KEPT_FILE).read_text())
        kept = Kept(**record["kept"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(
            f"{student.folder}: no {KEPT_FILE} that says what was kept of the teacher ({error}); "
            "cut the student again, or train without the hidden-state loss"
        ) from error
    if record["teacher"] != teacher.fingerprint:
        raise BadCheckpoint(f"{student.folder} was cut out of another teacher; the hidden-state loss needs that one")
    shrunk = teacher.family.scaled_embedding
    scale = math.sqrt(len(kept.hidden) / teacher.architecture.hidden) if shrunk else 1.0
    behind = [*[layer - 1 for layer in kept.layers[1:]], teacher.architecture.layers - 1]
    return Pairs(_spread(behind, count), torch.tensor(kept.hidden), scale)


@contextlib.contextmanager
def captured(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, a forward pass leaves the outputs of these layers here; no other states are kept."""
    found: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for number in layers:

            def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...], number: int = number) -> None:
                found[number] = output[0] if isinstance(output, tuple) else output

            stack.callback(anatomy.layers_of(model)[number].register_forward_hook(hook).remove)
        yield found


@torch.no_grad()
def projectors(
    pairs: Pairs, student: PreTrainedModel, teacher: Live, tokens_BS: Tensor, positions_BS: Tensor
) -> nn.ModuleList:
    """For each pair the linear map [H → E] that fits the teacher's states best on these tokens, float32."""
    layers, others = zip(*pairs.layers, strict=True)
    with captured(student, layers) as mine, captured(teacher.model, others) as theirs:
        anatomy.body_of(student)(input_ids=tokens_BS, position_ids=positions_BS, use_cache=False)
        teacher(tokens_BS, positions_BS)
    maps = nn.ModuleList()
    for layer, other in pairs.layers:
        student_NH, teacher_NE = mine[layer].flatten(0, 1).float(), theirs[other].flatten(0, 1).float()
        gram_HH = student_NH.T @ student_NH
        gram_HH.diagonal().add_(RIDGE * gram_HH.diagonal().mean())
        linear = nn.Linear(student_NH.shape[1], teacher_NE.shape[1], bias=False, device=gram_HH.device)
        linear.weight.copy_(torch.linalg.solve(gram_HH, student_NH.T @ teacher_NE).T)
        maps.append(linear)
    return maps


def loss(
    kind: str,
    pairs: Pairs,
    student: dict[int, Tensor],
    teacher: dict[int, Tensor],
    maps: nn.ModuleList | None = None,
    *,
    num_tokens: int,
    mask_N: Tensor,
) -> Tensor:
    """Mean over the pairs of Σ_n loss_n / num_tokens, float32 scalar.

    Args:
        kind: key of `losses.HIDDEN_LOSSES`.
        student, teacher: layer → its output, [B, S, H] and [B, S, E].
        maps: `projectors`, where the pairs need them.
        num_tokens, mask_N: as in `losses.divergence`.
    """
    total = torch.zeros((), device=mask_N.device)
    for number, (mine, theirs) in enumerate(pairs.layers):
        here, there = student[mine].flatten(0, 1)[mask_N], teacher[theirs].flatten(0, 1)[mask_N]
        if maps is not None:
            here = maps[number](here)
        if pairs.channels is not None:
            there = there[:, pairs.channels.to(there.device)]
        total = total + losses.HIDDEN_LOSSES[kind](here, there.float() * pairs.scale).sum()
    return total / (len(pairs.layers) * num_tokens)
