"""The sizes of a model as plain data, and the way to and from a Hugging Face config."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prunus import dims
from prunus.errors import BadRecipe, UnsupportedModel

AXES = {
    "layers": "decoder layers",
    "hidden": "channels of the residual stream",
    "ffn": "neurons per feed-forward block",
    "heads": "query heads per layer",
    "kv_heads": "key-value groups per layer; each leaves with its query heads",
    "experts": "experts per layer that the router chooses from",
    "expert_ffn": "neurons per expert",
    "shared_ffn": "neurons of the expert that sees every token",
    "top_k": "experts that a token is sent to",
    "linear_heads": "key heads of linear attention; each leaves with its value heads",
    "mamba_heads": "heads of a Mamba layer; of the first Mamba, its inner channels",
    "mamba_head_dim": "channels of a Mamba head",
    "state": "values that a Mamba layer keeps of each channel",
    "q_rank": "channels of the latent that queries are made from",
    "kv_rank": "channels of the latent that keys and values are made from, which is what the cache holds",
}
"""What can be cut, and what it is. A model has those that its family's `fields` name; `head_dim` and `vocab` are sizes,
but not axes of a cut."""


class Architecture(Mapping[str, int]):
    """Sizes of a decoder by name; also as attributes. Equal and hashed by its sizes.

    The axes that the model has, head_dim, vocab, and what else its family names, see its `fields`. head_dim is always
    explicit: runtimes that derive it break on pruned models.

    Args:
        derived: sizes that follow from others: name → formula (see `dims`).
    """

    def __init__(self, derived: Mapping[str, str] | None = None, /, **sizes: int) -> None:
        self._derived = derived or {}
        self._sizes = sizes
        if self._derived:
            independent = {name: size for name, size in sizes.items() if name not in self._derived}
            self._sizes = independent | {name: dims.size(rule, independent) for name, rule in self._derived.items()}
        vars(self).update(self._sizes)  # a search looks up millions

    def __getitem__(self, name: str) -> int:
        return self._sizes[name]

    def __getattr__(self, name: str) -> int:
        raise AttributeError(f"an architecture without {name!r}")

    def __contains__(self, name: object) -> bool:
        return name in self._sizes

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __hash__(self) -> int:
        return hash(frozenset(self._sizes.items()))

    def replace(self, **sizes: int) -> Architecture:
        """With other sizes. A token is sent to no more experts than there are."""
        changed = self._sizes | sizes
        if "top_k" in changed:
            changed["top_k"] = min(changed["top_k"], changed["experts"])
        return Architecture(self._derived, **changed)

    def only(self, sizes: Iterable[str]) -> Architecture:
        """Without the other sizes."""
        kept = set(sizes)
        derived = {name: rule for name, rule in self._derived.items() if name in kept}
        kept |= {part for rule in derived.values() for part in dims.names(rule)}
        return Architecture(derived, **{name: size for name, size in self._sizes.items() if name in kept})

    def plain(self) -> dict[str, int]:
        """All sizes, not to be changed: to look up many of them takes a third of the time."""
        return self._sizes

    def axes(self) -> dict[str, int]:
        return {axis: self._sizes[axis] for axis in AXES if axis in self._sizes and axis not in self._derived}

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.axes().items())


def from_config(
    config: Mapping[str, Any],
    fields: Mapping[str, str],
    derived: Mapping[str, str] | None = None,
    defaults: Mapping[str, str] | None = None,
) -> Architecture:
    """Read the sizes from a config; `fields` names the config's key for each size.

    Configs written before head_dim was explicit mean hidden / heads.

    Args:
        derived: see `Architecture`.
        defaults: formulas of sizes that a config need not give.
    Raises:
        UnsupportedModel: a size that is listed layer by layer, and not the same in all.
    """
    sizes = {size: _of_all_layers(key, config[key]) for size, key in fields.items() if config.get(key) is not None}
    sizes |= {size: dims.size(rule, sizes) for size, rule in (defaults or {}).items() if size not in sizes}
    if "head_dim" not in sizes and "heads" in sizes:
        sizes["head_dim"] = sizes["hidden"] // sizes["heads"]
    return Architecture(derived, **sizes)


def _of_all_layers(key: str, value: Any) -> int:
    """A size that may be listed for each layer."""
    if not isinstance(value, list):
        return int(value)
    if len(set(value)) != 1:
        raise UnsupportedModel(f"{key} in config.json differs from layer to layer, which is not supported")
    return int(value[0])


def to_config(
    config: Mapping[str, Any],
    target: Architecture,
    *,
    fields: Mapping[str, str],
    kept_layers: Sequence[int],
    per_layer_fields: Iterable[str] = (),
    layer_count_fields: Iterable[str] = (),
    others: Mapping[str, Any] | None = None,
    nested: str | None = None,
    other_fields: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The config of the cut model.

    Args:
        config: the teacher's config as a dict.
        target: sizes after the cut.
        fields: config key of each size.
        kept_layers: ascending indices of the teacher's layers that stay.
        per_layer_fields: keys that may hold one entry per layer; entries of removed layers are dropped.
        layer_count_fields: keys that hold "the first n layers"; n is recounted among the kept layers.
        others: more keys and their values.
        nested: key under which all these stand; None where they stand in `config` itself.
        other_fields: key, or "section.key", of the whole config → formula of a size, where such a key stands there.
    """
    if nested or other_fields:
        inner = to_config(
            config[nested] if nested else config,
            target,
            fields=fields,
            kept_layers=kept_layers,
            per_layer_fields=per_layer_fields,
            layer_count_fields=layer_count_fields,
            others=others,
        )
        whole = {**config, nested: inner} if nested else inner
        for path, formula in (other_fields or {}).items():
            section, _, key = path.rpartition(".")
            values = whole[section] if section else whole
            if key in values:
                changed = {key: _as_listed(values[key], dims.size(formula, target), target.layers)}
                whole |= {section: {**values, **changed}} if section else changed
        return whole
    cut = {**config, **(others or {})}
    sizes = {key: target[size] for size, key in fields.items() if size in target}
    cut |= {key: _as_listed(config.get(key), size, target.layers) for key, size in sizes.items()}
    for key in per_layer_fields:
        if isinstance(cut.get(key), Sequence):
            cut[key] = [config[key][i] for i in kept_layers]
    for key in layer_count_fields:
        if cut.get(key) is not None:
            cut[key] = sum(i < config[key] for i in kept_layers)
    return cut


def _as_listed(before: Any, size: int, layers: int) -> int | list[int]:
    """For each layer where it was listed so."""
    return [size] * layers if isinstance(before, list) else size


def parse(text: str, teacher: Architecture) -> Architecture:
    """`hidden=512,ffn=1024` → the teacher with those sizes replaced.

    Raises:
        BadRecipe: unknown axis (with a suggestion), not a whole number, larger than the teacher, or more experts for a
            token than there are; all at once.
    """
    mistakes, sizes, axes = [], {}, teacher.axes()
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, _, value = (piece.strip() for piece in part.partition("="))
        if axis not in axes:
            close = difflib.get_close_matches(axis, axes, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"axes of this model: {', '.join(axes)}"
            mistakes.append(f"arch: unknown axis {axis!r}; {hint}")
        elif not value.isdecimal() or int(value) < 1:
            mistakes.append(f"arch: {axis} must be a whole number of at least 1, not {value!r}")
        elif int(value) > teacher[axis]:
            mistakes.append(f"arch: {axis}={value} is larger than the teacher's {teacher[axis]}; pruning only removes")
        else:
            sizes[axis] = int(value)
    experts = sizes.get("experts", teacher.get("experts", 0))
    if sizes.get("top_k", 0) > experts > 0:
        mistakes.append(f"arch: top_k={sizes['top_k']} of {experts} experts; a token is sent to no more than there are")
    if mistakes:
        raise BadRecipe("\n".join(mistakes))
    return teacher.replace(**sizes)
