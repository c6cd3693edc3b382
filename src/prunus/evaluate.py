"""How good and how fast a model is: loss, divergence from the teacher, tokens per second, greedy samples.

Shapes: B blocks, S positions in a block, N valid targets, V vocabulary, H hidden.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunus import anatomy, hardware
from prunus.errors import BadData, BadRecipe
from prunus.head import Dense, Head, head_of
from prunus.shared_tokens import shared_rows
from prunus.text import Blocks, targets

LOGIT_BYTES = 32 * 1024**2
"""Size of one float32 [chunk, vocab] tensor; about five of them live at a time."""

PROMPTS = (
    "The capital of France is",
    "To make a cup of tea, first",
    "She opened the old door and saw",
    "In the nineteenth century, most people",
)

CACHES = ("past_key_values", "cache_params")
"""What models call what they remember of earlier tokens."""


@dataclass(frozen=True)
class Quality:
    """Next-token quality over held-out text.

    Attributes:
        loss: nats per target token.
        perplexity: exp(loss).
        bits_per_byte: bits of all targets / UTF-8 bytes that the targets stand for, see `_bytes_of_targets`.
        kl_to_teacher: mean Σ_v p_teacher (log p_teacher − log p_model) in nats per target; None without a teacher.
        top1_agreement: share of targets where teacher and model prefer the same token; None without a teacher.
        num_tokens: targets counted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    kl_to_teacher: float | None
    top1_agreement: float | None
    num_tokens: int


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one sequence (batch of 1), on this machine, now."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float


def quality(
    model: PreTrainedModel | Dense,
    blocks: Blocks,
    *,
    teacher: PreTrainedModel | Dense | None = None,
    batch_blocks: int = 4,
    chunk_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """How well a model continues the blocks.

    Args:
        model: causal language model, or its `states` on the same blocks.
        blocks: held-out text, packed.
        teacher: what kl_to_teacher and top1_agreement compare with; also a model or its states.
        batch_blocks: blocks per forward pass.
        chunk_tokens: rows of float32 logits alive at once, per model; default: what fits in LOGIT_BYTES.
        progress: called with (blocks done, blocks in all) after each batch.
    Raises:
        BadCheckpoint: the model's vocabulary is not the teacher's, whose padding alone may have another size.
        BadData: no token of the blocks continues a document.
    """
    compared = [model] if teacher is None else [model, teacher]
    heads = [each.head if isinstance(each, Dense) else head_of(each) for each in compared]
    shared = shared_rows(*(len(each.weight_VD) for each in (heads[0], heads[-1])))
    chunk_tokens = chunk_tokens or max(1, LOGIT_BYTES // (4 * heads[0].weight_VD.shape[0]))
    sums, num_tokens = torch.zeros(3, dtype=torch.float64), 0
    with evaluation_mode([each for each in compared if not isinstance(each, Dense)]), torch.inference_mode():
        walks = [_walk(each, blocks, batch_blocks) for each in compared]
        for number, (target_N, *hidden_NH) in enumerate(zip(_targets(blocks, batch_blocks), *walks, strict=True), 1):
            for at in range(0, len(target_N), chunk_tokens):
                rows = slice(at, at + chunk_tokens)
                log_p_NV = [_log_probabilities(*each, rows) for each in zip(heads, hidden_NH, strict=True)]
                sums += _chunk_sums(target_N[rows], shared, *log_p_NV)
            num_tokens += len(target_N)
            if progress:
                progress(min(number * batch_blocks, len(blocks)), len(blocks))
    if num_tokens == 0:
        raise BadData("evaluation: no token continues a document, so there is nothing to predict; give longer texts")
    return _quality(sums, num_tokens, _bytes_of_targets(blocks, num_tokens), compared=teacher is not None)


def states(
    model: PreTrainedModel,
    blocks: Blocks,
    *,
    batch_blocks: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Dense:
    """What `quality` needs of a model on these blocks, so that one which many are compared with runs once.

    In the CPU's memory: N · H values in the model's dtype. The head stays where it is.
    """
    found: list[Tensor] = []
    with evaluation_mode([model]), torch.inference_mode():
        for hidden_NH in _walk(model, blocks, batch_blocks):
            found.append(hidden_NH.cpu())
            if progress:
                progress(min(len(found) * batch_blocks, len(blocks)), len(blocks))
    return Dense(torch.cat(found), head_of(model))


def speed(
    models: Mapping[str, PreTrainedModel], *, prompt_tokens: int = 512, new_tokens: int = 32, repeats: int = 3
) -> dict[str, Speed]:
    """Prefill and greedy decoding rate of each model.

    After a warm-up of each, the models take turns (A B A B), so that a busy moment of the machine hits all of them.
    What counts is a model's share of its turn, the median over `repeats`: the machine is faster in one turn than in
    another. The decode rate excludes the prefill; the prompt is random tokens, the same for all, and shorter where a
    model knows too few positions. Models run as transformers alone runs them, which is what a user of the checkpoint
    will see.
    """
    known = _positions(models.values())
    new_tokens = min(new_tokens, known // 2)
    prompt_tokens = min(prompt_tokens, known - new_tokens)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with hardware.plain(models.values()), evaluation_mode(models.values()), torch.inference_mode():
        for model in models.values():
            _prefill_and_decode_seconds(model, prompt_tokens, new_tokens=2)
        for _ in range(repeats):
            for name, model in models.items():
                seconds[name].append(_prefill_and_decode_seconds(model, prompt_tokens, new_tokens))
    prefill, decode = (
        _typical({name: [run[part] for run in runs] for name, runs in seconds.items()}) for part in (0, 1)
    )
    return {name: Speed(prompt_tokens / prefill[name], new_tokens / decode[name]) for name in models}


def _positions(models: Iterable[PreTrainedModel]) -> int:
    """That all of them know."""
    return min(anatomy.positions(model.config) for model in models)


def _typical(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Of each name: the median of its shares of the turns, of a turn as long as most are."""
    turns = [sum(turn) for turn in zip(*seconds.values(), strict=True)]
    whole = statistics.median(turns)
    return {
        name: whole * statistics.median(own / turn for own, turn in zip(runs, turns, strict=True))
        for name, runs in seconds.items()
    }


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 40,
) -> list[str]:
    """Greedy ones, without the sampling settings that a checkpoint's generation config may hold."""
    with evaluation_mode([model]), torch.inference_mode():
        return [_continuation(model, tokenizer, prompt, max_new_tokens) for prompt in prompts]


@contextlib.contextmanager
def evaluation_mode(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """No dropout inside; each model's mode is put back after."""
    was_training = [(model, model.training) for model in models]
    try:
        for model, _ in was_training:
            model.eval()
        yield
    finally:
        for model, training in was_training:
            model.train(training)


def _batches(blocks: Blocks, batch_blocks: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, positions, and where there is a target, each [B, S]."""
    for start in range(0, len(blocks), batch_blocks):
        tokens_BS, positions_BS = blocks.batch(range(start, min(start + batch_blocks, len(blocks))))
        yield tokens_BS, positions_BS, targets(tokens_BS, positions_BS)


def _targets(blocks: Blocks, batch_blocks: int) -> Iterator[Tensor]:
    """The tokens that are to be predicted, [N] of each batch."""
    return (tokens_BS.roll(-1, dims=1)[mask_BS] for tokens_BS, _, mask_BS in _batches(blocks, batch_blocks))


def _walk(model: PreTrainedModel | Dense, blocks: Blocks, batch_blocks: int) -> Iterator[Tensor]:
    """The head's input where there is a target, [N, H] of each batch in the model's dtype."""
    if isinstance(model, Dense):
        return iter(model.hidden_NE.split([len(target_N) for target_N in _targets(blocks, batch_blocks)]))
    return (_hidden(model, *batch) for batch in _batches(blocks, batch_blocks))


def _hidden(model: PreTrainedModel, tokens_BS: Tensor, positions_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Without an attention mask, transformers reads the documents' borders from the positions and keeps them apart."""
    device = model.device
    body = anatomy.body_of(model)(
        input_ids=tokens_BS.to(device), position_ids=positions_BS.to(device), attention_mask=None, use_cache=False
    )
    return body.last_hidden_state[mask_BS.to(device)]


def _log_probabilities(head: Head, hidden_NH: Tensor, rows: slice) -> Tensor:
    """float32 [rows, V]."""
    return head.logits(hidden_NH[rows].to(head.weight_VD.device)).log_softmax(-1)


def _chunk_sums(target_N: Tensor, shared: int, log_p_NV: Tensor, teacher_NV: Tensor | None = None) -> Tensor:
    """float64 [3]: Σ −log p(target), and over the ids that both have Σ KL(teacher ‖ model) and the number of equal
    preferences (0, 0 without a teacher)."""
    nll = -log_p_NV.gather(1, target_N.to(log_p_NV.device)[:, None]).sum(dtype=torch.float64).item()
    kl = agreements = 0.0
    if teacher_NV is not None:
        teacher_NV, log_p_NV = _over(shared, teacher_NV.to(log_p_NV.device)), _over(shared, log_p_NV)
        kl = torch.linalg.vecdot(teacher_NV.exp(), teacher_NV - log_p_NV).sum(dtype=torch.float64).item()
        agreements = (teacher_NV.argmax(-1) == log_p_NV.argmax(-1)).sum().item()
    return torch.tensor([nll, kl, agreements], dtype=torch.float64)


def _over(shared: int, log_p_NV: Tensor) -> Tensor:
    """The same distribution over the first ids alone."""
    return log_p_NV if log_p_NV.shape[1] == shared else log_p_NV[:, :shared].log_softmax(-1)


def _bytes_of_targets(blocks: Blocks, num_targets: int) -> float:
    """The text's bytes × (targets / tokens), because the first token of a document is no target. Where that is always
    the same one, it is the mark that the tokenizer puts there and stands for no bytes: the targets stand for all."""
    firsts = np.unique(blocks.tokens[blocks.positions == 0])
    return blocks.num_bytes if len(firsts) == 1 else blocks.num_bytes * num_targets / blocks.num_tokens


def _quality(sums: Tensor, num_tokens: int, num_bytes: float, *, compared: bool) -> Quality:
    nats, kl, agreements = sums.tolist()
    return Quality(
        loss=nats / num_tokens,
        perplexity=(sums[0] / num_tokens).exp().item(),  # a diverged model gives inf, where math.exp raises
        bits_per_byte=nats / math.log(2) / num_bytes,
        kl_to_teacher=kl / num_tokens if compared else None,
        top1_agreement=agreements / num_tokens if compared else None,
        num_tokens=num_tokens,
    )


def _prefill_and_decode_seconds(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    prompt_1S = torch.randint(vocab, (1, prompt_tokens), generator=generator).to(model.device)
    steps = _greedy(model, prompt_1S)
    times = []
    start = time.perf_counter()
    for _ in range(new_tokens + 1):
        next(steps)
        times.append(time.perf_counter())
    return times[0] - start, times[-1] - times[0]


def _greedy(model: PreTrainedModel, tokens_1S: Tensor) -> Iterator[int]:
    """The most likely next token, again and again, with a KV cache. The first step includes the prefill."""
    cache: dict[str, Any] = {}
    while True:
        out = model(input_ids=tokens_1S, use_cache=True, logits_to_keep=1, **cache)
        cache = {name: out[name] for name in CACHES if name in out}
        assert cache, "a model that remembers nothing"
        tokens_1S = out.logits[:, -1:].argmax(-1)
        yield int(tokens_1S)  # the copy to the CPU waits for the device, so a clock around a step is right


def check_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> None:
    """Raises BadRecipe for a prompt without any token, which nothing can continue."""
    for prompt in prompts:
        if not tokenizer(prompt)["input_ids"]:
            raise BadRecipe(f"evaluate.prompts: {prompt!r} has no token; give a prompt with some text in it")


def _continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    prompt_1S = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    max_new_tokens = max(0, min(max_new_tokens, _positions([model]) - prompt_1S.shape[1]))
    ends = _end_tokens(model)
    new = list(
        itertools.takewhile(
            lambda token: token not in ends, itertools.islice(_greedy(model, prompt_1S), max_new_tokens)
        )
    )
    # decoded together with the prompt: many tokenizers drop the space before a text's first word
    given = prompt_1S[0].tolist()
    before, after = (str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in (given, given + new))
    return after[len(before) :]


def _end_tokens(model: PreTrainedModel) -> set[int]:
    ends = (
        model.generation_config.eos_token_id if model.generation_config else model.config.get_text_config().eos_token_id
    )
    return set(ends) if isinstance(ends, list) else {ends}
