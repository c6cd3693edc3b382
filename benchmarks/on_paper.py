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

from transformers import LlamaConfig

PLANS = {
    "8B → 4B": (
        {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256},
        ["--params", "4B", "--tokens", "10B"],
    ),
    "15B → 8B": (
        {"num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40,
         "num_key_value_heads": 40, "vocab_size": 256000},
        ["--params", "8B", "--tokens", "10B"],
    ),
}  # fmt: skip
OPTIONS = ["--gpus", "8", "--tflops", "600", "--gigabytes", "80", "--data", "text", "--to", "run"]
SETTINGS = ["--set", "distill.batch_tokens=4M", "--set", "data.block_size=4096", "--set", "measure.tokens=4M"]


def main() -> None:
    for name, (shape, budget) in PLANS.items():
        print(f"\n{name}")
        with tempfile.TemporaryDirectory() as folder:
            write_headers(LlamaConfig(**shape, head_dim=128, tie_word_embeddings=False), Path(folder) / "model")
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


def write_headers(config: LlamaConfig, folder: Path) -> None:
    folder.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    weight_map = {}
    for name, shape in shapes(config).items():
        weight_map[name] = f"{name}.safetensors"
        size = 2 * math.prod(shape)
        header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
        with (folder / weight_map[name]).open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
        os.truncate(folder / weight_map[name], 8 + len(header) + size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shapes(config: LlamaConfig) -> dict[str, list[int]]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    heads, groups = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
    layer = {
        "input_layernorm": [hidden],
        "self_attn.q_proj": [heads, hidden],
        "self_attn.k_proj": [groups, hidden],
        "self_attn.v_proj": [groups, hidden],
        "self_attn.o_proj": [hidden, heads],
        "post_attention_layernorm": [hidden],
        "mlp.gate_proj": [ffn, hidden],
        "mlp.up_proj": [ffn, hidden],
        "mlp.down_proj": [hidden, ffn],
    }
    outside = {
        "model.embed_tokens.weight": [config.vocab_size, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [config.vocab_size, hidden],
    }
    inside = {
        f"model.layers.{number}.{name}.weight": shape
        for number in range(config.num_hidden_layers)
        for name, shape in layer.items()
    }
    return outside | inside


if __name__ == "__main__":
    main()
