"""Budgets, legal architectures, and the order of candidates."""

import sys

import pytest
import torch
from conftest import add_tokenizer, for_each_kind, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prunus import cost, memory
from prunus.anatomy import stored_tensors
from prunus.budget import CONTEXT, LIMITS, Budget, Costs, Limit, parse_budget, parse_quantity
from prunus.documents import documents
from prunus.errors import BadRecipe, BudgetUnreachable
from prunus.families import family_of
from prunus.importance import score
from prunus.measure import measure
from prunus.search import lost_curves, lost_share, probe_architectures, search
from prunus.selection import illegal_cut
from prunus.space import legal_architectures
from prunus.text import tokenise

RATES = {"step": 500.0, "layers": 100.0, "head": 0.02, "cached": 1.0, "looking": 20.0, "attention": 0.1, "ffn": 0.05}
"""Microseconds of each part."""


@pytest.mark.parametrize(
    ("text", "value"), [("200k", 200_000), ("95M", 95e6), ("1.5B", 1.5e9), ("180MB", 180e6), ("1GiB", 2**30), ("7", 7)]
)
def test_quantities(text, value):
    assert parse_quantity(text) == value


@pytest.mark.parametrize("text", ["", "x", "12q", "1.2.3", "-5", "0.7x"])
def test_quantities_that_are_none(text):
    with pytest.raises(ValueError, match="not a quantity"):
        parse_quantity(text)


@for_each_kind
def test_every_proposal_is_legal_and_within_the_tolerance(teacher):
    budget = parse_budget(teacher, params="0.7x")
    tolerance = 0.03 if "aligned_experts" in teacher.family.constraints else 0.01
    found = legal_architectures(teacher.family, teacher.architecture, budget, tolerance=tolerance, portable=False)
    fewest = {"aligned_experts": 1, "mamba_is_expand": 1, "hidden_is_heads": 3}  # what a tiny model leaves of choices
    assert len(found) >= min((fewest.get(name, 11) for name in teacher.family.constraints), default=11)
    assert len(set(found)) == len(found)
    for target in found:
        assert not illegal_cut(teacher.family, teacher.architecture, target)
        assert abs(cost.parameters(teacher.family, teacher.layout, target) / budget.limits[0].target - 1) <= tolerance


def test_memory_counts_weights_and_cache(llama):
    budget = parse_budget(llama, memory="0.7x")
    a = llama.architecture
    cache = 2 * a.layers * a.kv_heads * a.head_dim * 4 * CONTEXT
    (limit,) = budget.limits
    assert budget.cost(limit, a) == llama.parameters * 4 + cache
    assert limit.target == round(0.7 * (llama.parameters * 4 + cache))


@pytest.mark.parametrize("kind", LIMITS)
def test_the_whole_model_uses_up_a_limit_of_all_it_has(llama, kind):
    for share in (1, 0.5):
        budget = parse_budget(llama, rates=RATES, **{kind: f"{share}x"})
        assert budget.use(llama.architecture) == pytest.approx(1 / share, rel=1e-3)


def test_the_cache_is_as_long_as_the_context(llama):
    short, long = (parse_budget(llama, kv_cache="0.5x", context=tokens) for tokens in (1000, 8000))
    assert long.limits[0].target == 8 * short.limits[0].target


def test_a_layer_with_a_sliding_window_keeps_no_more_of_the_cache_than_that(tmp_path):
    """Of four layers every other one has a window of 8 tokens."""
    teacher = tiny_model("gemma3_text", tmp_path)
    a = teacher.architecture
    of_a_token = 2 * a.kv_heads * a.head_dim * 4
    for tokens, kept in ((100, 2 * 8 + 2 * 100), (6, 4 * 6)):
        budget = parse_budget(teacher, kv_cache="1x", context=tokens)
        assert budget.limits[0].target == kept * of_a_token
    budget = parse_budget(teacher, kv_cache="1x", context=100, ranking=[1, 3, 0, 2])
    found = [budget.cost(budget.limits[0], a.replace(layers=layers)) for layers in (1, 2, 3, 4)]
    assert found == [kept * of_a_token for kept in (100, 200, 208, 216)]
    model, prompt = teacher.module(), torch.randint(3, 90, (1, 40))
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    own_keys = 2 * of_a_token  # of each token that comes, which transformers adds when it is there
    assert parse_budget(teacher, kv_cache="1x", context=40).limits[0].target == held + own_keys


def test_of_several_limits_all_hold_and_one_is_used_up(llama):
    budget = parse_budget(llama, params="0.9x", kv_cache="0.67x", flops="0.8x", latency="0.9x", rates=RATES)
    found = legal_architectures(llama.family, llama.architecture, budget)
    assert len(found) > 10
    for target in found:
        shares = budget.shares(target)
        assert max(shares) <= 1.01
        assert max(shares) >= 0.99 or target.ffn == llama.architecture.ffn  # a group more would be too many
        assert cost.parameters(llama.family, llama.layout, target) <= 1.01 * 0.9 * llama.parameters


def test_a_neuron_may_take_less_than_a_microsecond(tmp_path):
    wide = tiny_model("llama", tmp_path, intermediate_size=3072)
    found = []
    for speed in (1, 100):
        rates = {name: rate / speed for name, rate in RATES.items()}
        budget = parse_budget(wide, latency="0.7x", rates=rates)
        found.append(legal_architectures(wide.family, wide.architecture, budget))
        assert all(budget.use(target) == pytest.approx(1, abs=0.01) for target in found[-1])
    slow, fast = map(len, found)
    assert fast == pytest.approx(slow, rel=0.1)


def test_neurons_that_no_limit_counts_all_stay(llama):
    found = legal_architectures(llama.family, llama.architecture, parse_budget(llama, kv_cache="0.67x"))
    assert {target.ffn for target in found} == {llama.architecture.ffn}
    assert llama.architecture.hidden in {target.hidden for target in found}


def test_where_steps_are_large_all_are_near_enough_of_which_nothing_could_stay_larger(tmp_path):
    """Of half a cache one can keep half of the layers, or more of them with fewer groups."""
    deep = tiny_model("llama", tmp_path, num_hidden_layers=30, num_attention_heads=6, num_key_value_heads=3,
                      hidden_size=48, head_dim=8)  # fmt: skip
    for budget in ({"kv_cache": "0.5x"}, {"kv_cache": "0.5x", "params": "0.99x"}):
        found = legal_architectures(deep.family, deep.architecture, parse_budget(deep, **budget))
        whole = {(each.layers, each.kv_heads) for each in found if each.hidden == 48}
        assert {(15, 3), (22, 2), (30, 1)} == whole
        assert {each.layers for each in found if each.hidden < 48} <= {
            15
        }  # no gain in the cache: by the tolerance alone
    by_parameters = parse_budget(deep, params="0.7x")
    found = legal_architectures(deep.family, deep.architecture, by_parameters)
    assert all(abs(by_parameters.use(each) - 1) <= 0.01 for each in found)


def test_the_limit_that_cannot_be_kept_is_named(llama):
    budget = parse_budget(llama, params="0.9x", kv_cache="0.01x")
    with pytest.raises(BudgetUnreachable, match=r"^kv_cache 0\.01x is [\d,]+, but the smallest legal model"):
        legal_architectures(llama.family, llama.architecture, budget)


def test_an_axis_whose_every_legal_size_is_odd_to_others_stays(tmp_path):
    """Mamba-2's inner channels are hidden · expand, so a head_dim that is no power of two leaves no smaller one."""
    teacher = tiny_model("mamba2", tmp_path, num_heads=8, head_dim=12)
    budget = parse_budget(teacher, params="0.76x")
    found = legal_architectures(teacher.family, teacher.architecture, budget, tolerance=0.05)
    assert len(found) > 1
    assert all(abs(budget.use(target) - 1) <= 0.05 for target in found)


def test_a_budget_that_nothing_meets_gives_the_nearest_and_says_so(tmp_path, blocks):
    lumpy = tiny_model("llama", tmp_path, intermediate_size=1, num_hidden_layers=1, num_attention_heads=3,
                       num_key_value_heads=3, hidden_size=24)  # fmt: skip
    found = search(lumpy, score(measure(lumpy, blocks)), parse_budget(lumpy, params="0.93x"))
    assert len(found.candidates) == 1
    assert "no legal architecture lies within 1%" in found.note


def test_a_budget_below_the_smallest_legal_model_is_refused(llama):
    with pytest.raises(BudgetUnreachable, match="smallest legal model"):
        legal_architectures(llama.family, llama.architecture, parse_budget(llama, params="0.001x"))


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ({}, "give a budget"),
        ({"params": "1.2x"}, "only removes"),
        ({"params": "many"}, "0.7x"),
        ({"params": "0"}, "only"),
    ],
)
def test_budgets_that_make_no_sense(llama, budget, reason):
    with pytest.raises(BadRecipe, match=reason):
        parse_budget(llama, **budget)


def test_each_axis_is_probed_by_the_limit_that_it_helps(llama):
    """Neurons are no part of the cache: one fewer was as near to a budget of it as half of them."""
    one, both = (
        probe_architectures(llama.family, llama.architecture, parse_budget(llama, params="0.8x", kv_cache=cache))
        for cache in (None, "0.5x")
    )
    assert both["ffn"] == one["ffn"]
    assert both["hidden"] == one["hidden"]
    assert one["ffn"].ffn < 0.75 * llama.architecture.ffn


@pytest.mark.parametrize("name", ["stablelm", "gpt2"])
def test_axes_that_are_tied_are_probed_together(name, tmp_path):
    """They have no head_dim of their own; not probed, hidden channels and heads weighed as if they did no harm."""
    teacher = tiny_model(name, tmp_path)
    whole, budget = teacher.architecture, parse_budget(teacher, params="0.75x")
    probes = probe_architectures(teacher.family, whole, budget)
    assert probes.keys() == {"layers", "hidden", "heads", "ffn"}
    assert probes["hidden"] == probes["heads"]
    assert whole.hidden / probes["hidden"].hidden == whole.heads / probes["hidden"].heads > 1


def test_what_is_proposed_other_programs_load_too(tmp_path):
    square = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "head_dim": 8}
    teacher = tiny_model("qwen2", tmp_path / "square", **square)
    spaces = [
        legal_architectures(model.family, model.architecture, parse_budget(model, params="0.5x"), portable=portable)
        for model, portable in (
            (teacher, True),
            (teacher, False),
            (tiny_model("qwen2", tmp_path / "not", **square | {"hidden_size": 40}), True),
        )
    ]
    assert [all(a.hidden == a.heads * a.head_dim for a in found) for found in spaces] == [True, False, False]
    assert {a.heads for a in spaces[0]} == {4, 6}


def test_lost_share_is_zero_for_all_and_grows_with_the_cut(llama, blocks):
    scores, whole = score(measure(llama, blocks)), llama.architecture
    curves = lost_curves(scores, whole)
    assert set(lost_share(curves, whole).values()) == {0.0}
    for axis, sizes in {"layers": (3, 2), "hidden": (42, 24), "ffn": (30, 10), "heads": (3, 3)}.items():
        shares = [lost_share(curves, whole.replace(**{axis: size}))[axis] for size in sizes]
        assert 0 < shares[0] <= shares[1] < 1


def test_lost_share_is_that_of_the_energy_of_what_leaves(llama, blocks):
    scores, whole = score(measure(llama, blocks)), llama.architecture
    lost = lost_share(lost_curves(scores, whole), whole.replace(ffn=10, kv_heads=1, heads=1))
    ffn_LF = scores["ffn"].square()
    kept_L = ffn_LF.topk(10).values.sum(1)
    assert lost["ffn"] == pytest.approx(float((1 - kept_L / ffn_LF.sum(1)).mean()), rel=1e-5)
    groups = float((scores["kv_heads"].square().amax(1) / scores["kv_heads"].square().sum(1)).mean())
    heads_LGA = scores["heads"].square().unflatten(1, (whole.kv_heads, -1))
    inside = float((heads_LGA.amax(2) / heads_LGA.sum(2)).mean())
    assert lost["heads"] == pytest.approx(1 - groups * inside, rel=1e-5)


@pytest.fixture
def text(corpus, tmp_path):
    add_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    return tokenise(documents(str(corpus)), tokenizer, block_size=32, to=tmp_path / "text", label="test")


def test_candidates_are_measured_and_the_best_comes_first(llama, text):
    scores = score(measure(llama, text.head(16)))
    found = search(
        llama,
        scores,
        parse_budget(llama, params="0.8x"),
        calibration=text.head(16),
        heldout=text.select(range(16, 32)),
        candidates=3,
        probe_blocks=8,
    )
    losses = [candidate.measured.loss for candidate in found.candidates[:3]]
    assert losses == sorted(losses)
    assert all(candidate.measured is None for candidate in found.candidates[3:])
    assert set(found.probes) == {"layers", "hidden", "ffn", "heads"}


def test_a_search_finds_the_same_with_a_teacher_from_the_disk(llama, text, monkeypatch):
    scores, budget = score(measure(llama, text.head(8))), parse_budget(llama, params="0.8x")
    options = {"calibration": text.head(8), "heldout": text.select(range(8, 16)), "candidates": 2}
    found = search(llama, scores, budget, **options)
    check = memory.check_search
    monkeypatch.setattr(memory, "check_search", lambda *_, **given: check(*_, **given)._replace(streamed=True))
    monkeypatch.setattr(sys.modules["prunus.search"], "in_memory", lambda _: pytest.fail("the teacher is whole"))
    assert search(llama, scores, budget, **options) == found


def test_axes_that_are_tied_weigh_alike(text, tmp_path):
    teacher = tiny_model("stablelm", tmp_path / "teacher")
    scores, budget = score(measure(teacher, text.head(8))), parse_budget(teacher, params="0.75x")
    found = search(teacher, scores, budget, calibration=text.head(8), heldout=text.select(range(8, 16)), candidates=1)
    assert found.probes["hidden"] == found.probes["heads"] != 1.0


def test_a_large_hybrid_may_lose_layers_and_channels():
    """Of its many axes all sizes together are too many to try; those that cannot meet the budget must not stand in the
    way of those that can."""
    pattern = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
    sizes = {"hidden_size": 4096, "intermediate_size": 21504, "num_attention_heads": 32, "num_key_value_heads": 8}
    mamba = {"mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8}
    config = AutoConfig.for_model("nemotron_h", hybrid_override_pattern=pattern, head_dim=128, **sizes, **mamba)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    family = family_of("nemotron_h", config)
    layout = cost.layout(family, {name: tuple(t.shape) for name, t in stored_tensors(model).items()})
    whole = family.architecture(config)
    whole = whole.only(family.sizes(unit for units in layout.values() for unit in units))
    costs = Costs(family, cost.shapes(family, layout), 2)
    limit = Limit("params", "0.9x", round(0.9 * costs.parameters(whole)), costs.parameters(whole))
    found = legal_architectures(family, whole, Budget(costs, (limit,)))
    assert all(len({each[axis] for each in found}) > 4 for axis in ("layers", "hidden"))
