"""Gemma 3 with a vision tower. Its connector writes beside an embedding that is scaled by √hidden."""

from prunus.families import gemma3_text
from prunus.families._vision import LLAVA_PREFIXES, with_vision
from prunus.families.family import AS_IT_IS

PROJECTION = "model.multi_modal_projector.mm_input_projection_weight"

FAMILY = with_vision(
    gemma3_text.FAMILY,
    "gemma3",
    vision=("model.vision_tower.", "model.multi_modal_projector."),
    connector={PROJECTION: (AS_IT_IS, "hidden")},
    connectors=(PROJECTION,),
    stored_prefixes=LLAVA_PREFIXES,
)
