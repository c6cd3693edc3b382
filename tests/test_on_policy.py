"""On-policy distillation: what the student writes, what of it counts, and that runs of it stay exact."""

import dataclasses
import json

import pytest
import torch
from conftest import KINDS, tiny_model
from test_distill import FAST, curve, setting, trained, weights  # noqa: F401  (a fixture)

from prunus.errors import BadData
from prunus.on_policy import continued, is_due, seeds

LENGTH, PROMPT = 40, 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("on_policy") / "model", eos_token_id=96).module().train()


def text(rows):
    return torch.randint(0, 96, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", KINDS)
def test_samples_from_the_student_without_a_cache_are_the_same(family, tmp_path):
    model = tiny_model(family, tmp_path / "model").module()
    tokens, _, _ = continued(model, text(2), seeds=[3, 4])
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    with torch.no_grad():
        for place in range(PROMPT, LENGTH):
            p = model(input_ids=tokens[:, :place], use_cache=False).logits[:, -1].float().softmax(-1)
            for row, generator in enumerate(generators):
                assert tokens[row, place] == torch.multinomial(p[row], 1, generator=generator)
    assert torch.equal(tokens[:, :PROMPT], text(2)[:, :PROMPT])


def test_tokens_appear_as_often_as_the_student_says(model):
    """The first written token, 4000 times, against the distribution itself: χ² over the likely ids."""
    prompt = text(1)[:, : 2 * 2]
    with torch.no_grad():
        p = model(input_ids=prompt[:, :2]).logits[0, -1].softmax(-1)
    tokens, _, _ = continued(model, prompt.expand(4000, -1), seeds=list(range(4000)))
    likely = (4000 * p >= 5).nonzero().flatten()
    counts = tokens[:, 2].bincount(minlength=97)[likely]
    expected = 4000 * p[likely]
    assert len(likely) > 5
    excess = ((counts - expected) ** 2 / expected).sum() - len(likely)
    assert abs(excess) < 5 * (2 * len(likely)) ** 0.5


def test_a_block_depends_on_its_own_seed_alone(model):
    torch.manual_seed(1)
    together, _, _ = continued(model, text(3), seeds=[5, 6, 7])
    alone, _, _ = continued(model, text(3)[1:2], seeds=[6])
    assert torch.equal(together[1:2], alone)
    assert len(set(seeds(0, 1, [4, 5]) + seeds(0, 2, [4, 5]) + seeds(1, 1, [4, 5]))) == 6
    assert model.training


def test_only_what_was_written_before_the_end_counts(model, monkeypatch):
    script = iter([5, 96, 7, *[8] * LENGTH])
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: torch.tensor([next(script)]))
    tokens, positions, mask = continued(model, torch.full((1, LENGTH), 96), seeds=[0])
    assert tokens[0, PROMPT : PROMPT + 3].tolist() == [5, 96, 7]
    assert mask[0].nonzero().flatten().tolist() == [PROMPT - 1, PROMPT]  # which predict 5 and the end
    assert positions[0].tolist() == list(range(LENGTH))


def test_steps_are_spread_evenly():
    due = [step for step in range(100) if is_due(step, 0.25)]
    assert due == list(range(3, 100, 4))
    assert all(is_due(step, 1.0) and not is_due(step, 0.0) for step in range(100))


ON_POLICY = dataclasses.replace(FAST, on_policy_share=0.5, divergence="reverse_kl")


def test_the_split_into_micro_batches_changes_nothing(setting, tmp_path):  # noqa: F811
    one, four = (
        trained(setting, tmp_path / str(size), settings=dataclasses.replace(ON_POLICY, micro_blocks=size))
        for size in (1, 4)
    )
    assert curve(one) == pytest.approx(curve(four), rel=1e-4)


def test_a_run_that_was_stopped_ends_with_the_same_bits(setting, tmp_path):  # noqa: F811
    undisturbed = trained(setting, tmp_path / "a", settings=ON_POLICY)

    def stop(at):
        if at.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(setting, tmp_path / "b", settings=ON_POLICY, checkpoint_seconds=0, progress=stop)
    assert torch.equal(weights(trained(setting, tmp_path / "b", settings=ON_POLICY)), weights(undisturbed))
    assert json.loads((tmp_path / "b" / "training.json").read_text())["steps"] == 8


def test_the_divergence_on_its_own_text_falls(setting, tmp_path):  # noqa: F811
    settings = dataclasses.replace(ON_POLICY, on_policy_share=1.0, tokens=3200)
    losses = curve(trained(setting, tmp_path / "a", settings=settings))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_it_needs_the_teacher_itself(setting, tmp_path):  # noqa: F811
    _, student, blocks = setting
    with pytest.raises(BadData, match="on_policy_share needs the teacher itself"):
        trained((None, student, blocks), tmp_path / "a", settings=ON_POLICY)
