"""The training loop: exactness, invariances, resuming."""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import add_tokenizer, tiny_model, weights_of
from transformers import AutoTokenizer

import prunus as pr
from prunus import hidden, watch, weight_size
from prunus.checkpoint import save
from prunus.distill import distill
from prunus.documents import documents
from prunus.errors import BadCheckpoint, BadData, BadOutput, Stopped, TrainingDiverged
from prunus.evaluate import quality
from prunus.importance import score
from prunus.masters import Masters
from prunus.measure import measure
from prunus.prune import prune
from prunus.schedule import LARGEST_STEP, SCHEDULES, Settings, learning_rate, plan
from prunus.step import hidden_weight
from prunus.text import tokenise

FAST = Settings(tokens=1024, batch_tokens=128, micro_blocks=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def setting(whole_model, corpus, tmp_path_factory):
    """Teacher, student and text."""
    folder = tmp_path_factory.mktemp("distill")
    teacher = pr.load(whole_model)
    tokenizer = AutoTokenizer.from_pretrained(whole_model)
    text = tokenise(documents(str(corpus)), tokenizer, block_size=32, to=folder / "text", label="test")
    target = teacher.architecture.replace(ffn=24)
    return teacher, prune(teacher, score(measure(teacher, text.head(8))), target, to=folder / "student"), text


def trained(setting, to, **changes):
    teacher, student, text = setting
    options = {"settings": FAST, "dtype": torch.float32} | changes
    return distill(student, teacher, text, to=to, **options)


def curve(checkpoint):
    return [point["loss"] for point in json.loads((checkpoint.folder / "training.json").read_text())["curve"]]


def weights(checkpoint):
    return torch.cat([tensor.flatten() for _, tensor in sorted(weights_of(checkpoint).items())])


def test_the_loss_falls(setting, tmp_path):
    losses = curve(trained(setting, tmp_path / "a", settings=dataclasses.replace(FAST, tokens=6400)))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("dtype", "noise"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_a_student_that_is_its_teacher_has_no_loss(setting, tmp_path, dtype, noise):
    """Up to the rounding of its hidden states: in training mode attention runs through another kernel."""
    teacher, _, text = setting
    same = distill(teacher, teacher, text, to=tmp_path / "a", settings=FAST, dtype=dtype)
    assert abs(curve(same)[0]) < noise


def test_the_split_into_micro_batches_changes_nothing(setting, tmp_path):
    splits = {size: dataclasses.replace(FAST, micro_blocks=size) for size in (1, 2, 4)}
    runs = [trained(setting, tmp_path / str(size), settings=settings) for size, settings in splits.items()]
    for other in runs[1:]:
        assert curve(other) == pytest.approx(curve(runs[0]), rel=1e-4)
        torch.testing.assert_close(weights(other), weights(runs[0]), rtol=1e-3, atol=1e-4)


def test_a_run_that_was_stopped_ends_with_the_same_bits(setting, tmp_path):
    undisturbed = trained(setting, tmp_path / "a")

    def stop(at):
        if at.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(setting, tmp_path / "b", checkpoint_seconds=0, progress=stop)
    assert not (tmp_path / "b").exists()
    steps = []
    resumed = trained(setting, tmp_path / "b", progress=lambda at: steps.append(at.step))
    assert steps[0] == 5
    assert torch.equal(weights(resumed), weights(undisturbed))
    assert curve(resumed) == curve(undisturbed)
    assert list(tmp_path.glob(".*")) == []


def test_an_unfinished_run_with_other_settings_is_not_continued(setting, tmp_path):
    def stop(at):
        if at.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(setting, tmp_path / "a", checkpoint_seconds=0, progress=stop)
    with pytest.raises(BadOutput, match="other settings"):
        trained(setting, tmp_path / "a", settings=dataclasses.replace(FAST, learning_rate=2e-3))


def test_random_init_starts_from_the_seed_alone(setting, tmp_path):
    a, b = (trained(setting, tmp_path / name, random_init=True) for name in "ab")
    assert torch.equal(weights(a), weights(b))
    assert curve(a)[0] > 2 * curve(trained(setting, tmp_path / "c"))[0]


@pytest.mark.parametrize(
    "change", [{"divergence": "reverse_kl"}, {"divergence": "jsd", "mix": 0.3}, {"temperature": 2.0}]
)
def test_other_divergences_learn(setting, tmp_path, change):
    losses = curve(trained(setting, tmp_path / "a", settings=dataclasses.replace(FAST, tokens=6400, **change)))
    assert losses[-1] < 0.7 * losses[0]


def test_gradient_checkpointing_changes_nothing(setting, tmp_path):
    plain, checkpointed = (trained(setting, tmp_path / str(on), gradient_checkpointing=on) for on in (False, True))
    assert curve(checkpointed) == pytest.approx(curve(plain), rel=1e-6)


def test_without_a_teacher_it_is_cross_entropy_on_the_text(setting, tmp_path):
    """Teacher correction: the loss is the text's own, and falls."""
    teacher, _, text = setting
    corrected = distill(
        teacher, None, text, to=tmp_path / "a", settings=dataclasses.replace(FAST, tokens=6400), dtype=torch.float32
    )
    losses = [quality(model.module(torch.float32), text).loss for model in (teacher, corrected)]
    assert curve(corrected)[0] == pytest.approx(losses[0], rel=0.1)
    assert losses[1] < losses[0]


def test_text_is_taken_as_it_is_whatever_a_teacher_would_be_asked(setting, tmp_path):
    asked = dataclasses.replace(FAST, temperature=2.0, divergence="jsd")
    plain, other = (
        distill(setting[1], None, setting[2], to=tmp_path / name, settings=settings, dtype=torch.float32)
        for name, settings in (("a", FAST), ("b", asked))
    )
    assert torch.equal(weights(plain), weights(other))


def test_hidden_states_are_compared_where_the_cut_says(setting, tmp_path):
    """A student that lost a layer: with the loss its streams come closer to the teacher's than without."""
    teacher, _, text = setting
    target = teacher.architecture.replace(layers=3)
    student = prune(teacher, score(measure(teacher, text.head(8))), target, to=tmp_path / "student")
    pairs = hidden.pairs_of_cut(student, teacher, count=4)
    assert len(pairs.layers) == 3
    assert pairs.layers[-1] == (2, 3)
    runs = {}
    for kind in (None, "mse", "cosine"):
        settings = dataclasses.replace(FAST, tokens=6400, hidden_loss=kind)
        runs[kind] = trained((teacher, student, text), tmp_path / str(kind), settings=settings, pairs=pairs)

    def distance(checkpoint):
        models = checkpoint.module(torch.float32), teacher.module(torch.float32)
        tokens, positions = text.batch([0, 1])
        with torch.no_grad():
            captures = []
            for side, model in enumerate(models):
                with hidden.captured(model, [pair[side] for pair in pairs.layers]) as found:
                    model(input_ids=tokens, position_ids=positions)
                captures.append(found)
        mask = torch.ones(tokens.numel(), dtype=torch.bool)
        return float(hidden.loss("mse", pairs, *captures, num_tokens=tokens.numel(), mask_N=mask))

    assert distance(runs["mse"]) < 0.9 * distance(runs[None])
    assert distance(runs["cosine"]) < distance(runs[None])


def test_a_student_that_keeps_everything_has_no_hidden_loss(setting, tmp_path):
    teacher, _, text = setting
    whole = prune(teacher, score(measure(teacher, text.head(8))), teacher.architecture, to=tmp_path / "student")
    pairs = hidden.pairs_of_cut(whole, teacher, count=2)
    settings = dataclasses.replace(FAST, hidden_loss="mse")
    written = trained((teacher, whole, text), tmp_path / "a", settings=settings, pairs=pairs)
    first = json.loads((written.folder / "training.json").read_text())["curve"][0]
    assert first["hidden_loss"] < 1e-9


def test_hidden_loss_needs_a_cut_that_is_known(setting, tmp_path):
    teacher = setting[0]
    with pytest.raises(BadData, match="the pairs of layers"):
        trained(setting, tmp_path / "a", settings=dataclasses.replace(FAST, hidden_loss="mse"))
    with pytest.raises(BadCheckpoint, match=r"no prunus\.json"):
        hidden.pairs_of_cut(teacher, teacher, count=2)


def test_a_foreign_student_learns_through_projectors(setting, tmp_path):
    """Narrower and shallower than its teacher, and no cut of it."""
    teacher, _, text = setting
    student = tiny_model("llama", tmp_path / "student", hidden_size=36, num_hidden_layers=3)
    pairs = hidden.pairs(student, teacher, count=2)
    assert pairs.layers == ((1, 2), (2, 3))  # of 3 and of 4
    settings = dataclasses.replace(FAST, tokens=6400, hidden_loss="mse")
    options = {"settings": settings, "pairs": pairs}
    written = trained((teacher, student, text), tmp_path / "a", **options)
    losses = [point["hidden_loss"] for point in json.loads((written.folder / "training.json").read_text())["curve"]]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert {name for name, _ in written.tensors()} == {name for name, _ in student.tensors()}

    def stop(at):
        if at.step == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained((teacher, student, text), tmp_path / "b", **options, checkpoint_seconds=0, progress=stop)
    resumed = trained((teacher, student, text), tmp_path / "b", **options)
    assert torch.equal(weights(resumed), weights(written))


def test_a_projector_starts_as_the_best_fit(setting, tmp_path):
    """Between a model and itself that is the identity."""
    teacher, _, text = setting
    settings = dataclasses.replace(FAST, hidden_loss="mse", learning_rate=1e-12)
    pairs = hidden.pairs(teacher, teacher, count=2)
    written = trained((teacher, teacher, text), tmp_path / "a", settings=settings, pairs=pairs)
    assert json.loads((written.folder / "training.json").read_text())["curve"][0]["hidden_loss"] < 0.01


def test_held_out_loss_is_measured_and_a_plateau_ends_the_training(setting, tmp_path):
    text = setting[2]
    settings = dataclasses.replace(FAST, tokens=6400, evaluate_every=5, patience=2, learning_rate=1e-12)
    written = trained(setting, tmp_path / "a", settings=settings, validation=text.head(4))
    record = json.loads((written.folder / "training.json").read_text())
    measured = [point["step"] for point in record["curve"] if "heldout_loss" in point]
    assert measured == [5, 10, 15]
    assert record["steps"] == 15


def broken_at(monkeypatch, steps):
    """The gradient of these calls of a step is not a number."""
    whole, calls = Masters.clip, iter(range(10**6))

    def clip(self, most):
        if next(calls) in steps:
            next(iter(self.values.values())).grad.fill_(math.nan)
        return whole(self, most)

    monkeypatch.setattr(Masters, "clip", clip)


def test_a_step_without_a_finite_gradient_is_left_out(setting, tmp_path, monkeypatch):
    broken_at(monkeypatch, {3})
    written = trained(setting, tmp_path / "a")
    record = json.loads((written.folder / "training.json").read_text())
    assert record["skipped_steps"] == [4]
    assert [point["step"] for point in record["curve"]] == [1, 2, 3, 5, 6, 7, 8]
    assert weights(written).isfinite().all()


def test_a_loss_that_is_no_number_does_not_reach_the_next_step():
    good, bad = {"loss": 2.0, "hidden_loss": 0.5}, {"loss": math.nan, "hidden_loss": math.nan, "skipped": True}
    settings = Settings(hidden_loss="mse", hidden_weight=3.0)
    assert hidden_weight([good, bad], settings) == hidden_weight([good], settings) == 12.0
    assert hidden_weight([bad], settings) == 0.0


def test_hidden_states_weigh_against_the_divergence_of_steps_of_their_kind():
    text, own = {"loss": 0.4, "hidden_loss": 0.1}, {"loss": 2.0, "hidden_loss": 0.1}
    settings = Settings(hidden_loss="mse", on_policy_share=0.5)
    assert [hidden_weight([text, own, text, own][:done], settings) for done in range(1, 5)] == [0.0, 4.0, 20.0, 4.0]


def test_text_that_says_nothing_of_a_next_token_is_refused(setting, tmp_path):
    _, _, text = setting
    alone = dataclasses.replace(text, positions=np.zeros_like(text.positions))
    with pytest.raises(BadData, match="nothing can be learnt"):
        trained((*setting[:2], alone), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_is_stored_in_float32_beside_a_shorter_type_stays_so(setting, tmp_path):
    teacher, _, text = setting
    student = pr.load(teacher.folder)
    model = student.module(torch.bfloat16)
    tensors = model.state_dict() | {"model.norm.weight": torch.full((48,), 1.0009765625)}
    tensors.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
    mixed = save(tmp_path / "mixed", student.config, tensors, like=student)
    written = distill(mixed, teacher, text, to=tmp_path / "a", settings=FAST)
    types = {name: stored.parts().dtype for name, stored in written.stored.items()}
    assert types.pop("model.norm.weight") == torch.float32
    assert set(types.values()) == {torch.bfloat16}


def test_repeated_bad_steps_go_back_and_slow_down(setting, tmp_path, monkeypatch):
    settings = dataclasses.replace(FAST, tokens=2560)
    broken_at(monkeypatch, set(range(6, 11)))
    written = trained(setting, tmp_path / "a", settings=settings, checkpoint_seconds=0)
    record = json.loads((written.folder / "training.json").read_text())
    assert len(record["events"]) == 1
    assert record["steps"] == 20
    plan_ = plan(settings, hidden=48, num_blocks=len(setting[2]), block_size=32)
    assert record["curve"][-1]["learning_rate"] == pytest.approx(learning_rate(19, plan_, settings, []) / 2)


def test_going_back_undoes_what_broke(setting, tmp_path, monkeypatch):
    """Weights that an update broke stay broken until they are loaded anew: a state within the bad streak is none."""
    whole, update = Masters.clip, Masters.step
    updates = iter(range(10**6))
    broken: list[torch.Tensor] = []

    def step(self, rate):
        update(self, rate)
        if next(updates) == 4:
            broken.append(next(iter(self.values.values())).detach().clone())

    def clip(self, most):
        value = next(iter(self.values.values()))
        if broken and torch.equal(value, broken[0]):
            value.grad.fill_(math.nan)
        return whole(self, most)

    times = iter(range(10**6))  # a state is stored after every third step only
    monkeypatch.setattr(Masters, "step", step)
    monkeypatch.setattr(Masters, "clip", clip)
    clock = SimpleNamespace(monotonic=lambda: float(next(times)))
    monkeypatch.setattr(importlib.import_module("prunus.distill"), "time", clock)
    written = trained(setting, tmp_path / "a", settings=dataclasses.replace(FAST, tokens=2560), checkpoint_seconds=3)
    record = json.loads((written.folder / "training.json").read_text())
    assert len(record["events"]) == 1
    assert record["steps"] == 20


def test_a_stop_within_a_bad_streak_stores_nothing_broken(setting, tmp_path, monkeypatch):
    """The next start goes on from what was stored before, and ends as an undisturbed training."""
    settings = dataclasses.replace(FAST, tokens=1280)
    undisturbed = trained(setting, tmp_path / "a", settings=settings, checkpoint_seconds=0)
    with monkeypatch.context() as patched:
        broken_at(patched, {5, 6})
        stop = SimpleNamespace(is_set=lambda: len(seen) == 7)  # steps 5 and 6 are bad
        seen: list[object] = []
        patched.setattr(watch, "stop_signal", lambda: contextlib.nullcontext(stop))
        with pytest.raises(Stopped):
            trained(setting, tmp_path / "b", settings=settings, checkpoint_seconds=0, progress=seen.append)
    again = trained(setting, tmp_path / "b", settings=settings, checkpoint_seconds=0)
    assert all(torch.equal(again.tensor(name), undisturbed.tensor(name)) for name in undisturbed.stored)


def test_buffers_keep_their_type(setting):
    """Rotary frequencies are float32 in transformers, whatever the model computes in."""
    model = setting[1].module(torch.float32)
    Masters(model, torch.bfloat16, weight_decay=0.0)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    floats = [value for value in model.buffers() if value.is_floating_point()]
    assert floats
    assert {value.dtype for value in floats} == {torch.float32}


def test_a_baseline_has_nothing_of_the_student(tmp_path, corpus):
    """Not even what is not trained, such as the biases by which experts are chosen."""
    teacher = tiny_model("deepseek_v3", tmp_path / "teacher")
    add_tokenizer(tmp_path / "teacher")
    name = next(name for name in teacher.stored if name.endswith("e_score_correction_bias"))
    text = tokenise(documents(str(corpus)), teacher.tokenizer(), block_size=32, to=tmp_path / "text", label="test")
    tensors = {each: teacher.tensor(each) for each in teacher.stored}
    tensors[name] = torch.rand_like(tensors[name])
    student = save(tmp_path / "student", teacher.config, tensors, like=teacher)
    baseline = trained((teacher, student, text), tmp_path / "baseline", random_init=True)
    assert baseline.tensor(name).abs().max() == 0


def test_a_training_that_never_recovers_says_so(setting, tmp_path, monkeypatch):
    broken_at(monkeypatch, set(range(1, 10**6)))
    with pytest.raises(TrainingDiverged, match=r"Lower distill\.learning_rate"):
        trained(setting, tmp_path / "a", checkpoint_seconds=0)
    assert not (tmp_path / "a").exists()


def test_a_stop_signal_loses_nothing(setting, tmp_path):
    undisturbed = trained(setting, tmp_path / "a")

    def stop(at):
        if at.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="after step 3"):
        trained(setting, tmp_path / "b", checkpoint_seconds=1e9, progress=stop)
    resumed = trained(setting, tmp_path / "b")
    assert torch.equal(weights(resumed), weights(undisturbed))
    assert curve(resumed) == curve(undisturbed)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_start_at_the_peak_and_end_where_they_should(name):
    settings = Settings(tokens=100 * 64, batch_tokens=64, learning_rate=3e-4, schedule=name, decay_share=0.2)
    schedule = plan(settings, hidden=576, num_blocks=1000, block_size=32)
    rates = [learning_rate(step, schedule, settings, []) for step in range(100)]
    assert rates[5] == pytest.approx(3e-4)
    assert rates[-1] == pytest.approx(3e-4 if name == "constant" else 3e-5)
    if name == "wsd":
        assert rates[5:75] == pytest.approx([3e-4] * 70)
        assert rates[82:] == sorted(rates[82:], reverse=True)


def test_schedule_by_hand():
    settings = Settings(tokens=100 * 64, batch_tokens=64)
    schedule = plan(settings, hidden=576, num_blocks=1000, block_size=32)
    assert (schedule.steps, schedule.batch_blocks, schedule.warmup_steps) == (100, 2, 5)
    losses = [1.0] * 5 + [0.1] * 95  # what comes behind the warm-up changes nothing
    rates = [learning_rate(step, schedule, settings, losses[: step + 1]) for step in range(100)]
    assert rates[0] == pytest.approx(2.5e-4 / 5)
    assert max(rates) == rates[5] == pytest.approx(2.5e-4)
    assert rates[-1] == pytest.approx(2.5e-5)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_a_student_far_from_its_teacher_goes_faster(setting, tmp_path):
    schedule = plan(Settings(tokens=64), hidden=144, num_blocks=1000, block_size=32)
    far, near, farthest = (
        learning_rate(0, schedule, Settings(), [loss]) * schedule.warmup_steps for loss in (2.25, 0.25, 1e3)
    )
    assert (far, near, farthest) == pytest.approx((2 * 1.5 * 2.5e-4, 2 * 0.5 * 2.5e-4, 2 * 2.0 * 2.5e-4))
    for settings, distilled in (
        (Settings(learning_rate=1e-4), True),
        (Settings(divergence="reverse_kl"), True),
        (Settings(cross_entropy_share=0.5), True),
        (Settings(), False),
    ):
        assert not plan(settings, hidden=144, num_blocks=1000, block_size=32, distilled=distilled).by_distance
    written = trained(setting, tmp_path / "a", settings=dataclasses.replace(FAST, learning_rate=None))
    points = json.loads((written.folder / "training.json").read_text())["curve"]
    kl = sum(point["loss"] for point in points[: max(1, round(0.05 * len(points)))])
    size = weight_size.of_layers(setting[1])
    assert LARGEST_STEP * size * math.sqrt(4) < 2.5e-4 * math.sqrt(576 / 48), "its weights are small"
    highest = max(point["learning_rate"] for point in points)
    assert highest == pytest.approx(LARGEST_STEP * size * math.sqrt(4 * kl))


def test_small_weights_take_small_steps():
    twos, ones = torch.full((3, 4), 2.0), torch.ones(3, 4)
    assert weight_size.size_of([[twos]]) == 2.0
    assert weight_size.size_of([[twos[:1], twos[1:]], [ones], [0 * ones]]) == pytest.approx(1.6**0.5)
    known = {"hidden": 576, "num_blocks": 1000, "block_size": 32}
    rates = [plan(Settings(), **known, size=size).learning_rate for size in (0.02, 0.2, math.inf)]
    assert rates == pytest.approx([3e-5 * math.sqrt(2), 2.5e-4, 2.5e-4])
    assert plan(Settings(learning_rate=1e-3), **known, size=0.02).learning_rate == 1e-3


def test_derived_settings():
    big = plan(Settings(), hidden=4096, num_blocks=10**6, block_size=512)
    assert big.batch_blocks == 512
    assert big.learning_rate == pytest.approx(0.9375e-4)
    small = plan(Settings(), hidden=576, num_blocks=130, block_size=512)
    assert small.batch_blocks == 1
    assert small.steps == 130
    assert math.isclose(small.tokens, 130 * 512)
    with pytest.raises(BadData, match="at least one step"):
        plan(Settings(batch_tokens=4096), hidden=64, num_blocks=2, block_size=32)


def test_a_weight_without_part_in_a_step_keeps_no_gradient_of_the_step_before():
    """An expert that no token chose: its gradient is zero, not what it was."""
    experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
    masters = Masters(experts, torch.bfloat16, weight_decay=0.0)
    x = torch.randn(3, 4).bfloat16()

    def gradients(*chosen):
        for number in chosen:
            experts[number](x).float().sum().backward()
        masters.clip(math.inf)
        found = [masters.values[f"{number}.weight"].grad.clone() for number in range(2)]
        masters.forget_gradients()
        return found

    once, both, one = gradients(0, 1), gradients(0, 0, 1), gradients(0)
    torch.testing.assert_close(both[0], 2 * once[0], rtol=0, atol=0)
    torch.testing.assert_close(both[1], once[1], rtol=0, atol=0)
    torch.testing.assert_close(one[0], once[0], rtol=0, atol=0)
    assert one[1].count_nonzero() == 0
