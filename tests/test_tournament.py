"""Candidates trained a little: who is dropped when, what it costs, and a kill on the way."""

import itertools
import json
import math

import pytest
from conftest import SMALL, add_tokenizer, small_flags
from test_pipeline import make_recipe
from transformers import AutoTokenizer

from prunus import choice, side_by_side
from prunus import tournament as module
from prunus.documents import documents
from prunus.errors import BadRecipe, Stopped
from prunus.importance import score
from prunus.measure import measure
from prunus.pipeline import compress
from prunus.prune import prune
from prunus.schedule import Settings
from prunus.text import tokenise
from prunus.tournament import STANDINGS, rounds, tournament


@pytest.mark.parametrize(("candidates", "tokens"), [(2, 1000), (3, 1000), (4, 32_000), (12, 100_000), (16, 64_000)])
def test_the_field_halves_while_the_text_doubles(candidates, tokens):
    plan = rounds(candidates, tokens)
    assert plan[0][0] == candidates
    assert plan[-1] == (2, tokens)
    for (count, end), (next_count, next_end) in itertools.pairwise(plan):
        assert next_count == math.ceil(count / 2)
        assert next_end == 2 * end


def test_twelve_candidates_cost_a_third_of_training_all():
    plan = rounds(12, 100_000)
    starts = [0, *(end for _, end in plan)]
    spent = sum(count * (end - start) for (count, end), start in zip(plan, starts, strict=False))
    assert spent <= 0.35 * 12 * 100_000


@pytest.fixture(scope="module")
def text(llama, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    add_tokenizer(folder)
    add_tokenizer(llama.folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenise(documents(str(corpus)), tokenizer, block_size=32, to=folder / "text", label="test")


@pytest.fixture(scope="module")
def candidates(llama, text, tmp_path_factory):
    folder, scores = tmp_path_factory.mktemp("candidates"), score(measure(llama, text.head(8)))
    sizes = {"deep": {"ffn": 8}, "wide": {"layers": 2}, "tiny": {"layers": 1, "ffn": 4}}
    return {
        name: prune(llama, scores, llama.architecture.replace(**own), to=folder / name) for name, own in sizes.items()
    }


def play(teacher, candidates, text, folder, **changes):
    settings = Settings(**{"batch_tokens": 128, "learning_rate": 1e-3} | changes)
    heldout = text.select(range(8))
    return tournament(
        teacher, candidates, text.select(range(8, 200)), heldout, to=folder, tokens=1024, settings=settings
    )


def test_the_best_of_those_trained_longest_is_first(llama, candidates, text, tmp_path):
    standings = play(llama, candidates, text, tmp_path / "rounds")
    lengths = [len(standing.losses) for standing in standings.values()]
    assert lengths == [3, 3, 2]
    first, second, _ = standings.values()
    assert first.losses[-1] <= second.losses[-1]
    assert first.tokens == [0, 512, 1024]
    assert all(standing.losses[1] < standing.losses[0] for standing in standings.values())
    assert [path.name for path in (tmp_path / "rounds").iterdir()] == [STANDINGS]


def test_a_killed_tournament_ends_with_the_same_standings(llama, candidates, text, tmp_path, monkeypatch):
    undisturbed = play(llama, candidates, text, tmp_path / "one")
    trained, distill = [], module.distill

    def killed(*args, **kwargs):
        if len(trained) == 3:
            raise Stopped("killed")
        trained.append(kwargs["to"])
        return distill(*args, **kwargs)

    monkeypatch.setattr(module, "distill", killed)
    with pytest.raises(Stopped):
        play(llama, candidates, text, tmp_path / "two")
    assert len(trained) == 3
    monkeypatch.setattr(module, "distill", distill)
    assert play(llama, candidates, text, tmp_path / "two") == undisturbed
    assert play(llama, candidates, text, tmp_path / "two") == undisturbed  # nothing is trained again
    assert list(undisturbed) == list(play(llama, candidates, text, tmp_path / "two"))


def test_what_samples_cannot_teach_is_left_to_the_training_proper(llama, candidates, text, tmp_path):
    needs_the_teacher = {"divergence": "reverse_kl", "temperature": 2.0, "hidden_loss": "mse", "on_policy_share": 0.5}
    plain, other = (
        play(llama, candidates, text, tmp_path / name, **changes)
        for name, changes in (("plain", {}), ("other", needs_the_teacher))
    )
    assert plain == other


def test_a_step_is_no_longer_than_a_round(llama, candidates, text, tmp_path):
    standings = play(llama, candidates, text, tmp_path / "rounds", batch_tokens=100_000)
    assert [len(standing.losses) for standing in standings.values()] == [3, 3, 2]


def test_side_by_side_they_end_alike(llama, candidates, text, tmp_path):
    pytest.importorskip("ray", reason="candidates go side by side on Ray")
    alone, together = (
        tournament(
            llama,
            candidates,
            text.select(range(8, 200)),
            text.select(range(8)),
            to=tmp_path / str(workers),
            tokens=1024,
            settings=Settings(batch_tokens=128, learning_rate=1e-3),
            workers=workers,
        )
        for workers in (1, 2)
    )
    assert list(alone) == list(together)
    for name, standing in alone.items():
        assert together[name].losses == pytest.approx(standing.losses, rel=1e-4)


def test_side_by_side_needs_ray(llama, candidates, text, tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BadRecipe, match=r"prunus\[ray\]"):
        tournament(llama, candidates, text, text.head(8), to=tmp_path / "rounds", tokens=1024, workers=2)


def test_standings_of_other_candidates_are_not_taken_up(llama, candidates, text, tmp_path):
    play(llama, candidates, text, tmp_path / "rounds")
    fewer = {name: candidates[name] for name in ("deep", "tiny")}
    standings = play(llama, fewer, text, tmp_path / "rounds")
    assert standings.keys() == fewer.keys()


def test_a_tournament_trains_with_checkpointing_where_asked(llama, candidates, text, tmp_path, monkeypatch):
    asked, distill = [], module.distill

    def noted(*args, **kwargs):
        asked.append(kwargs["gradient_checkpointing"])
        return distill(*args, **kwargs)

    monkeypatch.setattr(module, "distill", noted)
    options = {"tokens": 256, "settings": Settings(batch_tokens=128), "gradient_checkpointing": True}
    tournament(llama, candidates, text.select(range(8, 64)), text.head(8), to=tmp_path / "rounds", **options)
    assert asked
    assert all(asked)


def test_one_candidate_needs_no_tournament(invoke, whole_model, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "tournament", lambda *_, **__: pytest.fail("trained"))
    flags = [*small_flags(corpus, tmp_path / "run"), "--set", "search.tokens=512", "--set", "search.candidates=1"]
    result = invoke("search", str(whole_model), *flags)
    assert result.exit_code == 0, result.stderr


def test_rounds_shorter_than_a_block_are_refused(invoke, whole_model, corpus, tmp_path):
    flags = [*small_flags(corpus, tmp_path / "run"), "--set", "search.tokens=40", "--set", "search.candidates=4"]
    result = invoke("search", str(whole_model), *flags)
    assert result.exit_code == 2
    assert "search.tokens: 40 leave 20 for the first of 2 rounds" in result.stderr
    assert "give at least 64" in result.stderr


def test_a_run_with_a_tournament(invoke, whole_model, corpus, tmp_path):
    flags = [*small_flags(corpus, tmp_path / "run"), "--set", "search.tokens=512"]
    result = invoke("search", str(whole_model), *flags)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "run" / "2-candidates.json").read_text())["candidates"]
    trained = [candidate for candidate in found if candidate["trained"]]
    assert len(trained) == 2
    assert trained[0]["chosen"]
    assert trained[0]["trained"]["losses"][-1] <= trained[1]["trained"]["losses"][-1]
    assert not (tmp_path / "run" / ".tournament").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "others",
    [
        {"score": {"ffn": "magnitude", "hidden": "random"}},
        {"prune": SMALL["prune"] | {"repair": False}},
        {"distill": SMALL["distill"] | {"learning_rate": 1e-3}},
    ],
    ids=lambda others: next(iter(others)),
)
def test_a_redone_search_is_as_a_fresh_one(whole_model, corpus, tmp_path, monkeypatch, others):
    """Whether it was killed in its tournament or came to its end."""

    def made(name: str, **changes: object) -> list[tuple[object, object]]:
        values = {"search": SMALL["search"] | {"tokens": 512}, "stop_after": "search"} | changes
        run = compress(make_recipe(whole_model, corpus, tmp_path / name, **values), redo=True)
        return [(each["architecture"], each["trained"]) for each in run.candidates["candidates"]]

    def killed(*_: object, **__: object) -> None:
        raise Stopped("killed")

    with monkeypatch.context() as patched:
        patched.setattr(module, "distill", killed)
        with pytest.raises(Stopped):
            made("killed")
    assert (tmp_path / "killed" / ".tournament").is_dir()
    made("ended")
    assert not (tmp_path / "ended" / ".tournament").is_dir()
    assert made("killed", **others) == made("ended", **others) == made("fresh", **others)


@pytest.mark.slow
def test_a_redo_that_is_killed_in_its_tournament_goes_on(whole_model, corpus, tmp_path, monkeypatch):
    def made(name: str, **changes: object) -> object:
        values = {"search": SMALL["search"] | {"tokens": 512}, "stop_after": "search"} | changes
        return compress(make_recipe(whole_model, corpus, tmp_path / name, **values), redo=True).candidates["candidates"]

    def killed(*_: object, **__: object) -> None:
        raise Stopped("killed")

    others = {"score": {"ffn": "magnitude"}}
    made("run")
    with monkeypatch.context() as patched:
        patched.setattr(module, "distill", killed)
        with pytest.raises(Stopped):
            made("run", **others)
    fresh = made("fresh", **others)
    monkeypatch.setattr(choice, "prune", killed)  # its candidates are cut already
    assert made("run", **others) == fresh
