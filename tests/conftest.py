"""Tiny random models of every family, and text for them. Parametrised over the families, so a new one is tested."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import prunus as pr
from prunus.checkpoint import Checkpoint
from prunus.families import known_families

SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 128,
}
OWN = {
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3": {"tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
}  # fmt: skip


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


def tiny_model(family: str, folder: Path, **changes: object) -> Checkpoint:
    """A random model whose activations are of the order of 1, so that no error hides under a norm's epsilon."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | OWN.get(family, {}) | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "embed" in name else parameter.shape[1] ** -0.5))
    model.save_pretrained(folder)
    return pr.load(folder)


@pytest.fixture(scope="session", params=known_families())
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
