"""The hidden-state loss: a student's residual stream beside its teacher's, where a cut says which parts correspond.

A pruned student needs no projector: its channels are some of the teacher's, and behind each of its layers its stream
should be what the teacher's is behind the layer it came from and the dropped ones that followed.

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

from prunus import layerwise, losses
from prunus.checkpoint import Checkpoint
from prunus.errors import BadCheckpoint
from prunus.prune import KEPT_FILE
from prunus.selection import Kept


@dataclass(frozen=True)
class Pairs:
    """What is compared with what.

    Attributes:
        layers: (student layer, teacher layer) whose outputs correspond.
        channels: the teacher's channels that the student keeps; None where the widths are equal and all are kept.
        scale: of the student's stream beside the teacher's (see `Family.scaled_embedding`).
    """

    layers: tuple[tuple[int, int], ...]
    channels: Tensor | None
    scale: float = 1.0


def pairs(kept: Kept, teacher_layers: int, *, count: int, scale: float = 1.0) -> Pairs:
    """`count` pairs of layers spread evenly over a pruned student, its last among them."""
    behind = [*[layer - 1 for layer in kept.layers[1:]], teacher_layers - 1]
    count = min(count, len(behind))
    chosen = sorted({round((place + 1) * len(behind) / count) - 1 for place in range(count)})
    return Pairs(tuple((layer, behind[layer]) for layer in chosen), torch.tensor(kept.hidden), scale)


def pairs_of_cut(student: Checkpoint, teacher: Checkpoint, *, count: int) -> Pairs:
    """`pairs` of a student that Prunus cut out of this teacher, as its folder tells.

    Raises:
        BadCheckpoint: the folder does not tell, or tells of another teacher.
    """
    try:
        record = json.loads((student.folder / KEPT_FILE).read_text())
        kept = Kept(**record["kept"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(
            f"{student.folder}: no {KEPT_FILE} that says what was kept of the teacher ({error}). The hidden-state loss "
            "is for students that prunus cut; train without it."
        ) from error
    if record["teacher"] != teacher.fingerprint:
        raise BadCheckpoint(f"{student.folder} was cut out of another teacher; the hidden-state loss needs that one")
    shrunk = teacher.family.scaled_embedding
    scale = math.sqrt(len(kept.hidden) / teacher.architecture.hidden) if shrunk else 1.0
    return pairs(kept, teacher.architecture.layers, count=count, scale=scale)


@contextlib.contextmanager
def captured(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, a forward pass leaves the outputs of these layers here; no other states are kept."""
    found: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for number in layers:

            def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...], number: int = number) -> None:
                found[number] = output[0] if isinstance(output, tuple) else output

            stack.callback(layerwise.body(model).layers[number].register_forward_hook(hook).remove)
        yield found


def loss(
    kind: str,
    pairs: Pairs,
    student: dict[int, Tensor],
    teacher: dict[int, Tensor],
    *,
    num_tokens: int,
    mask_N: Tensor,
) -> Tensor:
    """Mean over the pairs of Σ_n loss_n / num_tokens, float32 scalar.

    Args:
        kind: key of `losses.HIDDEN_LOSSES`.
        student, teacher: layer → its output, [B, S, H] and [B, S, E].
        num_tokens, mask_N: as in `losses.divergence`.
    """
    total = torch.zeros((), device=mask_N.device)
    for mine, theirs in pairs.layers:
        student_NH = student[mine].flatten(0, 1)[mask_N]
        teacher_NE = teacher[theirs].flatten(0, 1)[mask_N]
        channels = pairs.channels
        teacher_NH = teacher_NE if channels is None else teacher_NE[:, channels.to(teacher_NE.device)]
        total = total + losses.HIDDEN_LOSSES[kind](student_NH, teacher_NH.float() * pairs.scale).sum()
    return total / (len(pairs.layers) * num_tokens)
