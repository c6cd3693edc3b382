import math

import pytest
import torch

from prunus import losses


def test_forward_kl_by_hand() -> None:
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    expected = 0.5 * math.log(2) + 0.25 * math.log(1 / 2)
    logits = [torch.tensor([x]).log() for x in (q, p)]
    assert losses.divergence("forward_kl", *logits, num_tokens=1).item() == pytest.approx(expected, rel=1e-6)
    assert losses.divergence("forward_kl", *logits, num_tokens=4).item() == pytest.approx(expected / 4, rel=1e-6)


def test_forward_kl_of_equals_is_zero_with_zero_gradient() -> None:
    student = torch.randn(5, 7, requires_grad=True)
    loss = losses.divergence("forward_kl", student, student.detach(), num_tokens=5)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-7


def test_temperature_scales_loss_and_gradient_alike() -> None:
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    losses.divergence("forward_kl", student, teacher, num_tokens=5, temperature=3.0).backward()
    expected = 3.0 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)) / 5
    torch.testing.assert_close(student.grad, expected.detach())


def test_masked_tokens_do_not_count() -> None:
    student, teacher, mask = torch.randn(5, 7), torch.randn(5, 7), torch.tensor([True, False, True, True, False])
    masked = losses.divergence("forward_kl", student, teacher, num_tokens=3, mask_N=mask)
    torch.testing.assert_close(masked, losses.divergence("forward_kl", student[mask], teacher[mask], num_tokens=3))
    target = torch.tensor([1, -100, 2, 0, -100])
    entropy = losses.cross_entropy(student, target, num_tokens=3, mask_N=mask)
    torch.testing.assert_close(entropy, -student.log_softmax(-1)[mask, target[mask]].mean())


def test_padded_vocabularies_are_cut_to_the_shared_ids() -> None:
    student, teacher = torch.randn(5, 7), torch.randn(5, 9)
    expected = losses.divergence("forward_kl", student, teacher[:, :7], num_tokens=5)
    assert losses.divergence("forward_kl", student, teacher, num_tokens=5) == expected
    padded = torch.cat([student, torch.full((5, 4), 50.0)], dim=1)
    assert losses.divergence("forward_kl", padded, teacher[:, :7], num_tokens=5) == expected


def test_head_logits_by_hand_and_in_fp32() -> None:
    hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.5, 0.0]])
    logits = losses.head_logits(hidden, weight, bias=torch.tensor([1.0, -0.5]), scale=0.5, softcap=5.0)
    torch.testing.assert_close(logits, torch.tensor([[5 * math.tanh(6 / 5), 0.0]]))
    assert losses.head_logits(hidden.bfloat16(), weight.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"teacher_logits_NV": torch.randn(4, 7)}, "5 student tokens against 4"),
        ({"mask_N": torch.ones(5)}, "mask must be bool"),
    ],
)
def test_errors_name_the_mistake(change: dict[str, object], message: str) -> None:
    arguments = {"student_logits_NV": torch.randn(5, 7), "teacher_logits_NV": torch.randn(5, 7), "num_tokens": 5}
    with pytest.raises(ValueError, match=message):
        losses.divergence("forward_kl", **(arguments | change))
