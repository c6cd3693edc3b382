"""The page and the card: complete, honest, harmless, and at ease with stages that were not run."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from prunus.report import _training, before_training, model_card, write_report

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x> $\\frac{| & **b**"


def full_report() -> dict:
    """A made-up run on a model of SmolLM2-135M's size."""
    layers, hidden, heads, kv_heads = 30, 576, 9, 3
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
        {
            "step": s,
            "tokens": s * 16_384,
            "loss": 1.2 + 2.2 * math.exp(-s / 300) + 0.06 * random.normal(),
            "learning_rate": 3e-4,
        }
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
            "limits": [
                {
                    "kind": "params",
                    "unit": "parameters",
                    "target": 94_160_506,
                    "planned": 94_150_656,
                    "counted": 94_150_656,
                }
            ],
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
        },
        "kept": {
            "layers": kept_layers,
            "hidden": np.sort(np.argsort(-hidden_scores)[: hidden * 3 // 4]).tolist(),
            "heads": kept_heads,
        },
        "candidates": [
            {
                "architecture": _sizes(layers - 1 - i % 4, hidden - 32 * (i % 5), 1536 - 64 * i, heads, kv_heads),
                "parameters": 94_000_000 - 10_000 * i,
                "predicted_damage": 0.4 + 0.05 * i,
                "measured": {"loss": 3.6 + 0.04 * i + 0.1 * random.normal(), "perplexity": 37.0 + i} if i < 8 else None,
                "chosen": i == 1,
                "costs": {"memory": 200_000_000 - 1_000_000 * i, "flops": 180_000_000 + 2_000_000 * (i % 3)},
            }
            for i in range(20)
        ],
        "uncut": {"measured": {"loss": 3.0}, "costs": {"memory": 300_000_000, "flops": 270_000_000}},
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
        "label": key.capitalize(),
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


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return html_of(full_report(), tmp_path_factory.mktemp("full"))


def html_of(report: dict, folder: Path) -> str:
    write_report(report, folder / "report.html")
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    return (folder / "report.html").read_text(encoding="utf-8")


def without_pictures() -> dict:
    """Quick to render."""
    return full_report() | {"scores": None, "candidates": None, "training": None}


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


def test_the_loss_of_a_training_is_not_that_of_two_steps() -> None:
    losses = [0.3, 0.7, *[0.4] * 16, 0.1, 0.5]
    training = {"steps": 20, "tokens": 20, "seconds": 1.0, "tokens_per_second": 20.0}
    curve = [{"loss": loss, "learning_rate": 1e-4} for loss in losses]
    assert dict(_training(training | {"curve": curve}))["loss, first and last tenth"] == "0.500 → 0.300"


def test_full_page_has_every_part(html: str) -> None:
    assert "SmolLM2-135M: 134.5M → 94.2M parameters (0.70×)" in html
    for part in ("Results", "Distillation", "What was important", "Candidates", "Where the parameters went", "Time"):
        assert part in html
    for words in ("269 MB", "28.5", "41.2 ± 1.0 %", "1 h 27 min", "arc_easy was run", "budget: params 0.7x", "−2.8 pt"):
        assert words in html, words
    assert html.count("<svg ") == 7
    assert "Removed: 15, 16, 26." in html
    assert "8 more are in 2-candidates.json" in html


def test_layers_are_numbered_as_in_the_student_that_was_cut() -> None:
    report = full_report() | {"parent": full_report()["teacher"] | {"architecture": {"layers": 5}}}
    report["kept"]["layers"] = [0, 1, 3]
    assert "Removed layers of the larger student: 2, 4." in model_card(report)


def test_page_is_self_contained(html: str) -> None:
    page = Page(html)
    assert page.fetched
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in page.fetched)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", html)
    assert html.count("<style") == 1
    assert len(page.ids) == len(set(page.ids))


@pytest.mark.parametrize("report", [minimal_report(), {}, {"teacher": {"name": "a/b"}}, {"models": []}], ids=range(4))
def test_missing_stages_are_left_out(report: dict, tmp_path: Path) -> None:
    html = html_of(report, tmp_path)
    assert "Candidates" not in html
    assert "None" not in html
    assert "nan" not in html
    assert "Speed was not measured" in html
    assert model_card(report).startswith("---\n")


@pytest.mark.parametrize("part", [*full_report()])
def test_any_part_may_be_missing(part: str, tmp_path: Path) -> None:
    html_of(without_pictures() | {part: None}, tmp_path)
    assert model_card(full_report() | {part: None}) == model_card({k: v for k, v in full_report().items() if k != part})


@pytest.mark.parametrize("part", ["kept", "teacher", "models"])
def test_pictures_need_the_scores_only(part: str, tmp_path: Path) -> None:
    report = full_report() | {part: None, "training": None, "candidates": None}
    report["scores"]["leave_one_out"] = None
    assert html_of(report, tmp_path).count("<svg ") == 4


def test_an_architecture_that_was_named_is_no_candidate(tmp_path: Path) -> None:
    report = without_pictures()
    predicted = full_report()["candidates"][0] | {"measured": None}
    report["candidates"] = [predicted]
    assert "the choice rests on the prediction alone" in html_of(report, tmp_path)
    report["candidates"] = [predicted | {"predicted_damage": None}]
    assert "Candidates" not in html_of(report, tmp_path)


def test_numbers_that_are_not_numbers_do_not_stop_the_report(tmp_path: Path) -> None:
    report = without_pictures()
    report["models"][1]["perplexity"] = math.inf
    report["models"][3]["perplexity"] = math.nan
    html = html_of(report, tmp_path)
    assert "∞" in html
    assert "the loss of quality is unknown" in html


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    report = without_pictures()
    report["samples"][0]["prompt"] = report["samples"][0]["continuations"]["distilled"] = HOSTILE
    report["teacher"]["name"] = report["warnings"][0] = report["models"][3]["label"] = HOSTILE
    report["recipe"] = {HOSTILE: HOSTILE}
    report["text"]["heldout"]["source"] = report["versions"]["cpu"] = report["stages"][0]["name"] = HOSTILE
    report["teacher"]["parameters_by_group"][HOSTILE] = 10
    report["models"][3]["tasks"] = {HOSTILE: {"acc": 0.5, "acc_stderr": 0.1}}
    html = html_of(report, tmp_path)
    assert not {"script", "img"} & set(Page(html).tags)
    assert "&lt;script&gt;" in html
    card = model_card(report | {"scores": {"functions": {HOSTILE: HOSTILE}}})
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


def test_the_card_of_a_cut_student_is_its_own() -> None:
    card = model_card(before_training(full_report()))
    assert "tokens/s" not in card
    assert "distilled" not in card.lower().replace("was not distilled", "")
    assert "| Perplexity | 19.0 | 3,120 | 88.2 | 4.64× |" in card


def test_card_does_not_publish_a_local_path() -> None:
    recipe = {
        "model": "/home/someone/models/tiny",
        "out": "~/work/out",
        "data": {"train": ["/home/a b/some one/x.txt"]},
    }
    report = minimal_report() | {"recipe": recipe}
    card = model_card(report | {"warnings": ["/home/someone/text.jsonl was short; 3 tokens/s"]})
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "tiny"
    assert "distilled" not in front["tags"], "it was only repaired"
    assert "someone" not in card
    assert "some one" not in card
    assert "- text.jsonl was short; 3 tokens/s" in card
    assert "model: tiny\nout: out" in card
