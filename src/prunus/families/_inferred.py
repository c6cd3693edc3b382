"""Families of types that no file describes, made by experiment on tiny models and believed only when they are proven."""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from prunus.errors import UnsupportedModel
from prunus.families import _proof, _trace
from prunus.families._probes import (
    BASE,
    LAYER_COUNTS,
    Probe,
    built,
    fields_of,
    formulas,
    may_be_tied,
    per_layer_fields,
    probes,
    stored,
    tiny,
)
from prunus.families.family import Branch, Family

BLOCKS, TOKENS = 2, 20
MOST_TRIES = 24
"""Ways to read fused projections that are tried."""
FUSED = (
    "heads*3*head_dim",
    "3*heads*head_dim",
    "heads*head_dim + 2*kv_heads*head_dim",
    "kv_heads*(group + 2)*head_dim",
    "2*ffn",
    "ffn*2",
    "2*expert_ffn",
    "expert_ffn*2",
    "heads*2*head_dim",
    "2*heads*head_dim",
)


def infer(config: PreTrainedConfig) -> Family:
    """The family of a config.

    Raises:
        UnsupportedModel: how far it came.
    """
    return _infer(type(config), json.dumps(config.to_dict(), sort_keys=True, default=str))


@functools.cache
def _infer(config_class: type[PreTrainedConfig], text: str) -> Family:
    config = config_class.from_dict(json.loads(text))
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return _first_proven(config)
    except UnsupportedModel as error:
        raise UnsupportedModel(
            f"model type {config.model_type!r} is not supported: no family file describes it, and what a tiny model of it "
            f"shows is not enough: {error}. docs/add_a_family.md shows how to add it."
        ) from error
    finally:
        transformers_logging.set_verbosity(level)


def _first_proven(config: PreTrainedConfig) -> Family:
    """Without a tie between hidden and heads where that is right, else with it."""
    reason = None
    for tied in may_be_tied(config):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                return _proven(config, tied)
            except UnsupportedModel as error:
                reason = error
    assert reason is not None
    raise reason


def _proven(config: PreTrainedConfig, tied: bool) -> Family:
    found = probes(config, tied=tied)
    small = tiny(config, found[0].sizes)
    model = random_model(small)
    tokens_BS = torch.randint(3, BASE["vocab"], (BLOCKS, TOKENS))
    body = _body(model)
    layers, prefix = _layers(model, body, small.num_hidden_layers)
    with _trace.recorded(layers) as ran, torch.no_grad():
        try:
            last = body(input_ids=tokens_BS, use_cache=False).last_hidden_state
        except Exception as error:  # whatever its code runs into
            raise UnsupportedModel(f"it does not run on text ({' '.join(str(error).split())[:200]})") from error
    branches = _trace.by_mark([_trace.branches(layer, small) for layer in ran])
    final_norm = _final_norm(model, body, prefix)
    offset, centred = _norm_kind(model.get_submodule(final_norm))
    common: dict[str, Any] = {
        "model_type": config.model_type,
        "branches": branches,
        "final_norm": final_norm,
        "embedding": _name_of(model, model.get_input_embeddings()),
        "head": _name_of(model, model.get_output_embeddings()),
        "layer_prefix": prefix,
        "norm_offset": offset,
        "centred": centred,
        "transposed": any(isinstance(module, Conv1D) for module in layers.modules()),
        "scaled_embedding": _is_scaled(model, ran[0].call.given, tokens_BS),
        "per_layer_fields": per_layer_fields(config),
        "layer_count_fields": tuple(key for key in LAYER_COUNTS if isinstance(getattr(config, key, None), int)),
        "buffers": tuple(
            sorted({_split(prefix, name)[1] for name in stored(model).keys() - dict(model.named_parameters()).keys()})
        ),
    }
    options = _options(found, prefix, branches, common["transposed"])
    reason = None
    for layout in itertools.islice(_alternatives(options), MOST_TRIES):
        family = _family(common, config, layout, tied, model)
        try:
            _proof.prove(family, small, model, tokens_BS)
            return family
        except UnsupportedModel as error:
            reason = reason or error
    assert reason is not None
    raise reason


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose activations are of the order of 1, so that no error hides under a norm's epsilon."""
    for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"):
        if getattr(config, key, None) is not None:
            setattr(config, key, 1e-10)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever its code runs into
        raise UnsupportedModel(f"it is not built in tiny sizes ({' '.join(str(error).split())[:200]})") from error
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for value in stored(model).values():
            if value.ndim < 2:
                value.add_(torch.randn_like(value) * 0.2)
            else:
                scale = 1.0 if id(value) in embeddings else value.shape[-1] ** -0.5
                value.copy_(torch.randn_like(value) * scale)
    return model.eval()


def _body(model: PreTrainedModel) -> PreTrainedModel:
    try:
        body: PreTrainedModel = model.get_decoder()
    except AttributeError as error:
        raise UnsupportedModel("transformers knows no decoder in it") from error
    return body if body is not model else model.base_model


def _layers(model: nn.Module, body: nn.Module, count: int) -> tuple[nn.ModuleList, str]:
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and any(module is each for each in body.modules())
        ):
            return module, f"{name}."
    raise UnsupportedModel("it has no list of decoder layers")


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    found = next((name for name, module in model.named_modules() if module is wanted), None)
    if found is None:
        raise UnsupportedModel("it has no embedding, or no output head, that transformers knows")
    return found


def _final_norm(model: nn.Module, body: nn.Module, prefix: str) -> str:
    names = [
        name
        for name, module in model.named_modules()
        if _trace.is_norm(module) and not name.startswith(prefix) and any(module is each for each in body.modules())
    ]
    if len(names) != 1:
        raise UnsupportedModel(f"outside its layers there are {len(names)} norms, where one is known how to read")
    return names[0]


@torch.no_grad()
def _norm_kind(norm: nn.Module) -> tuple[float, bool]:
    """What is added to its weight, and whether it takes off the mean."""
    weight = norm._parameters.get("weight")
    if weight is None:
        raise UnsupportedModel("its norms have no weight, which could take the correction for channels that leave")
    x = torch.randn(5, len(weight))
    out, bias = norm(x), norm._parameters.get("bias")
    out = out - bias if bias is not None else out
    rms, centred = (each / each.square().mean(-1, keepdim=True).sqrt() for each in (x, x - x.mean(-1, keepdim=True)))
    for offset, normed, takes in ((0.0, rms, False), (1.0, rms, False), (0.0, centred, True)):
        if torch.allclose(out, normed * (weight + offset), rtol=1e-3, atol=1e-4):
            return offset, takes
    raise UnsupportedModel(f"{type(norm).__name__} norms otherwise than by a root mean square")


def _is_scaled(model: PreTrainedModel, stream: Tensor, tokens_BS: Tensor) -> bool:
    embedded = model.get_input_embeddings().weight[tokens_BS]
    return embedded.shape == stream.shape and torch.allclose(stream, embedded * BASE["hidden"] ** 0.5, rtol=1e-3)


def _split(prefix: str, name: str) -> tuple[int | None, str]:
    if not name.startswith(prefix):
        return None, name
    index, _, rest = name.removeprefix(prefix).partition(".")
    return (int(index), rest) if index.isdigit() else (None, name)


Options = dict[str, list[tuple[str, ...]]]
"""Tensor, by its name inside a layer or its whole name → what its dimensions may be made of."""


def _options(found: list[Probe], prefix: str, branches: tuple[Branch, ...], transposed: bool) -> Options:
    options: Options = {}
    for name, shape in found[0].shapes.items():
        layer, local = _split(prefix, name)
        each = [formulas(found, name, dim) for dim in range(len(shape))]
        each = [
            _fitting_role(parts, dim, len(shape), local, branches, transposed, layer) for dim, parts in enumerate(each)
        ]
        own = [tuple(parts) for parts in itertools.product(*each)]
        if options.setdefault(local, own) != own:
            raise UnsupportedModel(f"{local} has different shapes in different layers")
    return options


def _fitting_role(
    parts: list[str], dim: int, ndim: int, local: str, branches: tuple[Branch, ...], transposed: bool, layer: int | None
) -> list[str]:
    """Of several formulas those that fit what the tensor does; of those that differ in nothing but words, one."""
    module = local.rpartition(".")[0]
    attention = next(
        (branch for branch in branches if branch.inner == "heads" and local.startswith(f"{branch.module}.")), None
    )
    inputs = ndim == 2 and dim == (0 if transposed else 1)
    on_stream = attention is None or (inputs if module in attention.reads else module == attention.write and not inputs)
    if "hidden" in parts and (layer is None or on_stream):
        return ["hidden"]
    others = [part for part in parts if part != "hidden"] or parts
    fused = [variant for part in others for variant in _variants(part)]
    return fused if fused else others[:1]


def _variants(part: str) -> list[str]:
    """The orders in which a fused dimension may lie."""
    if part == "heads*2*head_dim":
        return [part, "2*heads*head_dim"]
    if part in ("2*ffn", "2*expert_ffn"):
        return [part, part.removeprefix("2*") + "*2"]
    return [part] if part in FUSED else []


def _alternatives(options: Options) -> Any:
    names = list(options)
    for chosen in itertools.product(*options.values()):
        yield dict(zip(names, chosen, strict=True))


def _family(
    common: Mapping[str, Any],
    config: PreTrainedConfig,
    layout: dict[str, tuple[str, ...]],
    tied: bool,
    model: PreTrainedModel,
) -> Family:
    prefix, fields = common["layer_prefix"], fields_of(config)
    inside = {_split(prefix, name)[1] for name in stored(model) if _split(prefix, name)[0] is not None}
    used = {name for units in layout.values() for unit in units for name in _names(unit)}
    constraints = []
    if "heads" in used and "kv_heads" not in fields:
        fields["kv_heads"] = fields["heads"]
        constraints.append("multi_head")
    if "head_dim" in used:
        constraints.append("even_head_dim")
    if tied:
        constraints.append("hidden_is_heads")
    elif "heads" in used and _refuses(config, {"hidden": BASE["hidden"] - 4}):
        constraints.append("heads_divide_hidden")
    derived = {}
    if "experts" in used:
        constraints.append("aligned_experts")
        if "expert_ffn" not in used:
            fields["expert_ffn"] = fields.pop("ffn")
            layout = {
                name: tuple(unit.replace("ffn", "expert_ffn") for unit in units) for name, units in layout.items()
            }
        if "shared_experts" in used and any("shared_experts*" in unit for units in layout.values() for unit in units):
            derived["shared_ffn"] = "shared_experts*expert_ffn"
            layout = {
                name: tuple("shared_ffn" if unit == derived["shared_ffn"] else unit for unit in units)
                for name, units in layout.items()
            }
        if "expert_groups" in fields:
            constraints += ["grouped_experts", "reachable_experts"]
    keep = used | {
        "layers",
        "kv_heads",
        "top_k",
        "expert_ffn",
        "shared_experts",
        "expert_groups",
        "chosen_groups",
        "head_dim",
    }
    stored_prefixes, stored_as = _stored_names(model, prefix)
    norms = {
        _split(prefix, name)[1]
        for name, module in model.named_modules()
        if _trace.is_norm(module) and name.startswith(prefix)
    }
    own = {norm for branch in common["branches"] for norm in (branch.norm, branch.post_norm)}
    inner = {norm for norm in norms - own if f"{norm}.weight" in layout and layout[f"{norm}.weight"] != ("head_dim",)}
    latents = {
        layout[f"{norm}.weight"][0]: norm for norm in inner if layout[f"{norm}.weight"][0] in ("q_rank", "kv_rank")
    }
    defaults = {"ffn": "4*hidden"} if "ffn" in fields and getattr(config, fields["ffn"]) is None else {}
    for branch in common["branches"]:
        _check_inner(branch, layout, common["transposed"])
    return Family(
        **common,
        defaults=defaults,
        layer_weights={name: units for name, units in layout.items() if name in inside},
        outer_weights={name: units for name, units in layout.items() if name not in inside},
        norms=tuple(sorted(inner)),
        latents=latents,
        constraints=tuple(constraints),
        fields={size: key for size, key in fields.items() if size in keep},
        derived=derived,
        stored_prefixes=stored_prefixes,
        stored_as=stored_as,
        ignores_positions=_ignores_positions(model),
    )


def _check_inner(branch: Branch, layout: Mapping[str, tuple[str, ...]], transposed: bool) -> None:
    """What a branch computes must be as wide as its axis says."""
    if branch.write and branch.inner not in _names(layout[f"{branch.write}.weight"][0 if transposed else 1]):
        raise UnsupportedModel(f"the inside of {branch.module} does not follow {branch.inner}")
    stacked = [units for name, units in layout.items() if branch.experts and name.startswith(f"{branch.experts}.")]
    if any(units[0] != "experts" for units in stacked):
        raise UnsupportedModel(f"{branch.experts} holds something else than experts")


def _refuses(config: PreTrainedConfig, change: dict[str, int]) -> bool:
    """Whether no model of these sizes can be built."""
    try:
        built(tiny(config, {size: BASE[size] for size in fields_of(config)} | change))
    except UnsupportedModel:
        return True
    return False


def _names(unit: str) -> frozenset[str]:
    from prunus import dims

    return dims.names(unit)


@torch.no_grad()
def _ignores_positions(model: PreTrainedModel) -> bool:
    """Whether documents in one block read each other, though their positions start anew."""
    tokens_1S = torch.randint(3, BASE["vocab"], (1, TOKENS))
    half = TOKENS // 2
    positions_1S = torch.arange(half).repeat(2)[None]
    body = _body(model)
    try:
        packed = body(input_ids=tokens_1S, position_ids=positions_1S, use_cache=False).last_hidden_state
        alone = body(
            input_ids=tokens_1S[:, half:], position_ids=positions_1S[:, half:], use_cache=False
        ).last_hidden_state
    except TypeError as error:
        raise UnsupportedModel("its code takes no positions, which tell documents apart") from error
    return not torch.allclose(packed[:, half:], alone, rtol=1e-3, atol=1e-4)


def _stored_names(
    model: PreTrainedModel, prefix: str
) -> tuple[tuple[tuple[str, str], ...], dict[str, tuple[str, ...]]]:
    """How names in a checkpoint differ from the model's: by a prefix, or for experts that lie apart there."""
    with tempfile.TemporaryDirectory() as folder:
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        model.save_pretrained(folder)
        if bars:
            transformers_logging.enable_progress_bar()
        files = load_file(Path(folder) / "model.safetensors")
    stored_as: dict[str, tuple[str, ...]] = {}
    prefixes: dict[str, str] = {}
    for name, value in stored(model).items():
        if name in files:
            continue
        layer, local = _split(prefix, name)
        other = next((n for n, v in files.items() if v.shape == value.shape and torch.equal(v, value)), None)
        if other is None and layer is not None and value.ndim == 3:
            names = _apart(files, f"{prefix}{layer}.", value[0])
        elif other is None:
            raise UnsupportedModel(f"a checkpoint holds {name} under another name, or in another shape")
        elif other.endswith(f".{local}") and layer is not None or layer is None and _tail(name) == _tail(other):
            tail = local if layer is None else f"{layer}.{local}"
            tail = _tail(name) if layer is None else tail
            prefixes[name.removesuffix(tail)] = other.removesuffix(tail)
            continue
        else:
            names = (other if layer is None else other.partition(f".{layer}.")[2],)
        if stored_as.setdefault(local, names) != names:
            raise UnsupportedModel(f"{name} is stored otherwise than in other layers")
    return tuple(sorted(prefixes.items(), key=lambda pair: -len(pair[0]))), stored_as


def _tail(name: str) -> str:
    """Of a name outside the layers, the module's own and the tensor's."""
    return ".".join(name.split(".")[-2:])


def _apart(files: Mapping[str, Tensor], prefix: str, expert: Tensor) -> tuple[str, ...]:
    """Patterns of the names under which the rows of a layer's first expert lie."""
    patterns = []
    for count in (1, 2):
        pieces = expert.chunk(count)
        names = [
            next(
                (n for n, v in files.items() if n.startswith(prefix) and v.shape == p.shape and torch.equal(v, p)), None
            )
            for p in pieces
        ]
        if all(names):
            patterns = [str(name).removeprefix(prefix).replace(".0.", ".*.", 1) for name in names]
            break
    if not patterns:
        raise UnsupportedModel("a checkpoint holds its experts in a way that is not known")
    return tuple(patterns)
