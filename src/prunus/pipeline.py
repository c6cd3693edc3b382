"""READ FIRST. A teacher becomes a student: text → measure → score → search → prune → distill → evaluate → report."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from prunus import (
    console,
    cost,
    depth,
    hidden,
    importance,
    parallel,
    results,
    sizes,
    tasks,
    text,
)
from prunus.choice import choose
from prunus.claims import claim, claim_family
from prunus.comparison import compare
from prunus.distill import Progress, distill
from prunus.documents import chat_template, check_ends, shuffled
from prunus.errors import BadOutput
from prunus.files import atomic_file, share
from prunus.goal import check_goal
from prunus.measure import measure, save_statistics
from prunus.prune import prune
from prunus.recipe import STAGES, Recipe
from prunus.report import before_training, model_card, write_report
from prunus.run import BASELINE, LARGER, TEACHER_CACHE, TEXT, Run, check_folder, open_run, write_json
from prunus.schedule import Settings
from prunus.scores import save_scores
from prunus.selection import ranked_layers
from prunus.shared_tokens import check_ids
from prunus.sides import sides
from prunus.source import Source, opened
from prunus.teacher import Cache, describe, differences, open_cache, write_cache
from prunus.trackers import Track, tracked


def compress(recipe: Recipe, *, redo: bool = False, redo_stage: str | None = None, beside: Path | None = None) -> Run:
    """Do every stage that is not done yet, up to `recipe.stop_after`.

    Args:
        recipe: everything the run depends on.
        redo, redo_stage: see `claims.claim`.
        beside: a run whose text and whose cache of the teacher this one shares.
    Returns:
        the run; its files hold the results.
    """
    if len(recipe.sizes) > 1:
        return _several(recipe, redo, redo_stage)
    run = open_run(recipe)
    check_goal(run)
    with contextlib.ExitStack() as stack:
        parallel.first_alone(lambda: stack.enter_context(claim(run, redo=redo, redo_stage=redo_stage)))
        if beside is not None:
            parallel.first_alone(lambda: _share(run, beside))
        for stage in STAGES[: STAGES.index(recipe.stop_after) + 1]:
            if not parallel.first_says(run.finished(stage)) or stage == "report":
                if stage == "measure":
                    _make_larger(run)
                _do(stage, run)
        return run


def report_again(recipe: Recipe) -> Run:
    """The page and the model card from what a run holds, and of several sizes the page of all; nothing else is done.

    Raises:
        BadOutput: a size was not evaluated yet, or a baseline is wanted that is not there.
    """
    if len(recipe.sizes) > 1:
        members = sizes.members(recipe)
        if missing := [size.params for size in members if not Run(Path(size.to), size).finished("evaluate")]:
            raise BadOutput(
                f"{recipe.to}: {' and '.join(map(str, missing))} not evaluated yet; prunus compress {recipe.to} goes on"
            )
        runs = [report_again(size) for size in members]
        sizes.write_page(runs, Path(recipe.to))
        return runs[-1]
    run = open_run(recipe)
    if recipe.baseline and run.finished("evaluate") and not (run.root / BASELINE).exists():
        raise BadOutput(f"{run.root}: it has no baseline; prunus compress {run.root} --baseline trains one")
    with claim(run):
        _do("report", run)
    return run


def _share(run: Run, beside: Path) -> None:
    names = [TEXT, *([TEACHER_CACHE] if run.recipe.distill.teacher_cache else [])]
    for name in names:
        if (beside / name).is_dir() and not (run.root / name).exists():
            share(beside / name, run.root / name)


def _several(recipe: Recipe, redo: bool, redo_stage: str | None) -> Run:
    """A run for each size, on the same text and taught by the same teacher; the last is the smallest."""
    root, members, runs = check_folder(Path(recipe.to)), sizes.members(recipe), list[Run]()
    with contextlib.ExitStack() as stack:
        parallel.first_alone(lambda: stack.enter_context(claim_family(recipe, members[0])))
        done = parallel.first_says(sizes.had_again(root, redo_stage))
        for member in members:
            console.heading(f"{member.params}:")
            again = None if member.params in done else redo_stage
            try:
                runs.append(compress(member, redo=redo, redo_stage=again, beside=runs[0].root if runs else None))
                done = sorted({*done, str(member.params)})
                parallel.first_alone(partial(sizes.note_again, root, redo_stage, done, of=len(members)))
            finally:
                if parallel.world().first and not Run(Path(member.to), member).finished("report"):
                    sizes.forget_page(root)
        if recipe.stop_after == "report":
            parallel.first_alone(lambda: sizes.write_page(runs, root))
    return runs[-1]


def _make_larger(run: Run) -> None:
    """Where one cut would take too much: the student of the round before, a run of its own on the same text."""
    recipe, larger = run.larger, run.root / LARGER
    if recipe is None:
        return
    console.heading(f"a larger student first, of {int(recipe.params or 0):,} parameters:")
    compress(recipe, redo=True, beside=run.root)
    run.settle()
    console.heading(f"then {run.recipe.params} out of it:")
    if recipe.distill.teacher_cache is not None:
        parallel.first_alone(lambda: share(larger / TEACHER_CACHE, run.root / TEACHER_CACHE))


def _do(stage: str, run: Run) -> None:
    """One stage, and its time. Ranks train together; everything else the first does alone."""
    if stage == "distill":
        with run.timed(stage) if parallel.world().first else contextlib.nullcontext():
            _distill(run)
        return

    def alone() -> None:
        with run.timed(stage):
            RUN_STAGE[stage](run)

    parallel.first_alone(alone)


def _text(run: Run) -> None:
    """Tokenise the training and the held-out text into packed blocks."""
    data, tokenizer = run.recipe.data, run.teacher.tokenizer()
    beside = max(run.recipe.measure.tokens, run.recipe.prune.tokens)
    limit = run.recipe.distill.tokens and run.recipe.distill.tokens + beside
    for part in data.sources:
        check_ends(part.source, limit)
    found = sides(data, chat_template(tokenizer))
    labels = {"train": data.label, "heldout": data.heldout or f"the held-out share of {data.label}"}
    for name, most in {"heldout": data.heldout_tokens, "train": limit}.items():  # the short one first: it may not do
        to = run.root / TEXT / name
        if not to.exists():
            with console.bar(f"{name} text", unit="tokens") as step:
                text.tokenise(
                    shuffled(found[name], seed=0),
                    tokenizer,
                    block_size=data.block_size,
                    max_tokens=most,
                    to=to,
                    label=labels[name],
                    progress=partial(step, total=most),
                )


def _measure(run: Run) -> None:
    """One pass over the calibration text."""
    options = run.recipe.measure
    for blocks in (run.train, run.validation, run.test):
        check_ids(blocks, run.first, run.teacher)
    source, gradients = opened(run.parent), options.gradients
    by_task = _by_task(run, source)  # first: a task that cannot be had should say so at once
    with console.bar("layers", unit="layers") as step:
        statistics = measure(run.parent, run.calibration, source=source, gradients=gradients, progress=step)
    for kind in depth.KINDS:
        if getattr(options, kind):
            with console.bar(kind.replace("_", " "), unit="layers") as step:
                statistics = depth.with_depth(
                    kind, run.parent, statistics, run.validation, source=source, progress=step
                )
    save_statistics(statistics.with_sums(by_task), run.path("measure"))


def _by_task(run: Run, model: Source) -> dict[str, Tensor]:
    """What the score contiguous_by_task needs, if the recipe asks for it."""
    options = run.recipe.measure
    if options.contiguous_by_task is None:
        return {}
    task = tasks.from_recipe(options.contiguous_by_task)
    wrong = partial(tasks.error_rate, tokenizer=run.parent.tokenizer(), task=task, limit=options.task_rows)
    with console.bar("contiguous by task", unit="layers") as step:
        return {"contiguous_by_task": depth.contiguous_by_task(model, wrong, progress=step)}


def _score(run: Run) -> None:
    save_scores(importance.score(run.statistics, **run.recipe.score.model_dump(exclude_none=True)), run.path("score"))


def _prune(run: Run) -> None:
    """Cut, repair, write, compare."""
    options, target = run.recipe.prune, results.chosen(run.candidates, run.parent)
    ranking = ranked_layers(run.scores, run.parent.architecture)
    parameters = cost.parameters(run.parent.family, run.parent.layout, target, ranking)
    run.require_space(1.1 * parameters * run.parent.dtype.itemsize, "the pruned model")
    with console.bar("repair", unit="layers") as step:
        prune(
            run.parent,
            run.scores,
            target,
            to=run.path("prune"),
            calibration=run.repair_text if options.repair else None,
            progress=step,
            **options.manner(),
        )


def _distill(run: Run) -> None:
    """Train the student on its teacher; with `baseline` also its shape from random weights."""
    options = run.recipe.distill
    settings = Settings(**options.hyperparameters())
    tokens = settings.tokens or run.train.num_tokens
    rounds = run.rounds.count  # the earlier ones had their tokens
    own = settings if rounds == 1 else replace(settings, tokens=tokens // rounds)
    # The result, and float32 weights with Adam's two moments while it is under way.
    run.require_space(run.pruned.bytes + 12 * run.pruned.parameters, "distillation")
    teacher = run.teacher if options.teacher_cache is None else _teacher_cache(run, options.teacher_cache)
    pairs = None
    if settings.hidden_loss is not None:
        pairs = hidden.pairs(run.pruned, run.teacher, count=settings.hidden_layers, cut=run.parent is run.teacher)
    starts = {run.path("distill"): own} | ({run.root / BASELINE: settings} if run.recipe.baseline else {})
    for to, training in starts.items():
        if to.exists():
            continue
        random_init = to.name == BASELINE
        name = "random init" if random_init else "student"
        with console.bar(name, unit="tokens") as step, tracked(options.trackers, f"{run.root.name} {name}") as track:
            distill(
                run.pruned,
                teacher,
                run.train,
                to=to,
                settings=training,
                pairs=pairs,
                validation=run.validation if settings.evaluate_every else None,
                gradient_checkpointing=options.gradient_checkpointing,
                compiled=options.compile,
                checkpoint_seconds=options.checkpoint_seconds,
                random_init=random_init,
                progress=partial(_show_step, step, track),
            )


def _teacher_cache(run: Run, kind: str) -> Cache:
    """What the teacher says of the training text, written once and read by every training of this run, and of others
    on the same text: its samples do not depend on the seed of a training."""
    options, folder = run.recipe.distill, run.root / TEACHER_CACHE

    def write() -> None:
        wanted = describe(
            run.teacher,
            run.train,
            kind=kind,
            per_token=options.cache_per_token,
            temperature=options.temperature,
        )
        if folder.is_dir() and differences(folder, wanted):
            shutil.rmtree(folder)  # of an earlier recipe of this run
        with console.bar("teacher cache", unit="tokens") as step:
            write_cache(run.teacher, run.train, wanted, to=folder, progress=step)

    parallel.first_alone(write)
    return open_cache(folder)


def _show_step(step: Callable[..., None], track: Track, at: Progress) -> None:
    step(at.tokens, at.total_tokens, f"loss {at.loss:.3f}")
    track(at)


def _evaluate(run: Run) -> None:
    write_json(run.path("evaluate"), compare(run))


def _report(run: Run) -> None:
    """Everything that is there, as JSON, as a page, and as the model's card."""
    report = results.collect(run)
    write_json(run.root / "5-report.json", report)
    write_report(report, run.root / "report.html")
    for stage, known in {"prune": before_training(report), "distill": report}.items():
        if run.finished(stage):
            with atomic_file(run.path(stage) / "README.md") as card:
                card.write_text(model_card(known), encoding="utf-8")


RUN_STAGE: dict[str, Callable[[Run], None]] = {
    "text": _text,
    "measure": _measure,
    "score": _score,
    "search": choose,
    "prune": _prune,
    "evaluate": _evaluate,
    "report": _report,
}
