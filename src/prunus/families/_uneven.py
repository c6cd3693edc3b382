"""Which models can have layers without attention: those that compute what DeciLM does."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from prunus.errors import UnsupportedModel
from prunus.families._decilm import DeciLMConfig, uneven

LIKE_LLAMA: dict[str, dict[str, Any]] = {"llama": {}, "mistral": {"sliding_window": None}}
"""Types that compute what Llama does, and what their config must say for it."""


def with_uneven_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the same model as a type whose layers may lack attention.

    Raises:
        UnsupportedModel: there is no such type for it.
    """
    if config.model_type == DeciLMConfig.model_type:
        return config
    needed = LIKE_LLAMA.get(config.model_type)
    if needed is None or any(getattr(config, key) != value for key, value in needed.items()):
        raise UnsupportedModel(
            f"uneven: a model of type {config.model_type!r} cannot have uneven layers. vLLM and llama.cpp read them of "
            "models that compute what Llama does (DeciLM) alone. Leave uneven out: layers are cut whole then."
        )
    return uneven(config)  # type: ignore[arg-type]  # it is Llama's but for its name
