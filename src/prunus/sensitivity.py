"""What the loss minds: gradients of the teacher's loss, on labels that it draws itself, at what its branches write.

An error δ of what a branch writes costs about ½ E[(g·δ)²] nats a token: the Fisher information, which is the curvature
of the divergence from the teacher at the teacher itself.

Shapes: B blocks, S tokens of a block, O channels that a branch writes, K rows of a sketch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunus import anatomy, layerwise
from prunus.families import Family
from prunus.head import head_of
from prunus.layerwise import TokenBlocks

BATCH_BLOCKS, BATCH_TOKENS = 2, 2048
"""What goes through the model at once, at most: all that it keeps for its backward pass is in memory."""
TOKENS = 8192
"""Of the text so many tokens do: a backward pass costs twice as much as a forward one."""
CHUNK_TOKENS = 256
ROWS = 512
"""Of a sketch: norms measured through it are off by √(2/ROWS), 6 %."""

Sketches = Mapping[tuple[int, str], Tensor]
"""(layer, write projection) → R, float32 [K, O], with RᵀR ≈ E[g gᵀ]."""


def sensitivity(model: PreTrainedModel, family: Family, blocks: TokenBlocks) -> Sketches:
    """Sketches of the gradients at what each branch of each layer writes, before a post-norm if there is one.

    Random sums of the gradients instead of their products: K × O numbers for each branch, and not O × O.

    Args:
        model: its weights stop asking for gradients.
        blocks: text, of which the beginning runs through the model; labels are drawn from what the model expects.
    Raises:
        BadCheckpoint: what the model computes is not finite.
    """
    tokens_1S, _ = blocks.batch([0])
    step = batch_blocks(tokens_1S.shape[1])
    count = min(len(blocks), max(1, TOKENS // tokens_1S.shape[1]))
    device = next(anatomy.body_of(model).parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    sketches: dict[tuple[int, str], Tensor] = {}
    with _gradients(model, family) as gradients:
        for start in range(0, count, step):
            stop = min(start + step, count)
            tokens_BS, positions_BS = (part.to(device) for part in blocks.batch(list(range(start, stop))))
            _backward(model, tokens_BS, positions_BS, generator)
            for place, gradient in gradients.items():
                g_NO = gradient.flatten(0, -2).float()
                signs_KN = torch.randint(0, 2, (ROWS, len(g_NO)), generator=generator, device=device) * 2.0 - 1
                sketches[place] = sketches.get(place, 0) + signs_KN @ g_NO
            gradients.clear()
    return {place: sketch / (ROWS * tokens_1S.numel() * count) ** 0.5 for place, sketch in sketches.items()}


def batch_blocks(block_size: int) -> int:
    """Blocks of so many tokens that go through the model at once."""
    return max(1, min(BATCH_BLOCKS, BATCH_TOKENS // block_size))


@contextlib.contextmanager
def _gradients(model: PreTrainedModel, family: Family) -> Iterator[dict[tuple[int, str], Tensor]]:
    """Inside, a backward pass leaves the gradient at each write here."""
    found: dict[tuple[int, str], Tensor] = {}
    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(anatomy.layers_of(model)):
            for branch in layerwise.branches_of(layer, family):
                if branch.write is not None:
                    hook = partial(_keep_gradient, found, (number, branch.write))
                    stack.callback(layer.get_submodule(branch.write).register_forward_hook(hook).remove)
        yield found


def _keep_gradient(
    found: dict[tuple[int, str], Tensor], place: tuple[int, str], _: nn.Module, __: object, output: Tensor
) -> None:
    output.register_hook(partial(found.__setitem__, place))


def _backward(model: PreTrainedModel, tokens_BS: Tensor, positions_BS: Tensor, generator: torch.Generator) -> None:
    """Σ over tokens of the cross-entropy with drawn labels, backwards to what the first layer writes."""
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    try:
        with torch.enable_grad():
            hidden_BSH = (
                anatomy.body_of(model)(input_ids=tokens_BS, position_ids=positions_BS, use_cache=False)
            ).last_hidden_state
        layerwise.check_finite(hidden_BSH, "what the model computes")
        hidden_BSH.backward(_head_gradient(model, hidden_BSH.detach(), generator))
    finally:
        handle.remove()


def _head_gradient(model: PreTrainedModel, hidden_BSH: Tensor, generator: torch.Generator) -> Tensor:
    """Of the loss with regard to the states behind the last norm, the logits a chunk at a time."""
    gradients = []
    for chunk_NH in hidden_BSH.flatten(0, 1).split(CHUNK_TOKENS):
        with torch.enable_grad():
            leaf_NH = chunk_NH.clone().requires_grad_(True)
            logits_NV = head_of(model).logits(leaf_NH)
            labels_N = torch.multinomial(logits_NV.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = F.cross_entropy(logits_NV, labels_N, reduction="sum")
        gradients.append(torch.autograd.grad(loss, leaf_NH)[0])
    return torch.cat(gradients).view_as(hidden_BSH)
