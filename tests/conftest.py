"""Tiny random models of every family, and text for them. Parametrised over the families, so a new one is tested."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the command line does; read when torch is loaded

import copy
import json
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

import prunus as pr
from prunus import anatomy, cli
from prunus.checkpoint import Checkpoint
from prunus.families import family_of, known_families
from prunus.families.family import FIELDS

SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 28,
    "shared_intermediate_size": 28,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
"""Config values of mixtures of experts and of latent attention, where a family knows them."""
MAMBA = {
    "mamba_n_heads": 12,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
MULTIMODAL_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
QWEN3_5 = {
    "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, **MULTIMODAL_ROPE,
}  # fmt: skip
GRANITE = {
    "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.3, "logits_scaling": 4.0,
}  # fmt: skip
OWN = {
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3": {"tie_word_embeddings": True},
    "granite": GRANITE,
    "granite_swa": GRANITE | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8,
                              "layer_rope_theta": [0, 1e4, 500, 1e4]},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "olmoe": {"num_key_value_heads": 3},
    "deepseek_v3": {"num_key_value_heads": 6, "head_dim": 4},
    "mamba2": {"num_heads": 12, "n_groups": 2, "state_size": 8, "chunk_size": 16},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"] * 2, "mlp_only_layers": [1], "linear_num_key_heads": 4,
        "linear_num_value_heads": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "qwen3_5_text": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5,
    "deepseek_v2": {"num_key_value_heads": 6, "head_dim": 4},
    "dots1": {"layer_types": ["full_attention"] * 4},
    "mellum": {"layer_types": ["full_attention"] * 4, "mlp_layer_types": ["dense", "sparse"] * 2},
    "exaone_moe": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8,
                   "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "ernie4_5_moe": {"moe_num_experts": 6, "moe_k": 2, "moe_layer_end_index": 3},
    "hunyuan_v1_moe": {"num_experts_per_tok": [2] * 4, "moe_intermediate_size": [40] * 4, "num_shared_expert": [1] * 4},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 96, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
                  "mlp_multipliers": [0.8, 0.4], "ssm_multipliers": [0.9, 0.8, 1.2, 0.7, 1.1],
                  "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.7, "attention_in_multiplier": 0.9,
                  "attention_out_multiplier": 0.6, "key_multiplier": 1.3, "embedding_multiplier": 2.0,
                  "lm_head_multiplier": 0.5},
    "nemotron_h": {
        "layer_types": ["linear_attention", "moe", "full_attention", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 8,
        "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16, "moe_shared_expert_intermediate_size": 28,
    },
    "nemotron-nas": {"intermediate_size": 512},
    "mamba": {"state_size": 8, "time_step_rank": 6},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 6},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0,
        "mamba_d_state": 8, "mamba_dt_rank": 6,
    },
    "falcon": {"new_decoder_architecture": True},
    "gptj": {"rotary_dim": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
}  # fmt: skip
CLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
}  # fmt: skip
QWEN_TOKENS = {
    "image_token_id": 96, "video_token_id": 95, "vision_start_token_id": 94, "vision_end_token_id": 93,
}  # fmt: skip
VISION = {
    "llava": {"vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **CLIP},
              "image_token_index": 96},
    "idefics3": {"vision_config": CLIP | {"patch_size": 7}, "scale_factor": 2, "image_token_id": 96},
    "smolvlm": {"vision_config": CLIP | {"patch_size": 7}, "scale_factor": 2, "image_token_id": 96},
    "gemma3": {"vision_config": CLIP, "mm_tokens_per_image": 4, "image_token_index": 96,
               "tie_word_embeddings": True},
    "qwen2_5_vl": {"vision_config": QWEN_VISION | {"depth": 2, "fullatt_block_indexes": [1], "window_size": 16},
                   **QWEN_TOKENS},
    "qwen3_vl": {"vision_config": QWEN_VISION | {"depth": 3, "deepstack_visual_indexes": [0, 1],
                                                 "num_position_embeddings": 16}, **QWEN_TOKENS},
    "qwen2_vl": {"vision_config": {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 4}, **QWEN_TOKENS},
    "qwen3_5": {"vision_config": QWEN_VISION | {"depth": 2, "num_position_embeddings": 16}, **QWEN_TOKENS},
    "qwen3_5_moe": {"vision_config": QWEN_VISION | {"depth": 2, "num_position_embeddings": 16}, **QWEN_TOKENS},
    "internvl": {"vision_config": CLIP | {"image_size": [56, 56], "patch_size": [14, 14]}, "image_token_id": 96},
    "mistral3": {"vision_config": CLIP | {"model_type": "pixtral", "image_size": 56, "head_dim": 8},
                 "image_token_index": 96},
    "aya_vision": {"vision_config": CLIP | {"model_type": "siglip_vision_model", "image_size": 56},
                   "image_token_index": 96, "alignment_intermediate_size": 20},
    "cohere2_vision": {"vision_config": CLIP | {"model_type": "siglip_vision_model", "image_size": 56},
                       "image_token_id": 96, "alignment_intermediate_size": 20},
    "vipllava": {"vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **CLIP},
                 "image_token_index": 96, "vision_feature_layers": [-2, -3]},
}  # fmt: skip
"""Of models that see: what stands beside the config of the decoder."""
TEXT = {
    "llava": {"model_type": "llama"},
    "idefics3": {"model_type": "llama"},
    "smolvlm": {"model_type": "llama"},
    "gemma3": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen2_5_vl": MULTIMODAL_ROPE,
    "qwen3_vl": MULTIMODAL_ROPE,
    "qwen2_vl": MULTIMODAL_ROPE,
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5,
    "internvl": {"model_type": "qwen2"},
    "mistral3": {"model_type": "mistral"},
    "aya_vision": {"model_type": "cohere2", "layer_types": ["full_attention"] * 4},
    "cohere2_vision": {"model_type": "cohere2", "layer_types": ["full_attention"] * 4},
    "vipllava": {"model_type": "llama"},
}
"""… and what stands in it."""
VISION_TOKEN = 96
VARIANTS = {
    "deepseek_v3, without a query latent": {"q_lora_rank": None},
    "deepseek_v2, without a query latent": {"q_lora_rank": None},
    "granitemoehybrid, dense": {"num_local_experts": 0},
    "granitemoehybrid, attention alone": {"num_local_experts": 0, "layer_types": ["full_attention"] * 4},
    "jamba, dense": {"num_experts": 1},
    "falcon_h1, without a norm": {"mamba_rms_norm": False},
    "gpt2, attention divided by the layer's number": {"scale_attn_by_inverse_layer_idx": True},
    "falcon, multi-query": {"new_decoder_architecture": False},
    "falcon, one norm": {"num_ln_in_parallel_attn": 1},
    "cohere, norms of each head": {"use_qk_norm": True},
    "gpt_neox, one branch after the other": {"use_parallel_residual": False},
}
"""Values of a type's other variants, by its name and theirs."""
KINDS = (
    *("llama", "gemma3_text", "phi3", "olmo2", "gpt_neox", "gpt2", "falcon", "cohere2", "qwen2_moe", "gpt_oss"),
    *("deepseek_v3", "qwen3_next", "mamba2", "falcon_h1", "granitemoehybrid", "nemotron_h", "gemma3", "qwen3_vl"),
    "jamba",
)
"""One type of each kind of layers; what depends on the kind alone is tested on these."""
for_each_kind = pytest.mark.parametrize("family_name", KINDS, indirect=True, scope="session")


def weights_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: tensor.whole() for name, tensor in checkpoint.tensors()}


@dataclass
class RandomBlocks:
    """What a walk needs of text: random tokens, with a document border inside each block."""

    tokens_NS: Tensor
    border: int = 10
    fingerprint: str = "random"

    def __len__(self) -> int:
        return len(self.tokens_NS)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        length = self.tokens_NS.shape[1]
        positions = torch.cat([torch.arange(self.border), torch.arange(length - self.border)])
        return self.tokens_NS[indices], positions.expand(len(indices), -1)


EPSILONS = dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"), 1e-10)
"""Of a norm over few channels 1e-5 is no trifle, and a cut does not scale it."""


def tiny_model(family: str, folder: Path, **changes: object) -> Checkpoint:
    """A random model whose activations are of the order of 1, so that no error hides under a norm's epsilon."""
    torch.manual_seed(0)
    model_type = family.partition(",")[0]
    config = tiny_config(family, **changes)
    model = builder(model_type).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "embed" in name else parameter.shape[-1] ** -0.5))
        for name, buffer in anatomy.stored_tensors(model).items():
            if name not in dict(model.named_parameters()):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    model.save_pretrained(folder)
    return pr.load(folder)


def builder(model_type: str) -> type:
    """What makes a model of this type from a config or a folder."""
    return AutoModelForImageTextToText if model_type in VISION else AutoModelForCausalLM


def tiny_config(family: str, **changes: object) -> PreTrainedConfig:
    model_type = family.partition(",")[0]
    if model_type in VISION:
        text = SIZES | EPSILONS | TEXT[model_type] | (EXPERTS if "moe" in model_type else {}) | changes
        others = copy.deepcopy(VISION[model_type])
        if "depth" in others["vision_config"]:
            as_wide = "hidden_size" if model_type == "qwen2_vl" else "out_hidden_size"
            others["vision_config"][as_wide] = text["hidden_size"]
        return AutoConfig.for_model(model_type, text_config=text, **others)
    default = AutoConfig.for_model(model_type)
    known = default.to_dict().keys() | default.attribute_map.keys()
    own = {key: value for key, value in {**EPSILONS, **EXPERTS}.items() if key in known}
    values = SIZES | own | OWN.get(model_type, {}) | VARIANTS.get(family, {}) | changes
    fields = family_of(model_type, SimpleNamespace(**default.to_dict() | values)).fields
    for size, usual in FIELDS.items():  # by the names that the family has for them
        if usual not in fields.values() and usual in values:
            value, own_name = values.pop(usual), fields.get(size)
            if own_name in known and not (size == "kv_heads" and own_name == fields["heads"]):
                values[own_name] = value
    return AutoConfig.for_model(model_type, **values)


def seen(config: PreTrainedConfig) -> dict[str, Tensor]:
    """What a model that sees is given of an image of four tokens between text; nothing for others."""
    if config.model_type not in VISION:
        return {}
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 93, (1, 20), generator=generator)
    tokens[0, 5:9] = VISION_TOKEN
    kinds = (tokens == VISION_TOKEN).long()
    if config.model_type.startswith("qwen"):
        patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        return {"input_ids": tokens, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]]),
                "mm_token_type_ids": kinds}  # fmt: skip
    side = 56 if config.model_type in ("internvl", "mistral3", "aya_vision", "cohere2_vision") else 28
    pixels = torch.randn(1, 3, side, side, generator=generator)
    if config.model_type == "mistral3":
        return {"input_ids": tokens, "pixel_values": pixels, "image_sizes": torch.tensor([[side, side]])}
    if "idefics" in config.model_type or config.model_type == "smolvlm":
        return {"input_ids": tokens, "pixel_values": pixels[None]}
    return {"input_ids": tokens, "pixel_values": pixels}


SENTENCE = "the a cat dog tree house river sees likes finds old red small big quickly slowly and or in on under"
WORDS = SENTENCE.split(" ")


def make_text(file: Path, documents: int, *, seed: int) -> Path:
    """JSONL of random sentences over a few words."""
    generator = random.Random(seed)
    lines = (" ".join(generator.choices(WORDS, k=generator.randrange(20, 60))) for _ in range(documents))
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


def add_tokenizer(folder: Path) -> None:
    """A small byte-level BPE tokenizer whose ids fit the tiny models' vocabulary."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=SIZES["vocab_size"], special_tokens=["<unk>", "<s>", "</s>"])
    raw.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


SMALL = {
    "data": {"block_size": 32, "heldout_tokens": 1024},
    "measure": {"tokens": 512},
    "search": {"candidates": 2, "probe_tokens": 256},
    "prune": {"tokens": 1024},
    "distill": {"tokens": 1024, "batch_tokens": 128},
    "evaluate": {"speed": False},
}
"""Recipe values of a run that takes seconds on a tiny model."""


def small_flags(data: Path, to: Path, *, budget: tuple[str, str] = ("--params", "0.7x")) -> list[str]:
    """The same as options of the command line."""
    settings = [f"{section}.{key}={value}" for section, values in SMALL.items() for key, value in values.items()]
    return [*budget, "--data", str(data), "--to", str(to), *(part for value in settings for part in ("--set", value))]


@pytest.fixture(scope="session")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer: what a user would bring."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_model("llama", folder, vocab_size=SIZES["vocab_size"])
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("corpus") / "text.jsonl", 400, seed=0)


@pytest.fixture(scope="session", params=[*known_families(), *VARIANTS])
def family_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def teacher(family_name: str, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_model(family_name, tmp_path_factory.mktemp(family_name))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def blocks() -> RandomBlocks:
    generator = torch.Generator().manual_seed(1)
    return RandomBlocks(torch.randint(0, SIZES["vocab_size"], (6, 24), generator=generator))


@dataclass
class Invoked:
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def invoke(capsys, monkeypatch):
    """Run the command line in this process, as the console script would."""

    def run(*arguments: str) -> Invoked:
        monkeypatch.setattr("sys.argv", ["prunus", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Invoked(code, captured.out, captured.err)

    return run
