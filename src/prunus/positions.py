"""Whether models can read blocks of a size."""

from __future__ import annotations

from prunus.checkpoint import Checkpoint
from prunus.errors import BadRecipe


def check_positions(block_size: int, *models: Checkpoint) -> None:
    """Raises BadRecipe if a block has more tokens than one of the models knows positions."""
    known = min(model.positions for model in models)
    if block_size > known:
        raise BadRecipe(f"data.block_size: {block_size} tokens, but the model knows {known} positions")
