"""Statistics → Scores. One pure function per published score, one visible table of them.

Shapes: L layers, H hidden channels, F FFN neurons, A query heads, G key-value groups, E experts,
C channels of any axis.
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
    "hidden": "norm_share",
    "ffn": "tempered_fisher",
    "heads": "tempered_fisher",
    "kv_heads": "tempered_fisher",
    "experts": "reap",
    "expert_ffn": "output",
    "shared_ffn": "tempered_fisher",
    "linear_heads": "output",
    "mamba_heads": "output",
    "mamba_head_dim": "energy",
    "state": "magnitude",
    "q_rank": "energy",
    "kv_rank": "energy",
    "aggregation": "l2:mean",
}
"""Score of each axis, and the reductions "over blocks : over tokens" of the activation scores.

Minitron's choices, but for "norm_share" and those by the Fisher information, which start better here (see LOG.md).
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


def activation(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L, F]: size of each neuron at the input of the down projection (NVIDIA's tool)."""
    return aggregate(stats.reductions[f"activation/{axis}"], stats.num_blocks, aggregation)


def preactivation(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L, F]: size of x·W₁ᵀ, before the activation function. Source: Minitron, arXiv:2407.14679, sec. 2.2."""
    if f"preactivation/{axis}" not in stats.reductions:
        raise BadRecipe(f"score {axis}=preactivation: this family has no projection of its own for it; take activation")
    return aggregate(stats.reductions[f"preactivation/{axis}"], stats.num_blocks, aggregation)


def fisher(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L, C]: root of the damage that the Fisher information foretells if a neuron, head or group were not there,
    √(½ E[(g·W x)²]), gradients g and what it writes W x taken as independent. Where no gradients were measured, as if
    the loss minded all that is written alike: √E[‖W x‖²].

    Source: the Fisher information as in Theis et al., arXiv:1801.05787, factored as in K-FAC, arXiv:1503.05671.
    """
    return (stats.sums[f"damage/{axis}"].clamp_min(0) / stats.num_tokens).sqrt()


def tempered_fisher(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L, C]: geometric mean of `fisher` and of a part's size: of a neuron √E[x²], of heads √E‖W x‖², since what a head
    reads may have any scale that its projection undoes.

    The gradients are of a few tokens of one kind of text: by half their power they keep what serves other text better,
    and this text no worse (LOG.md, 2026-11-30).
    """
    if axis in ("heads", "kv_heads"):
        squares = stats.sums[f"written/{axis}"].clamp_min(0)
    else:
        squares = stats.reductions[f"activation/{axis}"][REDUCTIONS.index("l2"), 1]
    return (fisher(stats, axis, aggregation) * (squares / stats.num_tokens).sqrt()).sqrt()


def head_output(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L, A]: ‖Attn(XW_q, XW_k, XW_v)‖₂ per head; likewise of Mamba. Source: Minitron, arXiv:2407.14679, sec. 2.2."""
    return aggregate(stats.reductions[f"output/{axis}"], stats.num_blocks, aggregation)


def group_sum(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L, G]: sum of `head_output` over a group's query heads."""
    return _per_group(stats, aggregation).sum(-1)


def group_l2(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L, G]: L2 norm of `head_output` over a group's query heads."""
    return _per_group(stats, aggregation).norm(dim=-1)


def _per_group(stats: Statistics, aggregation: str) -> Tensor:
    return head_output(stats, "heads", aggregation).unflatten(-1, (stats.sums["weight/kv_heads"].shape[1], -1))


def energy(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L, C]: E[(x/rms(x))²], the share that a latent's channel has of what its norm reads; [D]: E[x²] of what a
    channel of the Mamba heads writes."""
    return stats.sums[f"energy/{axis}"] / stats.num_tokens


def norm_share(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[H]: Σ over the norms of E[LN(X)_i²] / Σ_j E[LN(X)_j²], the channel's share of what each norm hands on.

    Each norm counts the same, however large its weights; what a branch reads without a norm counts as if it had one.
    """
    _, squares_NH = stats.reductions["output/hidden"][REDUCTIONS.index("l2")]
    bare_LH = stats.sums.get("bare/hidden", squares_NH[:0])
    reads_NH = torch.cat([squares_NH, bare_LH])
    return (reads_NH / reads_NH.sum(1, keepdim=True).clamp_min(1e-30)).sum(0)


def norm_output(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[H]: LN(X)_i summed over the norms. Source: Minitron, arXiv:2407.14679, sec. 2.2."""
    return aggregate(stats.reductions["output/hidden"], stats.num_blocks, aggregation).sum(0)


def block_influence(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L]: 1 − E[cos(layer input, layer output)]. Source: ShortGPT, arXiv:2403.03853; Minitron sec. 2.2."""
    return 1 - stats.sums["cosine"] / stats.num_tokens


def leave_one_out(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L]: rise of the loss when the layer is removed, nats per token. Source: Minitron, sec. 2.2 (as perplexity)."""
    return _of_depth(stats, "leave_one_out")


def iterative(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L]: rise of the loss when the layer leaves, after those that leave before it; the greedy removal with new scores
    after each layer. Source: Minitron, arXiv:2407.14679 (iterative importance)."""
    return _of_depth(stats, "iterative")


def logit_mse(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L]: mean squared change of the logits when the layer is removed."""
    return _of_depth(stats, "logit_mse")


def contiguous(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L]: rise of the loss when the layer leaves, as part of one run of neighbours (`depth.contiguous`)."""
    return _of_depth(stats, "contiguous")


def contiguous_by_task(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L]: the same by the answers of a task that go wrong (`depth.contiguous_by_task`)."""
    return _of_depth(stats, "contiguous_by_task")


def _of_depth(stats: Statistics, name: str) -> Tensor:
    if name not in stats.sums:
        raise BadRecipe(f"score layers={name} needs the model without its layers (recipe: measure.{name})")
    return stats.sums[name]


def reap(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L, E]: mean of w‖y‖ over the tokens that an expert was sent, w the router's weight and y its output; 0 if it was
    sent none. Source: REAP (router-weighted expert activation pruning), arXiv:2510.13999."""
    return stats.sums["output/experts"] / stats.sums["tokens/experts"].clamp_min(1)


def frequency(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L, E]: share of the tokens that an expert was sent; the usual baseline."""
    return stats.sums["tokens/experts"] / stats.num_tokens


def expert_output(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L, E, F]: L2 norm of what a neuron adds to the stream, over all tokens: √(Σ (w h_i)²) ‖W_i‖."""
    return (stats.sums["energy/expert_ffn"] * stats.sums["write/expert_ffn"]).sqrt()


def expert_activation(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """[L, E, F]: √(Σ (w h_i)²) alone."""
    return stats.sums["energy/expert_ffn"].sqrt()


def magnitude(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """L2 norm of the weights that would be removed: a baseline that needs no text."""
    return stats.sums[f"weight/{axis}"].sqrt()


def random(stats: Statistics, axis: str, aggregation: str) -> Tensor:
    """Uniform noise from a fixed seed: the baseline that every score must beat; zero where there is no such part."""
    like = stats.sums["cosine" if axis == "layers" else f"weight/{axis}"]
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(0)) * (like != 0)


Score = Callable[[Statistics, str, str], Tensor]
"""Of the statistics, the axis, and the aggregation; those that are means or sums by definition take no notice of it."""

NEURONS: Mapping[str, Score] = {
    "activation": activation,
    "preactivation": preactivation,
    "tempered_fisher": tempered_fisher,
    "fisher": fisher,
    "magnitude": magnitude,
    "random": random,
}
OF_GRADIENTS = ("tempered_fisher", "fisher")
LATENT: Mapping[str, Score] = {"energy": energy, "magnitude": magnitude, "random": random}

TABLE: Mapping[str, Mapping[str, Score]] = {
    "layers": {
        "block_influence": block_influence,
        "leave_one_out": leave_one_out,
        "iterative": iterative,
        "contiguous": contiguous,
        "contiguous_by_task": contiguous_by_task,
        "logit_mse": logit_mse,
        "random": random,
    },
    "hidden": {
        "norm_share": norm_share,
        "norm_output": norm_output,
        "magnitude": magnitude,
        "random": random,
    },
    "ffn": NEURONS,
    "heads": {
        "output": head_output,
        "tempered_fisher": tempered_fisher,
        "fisher": fisher,
        "magnitude": magnitude,
        "random": random,
    },
    "kv_heads": {
        "tempered_fisher": tempered_fisher,
        "fisher": fisher,
        "sum": group_sum,
        "l2": group_l2,
        "magnitude": magnitude,
        "random": random,
    },
    "experts": {"reap": reap, "frequency": frequency, "magnitude": magnitude, "random": random},
    "expert_ffn": {
        "output": expert_output,
        "activation": expert_activation,
        "magnitude": magnitude,
        "random": random,
    },
    "shared_ffn": NEURONS,
    "linear_heads": {"output": head_output, "magnitude": magnitude, "random": random},
    "mamba_heads": {"output": head_output, "magnitude": magnitude, "random": random},
    "mamba_head_dim": LATENT,
    "state": {"magnitude": magnitude, "random": random},
    "q_rank": LATENT,
    "kv_rank": LATENT,
}
AGGREGATIONS = tuple(f"{batch}:{sequence}" for batch in REDUCTIONS for sequence in REDUCTIONS)


def score(stats: Statistics, **functions: str) -> Scores:
    """Scores of every axis that the model has.

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
    axes = {
        axis: table[chosen[axis]](stats, axis, chosen["aggregation"]).float()
        for axis, table in TABLE.items()
        if axis == "layers" or f"weight/{axis}" in stats.sums
    }
    used = {axis: name for axis, name in chosen.items() if axis in axes or axis == "aggregation"}
    if stats.provenance.get("gradients") == "none":
        used = {axis: name + ", without gradients" * (name in OF_GRADIENTS) for axis, name in used.items()}
    provenance = dict(stats.provenance) | {f"score/{axis}": name for axis, name in used.items()}
    energies = {site: total / stats.num_tokens for site, total in stats.energies.items()}
    return Scores(axes, energies, provenance)
