"""Gemma 3 with a vision tower. Its connector writes beside an embedding that is scaled by √hidden."""

from prunus.families import gemma3_text
from prunus.families._vision import PROJECTOR, like_llava
from prunus.families.family import AS_IT_IS

PROJECTION = f"{PROJECTOR}mm_input_projection_weight"

FAMILY = like_llava(gemma3_text.FAMILY, "gemma3", {PROJECTION: (AS_IT_IS, "hidden")}, connectors=(PROJECTION,))
