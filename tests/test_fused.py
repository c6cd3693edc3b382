"""The fused loss against its naive twin in `losses`, and in bf16 against an fp64 oracle."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from prunus import fused, losses
from prunus.fused import Head

TOKENS, VOCAB, HIDDEN, TEACHER_HIDDEN = 37, 103, 16, 24


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def case(**head: object) -> tuple[Tensor, Head, Tensor, Head]:
    """Student hidden, student head, teacher hidden, teacher head; the student's require grad."""
    student = Head(torch.randn(VOCAB, HIDDEN).requires_grad_(), **head)
    teacher = Head(torch.randn(VOCAB, TEACHER_HIDDEN), **head)
    return torch.randn(TOKENS, HIDDEN).requires_grad_(), student, torch.randn(TOKENS, TEACHER_HIDDEN), teacher


def naive(hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head, **settings: object) -> Tensor:
    student_logits, teacher_logits = (
        losses.head_logits(h, head.weight_VD, bias=head.bias_V, softcap=head.softcap, scale=head.scale)
        for h, head in ((hidden, student), (teacher_hidden, teacher))
    )
    return losses.forward_kl(student_logits, teacher_logits, **settings)


def gradients(loss: Tensor, hidden: Tensor, student: Head) -> list[Tensor]:
    wanted = [value for value in (hidden, student.weight_VD, student.bias_V) if value is not None]
    return list(torch.autograd.grad(loss, [value for value in wanted if value.requires_grad]))


def assert_same(inputs: tuple[Tensor, Head, Tensor, Head], chunk_tokens: int = 16, **settings: object) -> None:
    """Value and gradients of the fused loss equal those of the naive one."""
    ours = fused.forward_kl(*inputs, chunk_tokens=chunk_tokens, **settings)
    reference = naive(*inputs, **settings)
    torch.testing.assert_close(ours, reference)
    for got, expected in zip(gradients(ours, *inputs[:2]), gradients(reference, *inputs[:2]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_by_hand() -> None:
    q, p, identity = torch.tensor([[0.25, 0.25, 0.5]]), torch.tensor([[0.5, 0.25, 0.25]]), Head(torch.eye(3))
    hidden = q.log().requires_grad_()
    loss = fused.forward_kl(hidden, identity, p.log(), identity, num_tokens=1)
    loss.backward()
    assert loss.item() == pytest.approx(0.25 * torch.tensor(2.0).log().item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, q - p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(TOKENS, HIDDEN).to(dtype), torch.randn(VOCAB, HIDDEN).to(dtype)
    student_hidden, student = hidden.clone().requires_grad_(), Head(weight.clone().requires_grad_())
    loss = fused.forward_kl(student_hidden, student, hidden, Head(weight), num_tokens=TOKENS)
    assert loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(loss, student_hidden, student))


@pytest.mark.parametrize("chunk_tokens", [1, 5, 16, 37, 1000])
@pytest.mark.parametrize("rows", [1, 7, 128])
def test_chunks_change_nothing(chunk_tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "ROW_TOKENS", rows)
    monkeypatch.setattr(fused, "VOCAB_BLOCK", 10 * rows)
    assert_same(case(), num_tokens=TOKENS, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0}, {"scale": 0.25}, {"softcap": 5.0, "scale": 2.0}])
def test_temperature_softcap_and_scale(temperature: float, head: dict[str, float]) -> None:
    assert_same(case(**head), num_tokens=TOKENS, temperature=temperature)


def test_bias_of_the_head() -> None:
    hidden, student, teacher_hidden, teacher = case(softcap=5.0, scale=0.5)
    student = dataclasses.replace(student, bias_V=torch.randn(VOCAB).requires_grad_())
    teacher = dataclasses.replace(teacher, bias_V=torch.randn(VOCAB))
    assert_same((hidden, student, teacher_hidden, teacher), num_tokens=TOKENS)


@pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(VOCAB, VOCAB - 9), (VOCAB - 9, VOCAB)])
def test_vocabularies_padded_differently(student_vocab: int, teacher_vocab: int) -> None:
    hidden, _, teacher_hidden, teacher = case()
    student = Head(torch.randn(student_vocab, HIDDEN).requires_grad_(), torch.randn(student_vocab).requires_grad_())
    teacher = dataclasses.replace(teacher, weight_VD=teacher.weight_VD[:teacher_vocab])
    assert_same((hidden, student, teacher_hidden, teacher), num_tokens=TOKENS)


def test_mask() -> None:
    mask = torch.rand(TOKENS) < 0.6
    assert_same(case(), num_tokens=int(mask.sum()), mask_N=mask)
    assert_same(case(), num_tokens=TOKENS, mask_N=torch.ones(TOKENS, dtype=torch.bool))


def test_a_micro_batch_without_valid_tokens_has_no_loss_and_no_gradient() -> None:
    inputs = case()
    loss = fused.forward_kl(*inputs, num_tokens=10, mask_N=torch.zeros(TOKENS, dtype=torch.bool))
    assert loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(loss, *inputs[:2]))


def test_micro_batches_add_up() -> None:
    hidden, student, teacher_hidden, teacher = inputs = case()
    whole = fused.forward_kl(*inputs, num_tokens=TOKENS)
    parts = [
        fused.forward_kl(hidden[part], student, teacher_hidden[part], teacher, num_tokens=TOKENS)
        for part in (slice(0, 5), slice(5, 30), slice(30, TOKENS))
    ]
    torch.testing.assert_close(sum(parts), whole)
    for got, expected in zip(gradients(sum(parts), hidden, student), gradients(whole, hidden, student), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_frozen_parts_get_no_gradient() -> None:
    hidden, student, teacher_hidden, teacher = case()
    frozen = dataclasses.replace(student, weight_VD=student.weight_VD.detach())
    assert_same((hidden, frozen, teacher_hidden, teacher), num_tokens=TOKENS)
    assert_same((hidden.detach(), student, teacher_hidden, teacher), num_tokens=TOKENS)
    teacher.weight_VD.requires_grad_()
    fused.forward_kl(hidden, frozen, teacher_hidden.requires_grad_(), teacher, num_tokens=TOKENS).backward()
    assert frozen.weight_VD.grad is None
    assert teacher.weight_VD.grad is None
    assert teacher_hidden.grad is None


def test_head_tied_to_the_embedding_sums_both_gradients() -> None:
    _, student, teacher_hidden, teacher = case()
    tied, ids = student.weight_VD, torch.randint(VOCAB, (TOKENS,))
    ours = fused.forward_kl(tied[ids], Head(tied), teacher_hidden, teacher, num_tokens=TOKENS)
    reference = naive(tied[ids], Head(tied), teacher_hidden, teacher, num_tokens=TOKENS)
    for got, expected in zip(torch.autograd.grad(ours, tied), torch.autograd.grad(reference, tied), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_no_grad_gives_the_loss_alone() -> None:
    inputs = case()
    with torch.no_grad():
        loss = fused.forward_kl(*inputs, num_tokens=TOKENS)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, naive(*inputs, num_tokens=TOKENS).detach())


def test_the_gradient_follows_the_factor_on_the_loss_and_is_spent_once() -> None:
    inputs = case()
    single = gradients(fused.forward_kl(*inputs, num_tokens=TOKENS), *inputs[:2])
    loss = fused.forward_kl(*inputs, num_tokens=TOKENS)
    (0.3 * loss).backward(retain_graph=True)
    torch.testing.assert_close(inputs[0].grad, 0.3 * single[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_does_not_reach_inside() -> None:
    inputs = case()
    expected = gradients(fused.forward_kl(*inputs, num_tokens=TOKENS), *inputs[:2])
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused.forward_kl(*inputs, num_tokens=TOKENS)
    for got, reference in zip(gradients(loss, *inputs[:2]), expected, strict=True):
        assert torch.equal(got, reference)


def near_teacher(distance: float, shift: float = 0.0) -> tuple[Tensor, Head, Tensor, Head]:
    """A bf16 student = teacher + noise of relative size `distance`; `shift` is added to all of its logits."""
    teacher_hidden = torch.randn(192, 64)
    teacher_hidden[:, 0] = 1
    weight = torch.randn(3000, 64) * 0.5
    hidden = teacher_hidden + distance * torch.randn_like(teacher_hidden)
    head = weight + distance * 0.5 * torch.randn_like(weight)
    head[:, 0] += shift
    values = [value.bfloat16() for value in (hidden, head, teacher_hidden, weight)]
    return values[0].requires_grad_(), Head(values[1].requires_grad_()), values[2], Head(values[3])


def oracle(hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients in fp64 from the same bf16 values."""
    hidden, weight = (value.detach().double().requires_grad_() for value in (hidden, student.weight_VD))
    log_q = (hidden @ weight.T).log_softmax(-1)
    log_p = (teacher_hidden.double() @ teacher.weight_VD.double().T).log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum() / len(hidden)
    return loss, list(torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("distance", [0.003, 0.03, 0.1, 0.2, 0.5, 2.0])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_bf16_gradients_are_within_half_a_percent(distance: float, shift: float) -> None:
    inputs = near_teacher(distance, shift)
    loss = fused.forward_kl(*inputs, num_tokens=192, chunk_tokens=100)
    expected_loss, expected = oracle(*inputs)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-3, abs=2e-6)
    for got, reference in zip(gradients(loss, *inputs[:2]), expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - reference).norm() / reference.norm() < 0.005


def test_fp32_head_under_bf16_hidden_states_gets_an_fp32_gradient() -> None:
    hidden, student, teacher_hidden, teacher = inputs = near_teacher(0.1)
    master = Head(student.weight_VD.detach().float().requires_grad_())
    loss = fused.forward_kl(hidden, master, teacher_hidden, teacher, num_tokens=192)
    _, expected = oracle(*inputs)
    got = gradients(loss, hidden, master)
    assert [gradient.dtype for gradient in got] == [torch.bfloat16, torch.float32]
    assert (got[1].double() - expected[1]).norm() / expected[1].norm() < 0.005


def test_two_runs_agree_bitwise() -> None:
    inputs = near_teacher(0.1)
    first, second = (gradients(fused.forward_kl(*inputs, num_tokens=192), *inputs[:2]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


GROWTH = """
import pathlib, re, torch
from prunus import fused, losses
hidden, teacher_hidden = (torch.randn(1024, 32).bfloat16() for _ in range(2))
student, teacher = (torch.randn(20000, 32).bfloat16() for _ in range(2))
hidden.requires_grad_(), student.requires_grad_()
def ours(n, v):
    heads = fused.Head(student[:v]), fused.Head(teacher[:v])
    fused.forward_kl(hidden[:n], heads[0], teacher_hidden[:n], heads[1], num_tokens=n, chunk_tokens=256).backward()
def naive(n, v):
    logits = [losses.head_logits(h[:n], w[:v]) for h, w in ((hidden, student), (teacher_hidden, teacher))]
    losses.forward_kl(*logits, num_tokens=n).backward()
def peak():
    # Not getrusage: its maximum includes the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
ours(8, 100), naive(8, 100)
before = peak()
ours(1024, 20000)
print(peak() - before)
naive(1024, 20000)
print(peak() - before)
"""


def test_memory_stays_far_below_the_naive_loss() -> None:
    run = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, check=True, text=True)
    ours_KiB, naive_KiB = map(int, run.stdout.split())
    assert naive_KiB > 4 * 1024 * 20000 * 4 / 1024  # four matrices of fp32 logits
    assert ours_KiB < naive_KiB / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"teacher_hidden_NE": torch.randn(4, TEACHER_HIDDEN)}, "37 student tokens against 4"),
    ],
)
def test_errors_name_the_mistake(change: dict[str, object], message: str) -> None:
    names = ("student_hidden_ND", "student", "teacher_hidden_NE", "teacher")
    with pytest.raises(ValueError, match=message):
        fused.forward_kl(**(dict(zip(names, case(), strict=True)) | {"num_tokens": TOKENS} | change))
