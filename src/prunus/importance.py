"""Statistics → Scores. One pure function per published score, one visible table of them.

Shapes: L layers, H hidden channels, F FFN neurons, A query heads, G key-value groups, C channels of any axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prunus.errors import BadRecipe
from prunus.measure import REDUCTIONS, Statistics
from prunus.scores import Scores

DEFAULTS = {
    "layers": "block_influence",
    "hidden": "energy",
    "ffn": "reconstruction",
    "heads": "output",
    "kv_heads": "sum",
    "aggregation": "l2:mean",
}
"""Score of each axis, and the reductions "over blocks : over tokens" of the activation scores.

Minitron's choices, but for "energy" and "reconstruction", which start better here (see LOG.md).
"""


def aggregate(sums_32LC: Tensor, num_blocks: int, aggregation: str) -> Tensor:
    """Reduce a signal over tokens, then over blocks.

    Source: Minitron, arXiv:2407.14679, sec. 2.2, which found (batch L2, sequence mean) best of the nine pairs.

    Args:
        sums_32LC: [3, 2, L, C], see `measure.Statistics.reductions`.
        aggregation: "batch:sequence", each of mean (of |x|), l2, var.
    Returns:
        float32 [L, C].
    """
    over_blocks, over_tokens = aggregation.split(":")
    first, second = sums_32LC[REDUCTIONS.index(over_tokens)]
    mean = first / num_blocks
    match over_blocks:
        case "mean":
            return mean
        case "l2":
            return second.sqrt()
        case _:
            return (second / num_blocks - mean.square()).clamp_min(0)


def activation(stats: Statistics, aggregation: str) -> Tensor:
    """[L, F]: size of each neuron at the input of the down projection (NVIDIA's tool)."""
    return aggregate(stats.reductions["activation"], stats.num_blocks, aggregation)


def preactivation(stats: Statistics, aggregation: str) -> Tensor:
    """[L, F]: size of x·W₁ᵀ, before the activation function. Source: Minitron, arXiv:2407.14679, sec. 2.2."""
    if "preactivation" not in stats.reductions:
        raise BadRecipe("score ffn=preactivation: this family has no projection of its own for it; take activation")
    return aggregate(stats.reductions["preactivation"], stats.num_blocks, aggregation)


def reconstruction(stats: Statistics, aggregation: str) -> Tensor:
    """[L, F]: error of the layer's output when a neuron leaves and the others make up for it by least squares.

        s_i = ‖W_i‖² / (G⁻¹)_ii,   G = E[hhᵀ],  W_i the neuron's column of the down projection

    Source: Optimal Brain Surgeon (Hassibi & Stork, 1993) applied to one linear map. Needs `measure(grams=True)`.
    """
    if "ffn" not in stats.inverse_gram:
        raise BadRecipe(
            "score ffn=reconstruction needs Gram matrices: measure with grams (recipe: measure.grams: true)"
        )
    return stats.sums["write_weight"] / stats.inverse_gram["ffn"]


def head_output(stats: Statistics, aggregation: str) -> Tensor:
    """[L, A]: ‖Attn(XW_q, XW_k, XW_v)‖₂ per head. Source: Minitron, arXiv:2407.14679, sec. 2.2."""
    return aggregate(stats.reductions["head_output"], stats.num_blocks, aggregation)


def energy(stats: Statistics, aggregation: str) -> Tensor:
    """[H]: Σ over the norms of E[(x/rms(x))²], the channel's share of what every norm reads."""
    del aggregation  # an energy is a mean of squares by definition
    return _sites(stats).sum(0) / stats.num_tokens


def norm_output(stats: Statistics, aggregation: str) -> Tensor:
    """[H]: LN(X)_i summed over the norms. Source: Minitron, arXiv:2407.14679, sec. 2.2."""
    return aggregate(stats.reductions["norm_output"], stats.num_blocks, aggregation).sum(0)


def block_influence(stats: Statistics, aggregation: str) -> Tensor:
    """[L]: 1 − E[cos(layer input, layer output)]. Source: ShortGPT, arXiv:2403.03853; Minitron sec. 2.2."""
    del aggregation  # a mean over all tokens by definition
    return 1 - stats.sums["cosine"] / stats.num_tokens


def leave_one_out(stats: Statistics, aggregation: str) -> Tensor:
    """[L]: rise of the loss when the layer is removed, nats per token. Source: Minitron, sec. 2.2 (as perplexity)."""
    del aggregation
    if "leave_one_out" not in stats.sums:
        raise BadRecipe(
            "score layers=leave_one_out needs the losses without each layer (recipe: measure.leave_one_out: true)"
        )
    return stats.sums["leave_one_out"]


def _magnitude(key: str) -> Score:
    def magnitude(stats: Statistics, aggregation: str) -> Tensor:
        """L2 norm of the weights that would be removed: a baseline that needs no text."""
        del aggregation
        return stats.sums[key].sqrt()

    return magnitude


def _random(shape_like: str) -> Score:
    def random(stats: Statistics, aggregation: str) -> Tensor:
        """Uniform noise from a fixed seed: the baseline that every score must beat."""
        del aggregation
        generator = torch.Generator().manual_seed(0)
        return torch.rand(stats.sums[shape_like].shape, generator=generator)

    return random


Score = Callable[[Statistics, str], Tensor]

TABLE: Mapping[str, Mapping[str, Score]] = {
    "layers": {
        "block_influence": block_influence,
        "leave_one_out": leave_one_out,
        "random": _random("cosine"),
    },
    "hidden": {
        "energy": energy,
        "norm_output": norm_output,
        "magnitude": _magnitude("hidden_weight"),
        "random": _random("hidden_weight"),
    },
    "ffn": {
        "activation": activation,
        "preactivation": preactivation,
        "reconstruction": reconstruction,
        "magnitude": _magnitude("ffn_weight"),
        "random": _random("ffn_weight"),
    },
    "heads": {
        "output": head_output,
        "magnitude": _magnitude("head_weight"),
        "random": _random("head_weight"),
    },
    "kv_heads": {
        "sum": head_output,
        "l2": head_output,
        "magnitude": _magnitude("kv_weight"),
        "random": _random("kv_weight"),
    },
}
AGGREGATIONS = tuple(f"{batch}:{sequence}" for batch in REDUCTIONS for sequence in REDUCTIONS)


def score(stats: Statistics, **functions: str) -> Scores:
    """Scores of every axis.

    Args:
        stats: from `measure`.
        functions: axis → name in `TABLE`, and aggregation → one of `AGGREGATIONS`; the rest as in `DEFAULTS`.
    Raises:
        BadRecipe: unknown axis or function, or statistics that the function needs were not measured.
    """
    chosen = DEFAULTS | functions
    mistakes = [
        f"unknown score axis {axis!r}; axes: {', '.join(DEFAULTS)}" for axis in functions if axis not in DEFAULTS
    ]
    options = {axis: tuple(TABLE[axis]) for axis in TABLE} | {"aggregation": AGGREGATIONS}
    mistakes += [
        f"score {axis}={chosen[axis]!r} is unknown; one of {', '.join(names)}"
        for axis, names in options.items()
        if chosen[axis] not in names
    ]
    if mistakes:
        raise BadRecipe("\n".join(mistakes))
    axes = {axis: table[chosen[axis]](stats, chosen["aggregation"]).float() for axis, table in TABLE.items()}
    if chosen["kv_heads"] in ("sum", "l2"):
        axes["kv_heads"] = _per_group(axes["kv_heads"], stats.sums["kv_weight"].shape[1], chosen["kv_heads"])
    provenance = dict(stats.provenance) | {f"score/{axis}": name for axis, name in chosen.items()}
    energies = {site: total / stats.num_tokens for site, total in stats.energies.items()}
    return Scores(axes, energies, provenance)


def _per_group(heads_LA: Tensor, groups: int, how: str) -> Tensor:
    """[L, G]: sum or L2 of the scores of a group's query heads."""
    grouped_LGA = heads_LA.view(len(heads_LA), groups, -1)
    return grouped_LGA.sum(-1) if how == "sum" else grouped_LGA.norm(dim=-1)


def _sites(stats: Statistics) -> Tensor:
    """[norms, H]: energy at the input of every norm of hidden channels."""
    hidden = len(stats.sums["hidden_weight"])
    sites = (energy_LH.view(-1, energy_LH.shape[-1]) for energy_LH in stats.energies.values())
    return torch.cat([energy_LH for energy_LH in sites if energy_LH.shape[-1] == hidden])
