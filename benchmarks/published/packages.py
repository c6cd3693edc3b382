"""Peers themselves, run by their packages. Rows whose package is not installed are left out.

pip install --no-deps torch-pruning==1.6.1
pip install --no-deps nvidia-modelopt==0.47.0 omegaconf antlr4-python3-runtime==4.9.3 pulp scipy ninja nvidia-ml-py
"""

from __future__ import annotations

import bisect
import itertools
import warnings
from dataclasses import replace

import torch
from transformers import PreTrainedModel

import prunus as pr
from prunus import anatomy

from .bench import BATCH_BLOCKS, Bench, batches, count

SCORING_BLOCKS = 64
"""Of calibration, for ModelOpt's score: its time grows with every block."""


def torch_pruning(bench: Bench) -> PreTrainedModel:
    """Torch-Pruning as its example for language models runs it (examples/LLMs): every width by the same share, parts
    ranked by the mean L2 norm of their weights. The least share that meets the parameters, in steps of one percent."""
    percent = bisect.bisect_left(range(100), True, key=lambda each: count(_narrowed(bench, each)) <= bench.parameters)
    model = _narrowed(bench, percent)
    model.config.hidden_size = model.lm_head.in_features
    for layer in anatomy.layers_of(model):
        attention = layer.self_attn
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features
    return model


def _narrowed(bench: Bench, percent: int) -> PreTrainedModel:
    import torch_pruning as tp

    model, share = bench.model(), percent / 100
    heads = {}
    for layer in anatomy.layers_of(model):
        attention = layer.self_attn
        heads[attention.q_proj] = model.config.num_attention_heads
        heads |= dict.fromkeys((attention.k_proj, attention.v_proj), model.config.num_key_value_heads)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # it cannot see which query heads share a group inside a fused one
    with warnings.catch_warnings(action="ignore"):
        tp.pruner.BasePruner(
            model,
            example_inputs=torch.arange(8)[None],
            importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
            global_pruning=False,
            output_transform=lambda output: output.logits,
            pruning_ratio=share,
            ignored_layers=[model.lm_head],
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=share,
            round_to=4,
        ).step()
    if model.config.tie_word_embeddings:  # it narrows both, and leaves two equal copies
        model.lm_head.weight = model.get_input_embeddings().weight
    model.set_attn_implementation(implementation)
    return model


def modelopt(bench: Bench) -> PreTrainedModel:
    """ModelOpt's iterative channel contribution (Puzzletron's score of FFN neurons) on the shape that Prunus found;
    channels as in Minitron, heads as Prunus scores them. Its own tool for Minitron needs Megatron-Core and a GPU."""
    from modelopt.torch.prune.importance_hooks.base_hooks import IterativeChannelContributionHook

    model = bench.model()
    rounds = min(SCORING_BLOCKS, len(bench.calibration)) // BATCH_BLOCKS
    hooks = []
    for layer in anatomy.layers_of(model):
        linear = layer.mlp.down_proj
        options = {"validation_full_iters": rounds, "calibration_method": "scale_by_magnitude"}
        hooks.append(IterativeChannelContributionHook(linear, options))
        linear.register_forward_hook(hooks[-1])
    with torch.no_grad():
        for tokens_BS, positions_BS in itertools.islice(batches(bench.calibration), rounds):
            anatomy.body_of(model)(input_ids=tokens_BS, position_ids=positions_BS, use_cache=False)
    ffn_LF = torch.stack([hook.accumulate() for hook in hooks]).float()
    scores = pr.score(bench.statistics, hidden="norm_output")
    scores = replace(scores, axes={**scores.axes, "ffn": ffn_LF})
    return bench.sliced(bench.shape, scores, norm_correction=False)
