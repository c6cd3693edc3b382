"""What happened, for people: `report.html` (one file, no network, no script) and the model card.

Both show the content of `5-report.json`, with the verdict in front. A part that is missing is left out.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from prunus import formats, pictures
from prunus.architecture import AXES
from prunus.families.family import MADE_UP
from prunus.files import atomic_file
from prunus.verdict import SPEEDS, Report, cautions, compared, complete, evaluated, final_stage, grade, verdict

CANDIDATES_SHOWN = 12
FIELDS: dict[str, tuple[str, Callable[[float | None], str], str]] = {
    "parameters": ("Parameters", formats.count, ""),
    "bytes": ("Size on disk", formats.byte_size, ""),
    "kv_bytes_per_token": ("KV cache per token", formats.byte_size, ""),
    "flops_per_token": ("FLOPs per token", formats.count, ""),
    "perplexity": ("Perplexity", formats.number, "lower is better"),
    "bits_per_byte": ("Bits per byte", formats.number, "lower is better"),
    "kl_to_teacher": ("KL to the teacher", formats.number, "nats per token, lower is better"),
    "top1_agreement": ("Same first choice", formats.percent, "agreement with the teacher on the likeliest next token"),
    "prefill_tokens_per_second": ("Prompt tokens/s", formats.number, "higher is better"),
    "decode_tokens_per_second": ("Generated tokens/s", formats.number, "higher is better"),
}
"""What is known of a model → its name, form and note on the page."""
COMPARISONS = ("kl_to_teacher", "top1_agreement")
"""Fields that compare with the teacher, so that student / teacher says nothing more."""
SIZE_FIELDS = [
    (key, FIELDS[key]) for key in ("parameters", "bytes", "flops_per_token", "perplexity", "kl_to_teacher")
] + [("decode_speedup", ("Generation", formats.times, ""))]
"""Columns of the page of several sizes."""
COSTS = {
    "weights": ("bytes of the weights", formats.byte_size),
    "memory": ("weights and KV cache", formats.byte_size),
    "flops": ("FLOPs per token", formats.count),
    "latency": ("ms per generated token", lambda microseconds: formats.number(microseconds / 1000)),
}
TILES = ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token", "decode_tokens_per_second", "perplexity")


def write_report(report: Report, to: Path) -> None:
    """Write the page as one self-contained HTML file; it appears whole or not at all.

    Args:
        report: the content of `5-report.json`.
        to: the file to write.
    Raises:
        BadOutput: the disk is full.
    """
    report = complete(report)
    html = _templates().get_template("report.html.jinja").render(_words(report) | _pictures(report))
    with atomic_file(to) as partial:
        partial.write_text(html, encoding="utf-8")


def write_family(family: Report, to: Path) -> None:
    """The page of several sizes of one teacher, as `write_report`.

    Args:
        family: the content of `family.json`.
    """
    everyone = [family["teacher"], *family["sizes"]]
    rows = [
        {"name": each["name"], "page": each["page"], "cells": [form(each[key]) for key, (_, form, _) in SIZE_FIELDS]}
        for each in everyone
    ]
    tried = [
        {
            "name": each["name"] if number else "teacher",
            "measured": {"loss": each["loss"]},
            "costs": {"weights": each["bytes"], "flops": each["flops_per_token"]},
        }
        for number, each in enumerate(everyone)
    ]
    words = {
        "teacher": family["teacher"],
        "sizes": family["sizes"],
        "columns": [title for _, (title, _, _) in SIZE_FIELDS],
        "rows": rows,
        "pareto": pictures.pareto(tried, {kind: COSTS[kind] for kind in ("weights", "flops")}),
    }
    html = _templates().get_template("family.html.jinja").render(words)
    with atomic_file(to) as partial:
        partial.write_text(html, encoding="utf-8")


def model_card(report: Report) -> str:
    """README.md of the output model: YAML front matter for the hub, then results, how it was made, and its limits.

    A card is published, so folders of this machine are cut out of it.
    """
    whole = complete(report)
    words = _words({**whole, "recipe": _without_folders(whole["recipe"])})
    teacher = (report.get("teacher") or {}).get("name", "")
    sees = (report.get("student") or {}).get("sees", False)
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", teacher)
    front = {
        "base_model": teacher if is_hub_id and not Path(teacher).exists() else words["name"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        "tags": ["prunus", "pruned", *["distilled"] * (final_stage(complete(report)) == "distilled")],
    }
    front_matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    loader = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    template = _templates().get_template("model_card.md.jinja")
    card = template.render(words, base=front["base_model"], front=front_matter, loader=loader)
    return re.sub(r"(?<![\w:/.<~-])~?/(?:[\w.@+-]+/)+", "", card)


def _without_folders(value: Any) -> Any:
    """A recipe in which local paths are their last part: what a pattern finds of them in prose ends at a blank."""
    if isinstance(value, Mapping):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~/")) else value


def before_training(report: Report) -> Report:
    """The report as of the student that was cut and not trained yet, for a card of its own. Where a later student was
    timed, this one was not, and the teacher's speed alone says nothing."""
    models = [model for model in report["models"] if model["key"] not in ("distilled", "baseline")]
    if len(models) < len(report["models"]):
        models = [{key: value for key, value in model.items() if key not in SPEEDS.values()} for model in models]
    return {**report, "models": models, "training": None}


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: bool(name and name.endswith(".html.jinja")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = _markdown
    return environment


def _markdown(text: str) -> str:
    """Text as text: no HTML, no table cell or emphasis begun by accident."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*|\[\]])", r"\\\1", one_line.replace("&", "&amp;").replace("<", "&lt;"))


# -------------------- words and tables


def _words(report: Report) -> dict[str, Any]:
    """Everything that the templates show, except the pictures."""
    distilled = final_stage(report) == "distilled"
    return {
        "name": _name(report),
        "headline": _headline(report),
        "created": report["created"].replace("T", " ")[:16],
        "made": f"Pruned{' and distilled' * distilled} by Prunus {report['prunus']}",
        "grade": grade(report),
        "verdict": verdict(report),
        "cautions": cautions(report),
        "tiles": _tiles(report),
        "results": _results(report) if report["models"] else None,
        "training": _training(report["training"]) if report["training"].get("curve") else [],
        "functions": report["scores"].get("functions", {}),
        "removed_layers": _removed_layers(report),
        "cut_from": "the larger student" if report["parent"] else "the teacher",
        "code": report["student"].get("code"),
        "candidates": _candidates(report),
        "shape": _shape(report),
        "groups": _groups(report),
        "samples": _samples(report),
        "recipe": yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True) if report["recipe"] else "",
        "provenance": _provenance(report),
        "budget": {"text": "", "note": "", **report["budget"]},
        "text": dict.fromkeys(("calibration", "repair", "train", "heldout"), "") | _texts(report),
        "stages": _stages(report),
        "total_time": formats.seconds(sum(stage["seconds"] for stage in report["stages"])),
    }


def _name(report: Report) -> str:
    """The last part of a hub id or path."""
    path = Path(report["teacher"].get("name", "unnamed model"))
    return path.stem if path.suffix == ".gguf" else path.name


def _headline(report: Report) -> str:
    teacher, student = (model.get("parameters") for model in compared(report))
    if teacher is None or student is None:
        return _name(report)
    change = f"{formats.count(teacher)} → {formats.count(student)} parameters ({formats.times(student / teacher)})"
    return f"{_name(report)}: {change}"


def _removed_layers(report: Report) -> list[int]:
    """Of what was cut last: the teacher, or where there is one the earlier student of it."""
    layers = (report["parent"] or report["teacher"]).get("architecture", {}).get("layers", 0)
    return sorted(set(range(layers)) - set(report["kept"].get("layers", range(layers))))


def _tiles(report: Report) -> list[dict[str, str]]:
    """The numbers of the headline."""
    teacher, student = compared(report)
    tiles = []
    for field in TILES:
        name, show, _ = FIELDS[field]
        old, new = teacher.get(field), student.get(field)
        if formats.ratio(new, old) is not None:
            change = formats.times(formats.ratio(new, old))
            tiles.append({"name": name, "ratio": change, "detail": f"{show(old)} → {show(new)}"})
    return tiles


def _results(report: Report) -> dict[str, Any]:
    """The main table: a row per metric and task, a column per model, and the student relative to the teacher."""
    models, final = report["models"], final_stage(report)
    columns = [{"label": model["label"], "final": model["key"] == final} for model in models]
    metrics = [field for field in FIELDS if any(model.get(field) is not None for model in models)]
    tasks = dict.fromkeys(task for model in models for task in model.get("tasks") or {})
    rows = [*(_metric_row(field, report) for field in metrics), *(_task_row(task, report) for task in tasks)]
    return {"columns": columns, "rows": rows}


def _metric_row(field: str, report: Report) -> dict[str, Any]:
    name, show, note = FIELDS[field]
    old, new = (model.get(field) for model in compared(report))
    change = "" if field in COMPARISONS else formats.times(formats.ratio(new, old))
    cells = [show(model.get(field)) for model in report["models"]]
    return {"name": name, "note": note, "cells": cells, "change": change}


def _task_row(task: str, report: Report) -> dict[str, Any]:
    teacher, student, *shown = (
        (model.get("tasks") or {}).get(task, {}) for model in (*compared(report), *report["models"])
    )
    if not any("acc" in result for result in shown):
        metric = next((name for result in shown for name in result if "stderr" not in name), "")
        cells = [formats.number(result.get(metric)) for result in shown]
        return {"name": task, "note": metric.partition(",")[0].replace("_", " "), "cells": cells, "change": ""}
    cells = [formats.accuracy(result.get("acc"), result.get("acc_stderr")) for result in shown]
    old, new = teacher.get("acc"), student.get("acc")
    change = formats.points(None if old is None or new is None else new - old)
    return {"name": task, "note": "accuracy ± standard error", "cells": cells, "change": change}


def _training(training: Report) -> list[tuple[str, str]]:
    losses = [point["loss"] for point in training["curve"]]
    # One step's loss says more of its text than of the student.
    tenth = -(-len(losses) // 10)
    first, last = (statistics.fmean(some) for some in (losses[:tenth], losses[-tenth:]))
    rounds = training.get("rounds", 1)
    return [
        *([("rounds", f"{rounds} of as many tokens; this is the last")] if rounds > 1 else []),
        ("steps", formats.count(training["steps"])),
        ("tokens", formats.count(training["tokens"])),
        ("time", formats.seconds(training["seconds"])),
        ("tokens/s", formats.number(training["tokens_per_second"])),
        ("peak learning rate", f"{max(point['learning_rate'] for point in training['curve']):.2g}"),
        ("loss, first and last tenth", f"{formats.number(first)} → {formats.number(last)}"),
    ]


def _candidates(report: Report) -> dict[str, Any] | None:
    """The best candidates and always the chosen one; None where the user named the architecture."""
    candidates = report["candidates"]
    if all(candidate["predicted_damage"] is None for candidate in candidates):
        return None
    shown = [c for number, c in enumerate(candidates) if number < CANDIDATES_SHOWN or c["chosen"]]
    rows, more = [_candidate(candidate) for candidate in shown], len(candidates) - len(shown)
    axes = [axis for axis in AXES if axis in shown[0]["architecture"]]
    known = {key: any(candidate.get(key) for candidate in candidates) for key in ("measured", "trained")}
    return {"axes": axes, "rows": rows, "more": more, **known}


def _candidate(candidate: Report) -> dict[str, Any]:
    measured = candidate["measured"] or {}
    trained = candidate.get("trained") or {"tokens": [None], "losses": [None]}
    return {
        "sizes": [formats.count(candidate["architecture"][axis]) for axis in AXES if axis in candidate["architecture"]],
        "parameters": formats.count(candidate["parameters"]),
        "predicted": formats.number(candidate["predicted_damage"]),
        "loss": formats.number(measured.get("loss")),
        "perplexity": formats.number(measured.get("perplexity")),
        "tokens": formats.count(trained["tokens"][-1]),
        "trained": formats.number(trained["losses"][-1]),
        "chosen": candidate["chosen"],
    }


def _shape(report: Report) -> list[tuple[str, str, str, str]]:
    """Each size: its name, of the teacher, of the student, and the change if there is one."""
    teacher, student = (model.get("architecture", {}) for model in compared(report))
    sizes = [(name, teacher[name], student[name]) for name in teacher if name in student and name not in MADE_UP]
    return [(name, f"{old:,}", f"{new:,}", formats.times(new / old) if new != old else "") for name, old, new in sizes]


def _groups(report: Report) -> dict[str, Any] | None:
    """Parameters of each part of teacher and student, with widths for the bars (per cent of the teacher)."""
    teacher, student = (model.get("parameters_by_group", {}) for model in compared(report))
    if not teacher or not student:
        return None
    rows = []
    bars: dict[str, list[dict[str, Any]]] = {"Teacher": [], "Student": []}
    for number, (name, old) in enumerate(teacher.items()):
        new, part = student.get(name, 0), {"name": name, "colour": number % 5}
        change = formats.times(formats.ratio(new, old))
        rows.append(part | {"teacher": formats.count(old), "student": formats.count(new), "change": change})
        for bar, size in zip(bars.values(), (old, new), strict=True):
            bar.append(part | {"width": round(100 * size / sum(teacher.values()), 2)})
    return {"rows": rows, "bars": bars}


def _samples(report: Report) -> list[dict[str, Any]]:
    labels = {key: model["label"] for key, model in evaluated(report).items()}
    return [
        sample | {"continuations": [(labels.get(key, key), text) for key, text in sample["continuations"].items()]}
        for sample in report["samples"]
    ]


def _provenance(report: Report) -> list[tuple[str, str]]:
    facts = [("prunus", report["prunus"]), *report["versions"].items()]
    for who in ("teacher", "parent", "student"):
        if not report[who]:
            continue
        facts += [(who, report[who].get("name")), (f"{who} sha256", report[who].get("fingerprint"))]
    texts = _texts(report)
    facts += [(f"{use} text", f"{texts[use]} · {text['fingerprint']}") for use, text in report["text"].items()]
    budget = report["budget"]
    facts.append(("budget", " · ".join(filter(None, [budget.get("text"), *_limits(budget), budget.get("note")]))))
    return [(name, value) for name, value in facts if value]


def _limits(budget: Report) -> Iterator[str]:
    for limit in budget.get("limits", []):
        sizes = [f"{key} {limit[key]:,.0f}" for key in ("target", "planned", "counted") if limit.get(key)]
        yield f"{' · '.join(sizes)} {limit['unit']}"


def _texts(report: Report) -> dict[str, str]:
    """Use → `250K tokens of wikitext-103 test`."""
    return {use: f"{formats.count(text['tokens'])} tokens of {text['source']}" for use, text in report["text"].items()}


def _stages(report: Report) -> list[dict[str, Any]]:
    seconds = {stage["name"]: stage["seconds"] for stage in report["stages"]}
    longest = max([1, *seconds.values()])
    return [{"name": n, "time": formats.seconds(s), "width": round(100 * s / longest, 1)} for n, s in seconds.items()]


# -------------------- pictures


def _pictures(report: Report) -> dict[str, Any]:
    curves = {"distilled": report["training"].get("curve"), "random init": report["training"].get("baseline_curve")}
    known = {name: points for name, points in curves.items() if points}
    tried = [candidate for candidate in report["candidates"] if candidate["measured"]]
    return {
        "importance": _importance_pictures(report) if report["scores"] else [],
        "curve": pictures.training(known) if known else None,
        "scatter": pictures.candidates(tried) if len(tried) > 2 else None,
        "pareto": _pareto(tried, report["uncut"]),
    }


def _pareto(tried: list[Report], uncut: Report | None) -> pictures.Picture | None:
    if len(tried) < 2 or not uncut or not uncut["measured"]:
        return None
    kinds = ["memory", "latency" if "latency" in uncut["costs"] else "flops"]
    named = [{**each, "name": "chosen" * each["chosen"]} for each in tried]
    return pictures.pareto([*named, {**uncut, "name": "uncut"}], {kind: COSTS[kind] for kind in kinds})


def _importance_pictures(report: Report) -> list[pictures.Picture]:
    scores, kept, removed = report["scores"], report["kept"], _removed_layers(report)
    kept_heads = dict(zip(kept["layers"], kept["heads"], strict=True)) if kept and kept["heads"] else None
    if kept_heads:  # nothing was removed where there was none
        kept_heads |= {layer: list(range(len(row))) for layer, row in enumerate(scores["heads"]) if not any(row)}
    return [
        pictures.layers(scores["layers"], scores.get("leave_one_out"), removed),
        *([pictures.heads(scores["heads"], kept_heads)] if "heads" in scores else []),
        pictures.hidden(scores["hidden"], kept.get("hidden")),
        *([pictures.ffn(scores["ffn"]["quantiles"], removed)] if "ffn" in scores else []),
    ]
