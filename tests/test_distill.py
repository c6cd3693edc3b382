"""The training loop: exactness, invariances, resuming."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoTokenizer

import prunus as pr
from prunus.distill import Settings, distill, learning_rate, plan
from prunus.documents import documents
from prunus.errors import BadData, BadOutput
from prunus.importance import score
from prunus.measure import measure
from prunus.prune import prune
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
    return torch.cat([tensor.flatten() for _, tensor in sorted(checkpoint.tensors())])


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


def test_schedule_by_hand():
    schedule = plan(Settings(tokens=100 * 64, batch_tokens=64), hidden=576, num_blocks=1000, block_size=32)
    assert (schedule.steps, schedule.batch_blocks, schedule.warmup_steps) == (100, 2, 5)
    rates = [learning_rate(step, schedule, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(3e-4 / 5)
    assert max(rates) == rates[5] == pytest.approx(3e-4)
    assert rates[-1] == pytest.approx(3e-5)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_derived_settings():
    big = plan(Settings(), hidden=4096, num_blocks=10**6, block_size=512)
    assert big.batch_blocks == 512
    assert big.learning_rate == pytest.approx(1.125e-4)
    small = plan(Settings(), hidden=576, num_blocks=130, block_size=512)
    assert small.batch_blocks == 1
    assert small.steps == 130
    assert math.isclose(small.tokens, 130 * 512)
    with pytest.raises(BadData, match="at least one step"):
        plan(Settings(batch_tokens=4096), hidden=64, num_blocks=2, block_size=32)
