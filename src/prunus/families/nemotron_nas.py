"""Nemotron-NAS (DeciLM): Llama whose layers may lack attention or the FFN. Depth is cut branch by branch, an FFN not
before its attention: llama.cpp drops attention that has no FFN behind it in its layer."""

import dataclasses
from pathlib import Path

from prunus.families import _decilm, llama
from prunus.families.family import Folding

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type=_decilm.DeciLMConfig.model_type,
    constraints=("even_head_dim", "hidden_is_heads", "ffn_of_256"),
    per_layer_fields=("block_configs",),
    first_layers=1,
    folding=Folding(_decilm.folded, _decilm.unfolded, Path(_decilm.__file__), f"{_decilm.CODE_NAME}.py"),
)
