"""Arcee AFM. relu², no gate."""

import dataclasses

from prunus.families import llama
from prunus.families._decoder import ATTENTION, FFN

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="arcee",
    layer_weights={name: dims for name, dims in llama.FAMILY.layer_weights.items() if "gate_proj" not in name},
    branches=(ATTENTION, dataclasses.replace(FFN, reads=("mlp.up_proj",), gate="mlp.up_proj")),
)
