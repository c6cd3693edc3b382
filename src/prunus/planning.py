"""A dry run: what a recipe would build, cost and write. Opens headers and configs only; writes nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prunus import cost, hardware, memory
from prunus.architecture import Architecture, parse
from prunus.budget import Budget, parse_budget
from prunus.checkpoint import Checkpoint, load
from prunus.console import duration
from prunus.errors import BadRecipe
from prunus.recipe import Recipe
from prunus.run import OUTPUTS
from prunus.schedule import Settings
from prunus.schedule import plan as plan_training
from prunus.search import probe_architectures
from prunus.selection import check_legal
from prunus.space import legal_architectures

EFFICIENCY = 0.45
"""Share of the GEMM rate that whole steps reach (norms, attention and softmax are not GEMMs); measured, see LOG.md."""


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
    teacher = load(recipe.model, uneven=recipe.uneven)
    budget = None
    if recipe.arch is not None:
        target, count = parse(recipe.arch, teacher.architecture), 1
        check_legal(teacher.family, teacher.architecture, target)
    elif recipe.latency is not None:
        raise BadRecipe("plan: what a token takes is measured in the run itself; give --params for a plan")
    else:
        budget = parse_budget(teacher, **recipe.limits)
        found = legal_architectures(teacher.family, teacher.architecture, budget, tolerance=recipe.search.tolerance)
        target, count = _most_similar(teacher.architecture, found), len(found)
    if recipe.distill.tokens is None:
        raise BadRecipe("plan: the time depends on the amount of text; give --tokens")
    schedule = plan_training(
        Settings(**recipe.distill.hyperparameters()),
        hidden=target.hidden,
        num_blocks=recipe.distill.tokens // recipe.data.block_size,
        block_size=recipe.data.block_size,
    )
    machine = machine or this_machine()
    parts = _memory(teacher, target, recipe, schedule.batch_blocks, machine)
    micro_blocks = parts.pop("micro_blocks")
    return {
        "teacher": _facts(teacher, teacher.architecture),
        "student": _facts(teacher, target),
        "budget": {limit.kind: limit.target for limit in budget.limits} if budget else {},
        "legal_architectures": count,
        "training": asdict(schedule) | {"tokens": schedule.tokens, "micro_blocks": micro_blocks},
        "peak_memory_bytes": sum(parts.values()),
        "peak_memory_parts": parts,
        "search_memory_bytes": _search_memory(teacher, target, budget, recipe, machine) if budget else 0,
        "repair_memory_bytes": _repair_memory(teacher, target, recipe, machine),
        "gpus": machine.gpus,
        "seconds": seconds(teacher, target, recipe, schedule.tokens, machine),
        "writes": [f"{recipe.to}/{name}" for names in OUTPUTS.values() for name in names],
        "disk_bytes": 4 * teacher.dtype.itemsize * _parameters(teacher, target),
    }


def _memory(
    teacher: Checkpoint, target: Architecture, recipe: Recipe, batch_blocks: int, machine: Machine
) -> dict[str, int]:
    """Blocks of a micro-batch, and the peak of each part on one GPU (or CPU) while distilling, in bytes.

    Raises:
        DoesNotFit: says what would.
    """
    options, parameters = recipe.distill, _parameters(teacher, target)
    untrained = cost.parameters_by_group(teacher.family, teacher.layout, target).get("vision", 0)
    need = memory.Training(
        family=teacher.family,
        student=target,
        branches={
            name: sum(layer < target.layers for layer in having)
            for name, having in cost.branch_layers(teacher.family, teacher.layout).items()
        },
        parameters=parameters - untrained,
        untrained=untrained,
        teacher_parameters=teacher.parameters,
        block_size=recipe.data.block_size,
        itemsize=machine.dtype.itemsize,
        live_teacher=options.teacher_cache is None,
        gradient_checkpointing=options.gradient_checkpointing,
        ranks=machine.gpus,
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
    parts = memory.check_search(
        teacher, built, blocks=blocks, block_size=block_size, device=machine.device, free=machine.memory
    )
    return sum(parts.values())


def _repair_memory(teacher: Checkpoint, target: Architecture, recipe: Recipe, machine: Machine) -> int:
    """Peak of the repair, in bytes; it runs on one GPU (or CPU).

    Raises:
        DoesNotFit: says what would.
    """
    if not recipe.prune.repair or target == teacher.architecture:
        return 0
    block_size = recipe.data.block_size
    blocks = max(1, recipe.prune.tokens // block_size)
    parts = memory.check_repair(
        teacher, target, blocks=blocks, block_size=block_size, device=machine.device, free=machine.memory
    )
    return sum(parts.values())


def seconds(
    teacher: Checkpoint, target: Architecture, recipe: Recipe, training_tokens: int, machine: Machine
) -> dict[str, float]:
    """Seconds of the long stages, from the rate of a GEMM. Only the training is spread over several GPUs."""
    rate = EFFICIENCY * machine.flops
    context = recipe.data.block_size // 2
    shapes = cost.shapes(teacher.family, teacher.layout)
    ahead = cost.flops_per_token(teacher.family, shapes, teacher.architecture, context=context)
    student = cost.flops_per_token(teacher.family, shapes, target, context=context)
    built = recipe.search.candidates + 4 if recipe.arch is None else 1
    search = built * (2 * recipe.search.probe_tokens * (ahead + student) + recipe.data.heldout_tokens / 3 * student)
    return {
        "measure": recipe.measure.tokens * ahead / rate,
        "search": search / rate,
        "prune": 2 * recipe.prune.repair * recipe.prune.tokens * (ahead + student) / rate,
        "distill": training_tokens * (ahead + 3 * student) * (2 if recipe.baseline else 1) / (rate * machine.gpus),
        "evaluate": recipe.data.heldout_tokens * (ahead + 3 * student) / rate,
    }


def show(result: dict[str, Any]) -> None:
    """Print the plan for a reader."""
    console = Console(highlight=False)
    table = Table("", "teacher", "student", "ratio", box=None, header_style="bold")
    teacher, student = result["teacher"], result["student"]
    for key in teacher:
        ratio = student[key] / teacher[key]
        table.add_row(key, f"{teacher[key]:,}", f"{student[key]:,}", f"{ratio:.2f}")
    console.print(table)
    if result["legal_architectures"] > 1:
        console.print(
            f"{result['legal_architectures']:,} legal architectures meet the budget; shown is the one most like the "
            "teacher. The search ranks them all and measures the best few."
        )
    training = result["training"]
    console.print(
        f"Distillation: {training['steps']:,} steps of {training['batch_blocks']} × {training['block_size']} tokens "
        f"({training['tokens']:,} in all), learning rate {training['learning_rate']:.2g}"
        + (" · √(KL at the start)" if training["by_distance"] else "")
    )
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in result["peak_memory_parts"].items())
    each = " on each" if result["gpus"] > 1 else ""
    console.print(f"Peak memory of the training{each}: about {result['peak_memory_bytes'] / 1e9:.1f} GB ({parts})")
    for stage in ("search", "repair"):
        if need := result[f"{stage}_memory_bytes"]:
            console.print(f"Peak memory of the {stage}: about {need / 1e9:.1f} GB")
    stages = " · ".join(f"{stage} {duration(time)}" for stage, time in result["seconds"].items())
    where = "on this machine, now" if result["gpus"] == 1 else f"on {result['gpus']} GPUs"
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
