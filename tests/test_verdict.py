"""What the page says about a run, and what it warns of."""

import math

import pytest

from prunus.comparison import label
from prunus.recipe import Prune
from prunus.verdict import cautions, compared, complete, final_stage, grade, verdict


def report(**distilled: object) -> dict:
    """A made-up run, distilled with a gain everywhere; `distilled` changes numbers of the final student."""
    sizes = {"parameters": 134_515_008, "bytes": 269_060_552, "flops_per_token": 268_959_744}
    fewer = {"parameters": 94_150_656, "bytes": 188_330_112, "flops_per_token": 188_000_000}
    speed = {"prefill_tokens_per_second": 1500.0, "decode_tokens_per_second": 40.0}
    faster = {"prefill_tokens_per_second": 2000.0, "decode_tokens_per_second": 60.0}
    final = {
        "key": "distilled",
        "perplexity": 28.5,
        "top1_agreement": 0.63,
        **faster,
        "tasks": tasks(0.38),
        **distilled,
    }
    return {
        "teacher": {**sizes, "kv_bytes_per_token": 23_040},
        "student": {**fewer, "kv_bytes_per_token": 15_360},
        "budget": {
            "text": "params 0.7x",
            "limits": [{"kind": "params", "unit": "parameters", "target": 94_160_506, "counted": 94_150_656}],
            "note": None,
        },
        "text": {
            "train": {"tokens": 24_000_000, "fingerprint": "aa"},
            "calibration": {"tokens": 262_144, "fingerprint": "bb"},
            "heldout": {"tokens": 250_000, "fingerprint": "cc"},
        },
        "models": [
            {"key": "teacher", "perplexity": 19.0, **speed, "tasks": tasks(0.5)},
            {"key": "cut", "perplexity": 3120.5},
            {"key": "repaired", "perplexity": 88.2, "kl_to_teacher": 1.52},
            final,
            {"key": "baseline", "perplexity": 140.3},
        ],
    }


def tasks(accuracy: float) -> dict:
    return {"arc_easy": {"acc": accuracy, "acc_stderr": 0.01}, "piqa": {"acc": accuracy + 0.2, "acc_stderr": 0.01}}


def test_verdict_says_what_was_won_and_lost() -> None:
    won, lost, path = verdict(complete(report()))
    assert won == (
        "The student has 30 % fewer parameters, 30 % fewer bytes on disk, 33 % fewer bytes of KV cache per token and "
        "30 % fewer FLOPs per token; on the same machine it reads prompts 1.33× as fast and generates 1.50× as fast."
    )
    assert lost == (
        "In exchange, perplexity on held-out text rises from 19.0 to 28.5 (1.50×), the teacher's first choice of next "
        "token is kept at 63.0 % of positions and mean accuracy over 2 tasks goes from 60.0 % to 48.0 %."
    )
    assert path == (
        "Perplexity was 3,120 after the cut, 88.2 after the repair, 28.5 after distillation and 140 for the same "
        "architecture trained from random weights."
    )


@pytest.mark.parametrize(
    ("corrected", "words"),
    [(True, "3,120 after the cut, 88.2 after the correction of the norms"), (False, "was 88.2 after the cut")],
)
def test_what_was_not_repaired_is_not_called_so(corrected: bool, words: str) -> None:
    run = report() | {"recipe": {"prune": {"repair": False, "norm_correction": corrected}}}
    if not corrected:
        del run["models"][1]
    path = verdict(complete(run))[2]
    assert words in path
    assert "repair" not in path
    assert "repair" not in label("repaired", Prune(repair=False, norm_correction=corrected))


def test_a_change_that_does_not_show_is_none() -> None:
    assert "perplexity on held-out text stays at 19.0 (1.00×)" in verdict(complete(report(perplexity=19.001)))[1]
    assert not [each for each in cautions(complete(report(perplexity=88.201))) if "worse" in each]


def test_a_group_counts_once() -> None:
    """Its members are listed beside it."""
    run = report()
    for model in run["models"]:
        if "tasks" in model:
            model["tasks"] |= {f"piqa_{n}": {"acc": 0.1} for n in range(9)}
    run["recipe"] = {"evaluate": {"tasks": ["arc_easy", {"name": "piqa", "file": "piqa.jsonl"}]}}
    assert "mean accuracy over 2 tasks goes from 60.0 % to 48.0 %" in verdict(complete(run))[1]


def test_a_gain_within_the_noise_of_timing_is_none() -> None:
    assert "generates about as fast as the teacher" in verdict(complete(report(decode_tokens_per_second=41.0)))[0]


def test_nothing_known_says_nothing() -> None:
    assert verdict(complete({})) == []
    assert grade(complete({})) == "Not compared with the teacher."


@pytest.mark.parametrize(
    ("perplexity", "words"),
    [(19.5, "Close"), (25.0, "Clearly worse"), (40.0, "Much worse"), (4e6, "not usable"), (math.inf, "not usable")],
)
def test_grade(perplexity: float, words: str) -> None:
    assert words in grade(complete(report(perplexity=perplexity)))


def test_the_student_is_the_furthest_stage() -> None:
    whole = complete(report())
    assert final_stage(whole) == "distilled"
    assert final_stage({**whole, "models": whole["models"][:3]}) == "repaired"
    assert final_stage(complete({})) is None
    teacher, student = compared(whole)
    assert (teacher["perplexity"], teacher["kv_bytes_per_token"]) == (19.0, 23_040)
    assert (student["perplexity"], student["kv_bytes_per_token"]) == (28.5, 15_360)


def test_no_false_alarm() -> None:
    assert cautions(complete(report())) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"perplexity": 18.0}, "below the teacher's"),
        ({"perplexity": 150.0}, "Distillation made the student worse (perplexity 88.2 → 150)."),
        ({"kl_to_teacher": 1.9}, "Distillation made the student worse (KL to the teacher 1.52 → 1.90)."),
        ({"perplexity": 145.0}, "trained from random weights is as good"),
        ({"perplexity": math.inf}, "not finite"),
        ({"perplexity": None}, "not measured"),
        ({"prefill_tokens_per_second": 1550.0}, "reads prompts 1.03× as fast as the teacher: no speed-up"),
        ({"decode_tokens_per_second": 20.0}, "generates 0.50× as fast as the teacher: no speed-up"),
        ({"decode_tokens_per_second": None, "prefill_tokens_per_second": None}, "Speed was not measured"),
        ({"tasks": tasks(0.49)}, "neither kept nor lost for certain: arc_easy, piqa"),
    ],
)
def test_cautions(changes: dict, words: str) -> None:
    assert words in " ".join(cautions(complete(report(**changes))))


@pytest.mark.parametrize(("target", "missed"), [(1000, False), (650, False), (500, True)])
def test_a_token_that_takes_longer_than_it_may_is_named(target: int, missed: bool) -> None:
    """40 tokens a second became 60."""
    run = report() | {"uncut": {"costs": {"latency": 700}}}  # of a larger student, which was cut
    limit = {"kind": "latency", "unit": "µs", "target": target, "whole": 1000}
    run["budget"] = {"text": "latency ?", "limits": [limit], "note": None}
    found = [each for each in cautions(complete(run)) if "budget" in each]
    assert bool(found) == missed
    if missed:
        assert "a token takes 67% of the teacher's time, allowed were 50%" in found[0]


def test_cautions_about_text_budget_and_stages() -> None:
    run = report() | {"warnings": ["the run's own"]}
    run["text"]["heldout"] = {"tokens": 5000, "fingerprint": "aa"}
    run["budget"]["limits"][0]["counted"] = 96_000_000
    del run["models"][3]
    found = " ".join(cautions(complete(run)))
    for words in (
        "the run's own",
        "is the train text",
        "on 5,000 tokens only",
        "96,000,000 parameters counted, 94,160,506 allowed",
        "was not distilled",
    ):
        assert words in found
