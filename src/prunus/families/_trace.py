"""Which modules of a decoder layer read the residual stream and which write to it, found by a run.

Shapes: B blocks, S tokens, H channels of the residual stream.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import UnsupportedModel
from prunus.families.family import Branch

ACTIVATIONS = ("activation_fn", "act_fn", "activation")
SAME = 1e-4
"""Sums of the same numbers differ by rounding."""


@dataclass(frozen=True)
class Call:
    """What a module was given and what it gave back: its first tensor of each."""

    name: str
    module: nn.Module
    given: Tensor
    gave: Tensor


@dataclass(frozen=True)
class Layer:
    """A layer that ran, and the calls inside it in the order in which they ended."""

    call: Call
    inside: tuple[Call, ...]


@contextlib.contextmanager
def recorded(layers: nn.ModuleList) -> Iterator[list[Layer]]:
    """Inside, every layer that runs is kept."""
    found: list[Layer] = []
    with contextlib.ExitStack() as stack:
        for layer in layers:
            inside: list[Call] = []

            def ended(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any, kept: list[Call]) -> None:
                given, gave = _given(module, args, kwargs), _first(output)
                if given is not None and gave is not None:
                    kept.append(Call(name, module, given.detach().clone(), gave.detach().clone()))

            for name, module in layer.named_modules():

                def hook(
                    m: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name, kept: list[Call] = inside
                ) -> None:
                    ended(name, m, args, kwargs, output, kept)
                    if not name:
                        found.append(Layer(kept[-1], tuple(kept[:-1])))

                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield found


def _given(module: nn.Module, args: Any, kwargs: Any) -> Tensor | None:
    """The first tensor that a module was called with."""
    return _first(args) if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)


def _first(values: Any) -> Tensor | None:
    if isinstance(values, Tensor):
        return values
    return next((value for value in values if isinstance(value, Tensor)), None) if isinstance(values, tuple) else None


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same rows."""
    if a.shape[-1:] != b.shape[-1:] or a.numel() != b.numel():
        return False
    return torch.equal(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))


def is_norm(module: nn.Module) -> bool:
    """Whether a module has nothing but vectors, and is called a norm."""
    return "norm" in type(module).__name__.lower() and all(value.ndim < 2 for value in module.parameters())


def has_matrix(module: nn.Module) -> bool:
    """Whether it is a projection."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2


@dataclass(frozen=True)
class Mixer:
    """A module between a read and a write of the stream."""

    branch: Branch
    read: Tensor
    written: Tensor


def branches(layer: Layer, config: Any) -> list[Branch]:
    """The branches of a layer, in their order.

    Raises:
        UnsupportedModel: it does something else than x ← x + post_norm(write(inner(reads(norm(x))))).
    """
    mixers = _mixers(layer)
    if not mixers:
        raise UnsupportedModel("no module of its layers reads the residual stream")
    out, stream = [], layer.call.given
    groups: list[list[Mixer]] = []
    for mixer in mixers:
        if groups and same(groups[-1][0].read, mixer.read):
            groups[-1].append(mixer)
        else:
            groups.append([mixer])
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        if not _close(group[0].read, stream):
            raise UnsupportedModel(f"{group[0].branch.module} reads something else than the residual stream")
        after = following[0].read if following else layer.call.gave
        for number, (mixer, factor) in enumerate(zip(group, _factors(group, stream, after), strict=True)):
            scale = None if abs(factor - 1) < SAME else _key_of(config, factor)
            out.append(_replace(mixer.branch, beside=number > 0, write_scale=scale))
        stream = after
    return out


def _replace(branch: Branch, **changes: Any) -> Branch:
    return Branch(**{**vars(branch), **changes})


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= SAME * b.norm())


def _factors(group: list[Mixer], before: Tensor, after: Tensor) -> list[float]:
    """Of what each adds to the stream."""
    if after.shape != before.shape:
        raise UnsupportedModel("its residual stream changes its shape")
    written = torch.stack([mixer.written.reshape(-1) for mixer in group], dim=1).double()
    added = (after - before).reshape(-1, 1).double()
    found = torch.linalg.lstsq(written, added).solution
    if (written @ found - added).norm() > 10 * SAME * added.norm():
        raise UnsupportedModel(f"what {group[0].branch.module} writes is not added to the residual stream")
    return [float(factor) for factor in found.flatten()]


def _key_of(config: Any, factor: float) -> str:
    """The config key that holds a factor."""
    for key, value in config.to_dict().items():
        if isinstance(value, float) and abs(value - factor) < SAME * max(1, abs(factor)):
            return str(key)
    raise UnsupportedModel(f"what its layers write is multiplied by {factor:.4g}, which its config does not name")


def _mixers(layer: Layer) -> list[Mixer]:
    calls = {call.name: call for call in layer.inside}
    norms = [call for name, call in calls.items() if "." not in name and is_norm(call.module)]
    found = []
    for name, call in calls.items():
        if "." in name or is_norm(call.module) or not any(True for _ in call.module.parameters()):
            continue
        bare = has_matrix(call.module)
        if bare and call.gave.shape[-1] != layer.call.given.shape[-1]:
            continue  # the first of two projections
        if not bare and call.gave.shape[-1] != call.given.shape[-1]:
            raise UnsupportedModel(f"{name} of its layers changes the width of what it reads")
        if bare:
            call, branch = _without_module(layer, call)
        else:
            branch = _branch(call, [each for each in layer.inside if each.name.startswith(f"{name}.")])
        norm = next((each for each in norms if same(each.gave, call.given)), None)
        post = next((each for each in norms if same(each.given, call.gave) and each is not norm), None)
        found.append(
            Mixer(
                _replace(branch, norm=norm.name if norm else None, post_norm=post.name if post else None),
                (norm.given if norm else call.given).reshape(layer.call.given.shape),
                (post.gave if post else call.gave).reshape(layer.call.given.shape),
            )
        )
    return found


def _without_module(layer: Layer, write: Call) -> tuple[Call, Branch]:
    """An FFN whose two projections stand in the layer, as one call."""
    reads = [c for c in layer.inside if "." not in c.name and has_matrix(c.module) and c.name != write.name]
    called = [name for name in ACTIVATIONS if callable(getattr(layer.call.module, name, None))]
    if len(reads) != 1 or not called:
        raise UnsupportedModel(f"{write.name} of its layers has no module around it, and is no plain FFN's")
    (read,) = reads
    branch = Branch("ffn", "", None, (read.name,), write.name, "ffn", gate=read.name, activation=called[0])
    return Call("", layer.call.module, read.given, write.gave), branch


def _branch(mixer: Call, inside: list[Call]) -> Branch:
    """Its projections; what it is called, and its inner axis, follow from what it takes."""
    experts = _stacked(mixer)
    matrices = [call for call in inside if _has_weight(call.module) and not call.name.startswith(f"{experts}.")]
    reads = [call for call in matrices if same(call.given, mixer.given)]
    writes = [call for call in matrices if call not in reads and call.gave.shape[-1] == mixer.given.shape[-1]]
    write = writes[-1] if writes else None
    if not reads or not (write or experts):
        raise UnsupportedModel(f"{mixer.name} has no projection that reads, or none that writes")
    attends = not experts and _attends(mixer)
    activated = [call.given for call in inside if not any(True for _ in call.module.parameters())]
    gate = next((read.name for read in reads if any(same(read.gave, given) for given in activated)), None)
    kind, inner = ("experts", "shared_ffn" if write else "") if experts else ("ffn", "ffn")
    return Branch(
        name="attention" if attends else kind,
        module=mixer.name,
        norm=None,
        reads=tuple(dict.fromkeys(call.name for call in reads)),
        write=write.name if write else None,
        inner="heads" if attends else inner,
        gate=None if attends else gate,
        experts=experts,
        write_gate=_write_gate(mixer, next((c for c in inside if c.name == experts), None), reads, write),
    )


def _attends(mixer: Call) -> bool:
    names = (mixer.name, type(mixer.module).__name__.lower())
    takes = inspect.signature(mixer.module.forward).parameters
    return "position_embeddings" in takes or any("attn" in name or "attention" in name for name in names)


def _write_gate(mixer: Call, experts: Call | None, reads: list[Call], write: Call | None) -> str | None:
    """The projection whose sigmoid multiplies what the last one writes, beside experts.

    Raises:
        UnsupportedModel: what comes out is neither that nor the plain output.
    """
    if write is None:
        return None
    rest = mixer.gave if experts is None else mixer.gave - experts.gave.reshape(mixer.gave.shape)
    written = write.gave.reshape(mixer.gave.shape)
    if _close(rest, written):
        return None
    for read in reads if experts else []:
        if read.gave.shape[-1] == 1 and _close(rest, written * read.gave.reshape(*rest.shape[:-1], 1).sigmoid()):
            return read.name
    raise UnsupportedModel(f"what {mixer.name} gives back is not the output of {write.name}")


def _has_weight(module: nn.Module) -> bool:
    """A projection, or a router that keeps its weight itself."""
    return has_matrix(module) and not isinstance(module, nn.Embedding)


def _stacked(mixer: Call) -> str | None:
    """Name of a module that holds stacked weights."""
    for name, module in mixer.module.named_modules():
        if name and any(value is not None and value.ndim == 3 for value in module._parameters.values()):
            return f"{mixer.name}.{name}"
    return None


def by_mark(layers: list[list[Branch]]) -> tuple[Branch, ...]:
    """All branches of the layers of a model, each once, in an order in which every layer runs its own.

    Raises:
        UnsupportedModel: two layers have different branches of one name.
    """
    found: dict[str, Branch] = {}
    for branches in layers:
        for branch in branches:
            if found.setdefault(branch.mark, branch) != branch:
                raise UnsupportedModel(f"{branch.module} works in different ways in different layers")
    return tuple(sorted(found.values(), key=lambda branch: branch.name != "attention"))
