"""Recipes: flags and settings over a file, quantities, and YAML there and back."""

import json
from pathlib import Path

import pytest
import yaml

from prunus import recipe
from prunus.budget import check_amount, parse_quantity, parse_share
from prunus.distill import CHECKPOINT_SECONDS
from prunus.errors import BadRecipe
from prunus.recipe import Distill, override, parse, read_yaml, to_yaml
from prunus.schedule import Settings

LEAST = {"model": "m", "to": "run", "params": "0.7x", "data": {"train": "text"}}
RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_recipes_of_the_project_are_right(file):
    made = parse(read_yaml(file), source=file.name)
    assert parse(yaml.safe_load(to_yaml(made)), source="again") == made


def test_there_are_recipes():
    assert RECIPES


def test_the_schema_is_up_to_date():
    """If not, write what `prunus.recipe.json_schema()` returns to recipes/recipe.schema.json."""
    schema = Path(__file__).parents[1] / "recipes" / "recipe.schema.json"
    assert schema.read_text() == recipe.json_schema()
    assert json.loads(schema.read_text())["additionalProperties"] is False


def test_yaml_there_and_back():
    values = LEAST | {
        "params": None,
        "memory": "180MB",
        "data": {"train": "wörter", "heldout_tokens": "64k", "text_field": "body"},
        "score": {"ffn": "magnitude", "aggregation": "l2:mean"},
        "distill": {"tokens": "1.5M", "learning_rate": 1e-4},
        "evaluate": {"tasks": ["piqa", {"name": "own", "file": "f", "choices": ["a", "b"], "gold": 0}]},
        "stop_after": "prune",
    }
    made = parse(values, source="test")
    assert parse(yaml.safe_load(to_yaml(made)), source="test") == made
    assert made.data.heldout_tokens == 64_000
    assert made.distill.tokens == 1_500_000
    assert "wörter" in to_yaml(made)


def test_recipes_are_frozen():
    made = parse(LEAST, source="test")
    with pytest.raises(ValueError, match="frozen"):
        made.params = "0.5x"


def test_distillation_has_the_defaults_of_its_settings():
    assert Settings(**Distill().hyperparameters()) == Settings()
    assert Distill().checkpoint_seconds == CHECKPOINT_SECONDS


def test_override_replaces_what_is_given_and_nothing_else():
    values = {"a": {"b": 1, "c": 2}, "d": 3}
    assert override(values, {"a.b": 5, "d": None, "e.f.g": "x"}) == {
        "a": {"b": 5, "c": 2},
        "d": None,
        "e": {"f": {"g": "x"}},
    }
    assert values == {"a": {"b": 1, "c": 2}, "d": 3}
    assert override({"a": 1}, {"a.b": 2}) == {"a": {"b": 2}}
    assert override({"a": 1}, {"a": False}) == {"a": False}


@pytest.mark.parametrize(
    ("options", "key", "expected"),
    [
        ([], "params", "0.7x"),
        (["--params", "0.5x"], "params", "0.5x"),
        (["--memory", "0.5x"], "params", None),
        (["--arch", "ffn=20"], "arch", "ffn=20"),
        (["--tokens", "2k"], "distill.tokens", 2000),
        (["--set", "distill.tokens=3k"], "distill.tokens", 3000),
        (["--set", "distill.learning_rate=1e-4"], "distill.learning_rate", 1e-4),
        (["--set", "prune.repair=false"], "prune.repair", False),
        (["--set", "evaluate.tasks=[piqa, arc_easy]"], "evaluate.tasks", ["piqa", "arc_easy"]),
        (["--tasks", "piqa,arc_easy"], "evaluate.tasks", ["piqa", "arc_easy"]),
        (["--set", "evaluate.prompts=[a=b]"], "evaluate.prompts", ["a=b"]),
        (["--baseline"], "baseline", True),
        (["--heldout", "other"], "data.heldout", "other"),
        (["--data", "new", "--set", "data.block_size=64"], "data.block_size", 64),
        (["--stop-after", "search"], "stop_after", "search"),
        (["--to", "elsewhere"], "to", "elsewhere"),
    ],
)
def test_options_override_the_file(invoke, tmp_path, monkeypatch, options, key, expected):
    seen = []
    monkeypatch.setattr(
        "prunus.cli._run", lambda stage, source, changes, settings, **_: seen.append((changes, settings))
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(LEAST | {"distill": {"seed": 3}}))
    assert invoke("compress", str(file), *options).exit_code == 0

    from prunus import cli

    made = cli._recipe(str(file), *seen[0]).model_dump()
    for part in key.split("."):
        made = made[part]
    assert made == expected
    assert cli._recipe(str(file), *seen[0]).distill.seed == 3


@pytest.mark.parametrize(
    ("text", "number"),
    [("200k", 2e5), ("95M", 9.5e7), ("1.5B", 1.5e9), ("180MB", 1.8e8), ("2GiB", 2**31), (" 7 ", 7), ("1_000", 1000)],
)
def test_quantities(text, number):
    assert parse_quantity(text) == number


@pytest.mark.parametrize("text", ["", "k", "-1", "1e6", "10Q", "1.2.3", "0.7x", "nan"])
def test_what_is_no_quantity(text):
    with pytest.raises(ValueError, match="is not a quantity such as"):
        parse_quantity(text)


def test_shares():
    assert [parse_share(text) for text in ("0.7x", ".5 x", "1x", "0.7", "x", "70%")] == [
        0.7,
        0.5,
        1.0,
        None,
        None,
        None,
    ]


def test_a_bare_fraction_was_meant_as_a_share():
    assert check_amount("0.7x") == "0.7x"
    with pytest.raises(ValueError, match=r"did you mean 0\.7x"):
        check_amount("0.7")
    for value in ("0.7", 0.7):
        with pytest.raises(BadRecipe, match=r"params: '0\.7' is less than one; did you mean 0\.7x"):
            parse(LEAST | {"params": value}, source="test")


@pytest.mark.parametrize("value", ["1.5", 0, -3, "many", 1.5, True and "yes"])
def test_counts_are_whole_and_positive(value):
    with pytest.raises(BadRecipe, match=r"distill\.tokens"):
        parse(LEAST | {"distill": {"tokens": value}}, source="test")


def test_scores_that_need_a_measurement():
    for score in ("leave_one_out", "contiguous_by_task"):
        with pytest.raises(BadRecipe, match=f"layers: {score} needs measure"):
            parse(LEAST | {"score": {"layers": score}}, source="test")


def test_a_cache_cannot_judge_what_the_student_will_write():
    with pytest.raises(BadRecipe, match="distill: on_policy_share: a cache knows nothing"):
        parse(LEAST | {"distill": {"on_policy_share": 0.5, "teacher_cache": "samples"}}, source="test")
