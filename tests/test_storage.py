"""Experts that lie apart in the files are one tensor of the model, and the other way round."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from prunus import hub, storage, weights
from prunus.checkpoint import Checkpoint, load, save
from prunus.errors import BadCheckpoint, UnsupportedModel


@pytest.fixture
def mixture(tmp_path: Path) -> Checkpoint:
    return tiny_model("deepseek_v3", tmp_path / "model")


def rewritten(mixture: Checkpoint, **changes: torch.Tensor | None) -> Path:
    """Its folder, after tensors were changed, added or taken out."""
    file = mixture.folder / "model.safetensors"
    tensors = {name: value for name, value in (load_file(file) | changes).items() if value is not None}
    save_file(tensors, file, metadata={"format": "pt"})
    return mixture.folder


def test_experts_are_joined_as_transformers_joins_them(mixture):
    model, stored = mixture.module(), load_file(mixture.folder / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(mixture.tensor(name), value)
    fused = mixture.tensor("model.layers.2.mlp.experts.gate_up_proj")
    gate, up = (stored[f"model.layers.2.mlp.experts.3.{half}_proj.weight"] for half in ("gate", "up"))
    assert torch.equal(fused[3], torch.cat([gate, up]))


def test_what_is_written_lies_apart_again(mixture, tmp_path):
    (tmp_path / "out").mkdir()
    weights.write(tmp_path / "out", storage.scattered(mixture.family, dict(mixture.tensors())))
    before, after = (load_file(folder / "model.safetensors") for folder in (mixture.folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("half", ["gate", "down"])
def test_an_expert_without_one_of_its_tensors(mixture, half):
    name = f"model.layers.2.mlp.experts.3.{half}_proj.weight"
    with pytest.raises(BadCheckpoint, match=f"it lacks {name}; download it again"):
        load(rewritten(mixture, **{name: None}))


def test_fewer_experts_than_the_config_says(mixture):
    last = {f"model.layers.2.mlp.experts.5.{part}_proj.weight": None for part in ("gate", "up", "down")}
    with pytest.raises(BadCheckpoint, match=r"experts\.\S+ has shape \[5, .*which config.json .*contradicts"):
        load(rewritten(mixture, **last))


def test_layers_that_predict_further_tokens_are_left_out(mixture):
    opened = load(rewritten(mixture, **{"model.layers.4.eh_proj.weight": torch.zeros(48, 96)}))
    assert opened.stored.keys() == mixture.stored.keys()
    with pytest.raises(UnsupportedModel, match=r"no rule for 1 tensors, such as 'model\.layers\.3\.eh_proj"):
        load(rewritten(mixture, **{"model.layers.3.eh_proj.weight": torch.zeros(48, 96)}))


@pytest.mark.parametrize(
    ("family", "name", "count"),
    [
        ("qwen3_next", "mtp.fc.weight", {}),
        ("qwen3_5", "mtp.fc.weight", {"mtp_num_hidden_layers": 1}),
        ("ernie4_5_moe", "model.mtp_linear_proj.0.weight", {"num_nextn_predict_layers": 1}),
        ("glm4_moe", "model.layers.4.eh_proj.weight", {"num_nextn_predict_layers": 1}),
    ],
)
def test_so_they_are_under_a_name_of_their_own_and_are_not_counted(tmp_path, family, name, count):
    """As they were published, and whatever is made of them: llama.cpp looks for as many as config.json says."""
    model = tiny_model(family, tmp_path / "model", **count)
    opened = load(rewritten(model, **{name: torch.zeros(48, 96)}))
    assert opened.stored.keys() == model.stored.keys()
    written = save(tmp_path / "out", opened.config, dict(opened.tensors()), like=opened)
    text = opened.family.text(load(written.folder).config)
    assert [getattr(text, key) for key in count] == [0] * len(count)


@pytest.mark.parametrize(("family", "name"), [("qwen3", "lm_head"), ("mistral3", "language_model.lm_head")])
def test_a_head_that_config_json_calls_tied_and_that_is_another(tmp_path, family, name):
    """transformers keeps it. So is Mistral Small 3.1, whose config.json says nothing, which means tied."""
    model, head = tiny_model(family, tmp_path / "model"), torch.randn(97, 48)
    assert model.config.tie_word_embeddings
    opened = load(rewritten(model, **{f"{name}.weight": head}))
    written = load(save(tmp_path / "out", opened.config, dict(opened.tensors()), like=opened).folder)
    for each in (opened, written):
        assert not each.config.tie_word_embeddings
        assert not each.config.get_text_config().tie_word_embeddings
        assert torch.equal(each.tensor("lm_head.weight"), head)
        assert torch.equal(each.module().lm_head.weight, head)


def test_the_hub_gives_each_weight_once(tmp_path, monkeypatch):
    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model.v3"]
    others = ["consolidated.safetensors", "original/model.safetensors", "onnx/config.json"]
    asked = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **patterns: asked.update(patterns) or tmp_path)
    with pytest.raises(BadCheckpoint, match=r"no config\.json"):
        load("owner/name")
    assert list(filter_repo_objects(files + others, **asked)) == files


def test_a_body_without_a_head_and_with_buffers_of_old(tmp_path):
    """As GPT-2's own checkpoint is."""
    model = tiny_model("gpt2", tmp_path / "model", tie_word_embeddings=True)
    file = model.folder / "model.safetensors"
    bare = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    bare |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 4, 4) for layer in range(4)}
    save_file(bare, file, metadata={"format": "pt"})
    opened = load(model.folder)
    assert opened.stored.keys() == model.stored.keys()
    assert torch.equal(opened.tensor("transformer.h.1.mlp.c_fc.weight"), bare["h.1.mlp.c_fc.weight"])
    found = opened.module().get_parameter("transformer.h.1.mlp.c_fc.weight")
    assert torch.equal(found, bare["h.1.mlp.c_fc.weight"])


def test_a_vision_tower_under_its_old_name(tmp_path):
    """As LLaVA 1.5 and Gemma 3 were published."""
    model = tiny_model("llava", tmp_path / "model")
    old = {
        name.replace("vision_tower.", "vision_tower.vision_model."): value
        for name, value in load_file(model.folder / "model.safetensors").items()
    }
    assert any("vision_tower.vision_model." in name for name in old)
    save_file(old, model.folder / "model.safetensors", metadata={"format": "pt"})
    opened = load(model.folder)
    found = opened.module().state_dict()
    assert opened.stored.keys() == model.stored.keys()
    assert all(torch.equal(opened.tensor(name), found[name]) for name in opened.stored)
