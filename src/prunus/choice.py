"""The search stage of a run: its scores and its budget become a list of candidates, the chosen one first."""

from __future__ import annotations

import shutil
from pathlib import Path

from prunus import architecture, console, latency, results
from prunus.budget import parse_budget
from prunus.checkpoint import Checkpoint, load
from prunus.prune import prune
from prunus.run import RATES, TOURNAMENT, Run, read_json, write_json
from prunus.schedule import Settings
from prunus.search import Candidate, Search, Standing, search
from prunus.selection import ranked_layers
from prunus.tournament import tournament


def choose(run: Run) -> None:
    """Find the architecture, unless the recipe names it."""
    recipe = run.recipe
    if recipe.arch is not None:
        named = architecture.parse(recipe.arch, run.parent.architecture)
        write_json(run.path("search"), results.explicit(run.parent, named, run.scores))
        return
    ranking = ranked_layers(run.scores, run.parent.architecture)
    rates = _rates(run) if recipe.latency else None
    budget = parse_budget(run.parent, whole=run.teacher, ranking=ranking, rates=rates, **recipe.limits)
    with console.bar("probes and candidates", unit="models") as step:
        found: Search = search(
            run.parent,
            run.scores,
            budget,
            calibration=run.calibration,
            heldout=run.validation,
            candidates=recipe.search.candidates,
            probe_blocks=max(1, recipe.search.probe_tokens // recipe.data.block_size),
            **recipe.search.space(),
            repair=recipe.prune.repair,
            **recipe.prune.manner(),
            progress=step,
        )
    if recipe.search.tokens:
        found = found.ordered(_tournament(run, found, rates))
    if recipe.latency:
        best = latency.tuned(run.parent, run.scores, budget, found.best.architecture, **recipe.search.space())
        found = found.with_best(best, budget)
    write_json(run.path("search"), results.searched(found, run.parent, budget))
    shutil.rmtree(run.root / TOURNAMENT, ignore_errors=True)


def _tournament(run: Run, found: Search, rates: dict[str, float] | None) -> dict[int, Standing]:
    """Train the measured candidates a little, if there are several. Number of each → how it did, best first."""
    recipe, folder = run.recipe, run.root / TOURNAMENT
    numbers = {str(each.architecture): number for number, each in enumerate(found.candidates) if each.measured}
    if len(numbers) < 2:
        return {}
    if rates is not None:
        folder.mkdir(exist_ok=True)
        write_json(folder / RATES, rates)
    students = {name: _candidate(run, found.candidates[number], folder / name) for name, number in numbers.items()}
    with console.bar("tournament", unit="tokens") as step:
        standings = tournament(
            run.teacher,
            students,
            run.train,
            run.validation,
            to=folder / "rounds",
            tokens=recipe.search.tokens or 0,
            settings=Settings(**recipe.distill.hyperparameters()),
            gradient_checkpointing=recipe.distill.gradient_checkpointing,
            workers=recipe.search.workers,
            progress=step,
        )
    return {numbers[name]: standing for name, standing in standings.items()}


def _candidate(run: Run, candidate: Candidate, to: Path) -> Checkpoint:
    """Cut and repaired, or as an earlier, killed run left it."""
    if to.is_dir():
        return load(to)
    options = run.recipe.prune
    return prune(
        run.parent,
        run.scores,
        candidate.architecture,
        to=to,
        calibration=run.calibration if options.repair else None,
        **options.manner(),
    )


def _rates(run: Run) -> dict[str, float]:
    """What a killed tournament began with: timed anew, the search would find other candidates."""
    file = run.root / TOURNAMENT / RATES
    if file.is_file():
        return read_json(file)
    with console.bar("timing", unit="models") as step:
        return latency.measured_rates(run.parent, run.scores, progress=step)
