"""Methods that rank parts: they are given the shape that Prunus found, and slice the teacher's weights to it."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

import prunus as pr

from .bench import Bench, moments, weights


def random(bench: Bench) -> PreTrainedModel:
    """Parts drawn by chance; layers too, where layers leave."""
    return _by(bench, "random", layers="random")


def magnitude(bench: Bench) -> PreTrainedModel:
    """L2 norm of the weights that would leave."""
    return _by(bench, "magnitude")


def wanda_sp(bench: Bench) -> PreTrainedModel:
    """Mean over a column of |W| ‖X‖, of the weights that write; the same share of every layer.

    Source: the baseline "Wanda-sp" of FLAP, arXiv:2312.11983, after Wanda, arXiv:2306.11695.
    """
    model, sizes = bench.model(), bench.teacher.architecture
    ffn_LF, attention_LC = (
        weights(model, name).abs().mean(1) * square_LI.sqrt() for name, (_, square_LI) in moments(bench).items()
    )
    heads_LA = attention_LC.unflatten(-1, (sizes.heads, -1)).sum(-1)
    groups_LG = heads_LA.unflatten(-1, (sizes.kv_heads, -1)).sum(-1)
    scores = pr.score(bench.statistics, ffn="magnitude", heads="magnitude", kv_heads="magnitude", hidden="magnitude")
    axes = {**scores.axes, "ffn": ffn_LF, "heads": heads_LA, "kv_heads": groups_LG}
    return bench.sliced(bench.shape, replace(scores, axes=axes), norm_correction=False)


def minitron(bench: Bench) -> PreTrainedModel:
    """Its scores on the shape that Prunus found. Source: arXiv:2407.14679; the whole is `recipes/minitron.yaml`."""
    return _minitron(bench, ffn="preactivation")


def minitron_activation(bench: Bench) -> PreTrainedModel:
    """The same with neurons by what the down projection reads, as NVIDIA's own tool scores those of gated FFNs
    (modelopt.torch.prune, mcore_minitron); the paper's formula is of the first projection, before the activation."""
    return _minitron(bench, ffn="activation")


def _minitron(bench: Bench, *, ffn: str) -> PreTrainedModel:
    scores = pr.score(bench.statistics, ffn=ffn, hidden="norm_output", heads="output", kv_heads="sum")
    return bench.sliced(bench.shape, scores, norm_correction=False, head_residuals=True)


def _by(bench: Bench, name: str, layers: str = "block_influence") -> PreTrainedModel:
    axes = {axis: name for axis in ("hidden", "ffn", "heads", "kv_heads") if axis in bench.teacher.architecture}
    return bench.sliced(bench.shape, pr.score(bench.statistics, layers=layers, **axes), norm_correction=False)
