"""What can be told of a run before hours of work, or the results of an earlier one, are spent on it."""

from __future__ import annotations

from dataclasses import replace

from prunus import architecture, parallel, side_by_side, tasks, tournament, trackers
from prunus.budget import LIMITS, parse_budget, parse_share
from prunus.errors import BadRecipe
from prunus.evaluate import check_prompts
from prunus.positions import check_positions
from prunus.recipe import STAGES
from prunus.run import Run
from prunus.schedule import Settings, check_shared, plan
from prunus.selection import check_legal
from prunus.shared_tokens import check_padding
from prunus.space import legal_architectures


def check_goal(run: Run) -> None:
    """Refuse a run that could not come to its end.

    Raises:
        BadRecipe: an architecture or budget that cannot be had, a longer block than the model can read, ids that one of
            the models lacks, an unknown task, a tracker or Ray not installed. BadData: fewer tokens than a step takes,
            or a step that ranks cannot share. BudgetUnreachable. PrunusError: lm-eval is not installed.
    """
    recipe, model = run.recipe, run.first
    side_by_side.check(recipe.search.workers)
    trackers.check(recipe.distill.trackers)
    evaluates = not run.finished("evaluate") or run.recipe_before.get("evaluate") != recipe.evaluate.model_dump()
    if evaluates and STAGES.index(recipe.stop_after) >= STAGES.index("evaluate"):
        tasks.check_all([tasks.from_recipe(task) for task in recipe.evaluate.tasks])
        if recipe.evaluate.prompts:
            check_prompts(run.teacher.tokenizer(), recipe.evaluate.prompts)
    check_padding(model, run.teacher, cache=recipe.distill.teacher_cache, on_policy=recipe.distill.on_policy_share > 0)
    check_positions(recipe.data.block_size, model, run.teacher)
    if recipe.latency and (parse_share(recipe.latency) or 0) > 1:
        raise BadRecipe(f"latency: {recipe.latency} is more than the model takes; pruning only removes")
    if recipe.arch is not None:
        target = architecture.parse(recipe.arch, model.architecture)
        check_legal(model.family, model.architecture, target)
    else:
        counted = {**recipe.limits, "latency": None}  # what a token takes is measured in the search
        if any(counted[kind] for kind in LIMITS):
            budget = parse_budget(model, whole=run.teacher, more=recipe.latency is not None, **counted)
            legal_architectures(model.family, model.architecture, budget, **recipe.search.space())
        _check_tournament(run)
    _check_training(run)


def _check_tournament(run: Run) -> None:
    """Each of its rounds goes on with the text, so the first must have some of its own."""
    recipe = run.recipe
    if recipe.search.tokens is None or recipe.search.candidates < 2:
        return
    plan = tournament.rounds(recipe.search.candidates, recipe.search.tokens)
    if plan[0][1] < recipe.data.block_size:
        least = recipe.data.block_size * 2 ** (len(plan) - 1)
        raise BadRecipe(
            f"search.tokens: {recipe.search.tokens:,} leave {plan[0][1]:,} for the first of {len(plan)} rounds, less "
            f"than a block ({recipe.data.block_size:,} tokens, data.block_size); give at least {least:,}"
        )


def _check_training(run: Run) -> None:
    """Its steps, where it is known how much text there will be."""
    recipe = run.recipe
    if recipe.distill.tokens is None or STAGES.index(recipe.stop_after) < STAGES.index("distill"):
        return
    settings = Settings(**recipe.distill.hyperparameters())
    own = replace(settings, tokens=recipe.distill.tokens // run.rounds.count)
    blocks = recipe.distill.tokens // recipe.data.block_size
    schedule = plan(own, hidden=run.first.architecture.hidden, num_blocks=blocks, block_size=recipe.data.block_size)
    check_shared(schedule, parallel.world().size)
