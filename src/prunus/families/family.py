"""What a family file states: which weight carries which axis, and how the residual stream is read and written.

A decoder layer is a sequence of branches. Each reads the residual stream x through a norm and writes back to it:

    x ← x + post_norm( write( inner( reads( norm(x) ) ) ) )

Names inside a layer are relative to `layer_prefix`; the tensors of a layer that has no bias simply are not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prunus.architecture import Architecture

CONSTRAINTS = {
    "heads_divide_hidden": (
        lambda a: a.hidden % a.heads == 0,
        "hidden must be a multiple of heads (transformers refuses the config otherwise)",
    ),
    "hidden_is_heads": (
        lambda a: a.hidden == a.heads * a.head_dim,
        "hidden must be heads × head_dim (its code has no other head_dim), so both are cut together",
    ),
    "multi_head": (
        lambda a: a.heads == a.kv_heads,
        "kv_heads must equal heads (every head has its own keys and values), so both are cut together",
    ),
    "even_head_dim": (lambda a: a.head_dim % 2 == 0, "head_dim must be even (rotary embedding)"),
}
"""Legality rules that a family can name, beside the ones that hold for all."""

ALWAYS = (
    (lambda a: a.heads % a.kv_heads == 0, "heads must be a multiple of kv_heads (every group serves the same number)"),
    (lambda a: min(a.layers, a.hidden, a.ffn, a.heads, a.kv_heads) >= 1, "every size must be at least 1"),
)


@dataclass(frozen=True)
class Branch:
    """One read-compute-write of the residual stream.

    Attributes:
        name: "attention" or "ffn".
        module: what computes the branch from the norm's output.
        norm: the norm through which the stream is read; None where it is read as it is (OLMo 2).
        reads: projections applied to the norm's output.
        write: projection whose output is added to the stream.
        inner: unit of the write's input, "heads" or "ffn".
        post_norm: norm between the write and the stream, if any.
        gate: the projection whose output is the pre-activation, if any.
    """

    name: str
    module: str
    norm: str | None
    reads: tuple[str, ...]
    write: str
    inner: str
    post_norm: str | None = None
    gate: str | None = None


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
        centred: norms take off the mean first (LayerNorm). What a cut of hidden does to the mean is not made good.
        parallel: all branches of a layer read the stream as it enters the layer.
        residual_scale: config key of a factor on what branches add.
        scaled_embedding: the embedding is multiplied by √hidden, so that a cut of hidden shrinks the stream.
        constraints: names in `CONSTRAINTS`.
        stored_as: names of tensors outside the layers in a checkpoint, where transformers renames them when it loads.
        requires: config key → the only value for which the above holds.
        fields: config key of each size.
        per_layer_fields, layer_count_fields: see `architecture.to_config`.
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
    centred: bool = False
    parallel: bool = False
    residual_scale: str | None = None
    scaled_embedding: bool = False
    constraints: tuple[str, ...] = ("even_head_dim",)
    stored_as: Mapping[str, str] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, str] = field(
        default_factory=lambda: {
            "layers": "num_hidden_layers",
            "hidden": "hidden_size",
            "ffn": "intermediate_size",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
            "vocab": "vocab_size",
        }
    )
    per_layer_fields: tuple[str, ...] = ()
    layer_count_fields: tuple[str, ...] = ()

    def split(self, tensor: str) -> tuple[int | None, str]:
        """`model.layers.3.mlp.up_proj.weight` → (3, `mlp.up_proj.weight`); outside the layers → (None, name)."""
        if not tensor.startswith(self.layer_prefix):
            return None, tensor
        index, _, rest = tensor[len(self.layer_prefix) :].partition(".")
        return (int(index), rest) if index.isdigit() else (None, tensor)

    def units(self, tensor: str) -> tuple[str, ...] | None:
        """Unit of each dimension of a tensor, or None where no rule covers it."""
        layer, name = self.split(tensor)
        rules = self.outer_weights if layer is None else self.layer_weights
        if name in rules:
            return rules[name]
        weight = rules.get(name.removesuffix(".bias") + ".weight")
        return weight[:1] if weight and name.endswith(".bias") else None

    def illegal(self, architecture: Architecture) -> list[str]:
        """Why this architecture may not be built; empty if it may."""
        rules = (*ALWAYS, *(CONSTRAINTS[name] for name in self.constraints))
        # A broken basic rule (a size of zero) would make later ones divide by zero.
        if min(architecture.axes().values()) < 1:
            return [ALWAYS[1][1]]
        return [why for holds, why in rules if not holds(architecture)]
