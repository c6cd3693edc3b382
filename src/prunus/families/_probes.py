"""What the dimensions of a type's weights are made of, found by building tiny models of other and other sizes.

A size is known by its config key; a dimension that follows heads × head_dim in every model built is that product.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from prunus import dims
from prunus.anatomy import stored_tensors
from prunus.errors import UnsupportedModel, one_line

KEYS = {
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size", "d_model"),
    "ffn": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab": ("vocab_size",),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k"),
    "expert_ffn": ("moe_intermediate_size", "moe_ffn_dim"),
    "shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "shared_ffn": ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    "expert_groups": ("n_group",),
    "chosen_groups": ("topk_group",),
    "q_rank": ("q_lora_rank",),
    "kv_rank": ("kv_lora_rank",),
    "nope_dim": ("qk_nope_head_dim",),
    "rope_dim": ("qk_rope_head_dim",),
    "value_dim": ("v_head_dim",),
}
"""Names that configs give to each size."""
BASE = {
    "layers": 4, "hidden": 96, "ffn": 40, "heads": 12, "kv_heads": 6, "head_dim": 8, "vocab": 97, "experts": 6,
    "top_k": 2, "expert_ffn": 24, "shared_experts": 1, "shared_ffn": 28, "expert_groups": 1, "chosen_groups": 1,
    "q_rank": 20, "kv_rank": 16, "nope_dim": 8, "rope_dim": 6, "value_dim": 10,
}  # fmt: skip
"""Sizes of the tiny models; no two that a dimension could confuse are the same."""
STEPS = {
    "hidden": 192, "ffn": 56, "heads": 24, "kv_heads": 12, "head_dim": 16, "vocab": 89, "experts": 10, "expert_ffn": 32,
    "shared_experts": 2, "shared_ffn": 36, "q_rank": 22, "kv_rank": 14, "nope_dim": 12, "rope_dim": 8, "value_dim": 12,
}  # fmt: skip
"""Another value of each, tried alone."""
FORMULAS = (
    *("vocab", "ffn", "expert_ffn", "shared_ffn", "experts", "q_rank", "kv_rank", "hidden"),
    *("heads*head_dim", "kv_heads*head_dim", "head_dim", "heads", "kv_heads"),
    *("2*ffn", "2*expert_ffn", "shared_experts*expert_ffn", "2*head_dim", "heads*2*head_dim"),
    *("heads*3*head_dim", "3*heads*head_dim", "heads*head_dim + 2*kv_heads*head_dim"),
    *("kv_heads*(group + 2)*head_dim", "heads*head_dim + 2*head_dim"),
    *("heads*(nope_dim + rope_dim)", "heads*(nope_dim + value_dim)", "kv_rank + rope_dim", "heads*value_dim"),
    *("kv_heads*value_dim", "shared_experts*ffn"),
)
"""What dimensions are made of, the likelier first."""
LAYER_COUNTS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
"""Config keys that hold "the first n layers"."""
FOLLOW_HIDDEN = ("word_embed_proj_dim",)
PLAIN_ROPE = ("rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class Probe:
    """A model that was built: its sizes, and the shape of each tensor."""

    sizes: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]


def fields_of(config: PreTrainedConfig) -> dict[str, str]:
    """Config key of each size that a config knows."""
    values, names = config.to_dict(), config.attribute_map
    found = {}
    for size, keys in KEYS.items():
        present = (names.get(key, key) for key in keys if names.get(key, key) in values)
        key = next(present, None)
        if key and (values[key] is not None or size == "ffn"):
            found[size] = key
    if "kv_rank" in found:
        return {size: key for size, key in found.items() if size not in ("kv_heads", "head_dim")}
    return found


def other_fields(config: PreTrainedConfig) -> dict[str, str]:
    """Config keys that must follow a size, though they are not where it is read."""
    return {key: "hidden" for key in FOLLOW_HIDDEN if getattr(config, key, None) == config.hidden_size}


def per_layer_fields(config: PreTrainedConfig) -> tuple[str, ...]:
    """Config keys with an entry for each layer."""
    count = config.num_hidden_layers
    lists = {key: value for key, value in config.to_dict().items() if isinstance(value, list) and len(value) == count}
    return tuple(
        key
        for key in lists
        if "layer" in key or key.endswith("_types") or (count > 1 and key != "architectures" and "token" not in key)
    )


def tiny(config: PreTrainedConfig, sizes: Mapping[str, int]) -> PreTrainedConfig:
    """A config of the same options and other sizes.

    Raises:
        UnsupportedModel: its class refuses these, or has no keys for them.
    """
    if lacking := {"layers", "hidden", "vocab"} - fields_of(config).keys():
        raise UnsupportedModel(f"its config has no key for {', '.join(sorted(lacking))}")
    values = copy.deepcopy(config.to_dict())
    kept = _sampled_layers([values[key] for key in per_layer_fields(config)], config.num_hidden_layers)
    for key in per_layer_fields(config):
        values[key] = [values[key][layer] for layer in kept]
    for key, value in values.items():
        if key in LAYER_COUNTS and value:
            values[key] = 1
        if key.startswith("rope_") and isinstance(value, dict):
            values[key] = _plain_rope(value)
        if "window" in key and isinstance(value, int) and not isinstance(value, bool) and key not in LAYER_COUNTS:
            values[key] = min(value, 8)
        if key == "index_topk" and value:  # fewer than a text has, so that what is left out shows
            values[key] = min(value, 4)
        if key.endswith("token_id") and isinstance(value, int):
            values[key] = value % BASE["vocab"]
        if key == "rotary_dim":
            values[key] = BASE["head_dim"]
        if key == "max_position_embeddings":
            values[key] = 128
        if "dropout" in key or "pdrop" in key:
            values[key] = 0.0 if isinstance(value, float) else value
    values |= {key: sizes[size] for size, key in fields_of(config).items() if size in sizes}
    values |= {key: sizes[size] for key, size in other_fields(config).items()}
    known = config.to_dict()
    if "kv_rank" in sizes:  # latents are made into keys of every head
        values |= {key: sizes["heads"] for key in KEYS["kv_heads"] if key in known}
        values |= {key: sizes["rope_dim"] for key in KEYS["head_dim"] if key in known}
    elif "head_dim" not in sizes and "head_dim" in known:
        values["head_dim"] = sizes["hidden"] // sizes["heads"]
    try:
        return type(config).from_dict(values)
    except Exception as error:  # config classes raise what they like
        raise UnsupportedModel(f"its config takes no tiny sizes ({one_line(error)})") from error


def _plain_rope(value: dict[str, Any]) -> dict[str, Any]:
    """Without tables that depend on head_dim."""
    if all(isinstance(part, dict) for part in value.values()):
        return {name: _plain_rope(part) for name, part in value.items()}
    kept = {key: value[key] for key in PLAIN_ROPE if value.get(key) is not None}
    return {"rope_type": "default", "rope_theta": 10000.0, **kept}


def _sampled_layers(lists: Sequence[Sequence[Any]], count: int) -> list[int]:
    """Four layers, in order, among which each kind is; the first ones where all are the same. Of fewer some twice."""
    if count < BASE["layers"]:
        return sorted(layer % count for layer in range(BASE["layers"]))
    kinds = [str([values[layer] for values in lists]) for layer in range(count)]
    first = sorted({kinds.index(kind) for kind in kinds})[: BASE["layers"]]
    others = (layer for layer in range(count) if layer not in first)
    return sorted([*first, *(layer for _, layer in zip(range(BASE["layers"] - len(first)), others, strict=False))])


def built(config: PreTrainedConfig) -> nn.Module:
    """The model on the meta device."""
    try:
        with torch.device("meta"), no_init_weights():
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever its code runs into
        raise UnsupportedModel(f"it is not built in tiny sizes ({one_line(error)})") from error


def probes(config: PreTrainedConfig, *, tied: bool) -> list[Probe]:
    """Models of base sizes, and with one size changed.

    Args:
        tied: hidden is always heads × head_dim.
    """
    fields = fields_of(config)
    sizes = {size: BASE[size] for size in fields if not (tied and size == "head_dim")}
    alone = [{size: step} for size, step in STEPS.items() if size in sizes and not (tied and size in TIED)]
    wider = {"hidden": STEPS["hidden"]}
    changes: list[dict[str, int]] = [{}, *alone, *([wider, wider | {"heads": STEPS["heads"]}] if tied else [])]
    found = []
    for change in changes:
        try:
            found.append(_probe(config, sizes | change, tied))
        except UnsupportedModel:
            if not change:
                raise
    return found


def may_be_tied(config: PreTrainedConfig) -> list[bool]:
    """Whether hidden may be, or must be, heads × head_dim; the likelier first."""
    fields = fields_of(config)
    if "heads" not in fields or "kv_rank" in fields:
        return [False]
    return [False, True] if "head_dim" in fields else [True]


TIED = ("hidden", "heads")


def _probe(config: PreTrainedConfig, sizes: dict[str, int], tied: bool) -> Probe:
    if "kv_heads" in sizes and sizes["heads"] % sizes["kv_heads"]:
        raise UnsupportedModel("kv_heads do not divide heads")
    shapes = {name: tuple(value.shape) for name, value in stored_tensors(built(tiny(config, sizes))).items()}
    complete = dict(sizes)
    if tied:
        complete["head_dim"] = sizes["hidden"] // sizes["heads"]
    if "heads" in sizes:
        complete.setdefault("kv_heads", sizes["heads"])
    return Probe(complete, shapes)


def formulas(found: Sequence[Probe], tensor: str, dim: int) -> list[str]:
    """All that a dimension may be made of; its length where it never changes.

    Raises:
        UnsupportedModel: nothing fits.
    """
    lengths = [probe.shapes[tensor][dim] for probe in found]
    fitting = [formula for formula in _known(frozenset(found[0].sizes)) if _fits(formula, found, lengths)]
    if len(set(lengths)) == 1:
        return [str(lengths[0])]
    if not fitting:
        raise UnsupportedModel(f"dimension {dim} of {tensor} ({lengths[0]}) is made of no sizes that are known")
    return fitting


@functools.cache
def _known(sizes: frozenset[str]) -> tuple[str, ...]:
    return tuple(formula for formula in FORMULAS if dims.names(formula) <= sizes)


def _fits(formula: str, found: Iterable[Probe], lengths: Iterable[int]) -> bool:
    return all(dims.size(formula, probe.sizes) == length for probe, length in zip(found, lengths, strict=True))
