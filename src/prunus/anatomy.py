"""Where the parts of a transformers model are, whatever its type."""

from __future__ import annotations

import sys

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The language model without its head, and without what sees or hears."""
    decoder = model.get_decoder()
    body: PreTrainedModel = decoder if decoder is not model else model.base_model  # not found in every type
    return body


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers.

    Raises:
        StopIteration: there is no list of them.
    """
    body = body_of(model)
    count = body.config.num_hidden_layers
    return next(module for module in body.modules() if isinstance(module, nn.ModuleList) and len(module) == count)


def positions(config: PreTrainedConfig) -> int:
    """Tokens of the longest text that the model knows the positions of; where any will do, more than there can be."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: its parameters, a tied head left out, and some buffers."""
    kept = model.state_dict().keys()
    return {**dict(model.named_parameters()), **{name: value for name, value in model.named_buffers() if name in kept}}
