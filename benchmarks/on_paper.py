"""What `prunus plan` says of large models on 8 GPUs, without their weights.

Usage: python benchmarks/on_paper.py
The checkpoints are headers over sparse files of the right size: nothing is read of them but shapes.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from prunus import anatomy, storage, weights
from prunus.families import family_of

PLANS = {
    "8B → 4B": (
        {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
        ["--params", "4B", "--tokens", "10B"],
    ),
    "15B → 8B": (
        {"model_type": "llama", "num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13824,
         "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 256000},
        ["--params", "8B", "--tokens", "10B"],
    ),
    "30B-A3B → 18B": (
        {"model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "moe_intermediate_size": 768,
         "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
         "vocab_size": 151936},
        ["--arch", "layers=40,hidden=1792,expert_ffn=624", "--tokens", "10B",
         "--set", "distill.gradient_checkpointing=true"],
    ),
}  # fmt: skip
OPTIONS = ["--gpus", "8", "--tflops", "600", "--gigabytes", "80", "--data", "text", "--to", "run"]
SETTINGS = ["--set", "distill.batch_tokens=4M", "--set", "data.block_size=4096", "--set", "measure.tokens=1M"]


def main() -> None:
    for name, (shape, budget) in PLANS.items():
        print(f"\n{name}")
        with tempfile.TemporaryDirectory() as folder:
            config = AutoConfig.for_model(
                **shape, head_dim=128, max_position_embeddings=8192, tie_word_embeddings=False
            )
            write_headers(config, Path(folder) / "model")
            command = [
                sys.executable,
                "-m",
                "prunus",
                "plan",
                str(Path(folder) / "model"),
                *budget,
                *OPTIONS,
                *SETTINGS,
            ]
            subprocess.run(command, check=True)


def write_headers(config: PreTrainedConfig, folder: Path) -> None:
    """A file for each tensor, of which only the header takes any space."""
    folder.mkdir()
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(folder)
    tensors = {
        name: weights.Parts(tuple(tensor.shape), torch.bfloat16, lambda: iter(()))
        for name, tensor in anatomy.stored_tensors(model).items()
    }
    entries = storage.scattered(family_of(config.model_type, config), tensors)
    weight_map = {}
    for name, shape in ((name, shape) for entry in entries for name, shape in entry.shapes.items()):
        weight_map[name] = f"{name}.safetensors"
        size = 2 * math.prod(shape)
        header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
        with (folder / weight_map[name]).open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
        os.truncate(folder / weight_map[name], 8 + len(header) + size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


if __name__ == "__main__":
    main()
