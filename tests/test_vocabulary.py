"""A cut vocabulary spells every text, encodes what stays as before, and the model computes the same on it."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import VISION_TOKEN, add_tokenizer, seen, tiny_model
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from prunus.checkpoint import Checkpoint, load
from prunus.errors import BadCheckpoint, BadRecipe, UnsupportedModel
from prunus.vocabulary import Vocabulary, choose, count_tokens, named_ids, trim

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<unused0>", "<unused1>", "<|user|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXT = [" ".join(Path(json.__file__).read_text().split())]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return raw


def sentencepiece() -> Tokenizer:
    """As Llama 2, Mistral, Gemma: "▁" for a space, bytes for characters that are no tokens."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL + BYTES))
    definition = json.loads(raw.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(definition))


def unigram() -> Tokenizer:
    """As T5, XLM-R."""
    pieces = [(token, -1.0) for token in SPECIAL + BYTES]
    counts = Counter(word for text in TEXT for word in text.replace(" ", " ▁").split(" "))
    letters = Counter("".join(TEXT).replace(" ", "▁"))
    pieces += [(token, -20.0) for token in letters] + [
        (token, -8.0 - place / 100) for place, (token, _) in enumerate(counts.most_common(300)) if token not in letters
    ]
    raw = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.Metaspace(),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    )
    raw.add_special_tokens(SPECIAL)
    return raw


KINDS = {"byte-level": byte_level, "SentencePiece": sentencepiece, "Unigram": unigram}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    raw = KINDS[request.param]()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    folder = tmp_path_factory.mktemp("vocabulary")
    checkpoint = tiny_model("llama", folder, vocab_size=raw.get_vocab_size(), eos_token_id=[2, 6])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return checkpoint


@pytest.fixture(scope="module")
def cut(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, list[int]]:
    tokenizer = model.tokenizer()
    vocabulary = choose(tokenizer, count_tokens(tokenizer, [TEXT[0][:3000]]), 420)
    assert len(vocabulary.ids) == 420
    assert 0.8 < vocabulary.coverage <= 1
    return trim(model, vocabulary, to=tmp_path_factory.mktemp("cut") / "model"), vocabulary.ids


def random_strings(count: int) -> list[str]:
    generator = random.Random(0)
    kinds = [
        lambda: chr(generator.choice([0x20, 0x400, 0x900, 0x3040, 0xAC00]) + generator.randrange(80)),
        lambda: chr(generator.randrange(0x1F300, 0x1FAFF)),
        lambda: generator.choice("abc .,\n\t<>|0"),
    ]
    return ["".join(kind() for _ in range(generator.randrange(1, 30))) for kind in generator.choices(kinds, k=count)]


def test_what_the_old_vocabulary_spelled_the_new_one_does(model, cut):
    old, new = model.tokenizer(), AutoTokenizer.from_pretrained(cut[0].folder)

    def back(tokenizer, text):
        return tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)

    strings = random_strings(1000) + TEXT
    spelled = [text for text in strings if back(old, text) == text]
    assert len(spelled) > 0.6 * len(strings)
    assert [back(new, text) for text in spelled] == spelled


def test_text_whose_tokens_stay_is_encoded_as_before(model, cut):
    old, new = model.tokenizer(), AutoTokenizer.from_pretrained(cut[0].folder)
    ids = set(cut[1])
    found = 0
    for word in TEXT[0].split():
        before = old(word).input_ids
        if ids.issuperset(before):
            found += 1
            assert [cut[1][id] for id in new(word).input_ids] == before
    assert found > 300


def test_the_model_computes_the_same_logits(model, cut):
    student, ids = cut
    reloaded = AutoModelForCausalLM.from_pretrained(student.folder)
    tokens = torch.randint(0, len(ids), (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.module()(torch.tensor(ids)[tokens]).logits[..., ids]
        torch.testing.assert_close(reloaded(tokens).logits, expected)


def test_what_a_saved_tokenizer_would_truncate_is_counted(model):
    tokenizer = model.tokenizer()
    expected = count_tokens(tokenizer, [TEXT[0][:3000]])
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    assert count_tokens(tokenizer, [TEXT[0][:3000]]) == expected
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4, "the tokenizer itself stays as it is"


def test_tokens_without_an_embedding_leave(model):
    tokenizer = model.tokenizer()
    last = max(tokenizer.get_vocab().values())
    assert max(choose(tokenizer, {last: 9}, 420).ids) == last
    assert max(choose(tokenizer, {last: 9}, 420, embedded=last).ids) < last


def test_special_tokens_and_their_ids_follow(model, cut):
    student, ids = cut
    new, old = student.tokenizer(), model.tokenizer()
    assert new.get_vocab().keys() < old.get_vocab().keys()
    assert sorted(new.get_vocab().values()) == list(range(420))
    assert "<unused0>" not in new.get_vocab()
    for name in ("pad_token", "bos_token", "eos_token", "unk_token"):
        assert getattr(new, name) == getattr(old, name)
        assert ids[getattr(new, f"{name}_id")] == getattr(old, f"{name}_id")
    assert student.config.eos_token_id == [new.eos_token_id, new.convert_tokens_to_ids("<|user|>")]
    assert student.module().generation_config.eos_token_id == student.config.eos_token_id
    messages = [{"role": "user", "content": "dict"}]
    assert new.apply_chat_template(messages, tokenize=False) == old.apply_chat_template(messages, tokenize=False)
    assert new("dict").input_ids[0] == new.bos_token_id


@pytest.mark.parametrize("size", [100, 10**6])
def test_impossible_sizes_are_refused(model, size):
    with pytest.raises(BadRecipe, match="needs at least"):
        choose(model.tokenizer(), {}, size)


def test_a_tokenizer_that_cannot_spell_is_refused():
    raw = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        choose(PreTrainedTokenizerFast(tokenizer_object=raw), {}, 1)


def test_a_tokenizer_that_marks_the_ends_of_words_is_refused():
    raw = Tokenizer(models.BPE({"a": 0, "b</w>": 1, "ab</w>": 2}, [("a", "b</w>")], end_of_word_suffix="</w>"))
    with pytest.raises(UnsupportedModel, match="where words begin or end"):
        choose(PreTrainedTokenizerFast(tokenizer_object=raw), {}, 2)


def test_the_alphabet_stays_where_a_token_only_looks_like_a_byte():
    raw = byte_level()
    raw.add_tokens(["<0x0A>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    kept = set(choose(tokenizer, {}, 300).ids)
    assert {raw.token_to_id(letter) for letter in pre_tokenizers.ByteLevel.alphabet()} <= kept


def test_the_unknown_token_may_be_an_added_one():
    raw = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], unk_token="<unk>"))
    raw.add_special_tokens(["<unk>"])
    assert choose(PreTrainedTokenizerFast(tokenizer_object=raw), {}, 3).ids == [0, 1, 3]


@pytest.mark.slow
def test_a_model_learns_its_new_spelling(model, tmp_path, invoke):
    """From the command line: cut, and trained on so much of the text that it knows it better than before."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": part}) + "\n" for part in TEXT[0].split(". ") * 6))
    losses = []
    for extra in ([], ["--tokens", "40k"]):
        to = tmp_path / f"out{len(losses)}"
        done = invoke(
            "vocabulary", str(model.folder), "--size", "420", "--data", str(text), "--to", str(to), "--json", *extra
        )
        assert done.exit_code == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["vocabulary"] == [model.architecture.vocab, 420]
        written = load(result["folder"])
        tokens = torch.tensor(written.tokenizer()(TEXT[0][:2000]).input_ids)[None, :100]
        with torch.no_grad():
            losses.append(float(written.module(torch.float32)(tokens, labels=tokens).loss))
    assert losses[1] < losses[0] - 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out0", "out1", "text.jsonl"]


def test_what_a_generation_config_names_follows(pieces, tmp_path):
    """Ids that end a text stay; a sequence of which a part left is none any more."""
    folder, ids = Path(shutil.copytree(pieces.folder, tmp_path / "model")), list(range(300))
    GenerationConfig(
        eos_token_id=[2, 650], bad_words_ids=[[650, 7], [650], [8, 9]], suppress_tokens=[5, 650],
        sequence_bias=[[[650, 8], -1.0], [[9], 2.0]],
    ).save_pretrained(folder)  # fmt: skip
    (folder / "tokenizer.model.v3").write_bytes((folder / "tokenizer.model").read_bytes())
    checkpoint = load(folder)
    assert 650 in named_ids(checkpoint)
    assert 650 in choose(checkpoint.tokenizer(), {}, 400, named=named_ids(checkpoint)).ids
    kept = trim(checkpoint, Vocabulary([*ids[1:], 650], 1.0), to=tmp_path / "kept").folder
    assert GenerationConfig.from_pretrained(kept).eos_token_id == [1, 299]
    cut = trim(checkpoint, Vocabulary(ids, 1.0), to=tmp_path / "cut").folder
    found = GenerationConfig.from_pretrained(cut)
    assert found.eos_token_id == [2]
    assert found.bad_words_ids == [[8, 9]]
    assert found.suppress_tokens == [5]
    assert found.sequence_bias == [[[9], 2.0]]
    assert not (cut / "tokenizer.model.v3").exists(), "another form of the old vocabulary"


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(UnsupportedModel, match=r"ByT5Tokenizer is a slow tokenizer.*tokenizer\.json"):
        count_tokens(ByT5Tokenizer(), TEXT)


def test_a_model_that_sees_finds_its_image_token_again(tmp_path):
    """The config names the token that stands for an image, and the decoder's part of it the vocabulary's size."""
    folder = tiny_model("smolvlm", tmp_path / "model").folder
    add_tokenizer(folder)
    tokenizer = load(folder).tokenizer()
    pixel, kept = len(tokenizer) - 1, 20
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(pixel)]})
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_id": pixel}))
    whole, ids = load(folder), [*range(kept), pixel]
    student = trim(whole, Vocabulary(ids, 1.0), to=tmp_path / "cut")
    assert student.config.image_token_id == kept
    assert student.config.text_config.vocab_size == len(ids)
    image = seen(whole.config)
    text, pixels = image["input_ids"] % kept, image["input_ids"] == VISION_TOKEN
    before, after = (image | {"input_ids": text.masked_fill(pixels, token)} for token in (pixel, kept))
    with torch.no_grad():
        expected = whole.module()(**before).logits[..., ids]
        torch.testing.assert_close(student.module()(**after).logits, expected)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model with both forms of a SentencePiece vocabulary."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text(TEXT[0].replace(". ", ".\n"))
    SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=700, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
        normalization_rule_name="identity",
    )  # fmt: skip
    processor = SentencePieceProcessor(str(folder / "tokenizer.model"))
    ids = {processor.id_to_piece(id): id for id in range(processor.vocab_size())}
    merges = [(piece[:cut], piece[cut:]) for piece in ids for cut in range(1, len(piece))]
    merges = [pair for pair in merges if set(pair) <= ids.keys() and BYTES[0][:3] not in "".join(pair)]
    raw = Tokenizer(models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    checkpoint = tiny_model("llama", folder, vocab_size=raw.get_vocab_size())
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    return checkpoint


def test_both_forms_of_a_vocabulary_are_cut_alike(pieces, tmp_path):
    tokenizer = pieces.tokenizer()
    vocabulary = choose(tokenizer, count_tokens(tokenizer, [TEXT[0][:3000]]), 420)
    folder = trim(pieces, vocabulary, to=tmp_path / "cut").folder
    one, other = AutoTokenizer.from_pretrained(folder), SentencePieceProcessor(str(folder / "tokenizer.model"))
    assert other.vocab_size() == 420
    assert [other.id_to_piece(id) for id in range(420)] == one.convert_ids_to_tokens(list(range(420)))
    for text in [*TEXT[0].split(". "), *random_strings(200)]:
        assert other.encode(text) == one(text, add_special_tokens=False).input_ids


def test_other_forms_of_the_old_vocabulary_stay_behind(pieces, tmp_path):
    folder, others = Path(shutil.copytree(pieces.folder, tmp_path / "model")), ("tekken.json", "a.model", "b.tiktoken")
    for name in others:
        (folder / name).write_text("{}")
    cut = trim(load(folder), Vocabulary(list(range(300)), 1.0), to=tmp_path / "cut").folder
    assert not [name for name in others if (cut / name).exists()]
    assert SentencePieceProcessor(str(cut / "tokenizer.model")).vocab_size() == 300


def test_a_damaged_form_is_refused(pieces, tmp_path):
    folder = shutil.copytree(pieces.folder, tmp_path / "damaged")
    (folder / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes()[:-1])
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.model is damaged"):
        trim(load(folder), Vocabulary(list(range(300)), 1.0), to=tmp_path / "cut")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
