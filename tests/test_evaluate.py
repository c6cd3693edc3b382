"""Quality against Hugging Face's own numbers, packed text against the documents alone, speed and samples."""

from __future__ import annotations

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import for_each_kind
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prunus import evaluate
from prunus.errors import BadCheckpoint, BadData, BadRecipe
from prunus.evaluate import check_prompts
from prunus.head import Head
from prunus.text import Blocks

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,  # large, so that attention to another document would show
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
}


def llama(seed: int = 0, **changes: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"tie_word_embeddings": False} | changes)).eval()


def gemma3(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    own = {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    }
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES | own)).eval()


FAMILIES = pytest.mark.parametrize("build", [llama, gemma3])


def packed(*blocks: list[int], bytes_per_token: int = 3) -> Blocks:
    """Blocks of documents with these lengths and random tokens."""
    positions = np.array([[place for length in lengths for place in range(length)] for lengths in blocks], np.uint16)
    tokens = np.random.default_rng(0).integers(1, VOCAB, positions.shape, np.uint16)
    return Blocks(tokens, positions, np.full(len(blocks), bytes_per_token * positions.shape[1]), "random")


WHOLE = packed([12], [12], [12])
MIXED = packed([5, 7], [12], [1, 8, 3])


def by_hand(model: PreTrainedModel, blocks: Blocks) -> torch.Tensor:
    """Log-probabilities [N, V] at every target, from one forward pass per document."""
    found = []
    for tokens, positions in zip(*blocks.batch(range(len(blocks))), strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(tokens)]
        for start, stop in itertools.pairwise(starts):
            found.append(model(tokens[None, start:stop], use_cache=False).logits[0, :-1].log_softmax(-1))
    return torch.cat(found)


@FAMILIES
@torch.no_grad()
def test_documents_of_a_pack_do_not_see_each_other(build) -> None:
    model = build()
    tokens_BS, positions_BS = MIXED.batch(range(3))
    packs = model(input_ids=tokens_BS, position_ids=positions_BS, attention_mask=None, use_cache=False).logits
    for block, start, stop in [(0, 0, 5), (0, 5, 12), (1, 0, 12), (2, 0, 1), (2, 1, 9), (2, 9, 12)]:
        alone = model(tokens_BS[block : block + 1, start:stop], use_cache=False).logits
        torch.testing.assert_close(packs[block, start:stop], alone[0], rtol=1e-4, atol=1e-5)
    unaware = model(tokens_BS, use_cache=False).logits
    assert (unaware - packs)[0, 5:].abs().max() > 0.01, "the test would not notice a leak"


@for_each_kind
@torch.no_grad()
def test_what_is_generated_with_a_cache_is_what_the_whole_text_gives(teacher) -> None:
    model, text = teacher.module(torch.float32), torch.tensor([[5, 9, 3, 7, 11, 6]])
    for token in itertools.islice(evaluate._greedy(model, text), 4):
        assert token == int(model(input_ids=text, use_cache=False).logits[0, -1].argmax())
        text = torch.cat([text, torch.tensor([[token]])], dim=1)


@FAMILIES
@torch.no_grad()
def test_loss_is_hugging_faces(build) -> None:
    model = build()
    tokens_BS, _ = WHOLE.batch(range(3))
    found = evaluate.quality(model, WHOLE, batch_blocks=2)
    assert found.loss == pytest.approx(model(tokens_BS, labels=tokens_BS).loss.item(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.num_tokens == 3 * 11
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) / 3)
    assert found.kl_to_teacher is None
    assert found.top1_agreement is None


def test_a_mark_before_each_text_stands_for_no_bytes() -> None:
    marked = packed([5, 7], [12], [1, 8, 3])
    marked.tokens[marked.positions == 0] = 1
    found = evaluate.quality(llama(), marked)
    assert found.bits_per_byte == pytest.approx(found.loss * found.num_tokens / math.log(2) / marked.num_bytes)


@FAMILIES
@torch.no_grad()
def test_divergence_is_that_of_the_full_distributions(build) -> None:
    student, teacher = build(1), build(2)
    found = evaluate.quality(student, MIXED, teacher=teacher)
    q, p = by_hand(student, MIXED), by_hand(teacher, MIXED)
    assert found.num_tokens == len(p) == 4 + 6 + 11 + 0 + 7 + 2
    assert found.kl_to_teacher == pytest.approx(F.kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-4)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


def test_a_model_does_not_diverge_from_itself() -> None:
    for teacher in (model := llama(), llama()):
        found = evaluate.quality(model, MIXED, teacher=teacher)
        assert (found.kl_to_teacher, found.top1_agreement) == (0.0, 1.0)


@pytest.mark.parametrize(("batch_blocks", "chunk_tokens"), [(1, 1), (2, 5), (3, 1000)])
def test_batches_and_chunks_do_not_matter(batch_blocks: int, chunk_tokens: int) -> None:
    expected = evaluate.quality(llama(1), MIXED, teacher=llama(2))
    found = evaluate.quality(llama(1), MIXED, teacher=llama(2), batch_blocks=batch_blocks, chunk_tokens=chunk_tokens)
    assert vars(found) == pytest.approx(vars(expected), rel=1e-5)


def test_a_teacher_runs_once_for_all_students() -> None:
    teacher, steps, runs = llama(0), [], []
    expected = [evaluate.quality(model, MIXED, teacher=teacher, batch_blocks=2) for model in (teacher, llama(1))]
    teacher.model.register_forward_hook(lambda *_: runs.append(1))
    known = evaluate.states(teacher, MIXED, batch_blocks=2, progress=lambda done, total: steps.append((done, total)))
    found = [evaluate.quality(model, MIXED, teacher=known, batch_blocks=2) for model in (known, llama(1))]
    assert len(runs) == 2, "one per batch"
    assert steps == [(2, 3), (3, 3)]
    assert found == expected
    assert found[0].kl_to_teacher == 0


def test_logits_of_a_bf16_model_are_not_rounded_to_bf16() -> None:
    hidden, head = torch.randn(8, 64).bfloat16(), torch.randn(VOCAB, 64).bfloat16()
    found = Head(head).logits(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), hidden.double() @ head.double().t(), rtol=0, atol=5e-4
    )  # bf16 would be 0.06 off


def test_bf16_model_is_evaluated() -> None:
    exact = evaluate.quality(llama(), MIXED)
    rounded = evaluate.quality(llama().bfloat16(), MIXED)
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)


def test_a_diverged_model_has_infinite_perplexity() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    assert evaluate.quality(model, MIXED).perplexity == math.inf


def test_mode_is_put_back() -> None:
    model = llama().train()
    evaluate.quality(model, MIXED)
    assert model.training


def test_text_without_targets_is_refused() -> None:
    with pytest.raises(BadData, match="longer texts"):
        evaluate.quality(llama(), packed([1, 1], [1, 1]))


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(BadCheckpoint, match="the student's head has 1,200 tokens, the teacher's 96"):
        evaluate.quality(llama(vocab_size=1200), MIXED, teacher=llama())


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(VOCAB, VOCAB + 7), (VOCAB + 7, VOCAB)])
@torch.no_grad()
def test_padded_differently_they_are_compared_over_the_ids_that_both_have(student_rows: int, teacher_rows: int) -> None:
    student, teacher = llama(1, vocab_size=student_rows), llama(2, vocab_size=teacher_rows)
    found = evaluate.quality(student, MIXED, teacher=teacher)
    q, p = (by_hand(model, MIXED)[:, :VOCAB].log_softmax(-1) for model in (student, teacher))
    assert found.kl_to_teacher == pytest.approx(F.kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-4)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.loss == evaluate.quality(student, MIXED).loss


def test_speed_takes_turns() -> None:
    turns: list[str] = []
    pair = {"a": llama(0), "b": llama(1)}
    for name, model in pair.items():
        model.register_forward_hook(
            lambda module, args, kwargs, out, name=name: (
                turns.append(name) if kwargs["input_ids"].shape[1] > 1 else None
            ),
            with_kwargs=True,
        )
    found = evaluate.speed(pair, prompt_tokens=8, new_tokens=3, repeats=2)
    assert "".join(turns) == "ab" + "abab"
    assert list(found) == ["a", "b"]
    assert all(min(vars(rates).values()) > 0 for rates in found.values())


def test_a_model_that_knows_few_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    """Learned ones, beyond which there is nothing to look up."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=40, n_embd=16, n_layer=1, n_head=2)).eval()
    assert min(vars(evaluate.speed({"model": model}, repeats=1)["model"]).values()) > 0
    model.generation_config.eos_token_id = []
    (found,) = evaluate.continuations(model, tokenizer, ["The capital of"], max_new_tokens=100)
    assert found


def test_a_turn_of_a_slower_machine_leaves_the_ratio_of_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    slowness, own, calls = [1.0, 3.0, 1.5, 2.0], {"a": 2.0, "b": 5.0}, []

    def timed(model, prompt_tokens, new_tokens) -> tuple[float, float]:
        calls.append(model)
        turn = (len(calls) - 3) // 2  # behind the warm-up of both
        hiccup = 4.0 if (model, turn) == ("a", 0) else 1.0
        seconds = own[model] * slowness[max(turn, 0)] * hiccup
        return seconds, 4 * seconds

    monkeypatch.setattr(evaluate, "_prefill_and_decode_seconds", timed)
    monkeypatch.setattr(evaluate, "_positions", lambda models: 100)
    monkeypatch.setattr(evaluate.hardware, "plain", lambda models: contextlib.nullcontext())
    monkeypatch.setattr(evaluate, "evaluation_mode", lambda models: contextlib.nullcontext())
    found = evaluate.speed({"a": "a", "b": "b"}, prompt_tokens=10, new_tokens=4, repeats=4)
    ratio = found["a"].decode_tokens_per_second / found["b"].decode_tokens_per_second
    assert ratio == pytest.approx(5.0 / 2.0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<eos>"], show_progress=False)
    inner.train_from_iterator(evaluate.PROMPTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


@FAMILIES
def test_samples_are_greedy(build, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build()
    model.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=1.5)
    (found,) = evaluate.continuations(model, tokenizer, ["The capital of"], max_new_tokens=10)
    ids = tokenizer("The capital of", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(10):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert "The capital of" + found == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert [found] == evaluate.continuations(model, tokenizer, ["The capital of"], max_new_tokens=10)


def test_samples_stop_at_the_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    model = llama()
    ids = tokenizer("Water", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        first = int(model(ids).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [first]
    assert evaluate.continuations(model, tokenizer, ["Water"], max_new_tokens=6) == [""]


def test_a_prompt_without_any_token_is_refused_before_anything_runs():
    def blind(text: str) -> dict:
        return {"input_ids": [1] * len(text.strip())}

    check_prompts(blind, ["a"])
    with pytest.raises(BadRecipe, match="' ' has no token"):
        check_prompts(blind, ["a", " "])
