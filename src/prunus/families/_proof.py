"""Whether a family's data is right: a tiny model with parts set to zero computes what a model without them does.

The same is tested for every family file; a family that was inferred has to show it before it is believed.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from prunus import dims
from prunus.architecture import AXES, Architecture, to_config
from prunus.errors import UnsupportedModel
from prunus.families._probes import stored
from prunus.families._trace import is_norm
from prunus.families.family import Family

TOLERANCE = 2e-4
UNREACHABLE = -1e4
TRIES = 4_000
DRAWS = 4


@dataclass(frozen=True)
class Choice:
    """What stays: layers, and of each other axis some indices, the same in all layers."""

    layers: list[int]
    axes: Mapping[str, Tensor]


def failures(family: Family, config: PreTrainedConfig, model: PreTrainedModel, tokens_BS: Tensor) -> dict[str, str]:
    """Axes whose cut does not compute what it should, each with what was seen. Each is cut by itself, or with what must
    be cut along.

    Args:
        model: tiny, in float32, with random weights.
    """
    found = {}
    for axis in _sizes(family, config, model).axes():
        if axis not in family.uncut and (wrong := _wrong(family, config, model, tokens_BS, {axis})):
            found[axis] = wrong
    return found


def without(
    family: Family, failed: Mapping[str, str], config: PreTrainedConfig, model: PreTrainedModel, tokens_BS: Tensor
) -> Family:
    """The family with these axes fixed, after the others were cut together.

    Raises:
        UnsupportedModel: that fails, or too little is left.
    """
    axes = _sizes(family, config, model).axes()
    fixed = {axis: f"a tiny model so cut does not compute what it should ({wrong})" for axis, wrong in failed.items()}
    family = dataclasses.replace(family, uncut={**family.uncut, **fixed})
    left = [axis for axis in axes if axis not in family.uncut]
    if not {"ffn", "expert_ffn"} & set(left) or len(left) < 2:
        raise UnsupportedModel(next(iter(failed.values()), "no neurons can be told"))
    if wrong := _wrong(family, config, model, tokens_BS, set(left)):
        raise UnsupportedModel(wrong)
    return family


def _sizes(family: Family, config: PreTrainedConfig, model: PreTrainedModel) -> Architecture:
    units = (family.units(name, value.shape) or () for name, value in stored(model).items())
    return family.architecture(config).only(family.sizes(unit for each in units for unit in each))


def _wrong(
    family: Family, config: PreTrainedConfig, model: PreTrainedModel, tokens_BS: Tensor, axes: set[str]
) -> str | None:
    """What is wrong with cuts of these axes; None if nothing is. Which layers go is drawn more often than other things:
    they may be of several kinds."""
    draws = DRAWS if "layers" in axes else 1
    found = (_wrong_once(family, config, model, tokens_BS, axes, random.Random(draw)) for draw in range(draws))
    return next(filter(None, found), None)


def _wrong_once(
    family: Family,
    config: PreTrainedConfig,
    model: PreTrainedModel,
    tokens_BS: Tensor,
    axes: set[str],
    generator: random.Random,
) -> str | None:
    sizes = _sizes(family, config, model)
    target = _target(family, sizes, axes, generator)
    if target is None:
        return None
    layout = {name: family.units(name, value.shape) for name, value in stored(model).items()}
    given = (family, config, model, layout, _choice(sizes, target, generator), sizes, target)
    expected = _logits(_masked(*given), tokens_BS)
    try:
        found = _logits(_cut(*given), tokens_BS)
    except UnsupportedModel as error:
        return str(error)
    except (RuntimeError, ValueError) as error:
        return f"cut to {target}, it does not run: {' '.join(str(error).split())[:100]}"
    error_of = float((found - expected).norm() / expected.norm())
    return None if error_of < TOLERANCE else f"cut to {target}, its logits differ by {error_of:.0e}"


def _target(family: Family, sizes: Architecture, axes: set[str], generator: random.Random) -> Architecture | None:
    """A legal architecture in which these axes are cut, and others only where they must be."""
    joint = axes | {"hidden", "heads", "kv_heads"} & sizes.axes().keys() - family.uncut.keys()
    for attempt in range(TRIES):
        free = axes if attempt < TRIES // 2 else joint
        able = [axis for axis in sorted(free) if sizes[axis] > 1]
        drawn = {axis: generator.randint(max(1, sizes[axis] // 3), sizes[axis] - 1) for axis in able}
        target = sizes.replace(**drawn)
        per_group = (size.heads // size.kv_heads for size in (target, sizes)) if "heads" in sizes else iter((1, 1))
        if drawn.keys() & axes and not family.illegal(target) and next(per_group) <= next(per_group):
            return target
    return None


def _choice(sizes: Architecture, target: Architecture, generator: random.Random) -> Choice:
    def some(count: int, keep: int) -> list[int]:
        return sorted(generator.sample(range(count), keep))

    def grouped(groups: list[int], per_group: int, keep: int) -> list[int]:
        return [group * per_group + place for group in groups for place in some(per_group, keep)]

    plain = [axis for axis in AXES if axis in sizes and axis not in ("layers", "heads", "kv_heads", "experts", "top_k")]
    chosen = {axis: some(sizes[axis], target[axis]) for axis in plain}
    if "heads" in sizes:
        chosen["kv_heads"] = some(sizes.kv_heads, target.kv_heads)
        per_group = sizes.heads // sizes.kv_heads
        chosen["heads"] = grouped(chosen["kv_heads"], per_group, target.heads // target.kv_heads)
    if "experts" in sizes:
        groups = sizes.get("expert_groups", 1)
        chosen["experts"] = grouped(list(range(groups)), sizes.experts // groups, target.experts // groups)
    return Choice(some(sizes.layers, target.layers), {axis: torch.tensor(kept) for axis, kept in chosen.items()})


Layout = Mapping[str, tuple[str, ...] | None]


def _masked(
    family: Family,
    config: PreTrainedConfig,
    model: PreTrainedModel,
    layout: Layout,
    choice: Choice,
    sizes: Architecture,
    target: Architecture,
) -> PreTrainedModel:
    changed = copy.deepcopy(config)
    if "top_k" in sizes:
        setattr(changed, family.fields["top_k"], target.top_k)
    masked = _model(changed)
    values = {}
    for name, value in stored(model).items():
        layer, local = family.split(name)
        value = value.detach().clone()
        if layer is not None and layer not in choice.layers:
            values[name] = torch.zeros_like(value)
            continue
        for dim, unit in enumerate(layout[name] or ()):
            index = dims.index(unit, sizes, choice.axes.get)
            if index is not None:
                gone = torch.ones(value.shape[dim], dtype=torch.bool).index_fill_(0, index, False)
                value.index_fill_(dim, gone.nonzero().flatten(), UNREACHABLE if local in family.buffers else 0.0)
        values[name] = _centred(family, local, value, layout[name] or (), choice)
    masked.load_state_dict(values, strict=False)
    if target.get("experts") != sizes.get("experts"):
        for branch in family.branches:
            if branch.experts:
                _hide(masked, family, branch.reads, choice)
    return masked


def _centred(family: Family, local: str, value: Tensor, units: tuple[str, ...], choice: Choice) -> Tensor:
    """What writes to the stream with a mean of zero over the kept channels: a LayerNorm takes off the mean, which the
    dropped channels have a part in."""
    module = local.rpartition(".")[0]
    outer = {name.rpartition(".")[0] for name in family.outer_weights} - {family.head, family.final_norm}
    if family.centred and (module in outer or any(module == branch.write for branch in family.branches)):
        for dim, unit in enumerate(units):
            if unit == "hidden":
                kept = value.index_select(dim, choice.axes["hidden"])
                value = value.index_copy(dim, choice.axes["hidden"], kept - kept.mean(dim, keepdim=True))
    return value


def _hide(model: PreTrainedModel, family: Family, reads: tuple[str, ...], choice: Choice) -> None:
    """Routers never choose an expert that leaves."""
    router = next(read for read in reads if family.outputs(read) == "experts")
    for name, module in model.named_modules():
        if family.split(name)[1] == router:
            count = module.weight.shape[0]
            gone = [expert for expert in range(count) if expert not in choice.axes["experts"].tolist()]
            module.forward = _blind(module.forward, torch.tensor(gone))


def _blind(forward: Any, gone: Tensor) -> Any:
    class Unreachable(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            return found.index_fill(-1, gone, UNREACHABLE) if function is F.linear else found

    def blind(*args: Any, **kwargs: Any) -> Any:
        with Unreachable():
            return forward(*args, **kwargs)

    return blind


def _cut(
    family: Family,
    config: PreTrainedConfig,
    model: PreTrainedModel,
    layout: Layout,
    choice: Choice,
    sizes: Architecture,
    target: Architecture,
) -> PreTrainedModel:
    values = to_config(
        config.to_dict(),
        target,
        fields=family.fields,
        kept_layers=choice.layers,
        per_layer_fields=family.per_layer_fields,
        layer_count_fields=family.layer_count_fields,
        others=family.fixed,
        other_fields=family.other_fields,
    )
    norms = {name for name, module in model.named_modules() if is_norm(module)}
    shrunk = math.sqrt(target.hidden / sizes.hidden) if family.scaled_embedding else 1.0
    student = {}
    for name, value in stored(model).items():
        layer, local = family.split(name)
        if layer is not None and layer not in choice.layers:
            continue
        value, units = _centred(family, local, value.detach(), layout[name] or (), choice), layout[name] or ()
        before = value.shape
        for dim, unit in enumerate(units):
            index = dims.index(unit, sizes, choice.axes.get)
            value = value if index is None else value.index_select(dim, index)
        module = local.removesuffix(".weight")
        posts, writes = ({getattr(branch, kind) for branch in family.branches} for kind in ("post_norm", "write"))
        if name.removesuffix(".weight") in norms and value.shape != before:
            scale = math.sqrt(before[0] / value.shape[0]) * (shrunk if module in posts else 1.0)
            value = (value + family.norm_offset) * scale - family.norm_offset
        elif module in writes and not any(b.post_norm for b in family.branches if b.write == module):
            value = value * shrunk
        student[name if layer is None else f"{family.layer_prefix}{choice.layers.index(layer)}.{local}"] = value
    try:
        cut = _model(type(config).from_dict(values))
        missing, unexpected = cut.load_state_dict(student, strict=False)
    except Exception as error:  # config classes and models raise what they like
        raise UnsupportedModel(f"cut to {target}, it is not built ({' '.join(str(error).split())[:200]})") from error
    lacking = [name for name in missing if name in stored(cut) and name not in cut.all_tied_weights_keys]
    if unexpected or lacking:
        raise UnsupportedModel(f"cut to {target}, it has other tensors, such as {[*unexpected, *lacking][0]}")
    return cut


def _model(config: PreTrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def _logits(model: nn.Module, tokens_BS: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens_BS, use_cache=False).logits
    return logits
