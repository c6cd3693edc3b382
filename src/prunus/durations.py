"""How long the stages of a run take, from the rate of a GEMM."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prunus import cost, sensitivity, tournament
from prunus.architecture import Architecture
from prunus.checkpoint import Checkpoint
from prunus.recipe import STAGES, Recipe
from prunus.written import reaches

EFFICIENCY = 0.45
"""Share of the GEMM rate that whole steps reach (norms, attention and softmax are not GEMMs); measured, see LOG.md."""

PASSES: Mapping[str, Callable[[int], float]] = {
    "leave_one_out": lambda layers: layers / 2,
    "logit_mse": lambda layers: layers / 2,
    "iterative": lambda layers: layers**2 / 7,
    "contiguous": lambda layers: 1.5 * layers,
}
"""Measurement of layers → its passes over the held-out text that decides; docs/depth.md says the same."""


def seconds(
    recipe: Recipe,
    training_tokens: int,
    before: Architecture,
    target: Architecture,
    first: Checkpoint,
    teacher: Checkpoint,
    *,
    built: int,
    flops_per_second: float,
    gpus: int,
) -> dict[str, float]:
    """Of the long stages that the recipe reaches. Only the training is spread over several GPUs.

    Args:
        training_tokens: of the student's own training.
        before: what is cut.
        first: what the first round cuts.
        built: architectures that the search builds, repairs and measures.
        flops_per_second: of one GPU.
    """
    rate = EFFICIENCY * flops_per_second

    def flops(model: Checkpoint, sizes: Architecture) -> int:
        shapes = cost.shapes(model.family, model.layout)
        return cost.flops_per_token(model.family, shapes, sizes, context=recipe.data.block_size // 2)

    ahead, parent, student = flops(teacher, teacher.architecture), flops(first, before), flops(first, target)
    search = built * (2 * recipe.search.probe_tokens * (parent + student) + recipe.data.heldout_tokens / 3 * student)
    tokens = training_tokens + (recipe.distill.tokens or 0 if recipe.baseline else 0)
    step = ahead + (4 if recipe.distill.gradient_checkpointing else 3) * student
    stages = {
        "measure": _measured_tokens(recipe, before.layers) * parent / rate,
        "search": (search + _tournament_tokens(recipe) * step) / rate,
        "prune": 2 * recipe.prune.repair * recipe.prune.tokens * (parent + student) / rate,
        "distill": tokens * step / (rate * gpus),
        "evaluate": recipe.data.heldout_tokens * (ahead + 3 * student) / rate,
    }
    return {stage: stages[stage] for stage in STAGES if stage in stages and reaches(recipe, stage)}


def _measured_tokens(recipe: Recipe, layers: int) -> float:
    """Tokens of forward passes that take as long as the measurement; without one by a task, whose length is not known.

    A backward pass costs twice as much as a forward one.
    """
    options = recipe.measure
    gradients = 3 * min(options.tokens, sensitivity.TOKENS) if options.gradients else 0
    passes = sum(PASSES[kind](layers) for kind in PASSES if getattr(options, kind))
    return options.tokens + gradients + passes * recipe.data.heldout_tokens / 3


def _tournament_tokens(recipe: Recipe) -> int:
    """That candidates are trained on, all together."""
    if recipe.arch is not None or not recipe.search.tokens:
        return 0
    there, tokens = 0, 0
    for count, end in tournament.rounds(recipe.search.candidates, recipe.search.tokens):
        there, tokens = end, tokens + count * (end - there)
    return tokens
