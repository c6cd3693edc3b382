"""A dry run: what a recipe would build, cost and write. Opens headers and configs only; writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prunus import cost, durations, formats, hardware, memory, written
from prunus.architecture import Architecture, parse
from prunus.budget import Budget, parse_budget
from prunus.checkpoint import Checkpoint, load
from prunus.console import duration
from prunus.errors import BadRecipe
from prunus.measuring import check_measuring
from prunus.positions import check_positions
from prunus.recipe import Recipe
from prunus.rounds import recipe_of_larger, rounds
from prunus.run import LARGER
from prunus.schedule import Plan, Settings
from prunus.schedule import plan as plan_training
from prunus.search import probe_architectures
from prunus.selection import check_legal
from prunus.space import legal_architectures
from prunus.written import reaches


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
    first = teacher if recipe.start is None else load(recipe.start, uneven=recipe.uneven)
    check_positions(recipe.data.block_size, first, teacher)
    found: list[Round] = []
    for each, tokens in _in_rounds(recipe, first, teacher):
        before = found[-1].target if found else first.architecture
        found.append(_round(each, tokens, before, first, teacher, machine))
    *earlier, last = found
    heaviest = max(found, key=lambda each: sum(each.memory.values()))
    ahead = sum(sum(each.seconds.values()) for each in earlier)
    files = written.files(recipe, in_rounds=bool(earlier))
    return {
        "teacher": _facts(teacher, teacher.architecture),
        "student": _facts(first, last.target),
        "budget": last.limits,
        "legal_architectures": last.legal_architectures,
        "larger_students": [
            {"parameters": _parameters(first, each.target), "tokens": each.schedule.tokens}
            for each in earlier
            if each.schedule
        ],
        "training": last.schedule
        and asdict(last.schedule) | {"tokens": last.schedule.tokens, "micro_blocks": last.micro_blocks},
        "peak_memory_bytes": sum(heaviest.memory.values()),
        "peak_memory_parts": heaviest.memory,
        "measure_memory_bytes": max(each.measure_memory for each in found),
        "search_memory_bytes": max(each.search_memory for each in found),
        "repair_memory_bytes": max(each.repair_memory for each in found),
        "evaluation_memory_bytes": _evaluation_memory(recipe, first, teacher, last.target, machine),
        "gpus": machine.gpus,
        "here": here,
        "seconds": {**({"larger student": ahead} if earlier else {}), **last.seconds},
        "writes": [f"{recipe.to}/{name}" for name in files],
        "disk_bytes": written.disk_bytes(
            recipe, teacher, [_parameters(first, each.target) for each in found], itemsize=first.dtype.itemsize
        ),
    }


def _in_rounds(recipe: Recipe, first: Checkpoint, teacher: Checkpoint) -> list[tuple[Recipe, int]]:
    """Of each cut the recipe, and the tokens that its student is trained on, in the order in which they are made."""
    there, tokens = rounds(recipe, first, teacher), recipe.distill.tokens or 0
    larger = recipe_of_larger(recipe, there, tokens=tokens, to=Path(recipe.to) / LARGER)
    earlier = _in_rounds(larger, first, teacher) if larger and reaches(recipe, "measure") else []
    return [*earlier, (recipe, tokens // there.count)]


@dataclass(frozen=True)
class Round:
    """What one cut and its training need.

    Attributes:
        target: its architecture.
        limits: of the budget, by kind.
        legal_architectures: that meet it.
        schedule: of the training; None where the recipe stops before it.
        memory: of the training, bytes by what they hold.
        measure_memory, search_memory, repair_memory: bytes; 0 of a stage that is not reached.
        seconds: by stage.
    """

    target: Architecture
    limits: Mapping[str, int]
    legal_architectures: int
    schedule: Plan | None
    micro_blocks: int
    memory: Mapping[str, int]
    measure_memory: int
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
    budget, built = None, 0
    if recipe.arch is not None:
        target, count = parse(recipe.arch, first.architecture), 1
        check_legal(first.family, first.architecture, target)
    else:
        budget = parse_budget(first, whole=teacher, **recipe.limits)
        found = legal_architectures(first.family, first.architecture, budget, **recipe.search.space())
        target, count = _most_similar(before, found), len(found)
        probes = set(probe_architectures(first.family, first.architecture, budget).values())
        built = len(probes) + min(recipe.search.candidates, count) if count > 1 else 0
    schedule, parts = None, {"micro_blocks": 0}
    if reaches(recipe, "distill"):
        schedule = _schedule(recipe, tokens, target)
        parts = _memory(first, target, teacher, recipe, schedule.batch_blocks, machine)
    micro_blocks = parts.pop("micro_blocks")
    return Round(
        target=target,
        limits={limit.kind: limit.target for limit in budget.limits} if budget else {},
        legal_architectures=count,
        schedule=schedule,
        micro_blocks=micro_blocks,
        memory=parts,
        measure_memory=_measure_memory(first, recipe, machine),
        search_memory=_search_memory(first, target, budget, recipe, machine) if budget else 0,
        repair_memory=_repair_memory(first, target, recipe, machine),
        seconds=durations.seconds(
            recipe,
            schedule.tokens if schedule else 0,
            before,
            target,
            first,
            teacher,
            built=built,
            flops_per_second=machine.flops,
            gpus=machine.gpus,
        ),
    )


def _schedule(recipe: Recipe, tokens: int, target: Architecture) -> Plan:
    block_size, settings = recipe.data.block_size, Settings(**recipe.distill.hyperparameters())
    return plan_training(
        replace(settings, tokens=tokens),
        hidden=target.hidden,
        num_blocks=tokens // block_size,
        block_size=block_size,
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


def _measure_memory(teacher: Checkpoint, recipe: Recipe, machine: Machine) -> int:
    """Peak of the measurement, in bytes, on one GPU (or CPU).

    Raises:
        DoesNotFit: says what would.
    """
    if not reaches(recipe, "measure"):
        return 0
    options, block_size = recipe.measure, recipe.data.block_size
    fits = check_measuring(
        teacher,
        blocks=max(1, options.tokens // block_size),
        block_size=block_size,
        gradients=options.gradients,
        device=machine.device,
        free=machine.memory,
    )
    return sum(fits.parts.values())


def _search_memory(teacher: Checkpoint, target: Architecture, budget: Budget, recipe: Recipe, machine: Machine) -> int:
    """Peak of the search, in bytes, where it builds and repairs on one GPU (or CPU).

    Raises:
        DoesNotFit: says what would.
    """
    if not reaches(recipe, "search"):
        return 0
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
    if not recipe.prune.repair or target == teacher.architecture or not reaches(recipe, "prune"):
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
    if not reaches(recipe, "evaluate"):
        return 0
    sizes, student, itemsize = teacher.architecture, _parameters(first, target), machine.dtype.itemsize
    states = recipe.data.heldout_tokens * sizes.hidden if machine.device == "cpu" else 0
    together = itemsize * (teacher.parameters + student + states)
    apart = itemsize * (max(teacher.parameters, student + sizes.vocab * sizes.hidden) + states)
    return together if together <= memory.ROOM * machine.memory else apart


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
    if training := result["training"]:
        console.print(
            f"Distillation: {training['steps']:,} steps of {training['batch_blocks']} × {training['block_size']} "
            f"tokens ({training['tokens']:,} in all), learning rate {training['learning_rate']:.2g}"
            + (" · √(KL at the start), less of small weights" if training["by_distance"] else "")
        )
    if result["peak_memory_parts"]:
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in result["peak_memory_parts"].items())
        each = " on each" if result["gpus"] > 1 else ""
        console.print(f"Peak memory of the training{each}: about {result['peak_memory_bytes'] / 1e9:.1f} GB ({parts})")
    stages = {"measure": "measurement", "search": "search", "repair": "repair", "evaluation": "evaluation"}
    for stage, name in stages.items():
        if need := result[f"{stage}_memory_bytes"]:
            console.print(f"Peak memory of the {name}: about {need / 1e9:.1f} GB")
    times = " · ".join(f"{stage} {duration(time)}" for stage, time in result["seconds"].items() if time)
    where = "on this machine, now" if result["here"] else f"on {result['gpus']} GPU{'s' * (result['gpus'] > 1)}"
    console.print(f"Time {where}: about {duration(sum(result['seconds'].values()))} ({times})")
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
