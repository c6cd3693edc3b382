"""Training text that the student writes itself: it continues the first half of a block, and learns what the teacher
thinks of the continuation. So it is corrected where it really goes, not only where human text goes.

Agarwal et al., "On-Policy Distillation of Language Models" (arXiv:2306.13649). Nothing flows back through the sampling.

Shapes: B blocks, S tokens of a block, P of them the prompt, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prunus import anatomy
from prunus.evaluate import CACHES, evaluation_mode
from prunus.head import head_of


def is_due(step: int, share: float) -> bool:
    """Whether this step is one of those, `share` of all, spread evenly."""
    return math.floor((step + 1) * share) > math.floor(step * share)


@torch.no_grad()
def continued(model: PreTrainedModel, tokens_BS: Tensor, *, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks whose second half the model wrote, sampled at temperature 1.

    The first half is read as one text, whatever documents it came from. A block's continuation depends on its own seed
    alone, up to rounding: neither on the blocks beside it nor on the state of any other generator.

    Args:
        tokens_BS: blocks of text, of which the first half is kept.
        seeds: of each block.
    Returns:
        tokens and positions, int64 [B, S]; mask, bool [B, S]: True at s where token s + 1 was written by the model,
        and not behind the end of its text.
    """
    length = tokens_BS.shape[1]
    prompt = length // 2
    positions_BS = torch.arange(length, device=tokens_BS.device).expand_as(tokens_BS)
    generators = [torch.Generator(tokens_BS.device).manual_seed(seed) for seed in seeds]
    written_BS, body = tokens_BS.clone(), anatomy.body_of(model)
    own_name = set(CACHES) & inspect.signature(body.forward).parameters.keys()
    cache = {name: DynamicCache(config=body.config) for name in own_name}
    with evaluation_mode([model]):
        for place in range(prompt, length):
            unread = slice(0, prompt) if place == prompt else slice(place - 1, place)
            output = body(  # some models count positions from the first unread token unless they are told
                input_ids=written_BS[:, unread], position_ids=positions_BS[:, unread], use_cache=True, **cache
            )
            p_BV = torch.softmax(head_of(model).logits(output.last_hidden_state[:, -1]), dim=-1)
            for row, generator in enumerate(generators):
                written_BS[row, place] = torch.multinomial(p_BV[row], 1, generator=generator)
    return written_BS, positions_BS, _written(written_BS, prompt, _ends(model))


def seeds(seed: int, step: int, indices: Sequence[int]) -> list[int]:
    """One for each block of a step."""
    return [int(np.random.SeedSequence([seed, step, index]).generate_state(1)[0]) for index in indices]


def _written(tokens_BS: Tensor, prompt: int, ends: Tensor) -> Tensor:
    is_end_BS = torch.isin(tokens_BS, ends)
    is_end_BS[:, :prompt] = False
    ended_before_BS = is_end_BS.cumsum(1) - is_end_BS.long() > 0
    mask_BS = torch.zeros_like(is_end_BS)
    mask_BS[:, prompt - 1 : -1] = ~ended_before_BS[:, prompt:]
    return mask_BS


def _ends(model: PreTrainedModel) -> Tensor:
    """Ids that end a text."""
    found = model.config.get_text_config().eos_token_id
    found = found if isinstance(found, list) else [] if found is None else [found]
    return torch.tensor(found, dtype=torch.int64, device=model.device)
