"""Families of types without a file: made by experiments with tiny models, and believed as far as they are proven."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from prunus import dims
from prunus.architecture import AXES
from prunus.errors import UnsupportedModel
from prunus.families import _probes, _trace
from prunus.families._probes import BASE, Probe, fields_of, stored
from prunus.families._proof import Trial
from prunus.families.family import Branch, Family

BLOCKS, TOKENS = 2, 20
MOST_TRIES = 24
"""Ways to read fused projections that are tried."""
LEFT_OUT = {
    "phimoe": "its router chooses by chance in training, and two experts whatever the config says",
}
"""Types that pass in a tiny model, and are not to be cut all the same."""
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
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
        reason = UnsupportedModel(f"its code stopped ({type(error).__name__}: {_line(error)})")
    finally:
        transformers_logging.set_verbosity(level)
    raise UnsupportedModel(
        f"model type {config.model_type!r} is not supported: no file describes it, and a tiny model of it says: "
        f"{reason}. docs/add_a_family.md shows how to add it."
    ) from reason


def _options(config: PreTrainedConfig) -> str:
    small = _probes.tiny(config, {size: BASE[size] for size in fields_of(config)})
    options = {key: value for key, value in small.to_dict().items() if key not in ("_name_or_path", "architectures")}
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


@dataclass(frozen=True)
class Tiny:
    """A tiny model of a type, and where its parts are.

    Attributes:
        tied: hidden is always heads × head_dim.
        prefix: what names of its layers begin with.
    """

    config: PreTrainedConfig
    probes: Sequence[Probe]
    tied: bool
    model: PreTrainedModel
    layers: nn.ModuleList
    prefix: str

    @property
    def body(self) -> Any:
        return _body(self.model)

    def split(self, name: str) -> tuple[int | None, str]:
        """See `Family.split`."""
        if not name.startswith(self.prefix):
            return None, name
        index, _, rest = name.removeprefix(self.prefix).partition(".")
        return (int(index), rest) if index.isdigit() else (None, name)

    def norms(self, *, inside: bool) -> list[str]:
        """Names of the norms in the layers, relative to them, or of those around."""
        named = [(self.split(name), module) for name, module in self.model.named_modules()]
        mine = [local for (layer, local), module in named if (layer is not None) == inside and _trace.is_norm(module)]
        return list(dict.fromkeys(mine))


def _proven(config: PreTrainedConfig, tied: bool) -> Family:
    tiny = _built(config, tied)
    tokens_BS = torch.randint(3, BASE["vocab"], (BLOCKS, TOKENS))
    with _trace.recorded(tiny.layers) as ran, torch.no_grad():
        try:
            tiny.body(input_ids=tokens_BS, use_cache=False)
        except Exception as error:  # whatever its code runs into
            raise UnsupportedModel(f"it does not run on text ({_line(error)})") from error
    _check_causal(tiny, tokens_BS)
    branches = _trace.by_mark([_trace.branches(layer, tiny.config) for layer in ran])
    seen = _seen(config, tiny, branches, ran[0].call.given, tokens_BS)
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


@torch.no_grad()
def _check_causal(tiny: Tiny, tokens_BS: Tensor) -> None:
    """A model that reads both ways learns from text to look at what it should predict.

    Raises:
        UnsupportedModel: a token changes what comes before it.
    """
    other_BS = tokens_BS.clone()
    other_BS[:, -1] = tokens_BS[:, -1] % 50 + 10
    before, after = (
        tiny.body(input_ids=each, use_cache=False).last_hidden_state[:, :-1] for each in (tokens_BS, other_BS)
    )
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-4):
        raise UnsupportedModel("it reads text in both directions")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _built(config: PreTrainedConfig, tied: bool) -> Tiny:
    probes = _probes.probes(config, tied=tied)
    small = _probes.tiny(config, probes[0].sizes)
    model = random_model(small)
    inside = {id(module) for module in _body(model).modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == small.num_hidden_layers and id(module) in inside:
            return Tiny(small, probes, tied, model, module, f"{name}.")
    raise UnsupportedModel("it has no list of decoder layers")


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose activations are of the order of 1, so that no error hides under a norm's epsilon."""
    for key in EPSILONS:
        if getattr(config, key, None) is not None:
            setattr(config, key, 1e-10)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever its code runs into
        raise UnsupportedModel(f"it is not built in tiny sizes ({_line(error)})") from error
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for value in stored(model).values():
            if not value.is_floating_point():
                raise UnsupportedModel("it stores tensors of whole numbers")
            if value.ndim < 2:
                value.add_(torch.randn_like(value) * 0.2)
            else:
                scale = 1.0 if id(value) in embeddings else value.shape[-1] ** -0.5
                value.copy_(torch.randn_like(value) * scale)
    return model.eval()


def _body(model: PreTrainedModel) -> nn.Module:
    """See `layerwise.body_of`."""
    try:
        body = model.get_decoder()
    except AttributeError as error:
        raise UnsupportedModel("transformers knows no decoder in it") from error
    return body if body is not model else model.base_model


def _seen(
    config: PreTrainedConfig, tiny: Tiny, branches: tuple[Branch, ...], stream_BSH: Tensor, tokens_BS: Tensor
) -> dict[str, Any]:
    """What a run shows of a family, beside its weights."""
    around = tiny.norms(inside=False)
    if len(around) != 1:
        raise UnsupportedModel(f"outside its layers there are {len(around)} norms, where one is known how to read")
    offset, centred, weighs = _norm_kind(tiny.model.get_submodule(around[0]), BASE["hidden"])
    embedding: Any = tiny.model.get_input_embeddings()
    parameters = dict(tiny.model.named_parameters()).keys()
    return {
        "model_type": config.model_type,
        "branches": branches,
        "final_norm": around[0],
        "embedding": _name_of(tiny.model, embedding),
        "head": _name_of(tiny.model, tiny.model.get_output_embeddings()),
        "layer_prefix": tiny.prefix,
        "norm_offset": offset,
        "centred": centred,
        "uncut": {} if weighs else {"hidden": "its norms have no weight to make up for channels that leave"},
        "transposed": any(isinstance(module, Conv1D) for module in tiny.layers.modules()),
        "scaled_embedding": _is_scaled(embedding.weight[tokens_BS], stream_BSH),
        "per_layer_fields": _probes.per_layer_fields(config),
        "layer_count_fields": tuple(k for k in _probes.LAYER_COUNTS if isinstance(getattr(config, k, None), int)),
        "other_fields": _probes.other_fields(config),
        "buffers": tuple(sorted({tiny.split(name)[1] for name in stored(tiny.model).keys() - parameters})),
        "ignores_positions": _ignores_positions(tiny),
    }


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    found = next((name for name, module in model.named_modules() if module is wanted), None)
    if found is None:
        raise UnsupportedModel("it has no embedding, or no output head, that transformers knows")
    return found


@torch.no_grad()
def _norm_kind(norm: nn.Module, width: int) -> tuple[float, bool, bool]:
    """What is added to its weight, whether it takes off the mean, and whether it has a weight."""
    x_NH = torch.randn(5, width)
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    out_NH = norm(x_NH) - (0.0 if bias is None else bias)
    weight_H = torch.ones(width) if weight is None else weight
    centred_NH = x_NH - x_NH.mean(-1, keepdim=True)
    for offset, given_NH, takes in ((0.0, x_NH, False), (1.0, x_NH, False), (0.0, centred_NH, True)):
        normed_NH = given_NH / given_NH.square().mean(-1, keepdim=True).sqrt()
        if torch.allclose(out_NH, normed_NH * (weight_H + offset), rtol=1e-3, atol=1e-4):
            return offset, takes, weight is not None
    raise UnsupportedModel(f"{type(norm).__name__} norms otherwise than by a root mean square")


def _is_scaled(embedded_BSH: Tensor, stream_BSH: Tensor) -> bool:
    root = BASE["hidden"] ** 0.5
    return embedded_BSH.shape == stream_BSH.shape and torch.allclose(stream_BSH, embedded_BSH * root, rtol=1e-3)


@torch.no_grad()
def _ignores_positions(tiny: Tiny) -> bool:
    """Whether documents in one block read each other, though their positions start anew."""
    tokens_1S, half = torch.randint(3, BASE["vocab"], (1, TOKENS)), TOKENS // 2
    positions_1S = torch.arange(half).repeat(2)[None]
    packed, alone = (
        tiny.body(input_ids=tokens_1S[:, some], position_ids=positions_1S[:, some], use_cache=False).last_hidden_state
        for some in (slice(None), slice(half, None))
    )
    return not torch.allclose(packed[:, half:], alone, rtol=1e-3, atol=1e-4)


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
    inside = {tiny.split(name)[1] for name in stored(tiny.model) if tiny.split(name)[0] is not None}
    own = {norm for branch in seen["branches"] for norm in (branch.norm, branch.post_norm)}
    units_of = {norm: layout.get(f"{norm}.weight", ("head_dim",))[0] for norm in tiny.norms(inside=True)}
    inner = [norm for norm, unit in units_of.items() if norm not in own and unit != "head_dim"]
    keep = used | {"layers", "kv_heads", "head_dim"} | (set(BELONG_TO_EXPERTS) if "experts" in used else set())
    prefixes, stored_as = _stored_names(tiny)
    return Family(
        **seen,
        layer_weights={name: units for name, units in layout.items() if name in inside},
        outer_weights={name: units for name, units in layout.items() if name not in inside},
        norms=tuple(inner),
        latents={units_of[norm]: norm for norm in inner if units_of[norm] in ("q_rank", "kv_rank")},
        constraints=constraints,
        fields={size: key for size, key in fields.items() if size in keep},
        derived=derived,
        defaults={"ffn": "4*hidden"} if "ffn" in fields and getattr(config, fields["ffn"]) is None else {},
        stored_prefixes=prefixes,
        stored_as=stored_as,
    )


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


def _stored_names(tiny: Tiny) -> tuple[tuple[tuple[str, str], ...], dict[str, tuple[str, ...]]]:
    """How names in a checkpoint differ from the model's: `stored_prefixes` and `stored_as` of a family."""
    files = _saved(tiny.model)
    prefixes: dict[str, str] = {}
    stored_as: dict[str, tuple[str, ...]] = {}
    for name, value in stored(tiny.model).items():
        if name in files:
            continue
        layer, local = tiny.split(name)
        other = next((n for n, v in files.items() if v.shape == value.shape and torch.equal(v, value)), None)
        tail = ".".join(name.split(".")[-2:]) if layer is None else f"{layer}.{local}"
        if other is not None and other.endswith(f".{tail}"):
            prefixes[name.removesuffix(tail)] = other.removesuffix(tail)
            continue
        if other is not None:
            names: tuple[str, ...] = (other if layer is None else other.partition(f".{layer}.")[2],)
        elif layer is not None and value.ndim == 3:
            names = _apart(files, f"{tiny.prefix}{layer}.", value[0])
        else:
            raise UnsupportedModel(f"a checkpoint holds {name} in another form")
        if stored_as.setdefault(local, names) != names:
            raise UnsupportedModel(f"{name} is stored otherwise than in other layers")
    return tuple(sorted(prefixes.items(), key=lambda pair: -len(pair[0]))), stored_as


def _saved(model: PreTrainedModel) -> dict[str, Tensor]:
    """What transformers writes of a model."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return load_file(Path(folder) / "model.safetensors")
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def _apart(files: Mapping[str, Tensor], prefix: str, expert: Tensor) -> tuple[str, ...]:
    """Patterns of the names under which the rows of a layer's first expert lie."""

    def holder(rows: Tensor) -> str | None:
        same = (n for n, v in files.items() if n.startswith(prefix) and v.shape == rows.shape and torch.equal(v, rows))
        return next(same, None)

    for count in (1, 2):
        names = [holder(rows) for rows in expert.chunk(count)]
        if all(names):
            return tuple(str(name).removeprefix(prefix).replace(".0.", ".*.", 1) for name in names)
    raise UnsupportedModel("a checkpoint holds its experts in a way that is not known")
