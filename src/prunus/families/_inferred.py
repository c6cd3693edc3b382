"""Families of types without a file: made by experiments with tiny models, and believed as far as they are proven."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from prunus import dims
from prunus.anatomy import stored_tensors
from prunus.architecture import AXES
from prunus.errors import UnsupportedModel, one_line
from prunus.families import _experiments, _probes, _tiny, _trace
from prunus.families._probes import BASE, fields_of
from prunus.families._proof import Trial
from prunus.families._tiny import Tiny
from prunus.families.family import AS_IT_IS, Branch, Family

BLOCKS, TOKENS = 2, 20
MOST_TRIES = 24
"""Ways to read fused projections that are tried."""
LEFT_OUT = {
    "phimoe": "its router chooses by chance in training, and two experts whatever the config says",
}
"""Types that pass in a tiny model, and are not to be cut all the same."""
FUSED = {
    "heads*3*head_dim": ("heads*3*head_dim",),
    "3*heads*head_dim": ("3*heads*head_dim",),
    "heads*head_dim + 2*kv_heads*head_dim": ("heads*head_dim + 2*kv_heads*head_dim",),
    "kv_heads*(group + 2)*head_dim": ("kv_heads*(group + 2)*head_dim",),
    "heads*2*head_dim": ("heads*2*head_dim", "2*heads*head_dim"),
    "2*ffn": ("2*ffn", "ffn*2"),
    "2*expert_ffn": ("2*expert_ffn", "expert_ffn*2"),
}
"""Dimensions whose order shapes do not tell, and the orders that are tried."""
UNREAD = ("attn.attention.bias", "attn.attention.masked_bias", "attn.causal_mask")
"""Masks that published checkpoints of GPT-Neo and CodeGen hold, and transformers no longer reads."""
FURTHER_LAYERS = "num_nextn_predict_layers"
"""Config key of how many layers predict further tokens, where there are such."""
BELONG_TO_EXPERTS = ("top_k", "expert_ffn", "shared_experts", "expert_groups", "chosen_groups")

Layout = dict[str, tuple[str, ...]]
"""Tensor, by its name inside a layer or its whole name → formula of each dimension."""


_FOUND: dict[str, Family] = {}
"""What was found already, by the options of a tiny config: models that differ in nothing but sizes are one family."""


def infer(config: PreTrainedConfig) -> Family:
    """The family of a config.

    Raises:
        UnsupportedModel: how far it came.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        if config.model_type in LEFT_OUT:
            raise UnsupportedModel(LEFT_OUT[config.model_type])
        key = _options(config)
        if key not in _FOUND:
            _FOUND[key] = _first_proven(config)
        return _FOUND[key]
    except UnsupportedModel as error:
        reason: Exception = error
    except Exception as error:  # a type's own code may raise whatever it likes at any step
        reason = UnsupportedModel(f"its code stopped ({type(error).__name__}: {one_line(error)})")
    finally:
        transformers_logging.set_verbosity(level)
    raise UnsupportedModel(
        f"model type {config.model_type!r} is not supported: no file describes it, and a tiny model of it says: "
        f"{reason}. docs/add_a_family.md shows how to add it."
    ) from reason


def _options(config: PreTrainedConfig) -> str:
    small = _probes.tiny(config, {size: BASE[size] for size in fields_of(config)})
    others = ("_name_or_path", "architectures", FURTHER_LAYERS)
    options = {key: value for key, value in small.to_dict().items() if key not in others}
    return json.dumps(options, sort_keys=True, default=str)


def _first_proven(config: PreTrainedConfig) -> Family:
    """Without a tie between hidden and heads where that is right, else with it."""
    reason = UnsupportedModel("its attention is not known")
    for tied in _probes.may_be_tied(config):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                return _proven(config, tied)
            except UnsupportedModel as error:
                reason = error
    raise reason


def _proven(config: PreTrainedConfig, tied: bool) -> Family:
    tiny = _tiny.built(config, tied=tied)
    tokens_BS = torch.randint(3, BASE["vocab"], (BLOCKS, TOKENS))
    with _trace.recorded(tiny.layers) as ran, torch.no_grad():
        try:
            tiny.body(input_ids=tokens_BS, use_cache=False)
        except Exception as error:  # whatever its code runs into
            raise UnsupportedModel(f"it does not run on text ({one_line(error)})") from error
    _experiments.check_causal(tiny, tokens_BS)
    _experiments.check_head(tiny, tokens_BS)
    branches = _trace.by_mark([_trace.branches(layer, tiny.config) for layer in ran])
    seen = _experiments.seen(config, tiny, branches, ran[0].call.given, tokens_BS)
    best: tuple[Trial, dict[str, str]] | None = None
    for layout in itertools.islice(_layouts(tiny, branches, seen["transposed"]), MOST_TRIES):
        trial = Trial(_family(config, tiny, seen, layout), tiny.config, tiny.model, tokens_BS)
        failed = trial.failures()
        if best is None or len(failed) < len(best[1]):
            best = (trial, failed)
        if not failed:
            break
    assert best is not None
    trial, failed = best
    return trial.without(failed)


def _layouts(tiny: Tiny, branches: tuple[Branch, ...], transposed: bool) -> Iterator[Layout]:
    """What all dimensions may be made of, the likeliest first; they differ in the order of what is fused."""
    options: dict[str, list[tuple[str, ...]]] = {}
    for name, shape in tiny.probes[0].shapes.items():
        layer, local = tiny.split(name)
        attention = next((b for b in branches if b.inner == "heads" and local.startswith(f"{b.module}.")), None)
        if layer is None:
            attention = None
        each = []
        for dim in range(len(shape)):
            inputs = len(shape) == 2 and dim == (0 if transposed else 1)
            on_stream = attention is None or _touches_stream(attention, local.rpartition(".")[0], inputs)
            each.append(_orders(_probes.formulas(tiny.probes, name, dim), on_stream))
        own = list(itertools.product(*each))
        if options.setdefault(local, own) != own:
            raise UnsupportedModel(f"{local} has different shapes in different layers")
    for chosen in itertools.product(*options.values()):
        yield dict(zip(options, chosen, strict=True))


def _touches_stream(attention: Branch, module: str, inputs: bool) -> bool:
    """Whether a side of a weight in attention is the residual stream, where heads may be as wide."""
    return inputs if module in attention.reads else module == attention.write and not inputs


def _orders(formulas: list[str], on_stream: bool) -> tuple[str, ...]:
    if "hidden" in formulas and on_stream:
        return ("hidden",)
    others = [formula for formula in formulas if formula != "hidden"] or formulas
    orders = tuple(order for formula in others for order in FUSED.get(formula, ()))
    return orders or (others[0],)


def _family(config: PreTrainedConfig, tiny: Tiny, seen: Mapping[str, Any], layout: Layout) -> Family:
    """All of it put together."""
    fields = fields_of(config)
    layout, derived = _named_for_experts(layout, fields)
    used = {name for units in layout.values() for unit in units for name in dims.names(unit)}
    constraints = _constraints(config, tiny, used, fields)
    for branch in seen["branches"]:
        _check_inner(branch, layout, seen["transposed"])
    inside = {tiny.split(name)[1] for name in stored_tensors(tiny.model) if tiny.split(name)[0] is not None}
    own = {norm for branch in seen["branches"] for norm in (branch.norm, branch.post_norm)}
    units_of = {norm: layout.get(f"{norm}.weight", ("head_dim",))[0] for norm in tiny.norms(inside=True)}
    inner = [norm for norm, unit in units_of.items() if norm not in own and unit != "head_dim"]
    keep = used | {"layers", "kv_heads", "head_dim"} | (set(BELONG_TO_EXPERTS) if "experts" in used else set())
    prefixes, stored_as = _experiments.stored_names(tiny)
    return Family(
        **seen,
        layer_weights={name: units for name, units in layout.items() if name in inside},
        outer_weights={name: _open(units) for name, units in layout.items() if name not in inside},
        norms=tuple(inner),
        latents={units_of[norm]: norm for norm in inner if units_of[norm] in ("q_rank", "kv_rank")},
        constraints=constraints,
        fields={size: key for size, key in fields.items() if size in keep},
        derived=derived,
        cached="kv_rank + rope_dim" if "kv_rank" in used else Family.cached,
        defaults={"ffn": "4*hidden"} if "ffn" in fields and getattr(config, fields["ffn"]) is None else {},
        stored_prefixes=prefixes,
        stored_as=stored_as,
        further_layers=FURTHER_LAYERS,
        unread=(*Family.unread, *UNREAD),
    )


def _open(units: tuple[str, ...]) -> tuple[str, ...]:
    """Of a table of positions tiny models have fewer rows than their like."""
    return tuple(AS_IT_IS if unit.isdigit() else unit for unit in units)


def _named_for_experts(layout: Layout, fields: dict[str, str]) -> tuple[Layout, dict[str, str]]:
    """With the neurons of experts, and of those that see all tokens, under their own names; `fields` changes alike."""
    used = {unit for units in layout.values() for unit in units}
    if "experts" not in used:
        return layout, {}
    names, derived = {}, {}
    if not any("expert_ffn" in unit for unit in used):
        fields["expert_ffn"] = fields.pop("ffn")
        names = {unit: unit.replace("ffn", "expert_ffn") for unit in used if "ffn" in dims.names(unit)}
    shared = "shared_experts*expert_ffn"
    if shared in {*used, *names.values()}:
        derived = {"shared_ffn": shared}
        names = {unit: names.get(unit, unit).replace(shared, "shared_ffn") for unit in used}
    return {name: tuple(names.get(unit, unit) for unit in units) for name, units in layout.items()}, derived


def _constraints(config: PreTrainedConfig, tiny: Tiny, used: set[str], fields: dict[str, str]) -> tuple[str, ...]:
    """Rules that the config class or the code have; `fields` gets the groups of keys where each head has its own."""
    rules = []
    if "heads" in used and "kv_heads" not in fields:
        fields["kv_heads"] = fields["heads"]
        rules.append("multi_head")
    if "head_dim" in used:
        rules.append("even_head_dim")
    if tiny.tied:
        rules.append("hidden_is_heads")
    elif "heads" in used and not _is_built(config, {"hidden": BASE["hidden"] - 4}):
        rules.append("heads_divide_hidden")
    if "experts" in used:
        rules.append("aligned_experts")
        rules += ["grouped_experts", "reachable_experts"] if "expert_groups" in fields else []
    return tuple(rules)


def _is_built(config: PreTrainedConfig, change: dict[str, int]) -> bool:
    try:
        _probes.built(_probes.tiny(config, {size: BASE[size] for size in fields_of(config)} | change))
    except UnsupportedModel:
        return False
    return True


def _check_inner(branch: Branch, layout: Mapping[str, tuple[str, ...]], transposed: bool) -> None:
    """What a branch computes must be as wide as its axis says.

    Raises:
        UnsupportedModel: it follows something else.
    """
    if branch.write and branch.inner not in dims.names(layout[f"{branch.write}.weight"][0 if transposed else 1]):
        raise UnsupportedModel(f"the inside of {branch.module} does not follow {AXES[branch.inner]}")
    stacked = [units for name, units in layout.items() if branch.experts and name.startswith(f"{branch.experts}.")]
    if any(units[0] != "experts" for units in stacked):
        raise UnsupportedModel(f"{branch.experts} holds something else than experts")
