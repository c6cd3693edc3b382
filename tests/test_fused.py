"""The fused loss against its naive twin in `losses`, and in bf16 against an fp64 oracle."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prunus import fused, losses, row_blocks
from prunus.head import Dense, Head
from prunus.kernels import KERNELS, Samples, TopK

TOKENS, VOCAB, HIDDEN, TEACHER_HIDDEN = 37, 103, 16, 24


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def case(**head: object) -> tuple[Tensor, Head, Tensor, Head]:
    """Student hidden, student head, teacher hidden, teacher head; the student's require grad."""
    student = Head(torch.randn(VOCAB, HIDDEN).requires_grad_(), **head)
    teacher = Head(torch.randn(VOCAB, TEACHER_HIDDEN), **head)
    return torch.randn(TOKENS, HIDDEN).requires_grad_(), student, torch.randn(TOKENS, TEACHER_HIDDEN), teacher


def fused_loss(
    hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head, kind: str = "forward_kl", **settings: object
) -> Tensor:
    return fused.divergence(kind, hidden, student, Dense(teacher_hidden, teacher), **settings)


def naive(
    hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head, kind: str = "forward_kl", **settings: object
) -> Tensor:
    student_logits, teacher_logits = (
        losses.head_logits(h, head.weight_VD, bias=head.bias_V, softcap=head.softcap, scale=head.scale)
        for h, head in ((hidden, student), (teacher_hidden, teacher))
    )
    return losses.divergence(kind, student_logits, teacher_logits, **settings)


def gradients(loss: Tensor, hidden: Tensor, student: Head) -> list[Tensor]:
    wanted = [value for value in (hidden, student.weight_VD, student.bias_V) if value is not None]
    return list(torch.autograd.grad(loss, [value for value in wanted if value.requires_grad]))


def assert_same(inputs: tuple[Tensor, Head, Tensor, Head], chunk_tokens: int = 16, **settings: object) -> None:
    """Value and gradients of the fused loss equal those of the naive one."""
    ours = fused_loss(*inputs, chunk_tokens=chunk_tokens, **settings)
    reference = naive(*inputs, **settings)
    torch.testing.assert_close(ours, reference)
    for got, expected in zip(gradients(ours, *inputs[:2]), gradients(reference, *inputs[:2]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_by_hand() -> None:
    q, p, identity = torch.tensor([[0.25, 0.25, 0.5]]), torch.tensor([[0.5, 0.25, 0.25]]), Head(torch.eye(3))
    hidden = q.log().requires_grad_()
    loss = fused_loss(hidden, identity, p.log(), identity, num_tokens=1)
    loss.backward()
    assert loss.item() == pytest.approx(0.25 * torch.tensor(2.0).log().item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, q - p)


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(dtype: torch.dtype, kind: str) -> None:
    hidden, weight = torch.randn(TOKENS, HIDDEN).to(dtype), torch.randn(VOCAB, HIDDEN).to(dtype)
    student_hidden, student = hidden.clone().requires_grad_(), Head(weight.clone().requires_grad_())
    loss = fused_loss(student_hidden, student, hidden, Head(weight), kind, num_tokens=TOKENS)
    assert abs(loss.item()) < (1e-7 if kind.startswith("skewed") else 1e-12)
    # The skewed ones end in q (Σ q − 1), which fp32 leaves at 1e-7 q; the others are exact.
    allowed = 1e-6 if kind.startswith("skewed") else 0.0
    assert all(gradient.abs().max() <= allowed for gradient in gradients(loss, student_hidden, student))


@pytest.mark.parametrize("chunk_tokens", [1, 5, 16, 37, 1000])
@pytest.mark.parametrize("rows", [1, 7, 128])
def test_chunks_change_nothing(chunk_tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "ROW_TOKENS", rows)
    monkeypatch.setattr(fused, "VOCAB_BLOCK", 10 * rows)
    assert_same(case(), num_tokens=TOKENS, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
@pytest.mark.parametrize("mix", [0.1, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_divergence(kind: str, mix: float, temperature: float) -> None:
    mask = torch.rand(TOKENS) < 0.7
    assert_same(case(), kind=kind, num_tokens=50, mix=mix, temperature=temperature, mask_N=mask)
    assert_same(case(softcap=4.0, scale=0.7), kind=kind, num_tokens=TOKENS, mix=mix, temperature=temperature)


def test_there_is_a_kernel_for_every_reference() -> None:
    assert list(KERNELS) == list(losses.DIVERGENCES)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "scale": 0.5}])
def test_mixed_with_cross_entropy(temperature: float, head: dict[str, float]) -> None:
    inputs, labels = case(**head), torch.randint(VOCAB, (TOKENS,))
    settings = {"num_tokens": TOKENS, "temperature": temperature}
    ours = fused_loss(*inputs, label_N=labels, cross_entropy_share=0.3, chunk_tokens=16, **settings)
    hidden, student = inputs[:2]
    logits = losses.head_logits(hidden, student.weight_VD, softcap=student.softcap, scale=student.scale)
    hard = losses.cross_entropy(logits, labels, num_tokens=TOKENS)
    reference = 0.7 * naive(*inputs, **settings) + 0.3 * hard
    torch.testing.assert_close(ours, reference)
    for got, expected in zip(gradients(ours, *inputs[:2]), gradients(reference, *inputs[:2]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_no_cross_entropy_unless_asked_for() -> None:
    inputs = case()
    labelled = fused_loss(*inputs, num_tokens=TOKENS, label_N=torch.randint(VOCAB, (TOKENS,)))
    assert labelled == fused_loss(*inputs, num_tokens=TOKENS)


def sparse_targets(teacher_hidden: Tensor, teacher: Head, temperature: float, kept: int) -> dict[str, TopK | Samples]:
    p = (losses.head_logits(teacher_hidden, teacher.weight_VD) / temperature).softmax(-1)
    top = p.topk(kept)
    return {"top_k": TopK(top.indices, top.values), "samples": Samples(torch.multinomial(p, kept, replacement=True))}


def naive_sparse(logits: Tensor, targets: TopK | Samples, **settings: object) -> Tensor:
    if isinstance(targets, TopK):
        return losses.top_k_kl(logits, targets.ids_NK, targets.p_NK, **settings)
    return losses.sampled_kl(logits, targets.ids_NK, **settings)


@pytest.mark.parametrize("which", ["top_k", "samples"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kept", [1, 12, VOCAB - 1])
def test_sparse_targets(which: str, temperature: float, kept: int) -> None:
    hidden, student, teacher_hidden, teacher = case(softcap=6.0)
    targets = sparse_targets(teacher_hidden, teacher, temperature, kept)[which]
    settings = {"num_tokens": TOKENS, "temperature": temperature, "mask_N": torch.rand(TOKENS) < 0.7}
    ours = fused.divergence("forward_kl", hidden, student, targets, chunk_tokens=16, **settings)
    reference = naive_sparse(losses.head_logits(hidden, student.weight_VD, softcap=6.0), targets, **settings)
    torch.testing.assert_close(ours, reference)
    for got, expected in zip(gradients(ours, hidden, student), gradients(reference, hidden, student), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_top_k_is_exact_for_a_teacher_that_is_the_student() -> None:
    hidden, student, _, _ = case()
    targets = sparse_targets(hidden.detach(), Head(student.weight_VD.detach()), 1.0, 10)["top_k"]
    loss = fused.divergence("forward_kl", hidden, student, targets, num_tokens=TOKENS)
    assert abs(loss.item()) < 1e-6
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients(loss, hidden, student))


def test_samples_give_the_gradient_of_full_kl_in_expectation() -> None:
    """The mean over many draws is unbiased: its distance from the full gradient is what its own variance explains."""
    hidden, student, teacher_hidden, teacher = inputs = case()
    full = gradients(fused_loss(*inputs, num_tokens=TOKENS), hidden, student)[1]
    draws = []
    for _ in range(300):
        targets = sparse_targets(teacher_hidden, teacher, 1.0, 12)["samples"]
        loss = fused.divergence("forward_kl", hidden, student, targets, num_tokens=TOKENS)
        draws.append(gradients(loss, hidden, student)[1])
    stacked = torch.stack(draws)
    z_scores = (stacked.mean(0) - full) / (stacked.std(0) / len(draws) ** 0.5).clamp_min(1e-12)
    # Mean of z² is 1 for an unbiased estimate; the entries of a row are correlated, hence the room.
    assert 0.8 < z_scores.square().mean() < 1.25


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
    loss = fused_loss(*inputs, num_tokens=10, mask_N=torch.zeros(TOKENS, dtype=torch.bool))
    assert loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(loss, *inputs[:2]))


def test_micro_batches_add_up() -> None:
    hidden, student, teacher_hidden, teacher = inputs = case()
    whole = fused_loss(*inputs, num_tokens=TOKENS)
    parts = [
        fused_loss(hidden[part], student, teacher_hidden[part], teacher, num_tokens=TOKENS)
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
    fused_loss(hidden, frozen, teacher_hidden.requires_grad_(), teacher, num_tokens=TOKENS).backward()
    assert frozen.weight_VD.grad is None
    assert teacher.weight_VD.grad is None
    assert teacher_hidden.grad is None


def test_head_tied_to_the_embedding_sums_both_gradients() -> None:
    _, student, teacher_hidden, teacher = case()
    tied, ids = student.weight_VD, torch.randint(VOCAB, (TOKENS,))
    ours = fused_loss(tied[ids], Head(tied), teacher_hidden, teacher, num_tokens=TOKENS)
    reference = naive(tied[ids], Head(tied), teacher_hidden, teacher, num_tokens=TOKENS)
    for got, expected in zip(torch.autograd.grad(ours, tied), torch.autograd.grad(reference, tied), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_no_grad_gives_the_loss_alone() -> None:
    inputs = case()
    with torch.no_grad():
        loss = fused_loss(*inputs, num_tokens=TOKENS)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, naive(*inputs, num_tokens=TOKENS).detach())


def test_the_gradient_follows_the_factor_on_the_loss_and_is_spent_once() -> None:
    inputs = case()
    single = gradients(fused_loss(*inputs, num_tokens=TOKENS), *inputs[:2])
    loss = fused_loss(*inputs, num_tokens=TOKENS)
    (0.3 * loss).backward(retain_graph=True)
    torch.testing.assert_close(inputs[0].grad, 0.3 * single[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_does_not_reach_inside() -> None:
    inputs = case()
    expected = gradients(fused_loss(*inputs, num_tokens=TOKENS), *inputs[:2])
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_loss(*inputs, num_tokens=TOKENS)
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


def oracle(
    hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head, kind: str = "forward_kl"
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients in fp64 from the same bf16 values."""
    hidden, weight = (value.detach().double().requires_grad_() for value in (hidden, student.weight_VD))
    log_q = (hidden @ weight.T).log_softmax(-1)
    log_p = (teacher_hidden.double() @ teacher.weight_VD.double().T).log_softmax(-1)
    loss = losses.DIVERGENCES[kind](log_p, log_q, 0.3).sum() / len(hidden)
    return loss, list(torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("distance", [0.003, 0.03, 0.1, 0.2, 0.5, 2.0])
@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_bf16_gradients_are_within_half_a_percent(distance: float, shift: float, kind: str) -> None:
    inputs = near_teacher(distance, shift)
    loss = fused_loss(*inputs, kind, num_tokens=192, chunk_tokens=100, mix=0.3)
    expected_loss, expected = oracle(*inputs, kind)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-3, abs=2e-6)
    for got, reference in zip(gradients(loss, *inputs[:2]), expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - reference).norm() / reference.norm() < 0.005


def like_text(distance: float) -> tuple[tuple[Tensor, Head, Tensor, Head], Tensor]:
    """The same with a teacher that is sure of a few ids, as on text, and those ids."""
    _, _, teacher_hidden, teacher = near_teacher(0.0)
    labels = torch.randint(len(teacher.weight_VD), (len(teacher_hidden),))
    teacher_hidden = (teacher_hidden * 0.3 + teacher.weight_VD[labels] * 0.6).bfloat16()
    hidden, weight = (
        (value.float() + distance * value.float().std() * torch.randn(value.shape)).bfloat16().requires_grad_()
        for value in (teacher_hidden, teacher.weight_VD)
    )
    return (hidden, Head(weight), teacher_hidden, teacher), labels


WAYS = [row_blocks._shifted, row_blocks._by_difference, row_blocks._exact]
needs_bf16 = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU's GEMMs are in float32")


@needs_bf16
@pytest.mark.parametrize(("distance", "cheapest"), [(0.3, 0), (0.03, 1), (0.0, 2)])
def test_the_cheapest_way_to_the_logits_that_is_fine_enough(
    distance: float, cheapest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, labels = like_text(distance)
    taken: list[Callable[..., object]] = []
    choose = row_blocks.RowBlocks._first_fine_way
    monkeypatch.setattr(
        row_blocks.RowBlocks, "_first_fine_way", lambda *given: taken.append(choose(*given)) or taken[-1]
    )
    fused_loss(*inputs, num_tokens=192, label_N=labels)
    assert taken == [WAYS[cheapest]]


@needs_bf16
@pytest.mark.parametrize("distance", [0.3, 0.03, 0.0])
def test_a_wrong_expectation_costs_time_not_precision(distance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, labels = like_text(distance)
    chosen: list[object] = []
    choose = row_blocks.RowBlocks._first_fine_way
    monkeypatch.setattr(row_blocks.RowBlocks, "_first_fine_way", lambda *given: chosen.append(1) or choose(*given))
    found = [
        gradients(fused_loss(*inputs, num_tokens=192, label_N=labels, expected=expected), *inputs[:2])
        for expected in (None, 1.0)
    ]
    assert len(chosen) == (1 if distance == 0.3 else 2)  # only a far student's way was fine on trust
    for plain, trusted in zip(*found, strict=True):
        assert torch.equal(plain, trusted)


@pytest.mark.parametrize("way", [*(pytest.param(way, marks=needs_bf16) for way in WAYS[:-1]), WAYS[-1]])
@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_each_way_to_the_logits(way: object, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks.RowBlocks, "_first_fine_way", lambda *_: way)
    inputs, labels = like_text(0.3)
    loss = fused_loss(*inputs, kind, num_tokens=192, chunk_tokens=100, mix=0.3, label_N=labels)
    expected_loss, expected = oracle(*inputs, kind)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-3)
    for got, reference in zip(gradients(loss, *inputs[:2]), expected, strict=True):
        assert (got.double() - reference).norm() / reference.norm() < 0.005


@pytest.mark.parametrize("head", [{"softcap": 20.0}, {"scale": 0.7}, {"bias_V": torch.randn(3000)}])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bf16_with_softcap_scale_bias_and_temperature(head: dict[str, object], temperature: float) -> None:
    (hidden, student, teacher_hidden, teacher), labels = like_text(0.3)
    inputs = hidden, dataclasses.replace(student, **head), teacher_hidden, dataclasses.replace(teacher, **head)
    exact_hidden, exact_weight = (value.detach().double().requires_grad_() for value in (hidden, student.weight_VD))
    exact = (
        exact_hidden,
        dataclasses.replace(inputs[1], weight_VD=exact_weight),
        teacher_hidden.double(),
        dataclasses.replace(inputs[3], weight_VD=teacher.weight_VD.double()),
    )
    settings = {"num_tokens": 192, "temperature": temperature}
    loss, reference = fused_loss(*inputs, label_N=labels, **settings), naive(*exact, **settings)
    assert loss.item() == pytest.approx(reference.item(), rel=2e-3)
    expected = gradients(reference, exact_hidden, Head(exact_weight))
    for got, wanted in zip(gradients(loss, hidden, student), expected, strict=True):
        assert (got.double() - wanted).norm() / wanted.norm() < 0.005


@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_chunks_of_any_size_in_bf16(chunk_tokens: int) -> None:
    inputs, labels = like_text(0.3)
    loss = fused_loss(*inputs, num_tokens=192, chunk_tokens=chunk_tokens, label_N=labels)
    _, expected = oracle(*inputs)
    for got, reference in zip(gradients(loss, *inputs[:2]), expected, strict=True):
        assert (got.double() - reference).norm() / reference.norm() < 0.005


@pytest.mark.parametrize("which", ["top_k", "samples"])
def test_sparse_targets_in_bf16(which: str) -> None:
    (hidden, student, teacher_hidden, teacher), labels = like_text(0.3)
    targets = sparse_targets(teacher_hidden, teacher, 1.0, 12)[which]
    loss = fused.divergence("forward_kl", hidden, student, targets, num_tokens=192, label_N=labels)
    exact_hidden, exact_weight = (value.detach().float().requires_grad_() for value in (hidden, student.weight_VD))
    reference = naive_sparse(losses.head_logits(exact_hidden, exact_weight), targets, num_tokens=192)
    assert loss.item() == pytest.approx(reference.item(), rel=2e-3)
    expected = gradients(reference, exact_hidden, Head(exact_weight))
    for got, wanted in zip(gradients(loss, hidden, student), expected, strict=True):
        assert (got.float() - wanted).norm() / wanted.norm() < 0.005


def test_fp32_head_under_bf16_hidden_states_gets_an_fp32_gradient() -> None:
    hidden, student, teacher_hidden, teacher = inputs = near_teacher(0.1)
    master = Head(student.weight_VD.detach().float().requires_grad_())
    loss = fused_loss(hidden, master, teacher_hidden, teacher, num_tokens=192)
    _, expected = oracle(*inputs)
    got = gradients(loss, hidden, master)
    assert [gradient.dtype for gradient in got] == [torch.bfloat16, torch.float32]
    assert (got[1].double() - expected[1]).norm() / expected[1].norm() < 0.005


def test_two_runs_agree_bitwise() -> None:
    inputs = near_teacher(0.1)
    first, second = (gradients(fused_loss(*inputs, num_tokens=192), *inputs[:2]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


GROWTH = """
import pathlib, re, torch
from prunus import fused, losses, row_blocks
from prunus.head import Dense, Head
hidden, teacher_hidden = (torch.randn(1024, 32).bfloat16() for _ in range(2))
student, teacher = (torch.randn(20000, 32).bfloat16() for _ in range(2))
hidden.requires_grad_(), student.requires_grad_()
def ours(n, v):
    targets = Dense(teacher_hidden[:n], Head(teacher[:v]))
    head = Head(student[:v])
    fused.divergence("forward_kl", hidden[:n], head, targets, num_tokens=n, chunk_tokens=256).backward()
def naive(n, v):
    logits = [losses.head_logits(h[:n], w[:v]) for h, w in ((hidden, student), (teacher_hidden, teacher))]
    losses.divergence('forward_kl', *logits, num_tokens=n).backward()
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
        ({"mix": 1.0}, r"mix is 1\.0"),
        ({"kind": "kl"}, "no divergence 'kl'; there are forward_kl, reverse_kl"),
        ({"cross_entropy_share": 1.5}, r"cross_entropy_share is 1\.5"),
        ({"cross_entropy_share": 0.5}, "needs label_N"),
        ({"teacher_hidden": torch.randn(4, TEACHER_HIDDEN)}, "37 student tokens against 4"),
    ],
)
def test_errors_name_the_mistake(change: dict[str, object], message: str) -> None:
    names = ("hidden", "student", "teacher_hidden", "teacher")
    with pytest.raises(ValueError, match=message):
        fused_loss(**(dict(zip(names, case(), strict=True)) | {"num_tokens": TOKENS} | change))


def test_sparse_targets_say_what_they_cannot_give() -> None:
    hidden, student, teacher_hidden, teacher = case()
    samples = sparse_targets(teacher_hidden, teacher, 1.0, 5)["samples"]
    with pytest.raises(ValueError, match="reverse_kl needs the teacher's whole distribution"):
        fused.divergence("reverse_kl", hidden, student, samples, num_tokens=TOKENS)
    everything = TopK(torch.arange(VOCAB).expand(TOKENS, -1), torch.full((TOKENS, VOCAB), 1 / VOCAB))
    with pytest.raises(ValueError, match="leave nothing"):
        fused.divergence("forward_kl", hidden, student, everything, num_tokens=TOKENS)
