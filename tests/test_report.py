"""The page and the card: complete, honest, harmless, and at ease with stages that were not run."""

import copy
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from prunus import report as module
from prunus.report import model_card, write_report

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x> $\\frac{| & **b**"


def full_report(layers: int = 30, hidden: int = 576, heads: int = 9, kv_heads: int = 3) -> dict:
    """A made-up run on a model of SmolLM2-135M's size (or another)."""
    random = np.random.default_rng(0)
    kept_layers = [i for i in range(layers) if i not in (layers // 2, layers // 2 + 1, layers - 4)]
    kept_heads = [sorted(random.permutation(heads)[: 2 * heads // 3].tolist()) for _ in kept_layers]
    hidden_scores = np.exp(random.normal(size=hidden) * 0.8)
    hidden_scores[:3] *= 60
    teacher = {
        "name": "HuggingFaceTB/SmolLM2-135M",
        "model_type": "llama",
        "fingerprint": "3f9a" * 16,
        "architecture": _sizes(layers, hidden, 1536, heads, kv_heads),
        "parameters": 134_515_008,
        "bytes": 269_060_552,
        "parameters_by_group": {"embedding": 28_311_552, "attention": 26_542_080, "ffn": 79_626_240, "norms": 35_136},
        "flops_per_token": 268_959_744,
        "kv_bytes_per_token": 23_040,
    }
    student = teacher | {
        "name": "out/4-distilled",
        "fingerprint": "b071" * 16,
        "architecture": _sizes(len(kept_layers), hidden * 3 // 4, 1280, 2 * heads // 3, kv_heads - 1),
        "parameters": 94_150_656,
        "bytes": 188_330_112,
        "parameters_by_group": {"embedding": 21_233_664, "attention": 15_925_248, "ffn": 56_967_936, "norms": 23_808},
        "flops_per_token": 188_000_000,
        "kv_bytes_per_token": 15_360,
    }
    curve = [
        {"step": s, "tokens": s * 16_384, "loss": 1.2 + 2.2 * math.exp(-s / 300) + 0.06 * random.normal(), "lr": 3e-4}
        for s in range(1, 1500)
    ]
    return {
        "prunus": "0.1.0",
        "created": "2026-10-11T12:30:00+00:00",
        "versions": {"torch": "2.11.0", "transformers": "5.17.0", "python": "3.11.2", "cpu": "AMD EPYC 7B13, 8 cores"},
        "recipe": {
            "model": "HuggingFaceTB/SmolLM2-135M",
            "budget": "params 0.7x",
            "distill": {"steps": 1500, "lr": 3e-4},
        },
        "teacher": teacher,
        "student": student,
        "budget": {
            "text": "params 0.7x",
            "target": 94_160_506,
            "planned": 94_150_656,
            "counted": 94_150_656,
            "note": None,
        },
        "text": {
            "train": {"source": "wikitext-103 train", "tokens": 24_000_000, "fingerprint": "aa" * 8},
            "calibration": {"source": "wikitext-103 train", "tokens": 262_144, "fingerprint": "bb" * 8},
            "heldout": {"source": "wikitext-103 test", "tokens": 250_000, "fingerprint": "cc" * 8},
        },
        "scores": {
            "functions": {"ffn": "activation l2:mean", "hidden": "norm output l2", "layers": "block influence"},
            "layers": (0.05 + 0.3 * (np.linspace(-1, 1, layers) ** 2) + 0.02 * random.random(layers)).tolist(),
            "leave_one_out": (0.05 + 2 * (np.linspace(-1, 1, layers) ** 8)).tolist(),
            "hidden": hidden_scores.tolist(),
            "ffn": {"quantiles": np.sort(np.exp(random.normal(size=(layers, 11)) * 1.2), axis=1).tolist()},
            "heads": random.random((layers, heads)).tolist(),
            "kv_heads": random.random((layers, kv_heads)).tolist(),
        },
        "kept": {
            "layers": kept_layers,
            "hidden": np.sort(np.argsort(-hidden_scores)[: hidden * 3 // 4]).tolist(),
            "heads": kept_heads,
            "ffn_share": (0.8 + 0.15 * random.random(len(kept_layers))).tolist(),
        },
        "candidates": [
            {
                "architecture": _sizes(layers - 1 - i % 4, hidden - 32 * (i % 5), 1536 - 64 * i, heads, kv_heads),
                "parameters": 94_000_000 - 10_000 * i,
                "predicted_damage": 0.4 + 0.05 * i,
                "measured": {"loss": 3.6 + 0.04 * i + 0.1 * random.normal(), "perplexity": 37.0 + i} if i < 8 else None,
                "chosen": i == 1,
            }
            for i in range(20)
        ],
        "models": [
            _model("teacher", 134_515_008, 19.0, 0.0, 1.0, 0.412, (1520.0, 41.2)),
            _model("cut", 94_150_656, 3120.5, 4.9, 0.11, 0.262, (2010.0, 41.9)),
            _model("repaired", 94_150_656, 88.2, 1.71, 0.42, 0.301, (2010.0, 41.9)),
            _model("distilled", 94_150_656, 28.5, 0.52, 0.63, 0.384, (2013.0, 42.0)),
            _model("baseline", 94_150_656, 140.3, 2.2, 0.35, 0.271, (None, None)),
        ],
        "training": {
            "steps": 1500,
            "tokens": 24_576_000,
            "seconds": 5230.0,
            "tokens_per_second": 4699.0,
            "curve": curve,
            "baseline_curve": [point | {"loss": point["loss"] + 1.4} for point in curve],
        },
        "samples": [
            {
                "prompt": "The capital of France is",
                "continuations": {
                    "teacher": "Paris, the largest city of the country and the seat of its government. It lies on the",
                    "repaired": "the the city of the French and the city of of the",
                    "distilled": "Paris. It is the largest city in France, and one of the largest in Europe.",
                },
            }
        ]
        * 2,
        "stages": [
            {"name": n, "seconds": s}
            for n, s in (("measure", 63.1), ("search", 2.4), ("prune", 3.0), ("distill", 5230.0))
        ],
        "warnings": ["arc_easy was run on its first 500 questions only."],
    }


def _sizes(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> dict:
    sizes = {"layers": layers, "hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": kv_heads}
    return sizes | {"head_dim": 64, "vocab": 49_152}


def _model(key: str, parameters: int, perplexity: float, kl: float, top1: float, acc: float, speed: tuple) -> dict:
    return {
        "key": key,
        "label": {"teacher":"Teacher","cut":"Cut","repaired":"Repaired","distilled":"Distilled","baseline":"Random init"}[key],
        "parameters": parameters,
        "bytes": 2 * parameters,
        "perplexity": perplexity,
        "bits_per_byte": math.log2(perplexity) / 4.2,
        "kl_to_teacher": kl,
        "top1_agreement": top1,
        "prefill_tokens_per_second": speed[0],
        "decode_tokens_per_second": speed[1],
        "tasks": {"arc_easy": {"acc": acc, "acc_stderr": 0.01}, "piqa": {"acc": acc + 0.2, "acc_stderr": 0.011}},
    }


def minimal_report() -> dict:
    models = [model for model in full_report()["models"] if model["key"] in ("teacher", "repaired")]
    fields = ("key", "label", "parameters", "bytes", "perplexity")
    return {
        "teacher": {"name": "/home/someone/models/tiny"},
        "models": [{f: model[f] for f in fields} for model in models],
    }


def html_of(report: dict, tmp_path: Path) -> str:
    write_report(report, tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return (tmp_path / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects tags, and every attribute by which a browser would fetch something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "srcset", "href", "xlink:href", "data", "action", "poster")
        self.fetched += [value or "" for name, value in attrs if name in names and tag != "a"]
        self.ids += [value or "" for name, value in attrs if name == "id"]


def test_full_page_has_every_part(tmp_path: Path) -> None:
    html = html_of(full_report(), tmp_path)
    assert "SmolLM2-135M: 134.5M → 94.2M parameters (0.70×)" in html
    for part in ("Results", "Distillation", "What was important", "Candidates", "Where the parameters went", "Time"):
        assert part in html
    for words in ("269 MB", "28.5", "41.2 ± 1.0 %", "1 h 27 min", "arc_easy was run", "budget: params 0.7x", "−2.8 pt"):
        assert words in html, words
    assert html.count("<svg ") == 6
    assert "Removed: 15, 16, 26." in html


def test_page_is_self_contained(tmp_path: Path) -> None:
    html = html_of(full_report(), tmp_path)
    page = Page(html)
    assert page.fetched
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in page.fetched)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", html)


def test_pictures_do_not_disturb_each_other_or_the_theme(tmp_path: Path) -> None:
    html = html_of(full_report(), tmp_path)
    ids = Page(html).ids
    assert len(ids) == len(set(ids)), "an id that two pictures share makes one draw the other's markers"
    assert not [colour for colour in module.THEME if colour in html]
    assert html.count("<style") == 1
    assert not re.findall(r'<text style="[^"]*fill: #', html), "text whose colour would not follow the theme"


def test_same_report_same_page(tmp_path: Path) -> None:
    report = full_report(layers=4, hidden=16)
    assert html_of(report, tmp_path) == html_of(report, tmp_path)


def test_large_model_stays_a_small_file(tmp_path: Path) -> None:
    html = html_of(full_report(layers=80, hidden=8192, heads=64, kv_heads=8), tmp_path)
    assert len(html) < 1_000_000


@pytest.mark.parametrize("report", [minimal_report(), {}, {"teacher": {"name": "a/b"}}, {"models": []}], ids=range(4))
def test_missing_stages_are_left_out(report: dict, tmp_path: Path) -> None:
    html = html_of(report, tmp_path)
    assert "Candidates" not in html
    assert "None" not in html
    assert "nan" not in html
    assert "Speed was not measured" in html
    assert model_card(report).startswith("---\n")


@pytest.mark.parametrize("part", [*full_report()])
def test_any_part_may_be_missing(part: str) -> None:
    report = full_report(layers=6, hidden=32) | {part: None}
    module._page(report, pictures=part in ("scores", "kept", "teacher"))
    model_card(report)
    model_card({key: value for key, value in report.items() if key != part})


@pytest.mark.parametrize("parts", [("layers", "hidden", "heads"), ("leave_one_out", "ffn", "kv_heads")])
def test_any_score_may_be_missing(parts: tuple[str, ...]) -> None:
    report = full_report(layers=6, hidden=32)
    report["scores"] |= dict.fromkeys(parts)
    titles = [picture.title for picture in module._page(report)["importance"]]
    both = {"Layers", "Attention heads"}
    assert set(titles) == both | ({"Feed-forward neurons"} if "hidden" in parts else {"Hidden channels"})


def test_numbers_that_are_not_numbers_do_not_stop_the_report(tmp_path: Path) -> None:
    report = full_report(layers=6, hidden=32)
    report["models"][1]["perplexity"] = math.inf
    report["models"][3]["perplexity"] = math.nan
    report["training"]["curve"][5]["loss"] = math.nan
    report["scores"]["hidden"][0] = math.nan
    report["scores"]["heads"][0][0] = math.nan
    report["scores"]["ffn"]["quantiles"][0] = [0.0] * 11
    report["candidates"][0]["predicted_damage"] = math.nan
    html = html_of(report, tmp_path)
    assert "∞" in html
    assert "the loss of quality is unknown" in html


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    report = full_report(layers=6, hidden=32)
    report["samples"][0]["prompt"] = report["samples"][0]["continuations"]["distilled"] = HOSTILE
    report["teacher"]["name"] = report["warnings"][0] = report["models"][3]["label"] = HOSTILE
    report["recipe"] = {HOSTILE: HOSTILE}
    report["text"]["heldout"]["source"] = report["versions"]["cpu"] = report["stages"][0]["name"] = HOSTILE
    report["scores"]["functions"] = {HOSTILE: HOSTILE}
    report["teacher"]["parameters_by_group"][HOSTILE] = 10
    report["models"][3]["tasks"] = {HOSTILE: {"acc": 0.5, "acc_stderr": 0.1}}
    html = html_of(report, tmp_path)
    assert not {"script", "img"} & set(Page(html).tags)
    assert "&lt;script&gt;" in html
    card = model_card(report)
    before, _, after = card.partition("```yaml")
    assert "<script" not in before + after.partition("\n```\n")[2]
    assert all(line.count(" |") == 7 for line in card.splitlines() if line.startswith("| ") and "\\|" not in line)


def test_card_front_matter_is_yaml() -> None:
    _, front, body = model_card(full_report()).split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["prunus", "pruned", "distilled"],
    }
    assert "AutoModelForCausalLM.from_pretrained" in body
    assert "| Perplexity | 19.0 | 3,120 | 88.2 | 28.5 | 140 | 1.50× |" in body
    assert "\n\n\n" not in body


def test_card_does_not_publish_a_local_path() -> None:
    report = minimal_report() | {"recipe": {"model": "/home/someone/models/tiny", "out": "~/work/out"}}
    card = model_card(report | {"warnings": ["/home/someone/text.jsonl was short; 3 tokens/s"]})
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "tiny"
    assert "distilled" not in front["tags"], "it was only repaired"
    assert "someone" not in card
    assert "- text.jsonl was short; 3 tokens/s" in card
    assert "model: tiny\nout: out" in card


def test_verdict_says_what_was_won_and_lost() -> None:
    verdict = " ".join(module._verdict(full_report()))
    assert "30 % fewer parameters, 30 % fewer bytes on disk, 33 % fewer bytes of KV cache per token" in verdict
    assert "reads prompts 1.32× as fast" in verdict
    assert "perplexity on held-out text rises from 19.0 to 28.5 (1.50×)" in verdict
    assert "reads prompts 1.32× as fast and generates about as fast as the teacher" in verdict
    assert "140 for the same architecture trained from random weights" in verdict


def cautions_after(**changes: float | None) -> str:
    """Cautions when the distilled model has these other numbers."""
    report = copy.deepcopy(full_report(layers=4, hidden=16))
    report["models"][3] |= changes
    return " ".join(module._cautions(report))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"perplexity": 60.0}, "3.16× the teacher's perplexity is a lot to lose"),
        ({"perplexity": 18.0}, "below the teacher's"),
        ({"perplexity": 150.0}, "Distillation made the student worse (1.70×"),
        ({"perplexity": 145.0}, "trained from random weights is as good"),
        ({"prefill_tokens_per_second": 1550.0}, "reads prompts 1.02× as fast is within the noise"),
        ({"decode_tokens_per_second": 20.0}, "generates more slowly than the teacher (0.49×)"),
        ({"decode_tokens_per_second": None, "prefill_tokens_per_second": None}, "Speed was not measured"),
        ({"perplexity": math.inf}, "not finite"),
    ],
)
def test_cautions(changes: dict, words: str) -> None:
    assert words in cautions_after(**changes)


def test_no_false_alarm() -> None:
    report = full_report(layers=4, hidden=16) | {"warnings": []}
    fast = {"perplexity": 20.0, "decode_tokens_per_second": 60.0}
    report["models"][3] |= fast | {"tasks": {"arc_easy": {"acc": 0.3, "acc_stderr": 0.01}}}
    assert module._cautions(report) == []


def test_cautions_about_text_and_budget() -> None:
    report = full_report(layers=4, hidden=16)
    report["text"]["heldout"] = report["text"]["train"] | {"tokens": 5000}
    report["budget"]["counted"] = 95_000_000
    cautions = " ".join(module._cautions(report))
    assert "is the train text" in cautions
    assert "on 5,000 tokens only" in cautions
    assert "95,000,000 counted, 94,160,506 allowed" in cautions


@pytest.mark.parametrize(
    ("form", "value", "words"),
    [
        (module._count, 134_515_008, "134.5M"),
        (module._count, 999_999_999, "1.0B"),
        (module._count, 250_000, "250K"),
        (module._count, 9999, "9,999"),
        (module._count, 0, "0"),
        (module._bytes, 269_060_552, "269 MB"),
        (module._bytes, 999_700, "1 MB"),
        (module._number, 28.51, "28.5"),
        (module._number, 999.6, "1,000"),
        (module._number, math.nan, "–"),
        (module._number, math.inf, "∞"),
        (module._number, None, "–"),
        (module._percent, 0.6123, "61.2 %"),
        (module._seconds, 59.99, "60.0 s"),
        (module._seconds, 250, "4 min 10 s"),
        (module._points, -0.028, "−2.8 pt"),
    ],
)
def test_numbers_as_people_read_them(form: Callable[[object], str], value: float | None, words: str) -> None:
    assert form(value) == words


def test_rank_correlation_by_hand() -> None:
    assert module._rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert module._rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert module._rank_correlation([1, 1, 1], [3, 2, 1]) is None
    # ranks (1, 2.5, 2.5, 4) and (1, 2, 3, 4): 4.5 / sqrt(4.5 · 5)
    assert module._rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_kept_lists_of_kept_layers_and_of_all_layers_mean_the_same() -> None:
    by_kept = {"kept": {"layers": [0, 2], "heads": [[0], [1]], "ffn_share": [0.5, 0.7]}}
    by_all = {"kept": {"layers": [0, 2], "heads": [[0], [5], [1]], "ffn_share": [0.5, 0.6, 0.7]}}
    assert module._kept_heads(by_kept, 3) == module._kept_heads(by_all, 3) == [{0}, None, {1}]
    np.testing.assert_array_equal(module._share_by_layer(by_kept, 3), [0.5, np.nan, 0.7])
    np.testing.assert_array_equal(module._share_by_layer(by_all, 3), [0.5, 0.6, 0.7])
