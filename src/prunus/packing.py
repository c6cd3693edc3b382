"""Documents in one block are strangers to each other, in models that would let them read one another too."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from prunus.anatomy import body_of


def separate(model: PreTrainedModel) -> None:
    """Hand a model masks that end where positions start anew. transformers makes them so itself wherever a model's code
    tells it the positions; for the others its own function makes them here."""
    body_of(model).register_forward_pre_hook(_with_masks, with_kwargs=True)


def _with_masks(body: PreTrainedModel, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    positions = inputs.get("position_ids")
    if (
        positions is None
        or positions.ndim > 2
        or inputs.get("attention_mask") is not None
        or inputs.get("past_key_values") is not None
    ):
        return args, inputs
    # Of the states only shape, type and device are asked for.
    like = torch.empty(*positions.shape, 0, dtype=body.dtype, device=positions.device)
    masks = create_masks_for_generate(body.config, like, None, None, position_ids=positions)
    return args, {**inputs, "attention_mask": masks}
