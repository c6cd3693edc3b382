"""The verdict in words, and the cautions: what the numbers of a report say, and what they give away.

A report is the content of `5-report.json`; each of its parts may be missing, where a stage was not run. All functions
but `complete` take a complete one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from prunus import formats
from prunus.formats import finite, ratio

Report = Mapping[str, Any]

PARTS = {
    str: ("prunus", "created"),
    dict: (
        *("versions", "recipe", "teacher", "parent", "student", "budget"),
        *("text", "scores", "kept", "uncut", "training"),
    ),
    list: ("candidates", "models", "samples", "stages", "warnings"),
}
"""The parts of a report by their type."""
TIMING_NOISE = 0.05
"""Relative difference of two tokens/s that a repeated timing run on a shared machine can show by chance."""
FEW_TOKENS = 20_000
"""Held-out tokens below which perplexity is a rough number."""
GRADES = {
    1.05: "Close to the teacher.",
    1.25: "Somewhat worse than the teacher.",
    1.5: "Clearly worse than the teacher.",
    3.0: "Much worse than the teacher.",
    math.inf: "Far from the teacher; not usable as it is.",
}
"""Student perplexity / teacher perplexity below this → what the page says first."""
STAGES = {"cut": "after the cut", "repaired": "after the repair", "distilled": "after distillation"}
NORMS_ALONE = "after the correction of the norms"
SAVINGS = {
    "parameters": "parameters",
    "bytes": "bytes on disk",
    "kv_bytes_per_token": "bytes of KV cache per token",
    "flops_per_token": "FLOPs per token",
}
QUALITIES = {"perplexity": "perplexity", "kl_to_teacher": "KL to the teacher"}
"""Lower is better."""
SPEEDS = {"reads prompts": "prefill_tokens_per_second", "generates": "decode_tokens_per_second"}


# -------------------- reading a report


def complete(report: Report) -> Report:
    """The report with something empty for each part that is missing."""
    return {part: report.get(part) or kind() for kind, parts in PARTS.items() for part in parts}


def evaluated(report: Report) -> dict[str, Report]:
    """The evaluated models by key."""
    return {model["key"]: model for model in report["models"]}


def final_stage(report: Report) -> str | None:
    """The furthest that the student got."""
    return next((stage for stage in reversed(STAGES) if stage in evaluated(report)), None)


def compared(report: Report) -> tuple[Report, Report]:
    """Teacher and student, each its description and its evaluation in one."""
    models = evaluated(report)
    teacher = {**models.get("teacher", {}), **report["teacher"]}
    student = {**models.get(final_stage(report) or "", {}), **report["student"]}
    return teacher, student


# -------------------- verdict


def grade(report: Report) -> str:
    teacher, student = compared(report)
    worse = math.inf if student.get("perplexity") == math.inf else _perplexity_ratio(teacher, student)
    if worse is None:
        return "Not compared with the teacher."
    return next((words for limit, words in GRADES.items() if worse < limit), GRADES[math.inf])


def verdict(report: Report) -> list[str]:
    """What was won, what was lost, and which stage did it: at most three sentences."""
    teacher, student = compared(report)
    sentences = (_won(teacher, student), _lost(teacher, student, _named_tasks(report)), _path(report))
    return [f"{words[0].upper()}{words[1:]}." for words in sentences if words]


def _won(teacher: Report, student: Report) -> str:
    ratios = {noun: ratio(student.get(field), teacher.get(field)) for field, noun in SAVINGS.items()}
    savings = [f"{100 * (1 - value):.0f} % fewer {noun}" for noun, value in ratios.items() if value and value < 0.995]
    speeds = [f"{verb} {_as_fast(value)}" for verb, value in _speeds(teacher, student).items()]
    clauses = [f"the student has {_and(savings)}"] if savings else []
    clauses += [f"on the same machine it {_and(speeds)}"] if speeds else []
    return "; ".join(clauses)


def _as_fast(value: float) -> str:
    return "about as fast as the teacher" if abs(value - 1) <= TIMING_NOISE else f"{formats.times(value)} as fast"


def _named_tasks(report: Report) -> set[str]:
    """Those that the user asked for: of a group, lm-eval lists the members too."""
    asked = report["recipe"].get("evaluate", {}).get("tasks", [])
    return {task if isinstance(task, str) else task["name"] for task in asked}


def _lost(teacher: Report, student: Report, named: set[str]) -> str:
    worse, shared, parts = _perplexity_ratio(teacher, student), _shared_tasks(teacher, student), list[str]()
    tasks = [task for task in shared if task in named] or shared
    if worse is not None:
        before, after = formats.number(teacher["perplexity"]), formats.number(student["perplexity"])
        moves = f"{'rises' if worse > 1 else 'falls'} from {before} to" if before != after else "stays at"
        parts.append(f"perplexity on held-out text {moves} {after} ({formats.times(worse)})")
    if student.get("top1_agreement") is not None:
        share = formats.percent(student["top1_agreement"])
        parts.append(f"the teacher's first choice of next token is kept at {share} of positions")
    if tasks:
        before, after = (
            formats.percent(fmean(model["tasks"][task]["acc"] for task in tasks)) for model in (teacher, student)
        )
        parts.append(f"mean accuracy over {len(tasks)} task{'s' * (len(tasks) > 1)} goes from {before} to {after}")
    opening = "meanwhile" if worse is not None and worse < 1 else "in exchange"
    return f"{opening}, {_and(parts)}" if parts else ""


def _path(report: Report) -> str:
    """Perplexity from stage to stage."""
    stages = STAGES | _unrepaired(report) | {"baseline": "for the same architecture trained from random weights"}
    known = _figures(report, "perplexity")
    parts = [f"{formats.number(known[stage])} {words}" for stage, words in stages.items() if stage in known]
    return f"perplexity was {_and(parts)}" if len(parts) > 1 else ""


def _unrepaired(report: Report) -> dict[str, str]:
    """How the stage after the cut is called where nothing was to be repaired."""
    options = {"repair": True, "norm_correction": True} | report["recipe"].get("prune", {})
    return {} if options["repair"] else {"repaired": NORMS_ALONE if options["norm_correction"] else STAGES["cut"]}


def _perplexity_ratio(teacher: Report, student: Report) -> float | None:
    return ratio(student.get("perplexity"), teacher.get("perplexity"))


def _figures(report: Report, field: str) -> dict[str, float]:
    """The finite ones, by model."""
    known = {key: finite(model.get(field)) for key, model in evaluated(report).items()}
    return {key: value for key, value in known.items() if value is not None}


def _shared_tasks(teacher: Report, student: Report) -> list[str]:
    """Tasks whose accuracy is known for both."""
    before, after = (model.get("tasks") or {} for model in (teacher, student))
    return [task for task in before if "acc" in before[task] and "acc" in after.get(task, {})]


def _speeds(teacher: Report, student: Report) -> dict[str, float]:
    """Verb → student speed / teacher speed, where both were measured."""
    ratios = {verb: ratio(student.get(field), teacher.get(field)) for verb, field in SPEEDS.items()}
    return {verb: value for verb, value in ratios.items() if value is not None}


def _and(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


# -------------------- cautions


def cautions(report: Report) -> list[str]:
    """What a reader must know before using the numbers: the run's own warnings, and what the numbers give away."""
    teacher, student = compared(report)
    return [
        *report["warnings"],
        *_quality_cautions(teacher, student),
        *_budget_cautions(report["budget"]),
        *_latency_cautions(report, _speeds(teacher, student)),
        *_stage_cautions(report),
        *_speed_cautions(teacher, student),
        *_text_cautions(report["text"]),
    ]


def _quality_cautions(teacher: Report, student: Report) -> Iterator[str]:
    worse = _perplexity_ratio(teacher, student)
    if worse is None:
        yield "Perplexity of teacher and student was not measured, or is not finite: the loss of quality is unknown."
    elif worse < 1:
        yield (
            "The student's perplexity is below the teacher's. That says that the held-out text resembles the training "
            "text, not that the student is the better model; look at tasks and other text."
        )
    shared = _shared_tasks(teacher, student)
    noisy = [task for task in shared if _within_noise(teacher["tasks"][task], student["tasks"][task])]
    if noisy:
        yield f"Within two standard errors of the teacher, so neither kept nor lost for certain: {', '.join(noisy)}."


def _within_noise(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """An unknown standard error counts as none."""
    error = math.hypot(before.get("acc_stderr", 0), after.get("acc_stderr", 0))
    return abs(after["acc"] - before["acc"]) < 2 * error


def _budget_cautions(budget: Report) -> Iterator[str]:
    for limit in budget.get("limits", []):
        target, counted = limit["target"], limit.get("counted")
        if counted is not None and counted > 1.01 * target:
            sizes = f"{counted:,.0f} {limit['unit']} counted, {target:,.0f} allowed"
            yield f"The budget ({budget['text']}) was missed: {sizes}."


def _latency_cautions(report: Report, speeds: Mapping[str, float]) -> Iterator[str]:
    """The time of a token is counted by nobody but the clock."""
    limits = [limit for limit in report["budget"].get("limits", []) if limit["kind"] == "latency"]
    if not limits or "generates" not in speeds:
        return
    allowed, measured = limits[0]["target"] / limits[0]["whole"], 1 / speeds["generates"]
    if measured > (1 + TIMING_NOISE) * allowed:
        yield (
            f"The budget ({report['budget']['text']}) was missed: a token takes {measured:.0%} of the teacher's time, "
            f"allowed were {allowed:.0%}."
        )


def _stage_cautions(report: Report) -> Iterator[str]:
    """A stage that did harm, or was not run."""
    known, final = _figures(report, "perplexity"), final_stage(report)
    repair = "The correction of the norms" if _unrepaired(report) else "The repair"
    for before, after, words in (("cut", "repaired", repair), ("repaired", "distilled", "Distillation")):
        figures = ((noun, _figures(report, field)) for field, noun in QUALITIES.items())
        rises = [rise for noun, values in figures if (rise := _rise(noun, values, before, after))]
        if rises:
            yield f"{words} made the student worse ({_and(rises)})."
    if final in ("cut", "repaired"):
        yield "The student was not distilled: nothing has trained it since the cut."
    baseline = ratio(known.get("baseline"), known.get(final or ""))
    if baseline is not None and baseline <= 1:
        yield "The same architecture trained from random weights is as good: the teacher's weights gained nothing."


def _rise(noun: str, values: Mapping[str, float], before: str, after: str) -> str:
    """'perplexity 88.2 → 150', where that shows in the digits of a report."""
    if before not in values or after not in values or values[after] <= values[before]:
        return ""
    old, new = (formats.number(values[stage]) for stage in (before, after))
    return f"{noun} {old} → {new}" if old != new else ""


def _speed_cautions(teacher: Report, student: Report) -> Iterator[str]:
    speeds = _speeds(teacher, student)
    if not speeds:
        yield "Speed was not measured on both models. Fewer parameters do not by themselves make a model faster."
    for verb, value in speeds.items():
        if value < 1 + TIMING_NOISE:
            yield (
                f"It {verb} {formats.times(value)} as fast as the teacher: no speed-up. "
                f"Timings vary by {TIMING_NOISE:.0%} or so by chance."
            )


def _text_cautions(text: Report) -> Iterator[str]:
    heldout = text.get("heldout")
    if heldout is None:
        return
    if heldout["tokens"] < FEW_TOKENS:
        yield f"Perplexity was measured on {formats.count(heldout['tokens'])} tokens only; take it as a rough number."
    same = [use for use, other in text.items() if use != "heldout" and other["fingerprint"] == heldout["fingerprint"]]
    if same:
        yield f"The held-out text is the {_and(same)} text: the perplexities are not those of unseen text."
