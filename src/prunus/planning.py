"""A dry run: what a recipe would build, cost and write. Opens headers and configs only; writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prunus import cost, formats, hardware, memory, sensitivity, tournament
from prunus.architecture import Architecture, parse
from prunus.budget import Budget, parse_budget
from prunus.checkpoint import Checkpoint, load
from prunus.console import duration
from prunus.errors import BadRecipe
from prunus.recipe import STAGES, Recipe
from prunus.rounds import recipe_of_larger, rounds
from prunus.run import LARGER, OUTPUTS
from prunus.schedule import Plan, Settings
from prunus.schedule import plan as plan_training
from prunus.search import probe_architectures
from prunus.selection import check_legal
from prunus.space import legal_architectures
from prunus.teacher import bytes_per_token

EFFICIENCY = 0.45
"""Share of the GEMM rate that whole steps reach (norms, attention and softmax are not GEMMs); measured, see LOG.md."""

PASSES: Mapping[str, Callable[[int], float]] = {
    "leave_one_out": lambda layers: layers / 2,
    "logit_mse": lambda layers: layers / 2,
    "iterative": lambda layers: layers**2 / 7,
    "contiguous": lambda layers: 1.5 * layers,
}
"""Measurement of layers → its passes over the held-out text that decides; docs/depth.md says the same."""


@dataclass(frozen=True)
class Machine:
    """What the plan is for.

    Attributes:
        gpus: ranks over which the training is sharded.
        flops: GEMM rate of one of them, per second.
        memory: bytes that each has free.
        device: "cuda" or "cpu".
        dtype: in which it trains.
    """

    gpus: int
    flops: float
    memory: int
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16


def this_machine() -> Machine:
    dtype = hardware.compute_dtype()
    rate = hardware.matmul_flops_per_second(dtype)
    return Machine(1, rate, hardware.free_memory(), hardware.device().type, dtype)


def plan(recipe: Recipe, machine: Machine | None = None) -> dict[str, Any]:
    """What `compress` would do, on this machine or on another.

    Without scores the architecture is not known yet: shown is the legal one near the budget whose shape is nearest to
    the teacher's; the search ranks all of them by measured damage.
    """
    if len(recipe.sizes) > 1:
        raise BadRecipe(f"plan: one size at a time, such as --params {recipe.sizes[0]}")
    if recipe.latency is not None:
        raise BadRecipe("plan: what a token takes is measured in the run itself; give --params for a plan")
    if recipe.distill.tokens is None:
        raise BadRecipe("plan: the time depends on the amount of text; give --tokens")
    here = machine is None
    machine, teacher = machine or this_machine(), load(recipe.model, uneven=recipe.uneven)
    first = teacher if recipe.start is None else load(recipe.start)
    found: list[Round] = []
    for each, tokens in _in_rounds(recipe, first, teacher):
        before = found[-1].target if found else first.architecture
        found.append(_round(each, tokens, before, first, teacher, machine))
    *earlier, last = found
    heaviest = max(found, key=lambda each: sum(each.memory.values()))
    ahead = sum(sum(each.seconds.values()) for each in earlier)
    files = [*([LARGER] if earlier else []), *(name for names in OUTPUTS.values() for name in names)]
    return {
        "teacher": _facts(teacher, teacher.architecture),
        "student": _facts(first, last.target),
        "budget": last.limits,
        "legal_architectures": last.legal_architectures,
        "larger_students": [
            {"parameters": _parameters(first, each.target), "tokens": each.schedule.tokens} for each in earlier
        ],
        "training": asdict(last.schedule) | {"tokens": last.schedule.tokens, "micro_blocks": last.micro_blocks},
        "peak_memory_bytes": sum(heaviest.memory.values()),
        "peak_memory_parts": heaviest.memory,
        "search_memory_bytes": max(each.search_memory for each in found),
        "repair_memory_bytes": max(each.repair_memory for each in found),
        "evaluation_memory_bytes": _evaluation_memory(recipe, first, teacher, last.target, machine),
        "gpus": machine.gpus,
        "here": here,
        "seconds": {**({"larger student": ahead} if earlier else {}), **last.seconds},
        "writes": [f"{recipe.to}/{name}" for name in files],
        "disk_bytes": sum(4 * first.dtype.itemsize * _parameters(first, each.target) for each in found)
        + _cache_bytes(recipe, teacher),
    }


def _cache_bytes(recipe: Recipe, teacher: Checkpoint) -> int:
    options = recipe.distill
    if options.teacher_cache is None or options.tokens is None:
        return 0
    hidden = teacher.architecture.hidden
    return options.tokens * bytes_per_token(options.teacher_cache, per_token=options.cache_per_token, hidden=hidden)


def _in_rounds(recipe: Recipe, first: Checkpoint, teacher: Checkpoint) -> list[tuple[Recipe, int]]:
    """Of each cut the recipe, and the tokens that its student is trained on, in the order in which they are made."""
    there, tokens = rounds(recipe, first, teacher), recipe.distill.tokens or 0
    larger = recipe_of_larger(recipe, there, tokens=tokens, to=Path(recipe.to) / LARGER)
    earlier = _in_rounds(larger, first, teacher) if larger else []
    return [*earlier, (recipe, tokens // there.count)]


@dataclass(frozen=True)
class Round:
    """What one cut and its training need.

    Attributes:
        target: its architecture.
        limits: of the budget, by kind.
        legal_architectures: that meet it.
        memory: of the training, bytes by what they hold.
        search_memory, repair_memory: bytes.
        seconds: by stage.
    """

    target: Architecture
    limits: Mapping[str, int]
    legal_architectures: int
    schedule: Plan
    micro_blocks: int
    memory: Mapping[str, int]
    search_memory: int
    repair_memory: int
    seconds: Mapping[str, float]


def _round(
    recipe: Recipe, tokens: int, before: Architecture, first: Checkpoint, teacher: Checkpoint, machine: Machine
) -> Round:
    """Plan one of the cuts.

    Args:
        recipe: of this round.
        tokens: that its student is trained on.
        before: what is cut. In a later round its tensors are not there yet: the memory of the search and the repair is
            counted as if they started from `first`, which takes more.
        first: what the first round cuts.
    """
    budget = None
    if recipe.arch is not None:
        target, count = parse(recipe.arch, first.architecture), 1
        check_legal(first.family, first.architecture, target)
    else:
        budget = parse_budget(first, whole=teacher, **recipe.limits)
        found = legal_architectures(first.family, first.architecture, budget, **recipe.search.space())
        target, count = _most_similar(before, found), len(found)
    block_size, settings = recipe.data.block_size, Settings(**recipe.distill.hyperparameters())
    schedule = plan_training(
        replace(settings, tokens=tokens),
        hidden=target.hidden,
        num_blocks=tokens // block_size,
        block_size=block_size,
    )
    parts = _memory(first, target, teacher, recipe, schedule.batch_blocks, machine)
    micro_blocks = parts.pop("micro_blocks")
    return Round(
        target=target,
        limits={limit.kind: limit.target for limit in budget.limits} if budget else {},
        legal_architectures=count,
        schedule=schedule,
        micro_blocks=micro_blocks,
        memory=parts,
        search_memory=_search_memory(first, target, budget, recipe, machine) if budget else 0,
        repair_memory=_repair_memory(first, target, recipe, machine),
        seconds=_seconds(recipe, schedule.tokens, before, target, first, teacher, machine),
    )


def _memory(
    first: Checkpoint,
    target: Architecture,
    teacher: Checkpoint,
    recipe: Recipe,
    batch_blocks: int,
    machine: Machine,
) -> dict[str, int]:
    """Blocks of a micro-batch, and the peak of each part on one GPU (or CPU) while distilling, in bytes.

    Raises:
        DoesNotFit: says what would.
    """
    options, parameters = recipe.distill, _parameters(first, target)
    untrained = cost.parameters_by_group(first.family, first.layout, target).get("vision", 0)
    need = memory.Training(
        family=first.family,
        student=target,
        branches={
            name: sum(layer < target.layers for layer in having)
            for name, having in cost.branch_layers(first.family, first.layout).items()
        },
        parameters=parameters - untrained,
        untrained=untrained,
        gathered=cost.at_once(first.family, first.layout, target),
        teacher_parameters=teacher.parameters,
        teacher_gathered=cost.at_once(teacher.family, teacher.layout, teacher.architecture),
        settings=Settings(**options.hyperparameters()),
        block_size=recipe.data.block_size,
        itemsize=machine.dtype.itemsize,
        live_teacher=options.teacher_cache is None,
        gradient_checkpointing=options.gradient_checkpointing,
        ranks=machine.gpus,
        device=machine.device,
    )
    if options.micro_blocks:
        need = replace(need, blocks=options.micro_blocks)
    else:
        need = memory.fitting(need, batch_blocks=batch_blocks, free=machine.memory)
    return {"micro_blocks": need.blocks, **memory.peak(need)}


def _search_memory(teacher: Checkpoint, target: Architecture, budget: Budget, recipe: Recipe, machine: Machine) -> int:
    """Peak of the search, in bytes, where it builds and repairs on one GPU (or CPU).

    Raises:
        DoesNotFit: says what would.
    """
    block_size = recipe.data.block_size
    built = [*probe_architectures(teacher.family, teacher.architecture, budget).values(), target]
    blocks = max(1, recipe.search.probe_tokens // block_size) if recipe.prune.repair else 0
    fits = memory.check_search(
        teacher, built, blocks=blocks, block_size=block_size, device=machine.device, free=machine.memory
    )
    return sum(fits.parts.values())


def _repair_memory(teacher: Checkpoint, target: Architecture, recipe: Recipe, machine: Machine) -> int:
    """Peak of the repair, in bytes; it runs on one GPU (or CPU).

    Raises:
        DoesNotFit: says what would.
    """
    if not recipe.prune.repair or target == teacher.architecture:
        return 0
    block_size = recipe.data.block_size
    blocks = max(1, recipe.prune.tokens // block_size)
    fits = memory.check_repair(
        teacher, target, blocks=blocks, block_size=block_size, device=machine.device, free=machine.memory
    )
    return sum(fits.parts.values())


def _evaluation_memory(
    recipe: Recipe, first: Checkpoint, teacher: Checkpoint, target: Architecture, machine: Machine
) -> int:
    """Bytes of the teacher and one student, or of one after the other where both do not fit, see `comparison`. On the
    CPU the teacher's states lie in any case."""
    if STAGES.index("evaluate") > STAGES.index(recipe.stop_after):
        return 0
    sizes, student, itemsize = teacher.architecture, _parameters(first, target), machine.dtype.itemsize
    states = recipe.data.heldout_tokens * sizes.hidden if machine.device == "cpu" else 0
    together = itemsize * (teacher.parameters + student + states)
    apart = itemsize * (max(teacher.parameters, student + sizes.vocab * sizes.hidden) + states)
    return together if together <= memory.ROOM * machine.memory else apart


def _seconds(
    recipe: Recipe,
    training_tokens: int,
    before: Architecture,
    target: Architecture,
    first: Checkpoint,
    teacher: Checkpoint,
    machine: Machine,
) -> dict[str, float]:
    """Of the long stages, from the rate of a GEMM. Only the training is spread over several GPUs."""
    rate = EFFICIENCY * machine.flops

    def flops(model: Checkpoint, sizes: Architecture) -> int:
        shapes = cost.shapes(model.family, model.layout)
        return cost.flops_per_token(model.family, shapes, sizes, context=recipe.data.block_size // 2)

    ahead, parent, student = flops(teacher, teacher.architecture), flops(first, before), flops(first, target)
    built = recipe.search.candidates + 4 if recipe.arch is None else 1
    search = built * (2 * recipe.search.probe_tokens * (parent + student) + recipe.data.heldout_tokens / 3 * student)
    tokens = training_tokens + (recipe.distill.tokens or 0 if recipe.baseline else 0)
    step = ahead + (4 if recipe.distill.gradient_checkpointing else 3) * student
    stages = {
        "measure": _measured_tokens(recipe, before.layers) * parent / rate,
        "search": (search + _tournament_tokens(recipe) * step) / rate,
        "prune": 2 * recipe.prune.repair * recipe.prune.tokens * (parent + student) / rate,
        "distill": tokens * step / (rate * machine.gpus),
        "evaluate": recipe.data.heldout_tokens * (ahead + 3 * student) / rate,
    }
    return {stage: time for stage, time in stages.items() if STAGES.index(stage) <= STAGES.index(recipe.stop_after)}


def _measured_tokens(recipe: Recipe, layers: int) -> float:
    """Tokens of forward passes that take as long as the measurement; without one by a task, whose length is not known.

    Gram matrices cost as much as the pass that they are made of, and a backward pass twice as much as a forward one.
    """
    options = recipe.measure
    gradients = 3 * min(options.tokens, sensitivity.TOKENS) if options.grams and options.gradients else 0
    passes = sum(PASSES[kind](layers) for kind in PASSES if getattr(options, kind))
    return (1 + options.grams) * options.tokens + gradients + passes * recipe.data.heldout_tokens / 3


def _tournament_tokens(recipe: Recipe) -> int:
    """That candidates are trained on, all together."""
    if recipe.arch is not None or not recipe.search.tokens:
        return 0
    there, tokens = 0, 0
    for count, end in tournament.rounds(recipe.search.candidates, recipe.search.tokens):
        there, tokens = end, tokens + count * (end - there)
    return tokens


def show(result: dict[str, Any]) -> None:
    """Print the plan for a reader."""
    console = Console(highlight=False, markup=False)
    table = Table("", "teacher", "student", "ratio", box=None, header_style="bold")
    teacher, student = result["teacher"], result["student"]
    for key in teacher:
        share = formats.ratio(student[key], teacher[key])
        table.add_row(key, f"{teacher[key]:,}", f"{student[key]:,}", "–" if share is None else f"{share:.2f}")
    console.print(table)
    if result["legal_architectures"] > 1:
        console.print(
            f"{result['legal_architectures']:,} legal architectures meet the budget; shown is the one most like the "
            "teacher. The search ranks them all and measures the best few."
        )
    for larger in result["larger_students"]:
        size, tokens = f"{larger['parameters']:,}", f"{larger['tokens']:,}"
        console.print(f"In rounds: first a student of {size} parameters, distilled on {tokens} tokens")
    training = result["training"]
    console.print(
        f"Distillation: {training['steps']:,} steps of {training['batch_blocks']} × {training['block_size']} tokens "
        f"({training['tokens']:,} in all), learning rate {training['learning_rate']:.2g}"
        + (" · √(KL at the start), less of small weights" if training["by_distance"] else "")
    )
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in result["peak_memory_parts"].items())
    each = " on each" if result["gpus"] > 1 else ""
    console.print(f"Peak memory of the training{each}: about {result['peak_memory_bytes'] / 1e9:.1f} GB ({parts})")
    for stage in ("search", "repair", "evaluation"):
        if need := result[f"{stage}_memory_bytes"]:
            console.print(f"Peak memory of the {stage}: about {need / 1e9:.1f} GB")
    stages = " · ".join(f"{stage} {duration(time)}" for stage, time in result["seconds"].items())
    where = "on this machine, now" if result["here"] else f"on {result['gpus']} GPU{'s' * (result['gpus'] > 1)}"
    console.print(f"Time {where}: about {duration(sum(result['seconds'].values()))} ({stages})")
    console.print(f"Would write {result['disk_bytes'] / 1e6:,.0f} MB: {', '.join(result['writes'])}")


def _most_similar(teacher: Architecture, found: list[Architecture]) -> Architecture:
    """The one whose smallest axis share is largest."""
    return max(found, key=lambda a: min(size / teacher[axis] for axis, size in a.axes().items()))


def _facts(teacher: Checkpoint, sizes: Architecture) -> dict[str, int]:
    parameters, shapes = _parameters(teacher, sizes), cost.shapes(teacher.family, teacher.layout)
    return sizes.axes() | {
        "parameters": parameters,
        "bytes": parameters * teacher.dtype.itemsize,
        "FLOPs per token": cost.flops_per_token(teacher.family, shapes, sizes),
        "KV bytes per token": cost.kv_bytes_per_token(
            teacher.family, shapes, sizes, bytes_per_value=teacher.dtype.itemsize
        ),
    }


def _parameters(teacher: Checkpoint, sizes: Architecture) -> int:
    return cost.parameters(teacher.family, teacher.layout, sizes)
