"""DeciLM (`nemotron-nas`): Llama whose layers may lack attention or the FFN. vLLM and llama.cpp read it as it is.

This file alone goes along with such a checkpoint, so that transformers can read it with `trust_remote_code=True`, and
vLLM its config.
"""

from typing import Any

import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

CODE_NAME = "modeling_decilm"
"""Of this file in a checkpoint, without its suffix."""


class Block(dict[str, Any]):
    """What stands in the config of a layer. Runtimes read it by attributes, JSON by keys."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class DeciLMConfig(LlamaConfig):
    """Llama's config and `block_configs`, one of each layer; by default all layers are whole.

    `intermediate_size` and `num_key_value_heads` hold for every layer; where they are missing, the layers must agree.
    """

    model_type = "nemotron-nas"
    intermediate_size: int = 0
    block_configs: list[Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        found = self.block_configs or [{"attention": {}, "ffn": {}} for _ in range(self.num_hidden_layers)]
        attention, ffn = ([block[part] for block in found] for part in ("attention", "ffn"))
        if any(part.get("replace_with_linear") for part in (*attention, *ffn)):
            raise ValueError("layers whose attention or FFN is one linear map are not supported")
        heads, hidden = self.num_attention_heads, self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads // _one(attention, "n_heads_in_group", default=1)
        if not self.intermediate_size:
            self.intermediate_size = _width(_one(ffn, "ffn_mult", default=4.0), hidden)
        own: dict[str, dict[str, Any]] = {
            "attention": {"n_heads_in_group": heads // self.num_key_value_heads},
            "ffn": {"ffn_mult": 1.5 * self.intermediate_size / hidden},
        }
        self.block_configs = [
            Block({part: _part(values, bool(block[part].get("no_op"))) for part, values in own.items()})
            for block in found
        ]
        self.num_hidden_layers = len(found)
        kwargs.pop("layer_types", None)  # Llama reads no such list, which would not follow when layers are taken apart
        super().__post_init__(**kwargs)


def _one(parts: list[dict[str, Any]], key: str, *, default: Any) -> Any:
    """The one value that all layers have."""
    values = {part[key] for part in parts if part.get(key) is not None}
    if len(values) > 1:
        raise ValueError(f"layers differ in {key} ({', '.join(map(str, sorted(values)))}), which is not supported")
    return values.pop() if values else default


def _width(ffn_mult: float, hidden: int) -> int:
    """Neurons of an FFN: the next multiple of 256, as every runtime has it."""
    return -(-int(2 * ffn_mult * hidden / 3) // 256) * 256


def _part(values: dict[str, Any], no_op: bool) -> Block:
    return Block({"no_op": no_op, "replace_with_linear": False, **(dict.fromkeys(values) if no_op else values)})


def uneven(config: LlamaConfig) -> DeciLMConfig:
    """Of a model that computes what Llama does, whatever it is called: all layers whole."""
    values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    return DeciLMConfig.from_dict(values)


def unfolded(config: DeciLMConfig) -> DeciLMConfig:
    """With one layer for each attention, and one for each FFN."""
    parts = ("attention", "ffn")
    alone = [
        {part: {"no_op": part != only} for part in parts}
        for block in config.block_configs or []
        for only in parts
        if not block[only]["no_op"]
    ]
    return DeciLMConfig.from_dict({**config.to_dict(), "block_configs": alone})


def folded(config: DeciLMConfig) -> DeciLMConfig:
    """The inverse: an FFN behind attention is in the same layer."""
    whole: list[dict[str, Any]] = []
    for block in config.block_configs or []:
        behind = whole and not block["ffn"]["no_op"] and block["attention"]["no_op"] and whole[-1]["ffn"]["no_op"]
        if behind:
            whole[-1] = {"attention": whole[-1]["attention"], "ffn": block["ffn"]}
        else:
            whole.append(block)
    code = {
        "AutoConfig": f"{CODE_NAME}.DeciLMConfig",
        "AutoModelForCausalLM": f"{CODE_NAME}.DeciLMForCausalLM",
    }
    return DeciLMConfig.from_dict({**config.to_dict(), "auto_map": code, "block_configs": whole})


class DeciLMDecoderLayer(LlamaDecoderLayer):
    """x ← x + attention(norm(x)), x ← x + FFN(norm(x)), each where the layer has it."""

    attends: bool
    feeds: bool

    def keep(self, block: dict[str, Any]) -> None:
        """Let go of what the layer does not have."""
        self.attends, self.feeds = not block["attention"]["no_op"], not block["ffn"]["no_op"]
        if not self.attends:
            del self.self_attn, self.input_layernorm
        if not self.feeds:
            del self.mlp, self.post_attention_layernorm

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.attends:
            normed = self.input_layernorm(hidden_states)
            hidden_states = hidden_states + self.self_attn(normed, *args, **kwargs)[0]
        if self.feeds:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class DeciLMForCausalLM(LlamaForCausalLM):
    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        # Llama's own layers, turned into these: to make them anew would draw all weights twice.
        for layer, block in zip(self.model.layers, config.block_configs or [], strict=True):
            layer.__class__ = DeciLMDecoderLayer
            layer.keep(block)
