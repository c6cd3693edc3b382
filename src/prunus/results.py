"""What a run found, as plain data: the contents of 2-candidates.json and 5-report.json."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import prunus
from prunus import cost
from prunus.architecture import Architecture
from prunus.budget import CONTEXT, LIMITS, Budget, Costs, costs_of
from prunus.checkpoint import Checkpoint
from prunus.distill import TRAINING_FILE
from prunus.evaluate import Quality
from prunus.prune import KEPT_FILE
from prunus.run import BASELINE, LARGER, Run, read_json
from prunus.scores import Scores
from prunus.search import Candidate, Search
from prunus.selection import ranked_layers
from prunus.text import Blocks

NOT_LOADED = (
    "{program}'s own code for {type} takes hidden for heads × head_dim, and does not load this student. transformers "
    "does, and vLLM with --model-impl transformers. A search proposes only what all load, unless search.portable is "
    "false."
)
OTHER_PATTERN = (
    "Layers of several kinds of attention no longer alternate as the teacher's do. transformers and vLLM read the kind "
    "of each from config.json; llama.cpp knows the teacher's pattern alone for some model types, and would not load "
    "the student, or compute something else without a word. Compare its output before relying on it."
)
LISTED_CANDIDATES = 30
FAMILY = "family.json"


def searched(found: Search, parent: Checkpoint, budget: Budget) -> dict[str, Any]:
    """2-candidates.json of a search."""
    best = found.best.architecture
    return {
        "budget": {
            "text": str(budget),
            "limits": [
                {
                    "kind": limit.kind,
                    "unit": LIMITS[limit.kind].unit,
                    "target": limit.target,
                    "whole": limit.whole,
                    "planned": budget.cost(limit, best),
                }
                for limit in budget.limits
            ],
            "context": budget.costs.context,
            "planned_parameters": found.best.parameters,
            "note": found.note,
        },
        "probes": dict(found.probes),
        "considered": found.considered,
        "uncut": {
            "costs": _costs(budget.costs, parent.architecture),
            "measured": found.uncut and _measured(found.uncut),
        },
        "candidates": [
            _candidate(entry, chosen=entry is found.best) | {"costs": _costs(budget.costs, entry.architecture)}
            for entry in found.candidates[:LISTED_CANDIDATES]
        ],
    }


def _costs(costs: Costs, architecture: Architecture) -> dict[str, int]:
    """By the names of `LIMITS`; latency where it was timed."""
    kinds = [kind for kind in LIMITS if kind != "latency" or costs.rates]
    return {kind: LIMITS[kind].of(costs, architecture) for kind in kinds}


def _measured(quality: Quality) -> dict[str, float]:
    return {"loss": quality.loss, "perplexity": quality.perplexity}


def explicit(teacher: Checkpoint, target: Architecture, scores: Scores) -> dict[str, Any]:
    """2-candidates.json of an architecture that the user named."""
    parameters = cost.parameters(teacher.family, teacher.layout, target, ranked_layers(scores, teacher.architecture))
    return {
        "budget": {
            "text": f"arch {target}",
            "limits": [{"kind": "params", "unit": "parameters", "target": parameters, "planned": parameters}],
            "planned_parameters": parameters,
            "note": None,
        },
        "probes": {},
        "considered": 1,
        "candidates": [_candidate(Candidate(target, parameters, float("nan")), chosen=True)],
    }


def chosen(candidates: Mapping[str, Any], teacher: Checkpoint) -> Architecture:
    """The architecture that a search or the user settled on."""
    entry = next(entry for entry in candidates["candidates"] if entry["chosen"])
    return teacher.architecture.replace(**entry["architecture"])


def _candidate(candidate: Candidate, *, chosen: bool) -> dict[str, Any]:
    measured = candidate.measured
    damage = candidate.predicted_damage
    return {
        "architecture": dict(candidate.architecture),
        "parameters": candidate.parameters,
        "predicted_damage": None if damage != damage else damage,
        "measured": measured and _measured(measured),
        "trained": None if candidate.trained is None else asdict(candidate.trained),
        "chosen": chosen,
    }


def collect(run: Run) -> dict[str, Any]:
    """5-report.json: all that the stages which ran have to say."""
    evaluation = read_json(run.path("evaluate")) if run.finished("evaluate") else {}
    searched = run.candidates if run.finished("search") else None
    student = run.distilled if run.finished("distill") else run.pruned if run.finished("prune") else None
    training = _training(run)
    return {
        "prunus": prunus.__version__,
        "created": datetime.now(UTC).isoformat("T", "seconds"),
        "versions": versions(),
        "recipe": run.recipe.model_dump(mode="json"),
        "teacher": _identified(run.teacher),
        "parent": _identified(run.parent) if run.finished("measure") and run.parent is not run.teacher else None,
        "student": _identified(student) if student else None,
        "budget": searched and _budget(searched["budget"], student),
        "text": {name: _text(blocks) for name, blocks in _texts(run).items()},
        "scores": _scores(run) if run.finished("score") else None,
        "kept": _kept(run) if run.finished("prune") else None,
        "candidates": searched["candidates"] if searched else [],
        "uncut": searched and searched.get("uncut"),
        "models": evaluation.get("models", []),
        "training": training and training | {"rounds": run.rounds.count},
        "samples": evaluation.get("samples", []),
        "stages": _stages(run),
        "warnings": warnings(run.teacher, student) if student else [],
    }


def warnings(teacher: Checkpoint, student: Checkpoint) -> list[str]:
    """What other programs do not load, or may not read as it is meant."""
    family, kind = student.family, student.family.text(student.config).model_type
    found = [
        NOT_LOADED.format(program=program, type=kind)
        for program in family.elsewhere
        if family.portable(teacher.architecture, [program]).illegal(student.architecture)
    ]
    before, after = (_kinds_of_attention(model) for model in (teacher, student))
    return found if after == before[: len(after)] else [*found, OTHER_PATTERN]


def _kinds_of_attention(checkpoint: Checkpoint) -> list[object]:
    """Of each layer: linear, sliding or whole, with rotary embedding or without; empty where all are the same."""
    config = checkpoint.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    mixed = {"sliding_attention", "linear_attention"} & set(kinds)
    for values in (getattr(config, "no_rope_layers", None), kinds if mixed else None):
        if values and len(set(values)) > 1:
            return list(values)
    return []


def _stages(run: Run) -> list[dict[str, Any]]:
    """What took how long; the run of a larger student counts as one stage. A training that was killed and gone on with
    remembers the time before, which its stage does not."""
    known = run.log["stages"].items()
    seconds = {name: entry["seconds"] for name, entry in known if run.finished(name)}  # --redo leaves others behind
    if "distill" in seconds:
        folders = [run.path("distill"), *([run.root / BASELINE] if run.baseline else [])]
        seconds["distill"] = max(seconds["distill"], sum(_record(folder)["seconds"] for folder in folders))
    stages = [{"name": name, "seconds": spent} for name, spent in seconds.items()]
    if run.larger is not None and "measure" in seconds:
        larger = Run(run.root / LARGER, run.larger)
        stages.insert(1, {"name": "larger student", "seconds": sum(stage["seconds"] for stage in _stages(larger))})
    return stages


def family(runs: Sequence[Run]) -> dict[str, Any]:
    """family.json: the teacher and each size, with what was measured of them. Its speed is beside the teacher's, which
    ran in turns with it."""
    reports = [read_json(run.root / "5-report.json") for run in runs]
    folders = [run.root.name for run in runs]
    teacher = next(model for model in reports[0]["models"] if model["key"] == "teacher")
    members = [
        {"name": name, "page": f"{name}/report.html", **_last(report)}
        for name, report in zip(folders, reports, strict=True)
    ]
    return {
        "created": datetime.now(UTC).isoformat("T", "seconds"),
        "teacher": {
            "name": reports[0]["teacher"]["name"],
            "page": None,
            **_costs_and(teacher, reports[0]["teacher"]),
            "decode_speedup": 1.0,
        },
        "sizes": members,
    }


def _last(report: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of the student that the run ended with."""
    model = next(m for m in reversed(report["models"]) if m["key"] in ("repaired", "distilled"))
    teacher = next(m for m in report["models"] if m["key"] == "teacher")
    rates = [each.get("decode_tokens_per_second") for each in (model, teacher)]
    return {**_costs_and(model, report["student"]), "decode_speedup": rates[0] and rates[0] / rates[1]}


def _costs_and(model: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    quality = ("loss", "perplexity", "kl_to_teacher", "top1_agreement")
    costs = ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token")
    return {key: model.get(key) for key in quality} | {key: facts[key] for key in costs}


def _identified(checkpoint: Checkpoint) -> dict[str, Any]:
    return model_facts(checkpoint) | {"fingerprint": checkpoint.fingerprint}


def model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What its config and the headers of its files say."""
    family, tensors, sizes = checkpoint.family, checkpoint.layout, checkpoint.architecture
    return {
        "name": checkpoint.name,
        "model_type": family.model_type,
        "sees": bool(family.vision),
        "code": family.folding.code_name if family.folding else None,
        "architecture": dict(sizes),
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.bytes,
        "parameters_by_group": cost.parameters_by_group(family, tensors, sizes),
        "flops_per_token": cost.flops_per_token(family, cost.shapes(family, tensors), sizes),
        "kv_bytes_per_token": kv_bytes_per_token(checkpoint),
    }


def kv_bytes_per_token(checkpoint: Checkpoint) -> int:
    """Of its own type."""
    shapes, width = cost.shapes(checkpoint.family, checkpoint.layout), checkpoint.dtype.itemsize
    return cost.kv_bytes_per_token(checkpoint.family, shapes, checkpoint.architecture, bytes_per_value=width)


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


def _budget(budget: dict[str, Any], student: Checkpoint | None) -> dict[str, Any]:
    """The budget with what the written student costs, as far as its own tensors tell: not the time of a token."""
    if student is None:
        return budget
    counted = _costs(costs_of(student, context=budget.get("context", CONTEXT)), student.architecture)
    limits = [limit | {"counted": counted.get(limit["kind"])} for limit in budget["limits"]]
    return budget | {"limits": limits}


def _texts(run: Run) -> dict[str, Blocks]:
    if not run.finished("text"):
        return {}
    texts = {"train": run.train, "calibration": run.calibration, "validation": run.validation, "heldout": run.test}
    return texts | ({"repair": run.repair_text} if run.recipe.prune.repair else {})


def _text(blocks: Blocks) -> dict[str, Any]:
    return {"source": blocks.source, "tokens": blocks.num_tokens, "fingerprint": blocks.fingerprint}


def _scores(run: Run) -> dict[str, Any]:
    scores, levels = run.scores, torch.linspace(0, 1, 11)
    return {
        "functions": {
            key.removeprefix("score/"): name for key, name in scores.provenance.items() if key.startswith("score/")
        },
        "layers": scores["layers"].tolist(),
        "leave_one_out": run.statistics.sums["leave_one_out"].tolist()
        if "leave_one_out" in run.statistics.sums
        else None,
        "hidden": scores["hidden"].tolist(),
        **({"heads": scores["heads"].tolist()} if "heads" in scores.axes else {}),
        **(
            {"ffn": {"quantiles": torch.quantile(scores["ffn"], levels, dim=1).T.tolist()}}
            if "ffn" in scores.axes
            else {}
        ),
    }


def _kept(run: Run) -> dict[str, Any]:
    kept = read_json(run.path("prune") / KEPT_FILE)["kept"]
    return {
        "layers": kept["layers"],
        "hidden": kept["hidden"],
        "heads": kept["inner"].get("heads"),
    }


def _training(run: Run) -> dict[str, Any] | None:
    if not run.finished("distill"):
        return None
    record = _record(run.path("distill"))
    if (run.root / BASELINE).is_dir():
        record["baseline_curve"] = _record(run.root / BASELINE)["curve"]
    return record


def _record(folder: Path) -> dict[str, Any]:
    return read_json(folder / TRAINING_FILE)
