"""Gemma 2. Gemma 3 without norms on queries and keys; soft-caps on scores and logits, which depend on no size."""

import dataclasses

from prunus.families import gemma3_text
from prunus.families._decoder import QK_NORMS

FAMILY = dataclasses.replace(
    gemma3_text.FAMILY,
    model_type="gemma2",
    layer_weights={name: dims for name, dims in gemma3_text.FAMILY.layer_weights.items() if name not in QK_NORMS},
)
