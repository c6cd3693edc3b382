"""Local tasks: what is refused, and lm-eval's number against a direct computation of the log-likelihoods."""

from __future__ import annotations

import importlib.util
import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from prunus import tasks
from prunus.errors import BadData, BadRecipe, PrunusError
from prunus.tasks import LocalTask, local_task_from_dict, run_tasks

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason=f"lm-eval is not installed; {tasks.INSTALL}"
)
DRAW = random.Random(0)


def word() -> str:
    return "".join(DRAW.choices("abcdefgh ", k=DRAW.randint(2, 9))).strip() or "a"


def row(number: int) -> dict[str, object]:
    endings = [word() + "x", word() + "y", word() + "z"]  # all different
    answer = number % 3
    rest = {"gold": answer, "label": endings[answer], "number": str(number), "good": word(), "bad": word() + "!"}
    return {"topic": word(), "ctx": word(), "endings": endings} | rest


ROWS = [row(number) for number in range(24)]
GOOD = {"name": "mine", "file": "rows.jsonl", "query": "{{topic}}: {{ctx}}", "choices": "endings", "gold": "gold"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={mark: at for at, mark in enumerate(["<eos>", *alphabet])}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, initializer_range=0.3, **sizes, **ids)).eval()


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, query: str, answer: str) -> float:
    given = tokenizer(query)["input_ids"] or [tokenizer.eos_token_id]
    wanted = tokenizer(" " + answer)["input_ids"]
    log_p = model(torch.tensor([given + wanted])).logits[0].log_softmax(-1)
    return sum(log_p[len(given) - 1 + at, token].item() for at, token in enumerate(wanted))


def test_a_dict_becomes_a_task(folder: Path) -> None:
    task = local_task_from_dict(GOOD | {"choices": ["good", "bad"], "gold": 0}, folder=folder)
    assert task == LocalTask("mine", folder / "rows.jsonl", "{{topic}}: {{ctx}}", ("good", "bad"), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "gone.jsonl"}, "task mine: no such file: .*gone.jsonl"),
        ({"choices": "ending"}, "the first row has no field 'ending'; did you mean 'endings'?"),
        ({"choices": ["good", "worse"]}, "the first row has no field 'worse'"),
        ({"choices": "topic"}, "must give a list of two texts or more, none empty, not '"),
        ({"gold": "golden"}, "the first row has no field 'golden'; did you mean 'gold'"),
        ({"gold": "topic"}, "gold '.*' is neither one of the answers"),
        ({"gold": 3}, "gold 3 is neither .* nor an index from 0 to 2"),
        ({"gold": -1}, "gold -1 is neither"),
        ({"query": "{{contxt}}"}, "'contxt' is undefined; the first row's fields are topic, ctx"),
        ({"query": "{{ctx"}, "query '{{ctx': unexpected end of template"),
        ({"querry": "x"}, "unknown key 'querry'; did you mean 'query'?"),
        ({"choices": 3}, "'choices' must be a field's name or a list"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadRecipe, match=message.replace("?", r"\?").replace("{", r"\{")):
        local_task_from_dict(GOOD | changes, folder=folder)


def test_all_mistakes_are_told_at_once(folder: Path) -> None:
    with pytest.raises(BadRecipe) as caught:
        local_task_from_dict(GOOD | {"choices": "end", "gold": "right", "query": "{{q}}"}, folder=folder)
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(BadRecipe, match=r"'file' is missing\n.*'query' is missing"):
        local_task_from_dict({"name": "mine", "choices": "a", "gold": 0})


@pytest.mark.parametrize("content", ["", "not json", "[1, 2]"])
def test_a_file_that_is_not_json_lines_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(BadRecipe, match="JSON"):
        local_task_from_dict(GOOD, folder=tmp_path)


@needs_lm_eval
@pytest.mark.parametrize(
    ("changes", "query", "choices", "gold"),
    [
        ({}, lambda row: f"{row['topic']}: {row['ctx']}", lambda row: row["endings"], "gold"),
        ({"gold": "label", "query": "{{number}}"}, lambda row: row["number"], lambda row: row["endings"], "gold"),
        ({"choices": ["good", "bad"], "gold": 0, "query": ""}, lambda _: "", lambda row: [row["good"], row["bad"]], 0),
    ],
    ids=["index", "text, and a query that is a number", "pair without a query"],
)
def test_accuracy_is_that_of_the_log_likelihoods(
    folder, model, tokenizer, changes, query, choices, gold, capfd, monkeypatch
) -> None:
    hits, hits_norm = [], []
    for row in ROWS:
        scores = [log_likelihood(model, tokenizer, query(row), answer) for answer in choices(row)]
        per_character = [score / len(answer) for score, answer in zip(scores, choices(row), strict=True)]
        hits.append(np.argmax(scores) == (row[gold] if gold else 0))
        hits_norm.append(np.argmax(per_character) == (row[gold] if gold else 0))
    monkeypatch.chdir(folder)  # outside of a git repository, where lm-eval's call of git would complain
    model.train()
    state = random.getstate()
    found = run_tasks(model, tokenizer, [local_task_from_dict(GOOD | changes, folder=folder)])
    assert found["mine"]["acc"] == pytest.approx(np.mean(hits))
    assert found["mine"]["acc_norm"] == pytest.approx(np.mean(hits_norm))
    assert found["mine"]["acc_stderr"] == pytest.approx(np.std(hits, ddof=1) / len(hits) ** 0.5)
    assert set(found["mine"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert 0 < np.mean(hits) < 1, "the test would not notice a constant"
    assert capfd.readouterr() == ("", ""), "neither bars nor logs"
    assert tokenizer.pad_token is None, "the caller's tokenizer is left alone"
    assert model.training
    assert random.getstate() == state
    assert logging.getLogger("lm_eval").level == logging.NOTSET


def test_a_gold_that_means_two_answers_is_refused() -> None:
    task = tasks.LocalTask("sums", Path("rows.jsonl"), "2 + 3 =", "endings", "gold")
    endings = {"endings": ["3", "4", "5", "1"]}
    assert [tasks.gold_index(task, endings | {"gold": gold}) for gold in (1, "5", "4", "0")] == [1, 2, 1, 0]
    with pytest.raises(BadRecipe, match=r"gold '1' is one of the answers .* and the index of another"):
        tasks.gold_index(task, endings | {"gold": "1"})


@needs_lm_eval
def test_errors_are_what_is_not_right(folder, model, tokenizer) -> None:
    task = local_task_from_dict(GOOD, folder=folder)
    right = run_tasks(model, tokenizer, [task], limit=10)["mine"]["acc"]
    assert tasks.error_rate(model, tokenizer, task, limit=10) == pytest.approx(1 - right)


def test_a_task_without_accuracy_cannot_choose_layers(folder, model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tasks, "run_tasks", lambda *_, **__: {"wikitext": {"word_perplexity": 20.0}})
    with pytest.raises(BadRecipe, match="wikitext has no accuracy, only word_perplexity"):
        tasks.error_rate(model, tokenizer, "wikitext")


@needs_lm_eval
def test_a_limit_takes_a_fair_sample_the_same_each_time(folder, model, tokenizer) -> None:
    sorted_rows = [{"q": "", "endings": ["a", "b"], "gold": row >= 50} for row in range(100)]
    rows = [json.dumps(row | {"gold": int(row["gold"])}) for row in sorted_rows]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    task = local_task_from_dict(GOOD | {"query": ""}, folder=folder)
    found = run_tasks(model, tokenizer, [task], limit=30)
    assert 0.2 < found["mine"]["acc"] < 0.8, "the first 30 rows would give 0 or 1"
    assert found == run_tasks(model, tokenizer, [task], limit=30)


@needs_lm_eval
def test_mistakes_beyond_the_first_row_are_told(folder, model, tokenizer) -> None:
    task = local_task_from_dict(GOOD, folder=folder)
    lines = [json.dumps(row) for row in ROWS]
    for late, message in [
        (json.dumps(ROWS[0] | {"gold": 7}), "gold 7 is neither"),
        (json.dumps(ROWS[0] | {"endings": 5}), "must give a list of two texts or more, none empty, not 5"),
        ('{"topic": ', "rows.jsonl cannot be read as a table"),
    ]:
        (folder / "rows.jsonl").write_text("\n".join([*lines, late]))
        with pytest.raises(BadRecipe, match=message):
            run_tasks(model, tokenizer, [task])


@needs_lm_eval
def test_a_name_given_twice_is_refused(folder, model, tokenizer) -> None:
    task = local_task_from_dict(GOOD, folder=folder)
    with pytest.raises(BadRecipe, match="mine given twice"):
        run_tasks(model, tokenizer, [task, task])


@needs_lm_eval
def test_an_unknown_name_is_refused_with_close_matches(model, tokenizer, monkeypatch) -> None:
    from lm_eval.tasks import TaskManager

    # the real index takes ten seconds to read
    monkeypatch.setattr(TaskManager, "task_index", {"hellaswag": None})
    monkeypatch.setattr(TaskManager, "all_tasks", ["hellaswag"])
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **_: None)
    with pytest.raises(BadRecipe, match="lm-eval knows no task 'helaswag'; did you mean 'hellaswag'"):
        run_tasks(model, tokenizer, ["helaswag"])


@needs_lm_eval
def test_a_named_task_without_network_says_so(model, tokenizer, monkeypatch) -> None:
    from lm_eval.tasks import TaskManager

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(tasks, "_manager", lambda names: TaskManager(include_defaults=False))
    monkeypatch.setattr(TaskManager, "load", unreachable)
    with pytest.raises(BadData, match=r"Couldn't reach the Hub.*local file"):
        run_tasks(model, tokenizer, ["hellaswag"])


def test_without_lm_eval_the_command_to_install_it_is_told(model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PrunusError, match=r"pip install 'prunus\[evaluate\]'"):
        run_tasks(model, tokenizer, ["hellaswag"])


def test_metrics_keep_the_name_of_a_filter() -> None:
    values = {"alias": "x", "name": "x", "sample_len": 3, "acc,none": 1, "acc_stderr,none": "N/A", "em,strict": 0.5}
    assert tasks._metrics(values) == {"acc": 1.0, "em,strict": 0.5}
