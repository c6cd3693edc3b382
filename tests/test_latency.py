"""Time per token from models that were timed: rates from sums, and an architecture that takes as long as asked."""

import dataclasses
import json

import pytest
from conftest import small_flags

from prunus import choice, cost, hardware, latency, memory, tournament
from prunus.budget import parse_budget
from prunus.errors import DoesNotFit, Stopped
from prunus.importance import score
from prunus.latency import fitted, measured_rates, tuned
from prunus.measure import measure
from prunus.space import legal_architectures

RATES = {"step": 500.0, "layers": 100.0, "head": 0.2, "cached": 1.0, "looking": 20.0, "attention": 0.1, "ffn": 0.05}


@pytest.fixture
def scores(llama, blocks):
    return score(measure(llama, blocks))


@pytest.fixture
def clock(monkeypatch):
    """Stands in for the timing of models, which is noisy: their time by `RATES`, times what the test sets."""
    pace = {"cut": 1.0, "turns": 0}

    def microseconds(teacher, scores, architectures, **_):
        pace["turns"] += 1
        costs = parse_budget(teacher, latency="1x", rates=RATES).costs
        return [costs.latency(each) * (pace["cut"] if each != teacher.architecture else 1.0) for each in architectures]

    monkeypatch.setattr(latency, "microseconds", microseconds)
    return pace


def test_rates_are_found_again_from_the_times_of_cuts(llama, scores, clock):
    found, costs = measured_rates(llama, scores), parse_budget(llama, params="1x").costs
    for sizes in ({}, {"layers": 3, "ffn": 20}, {"heads": 2, "kv_heads": 1}, {"hidden": 24, "ffn": 10, "layers": 2}):
        target = llama.architecture.replace(**sizes)
        predicted, real = (dataclasses.replace(costs, rates=rates).latency(target) for rates in (found, RATES))
        assert predicted == pytest.approx(real, rel=0.05)


def test_no_rate_is_negative():
    amounts = [{"step": 1, "layers": n, "ffn": n * f} for n in (2, 4) for f in (100, 200)]
    times = [100 + 50 * each["layers"] - 0.01 * each["ffn"] for each in amounts]
    found = fitted(amounts, times)
    assert min(found.values()) >= 0
    predicted = [sum(found[name] * amount for name, amount in each.items()) for each in amounts]
    assert predicted == pytest.approx(times, rel=0.1)


@pytest.mark.parametrize("pace", [0.8, 1.0, 1.25])
def test_the_architecture_is_tuned_until_it_takes_as_long_as_asked(llama, scores, clock, pace):
    """The cuts are faster or slower than the rates say."""
    clock["cut"] = pace
    budget = parse_budget(llama, latency="0.75x", rates=RATES)
    start = llama.architecture.replace(layers=3)
    own, whole = latency.microseconds(llama, scores, [tuned(llama, scores, budget, start), llama.architecture])
    assert own / whole == pytest.approx(0.75, rel=0.025)


def test_what_no_other_architecture_betters_stays(llama, scores, clock):
    """A machine that is far slower with the cuts than the rates say, and one where another limit binds."""
    smaller = llama.architecture.replace(layers=2)
    clock["cut"] = 1000.0
    assert tuned(llama, scores, parse_budget(llama, latency="0.75x", rates=RATES), smaller) == smaller
    clock["cut"], clock["turns"] = 0.1, 0
    budget = parse_budget(llama, latency="0.9x", params="0.6x", rates=RATES)
    best = legal_architectures(llama.family, llama.architecture, budget)[0]
    assert tuned(llama, scores, budget, best) == best
    assert clock["turns"] == 1


def test_a_fast_enough_one_that_another_limit_holds_stays(llama, scores, clock):
    """Found with a wider tolerance than the default's, it is not among the architectures of that."""
    clock["cut"] = 0.8
    budget = parse_budget(llama, latency="0.9x", params="0.6x", rates=RATES)
    wide = legal_architectures(llama.family, llama.architecture, budget, tolerance=0.1)
    assert set(wide) - set(legal_architectures(llama.family, llama.architecture, budget))
    clock["turns"] = 0
    assert [tuned(llama, scores, budget, each, tolerance=0.1) for each in wide] == wide
    assert clock["turns"] == len(wide)


def test_the_nearest_of_those_that_were_timed_is_taken(llama, scores, monkeypatch):
    """A clock whose every later try misses by more."""
    shares, tried = iter([0.8, 1.2, 1.9, 2.5]), []

    def microseconds(teacher, scores, architectures, **_):
        tried.append(architectures[0])
        return [1000 * next(shares), 1000]

    monkeypatch.setattr(latency, "microseconds", microseconds)
    budget = parse_budget(llama, latency="0.75x", rates=RATES)
    start = llama.architecture.replace(layers=3)
    assert tuned(llama, scores, budget, start) == start
    assert len(tried) == len(set(tried)) > 1


def test_models_are_timed_in_turns(llama, scores):
    smaller = llama.architecture.replace(layers=1)
    small, whole = latency.microseconds(llama, scores, [smaller, llama.architecture])
    assert 0 < small < whole


def test_models_that_do_not_fit_side_by_side_are_refused_before_one_is_built(llama, scores, monkeypatch):
    shapes = [llama.architecture, llama.architecture.replace(layers=1)]
    sizes = [cost.parameters(llama.family, llama.layout, each) for each in shapes]
    need = hardware.compute_dtype().itemsize * sum(sizes)
    monkeypatch.setattr(hardware, "free_memory", lambda: int(need / memory.ROOM))
    monkeypatch.setattr(latency, "build", lambda *_: pytest.fail("built"))
    monkeypatch.setattr(latency, "cut", lambda *_, **__: pytest.fail("cut"))
    with pytest.raises(DoesNotFit, match=r"timing needs .* [(]2 models side by side.* such as --params"):
        latency.microseconds(llama, scores, shapes)


def test_a_killed_tournament_goes_on_with_the_times_it_began_with(
    invoke, clock, whole_model, corpus, tmp_path, monkeypatch
):
    flags = small_flags(corpus, tmp_path / "run", budget=("--latency", "0.7x"))
    with monkeypatch.context() as patched:
        patched.setattr(tournament, "distill", lambda *_, **__: (_ for _ in ()).throw(Stopped("killed")))
        assert invoke("search", str(whole_model), *flags, "--set", "search.tokens=512").exit_code
    monkeypatch.setattr(latency, "measured_rates", lambda *_, **__: pytest.fail("timed again"))
    monkeypatch.setattr(choice, "prune", lambda *_, **__: pytest.fail("cut again"))
    result = invoke("search", str(tmp_path / "run"))
    assert result.exit_code == 0, result.stderr
    assert not (tmp_path / "run" / ".tournament").exists()


def test_a_run_with_a_budget_of_time(invoke, clock, whole_model, corpus, tmp_path):
    flags = small_flags(corpus, tmp_path / "run", budget=("--latency", "0.7x"))
    result = invoke("search", str(whole_model), *flags)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "run" / "2-candidates.json").read_text())
    (limit,) = found["budget"]["limits"]
    assert limit["unit"] == "µs"
    assert found["candidates"][0]["chosen"]
    result = invoke("compress", str(tmp_path / "run"), "--set", "evaluate.speed=false")
    assert result.exit_code == 0, result.stderr
    (reported,) = json.loads((tmp_path / "run" / "5-report.json").read_text())["budget"]["limits"]
    assert reported == limit | {"counted": None}
    assert "latency" in (tmp_path / "run" / "report.html").read_text()
