"""What a family file states: which weight carries which axis, and how the residual stream is read and written.

A decoder layer is a sequence of branches. Each reads the residual stream x through a norm and writes back to it:

    x ← x + post_norm( write( inner( reads( norm(x) ) ) ) )

A branch of experts adds what its router's choice of experts makes of the norm's output, and what a shared expert does.

Names inside a layer are relative to `layer_prefix`, and are those of the transformers model. The tensors of a layer
that has no bias simply are not there; so it is with whole branches, where layers are of several kinds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prunus import dims
from prunus.architecture import AXES, Architecture, from_config, to_config

CONSTRAINTS = {
    "heads_divide_hidden": (
        lambda a: "heads" not in a or a.hidden % a.heads == 0,
        "hidden must be a multiple of heads (transformers refuses the config otherwise)",
    ),
    "hidden_is_heads": (
        lambda a: "heads" not in a or a.hidden == a.heads * a.head_dim,
        "hidden must be heads × head_dim (its code has no other head_dim), so both are cut together",
    ),
    "multi_head": (
        lambda a: "heads" not in a or a.heads == a.kv_heads,
        "kv_heads must equal heads (every head has its own keys and values), so both are cut together",
    ),
    "mamba_is_expand": (
        lambda a: "mamba_heads" not in a or a.mamba_heads * a.mamba_head_dim == a.expand * a.hidden,
        "mamba_heads × mamba_head_dim must be expand × hidden, so they are cut together",
    ),
    "even_head_dim": (lambda a: a.get("head_dim", 0) % 2 == 0, "head_dim must be even (rotary embedding)"),
    "aligned_experts": (
        lambda a: "experts" not in a or (a.hidden % 8 == 0 and a.expert_ffn % 8 == 0),
        "hidden and expert_ffn must be multiples of 8 (grouped matrix products need rows of 16 bytes)",
    ),
    "ffn_of_256": (lambda a: a.ffn % 256 == 0, "ffn must be a multiple of 256 (its config has only a rounded factor)"),
    "even_latent": (lambda a: a.kv_rank % 2 == 0, "kv_rank must be even (its code views what follows as complex)"),
    "grouped_experts": (
        lambda a: "experts" not in a or (a.experts % a.expert_groups == 0 and a.experts // a.expert_groups >= 2),
        "experts must be a multiple of the router's groups, with at least two in each",
    ),
    "several_experts": (
        lambda a: "experts" not in a or a.experts > 1,
        "experts must be at least 2 (of one its code makes a dense layer)",
    ),
    "reachable_experts": (
        lambda a: "experts" not in a or a.top_k <= a.chosen_groups * (a.experts // a.expert_groups),
        "top_k must not be more than the experts of the groups that a token is sent to",
    ),
}
"""Legality rules that a family can name, beside the ones that hold for all."""

ALWAYS = (
    (
        lambda a: "heads" not in a or a.heads % a.kv_heads == 0,
        "heads must be a multiple of kv_heads (every group serves the same number)",
    ),
    (lambda a: "top_k" not in a or a.top_k <= a.experts, "top_k must not be more than the experts"),
    (
        lambda a: "mamba_heads" not in a or a.mamba_heads % a.mamba_groups == 0,
        "mamba_heads must be a multiple of the groups that share a state's inputs",
    ),
    (
        lambda a: a.layers >= a.get(FIRST_LAYERS, 0),
        "the first layers must stay, because what the vision tower sees is added behind each",
    ),
)

FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
}
"""Config key of each size, as most families have it."""

FIRST_LAYERS = "first_layers"
"""The size that counts them."""

LAYER_PERIOD = "layer_period"
"""The size that counts the layers after which their kinds repeat."""

FOLDED = "folded"
"""A size of 1 where layers are folded in files, see `Folding`."""

MADE_UP = (FIRST_LAYERS, LAYER_PERIOD, FOLDED)
"""Sizes that say how a model may be cut, and are of no interest besides."""

AS_IT_IS = "="
"""A dimension that no size of the language model decides."""


@dataclass(frozen=True)
class Branch:
    """One read-compute-write of the residual stream.

    Attributes:
        name: "attention" or "ffn".
        module: what computes the branch from the norm's output; "" where an FFN's two projections stand in the layer.
        activation: in that case the layer's attribute that is called between them.
        norm: the norm through which the stream is read; None where it is read as it is (OLMo 2).
        reads: projections applied to the norm's output.
        write: projection whose output is added to the stream; None where experts alone write.
        inner: axis of the write's input: "heads", "ffn", "shared_ffn" or "mamba_heads".
        post_norm: norm between the write and the stream, if any.
        gate: the projection whose output is the pre-activation, if any.
        experts: the module that holds the experts' weights, [experts, ...] each; its router is one of `reads`.
        write_gate: a projection whose sigmoid multiplies the write (Qwen's shared expert).
        beside: it reads the stream as the branch before it did, so the two run side by side.
        read_scale, write_scale: config keys of factors on what its module reads, and on what it adds.
        module_scale: its module's attribute that holds a factor which the module itself puts on the write's output.
    """

    name: str
    module: str
    norm: str | None
    reads: tuple[str, ...]
    write: str | None
    inner: str
    post_norm: str | None = None
    gate: str | None = None
    experts: str | None = None
    write_gate: str | None = None
    beside: bool = False
    activation: str = ""
    read_scale: str | None = None
    write_scale: str | None = None
    module_scale: str | None = None

    @property
    def mark(self) -> str:
        """A module that a layer has if it has this branch."""
        return self.experts or self.write or self.module

    def owns(self, module: str) -> bool:
        """Whether a module of a layer is one of its projections."""
        return module in (*self.reads, self.write) or module == self.experts


@dataclass(frozen=True)
class Folding:
    """Layers that lie in files with all their branches, and are one branch each in memory, to be cut one by one. An FFN
    stays as long as the attention before it, so that no layer ends with that.

    Attributes:
        folded, unfolded: make a config of files from one in memory, and back.
        code: file that goes along with a checkpoint, for those that do not know the type.
        code_name: its name there.
    """

    folded: Callable[[Any], Any]
    unfolded: Callable[[Any], Any]
    code: Path
    code_name: str


@dataclass(frozen=True)
class Family:
    """One Hugging Face `model_type`.

    Attributes:
        model_type: as in config.json.
        layer_weights: tensor of a layer → formula of each dimension (see `dims`). A trailing `.bias` is sliced like its
            output.
        outer_weights: tensors outside the layers, by full name.
        branches: in the order in which they run.
        final_norm: norm before the output head.
        norms: norms of a layer beside those of its branches, over more than a head (OLMo 2's of all queries).
        norm_offset: 1.0 where the norm multiplies by (1 + weight), as Gemma does.
        transposed: weights of projections are [inputs, outputs] (GPT-2's Conv1D).
        centred: norms take off the mean first (LayerNorm). What a cut of hidden does to the mean is not made good.
        residual_scale: config key of a factor on what branches add.
        scaled_embedding: the embedding is multiplied by √hidden, so that a cut of hidden shrinks the stream.
        constraints: names in `CONSTRAINTS`.
        stored_as: tensor → its name in a checkpoint, where that is another than in transformers; of experts several,
            with * for the number of the expert: what is stacked expert by expert, and joined along the outputs.
        stored_prefixes: what names begin with in transformers, and in a checkpoint, where that differs. Of several for
            the same names the first is written.
        buffers: names of tensors that are no parameters, but stored.
        latents: axis → the norm that spans it.
        gated_norms: norm of a Mamba layer's x·silu(z) → the size that counts the groups which it norms apart.
        further_layers: config key of how many layers predict further tokens, in files as layers beyond the last or
            under a name of their own; transformers does not load them, and they are left out.
        ignores_positions: its code makes masks without them, so it must be told where documents end (see `packing`).
        requires: config key → the only value for which the above holds; "a.b" is b in the mapping a.
        fields: config key of each size.
        derived: sizes that follow from others: name → formula.
        defaults: formulas of sizes that a config need not give.
        elsewhere: further constraints of other programs' code for this type: llama.cpp's of 2026-11, vLLM 0.33's. A
            search keeps them unless told otherwise.
        unread: patterns of names in a checkpoint that transformers does not read, such as buffers of old, and layers
            that predict further tokens.
        cached: formula of the values that a layer keeps of a token while it generates.
        per_layer_fields, layer_count_fields: see `architecture.to_config`.
        branch_layers: config key → branch: the key lists the layers that have it.
        fixed: config key → value in every cut model, unless a size stands there.
        uncut: axis → why it cannot be cut.
        nested: config key under which the language model's own config stands, beside those of what sees or hears.
        vision: what names of tensors begin with that belong to a vision tower and the connector. They stay as they are
            but for the dimensions that `outer_weights` names.
        connectors: tensors that write to the stream beside an embedding that is scaled by √hidden.
        other_fields: key, or "section.key", of the config → formula of a size that may stand there too. Transformers
            need not read it: others do.
        first_layers: how many first layers must stay; or "section.key" of a list, because something is added behind the
            layers that it counts.
        layer_periods: keys of the numbers of layers after which their kinds repeat, where these follow from the layer's
            number. Layers leave in runs of their least common multiple.
        folding: how layers lie in files, where that is otherwise than in memory.
    """

    model_type: str
    layer_weights: Mapping[str, tuple[str, ...]]
    outer_weights: Mapping[str, tuple[str, ...]]
    branches: tuple[Branch, ...]
    final_norm: str = "model.norm"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    layer_prefix: str = "model.layers."
    norms: tuple[str, ...] = ()
    norm_offset: float = 0.0
    transposed: bool = False
    centred: bool = False
    residual_scale: str | None = None
    scaled_embedding: bool = False
    constraints: tuple[str, ...] = ("even_head_dim",)
    stored_as: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stored_prefixes: tuple[tuple[str, str], ...] = ()
    buffers: tuple[str, ...] = ()
    latents: Mapping[str, str] = field(default_factory=dict)
    gated_norms: Mapping[str, str] = field(default_factory=dict)
    further_layers: str | None = None
    ignores_positions: bool = False
    requires: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=lambda: dict(FIELDS))
    derived: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unread: tuple[str, ...] = ("*rotary_emb.inv_freq", "mtp.*")
    cached: str = "2*kv_heads*head_dim"
    per_layer_fields: tuple[str, ...] = ()
    layer_count_fields: tuple[str, ...] = ()
    branch_layers: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    uncut: Mapping[str, str] = field(default_factory=dict)
    nested: str | None = None
    vision: tuple[str, ...] = ()
    connectors: tuple[str, ...] = ()
    other_fields: Mapping[str, str] = field(default_factory=dict)
    first_layers: str | int = 0
    layer_periods: tuple[str, ...] = ()
    folding: Folding | None = None

    def split(self, tensor: str) -> tuple[int | None, str]:
        """`model.layers.3.mlp.up_proj.weight` → (3, `mlp.up_proj.weight`); outside the layers → (None, name)."""
        if not tensor.startswith(self.layer_prefix):
            return None, tensor
        index, _, rest = tensor[len(self.layer_prefix) :].partition(".")
        return (int(index), rest) if index.isdigit() else (None, tensor)

    def units(self, tensor: str, shape: Sequence[int]) -> tuple[str, ...] | None:
        """Unit of each dimension of a tensor, or None where no rule covers it."""
        layer, name = self.split(tensor)
        rules = self.outer_weights if layer is None else self.layer_weights
        if name in rules:
            rule: tuple[str, ...] | None = rules[name]
        else:
            weight = rules.get(name.removesuffix(".bias") + ".weight")
            rule = weight[:1] if weight and name.endswith(".bias") else None
        if rule is None and name.startswith(self.vision):
            rule = (AS_IT_IS,) * len(shape)
        if rule is None or len(rule) != len(shape):
            return rule
        return tuple(str(size) if unit == AS_IT_IS else unit for unit, size in zip(rule, shape, strict=True))

    def text(self, config: Any) -> Any:
        """The language model's part of a config."""
        return getattr(config, self.nested, None) if self.nested else config

    def fits(self, config: object) -> bool:
        """Whether a config has what is required."""
        text = self.text(config)
        return all(_setting(text, key, value) == value for key, value in self.requires.items())

    def architecture(self, config: object) -> Architecture:
        """The sizes in a transformers config."""
        values = {key: getattr(self.text(config), key, None) for key in self.fields.values()}
        own = self._own_sizes(config)
        return from_config(values | own, {**self.fields, **{size: size for size in own}}, self.derived, self.defaults)

    def _own_sizes(self, config: object) -> dict[str, int]:
        """Those that no key of the config holds."""
        own = {FOLDED: 1} if self.folding else {}
        if isinstance(self.first_layers, str):
            section, key = self.first_layers.split(".")
            own[FIRST_LAYERS] = len(getattr(getattr(config, section), key))
        elif self.first_layers:
            own[FIRST_LAYERS] = self.first_layers
        if self.layer_periods:
            own[LAYER_PERIOD] = math.lcm(*(getattr(self.text(config), key) for key in self.layer_periods))
        return own

    def sizes(self, formulas: Iterable[str]) -> set[str]:
        """The sizes of a model whose weights have these dimensions. Without experts in any layer there are none to cut,
        though the config has a number of them; so it is with a dense layer's neurons."""
        used = {name for formula in formulas for name in dims.names(formula)}
        used |= {"layers"} | ({"top_k"} if "experts" in used else set()) | ({"kv_heads"} if "heads" in used else set())
        return used | {*MADE_UP} | self.fields.keys() - AXES.keys()

    def cut_config(
        self,
        config: Mapping[str, Any],
        target: Architecture,
        kept_layers: Sequence[int],
        others: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The config of a cut model, from the whole one's as a dict. See `architecture.to_config`."""
        return to_config(
            config,
            target,
            fields=self.fields,
            kept_layers=kept_layers,
            # Any config may list the kinds of its layers, which its class then wants to be as many as these.
            per_layer_fields=tuple(dict.fromkeys((*self.per_layer_fields, "layer_types"))),
            layer_count_fields=self.layer_count_fields,
            others={**self.fixed, **(others or {})},
            nested=self.nested,
            other_fields=self.other_fields,
        )

    def outputs(self, projection: str) -> str:
        """Formula of a layer's projection's outputs."""
        return self.layer_weights[f"{projection}.weight"][-1 if self.transposed else 0]

    def illegal(self, architecture: Architecture) -> list[str]:
        """Why this architecture may not be built; empty if it may."""
        rules = (*ALWAYS, *(CONSTRAINTS[name] for name in self.constraints))
        if min(architecture.axes().values()) < 1:  # later rules would divide by zero
            return ["every size must be at least 1"]
        return [why for holds, why in rules if not holds(architecture)]

    def portable(self, teacher: Architecture, programs: Iterable[str] | None = None) -> Family:
        """The family as these programs know it too (all of `elsewhere` by default); as it is, if they would not load
        the teacher itself."""
        further = itertools.chain(*(self.elsewhere[name] for name in programs or self.elsewhere))
        everywhere = replace(self, constraints=(*self.constraints, *further))
        return self if everywhere.illegal(teacher) else everywhere


def _setting(config: Any, key: str, default: object) -> object:
    """A value of a config; where it is in a mapping, the default does not stand for it."""
    outer, _, inner = key.partition(".")
    return (getattr(config, outer, None) or {}).get(inner) if inner else getattr(config, outer, default)
