"""Does llama.cpp compute from a checkpoint what transformers computes?

Usage: python benchmarks/llama_cpp.py FOLDER... --llama-cpp CHECKOUT --text FILE

Needs `pip install xllamacpp gguf`. Each folder is converted to float32 by the checkout's own converter; then the log
probabilities of the ten likeliest next tokens are compared behind beginnings of the text, and what both write greedily.

That converter takes DeciLM for Llama 3 by its number of tokens, and any other for SentencePiece; where it is neither,
its step for byte-level BPE is put in its place here.
"""

import argparse
import contextlib
import io
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import xllamacpp

import prunus as pr
from prunus.checkpoint import Checkpoint

LENGTHS = (8, 16, 32, 64, 128, 256)
WRITTEN = 24


def convert(folder: Path, checkout: Path, to: Path) -> None:
    sys.path.insert(0, str(checkout))
    from conversion.base import TextModel
    from conversion.deci import DeciModel

    DeciModel.set_vocab = TextModel._set_vocab_gpt2
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", str(to), "--outtype", "f32"]
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(checkout / sys.argv[0]), run_name="__main__")


class LlamaCpp:
    """A model that llama.cpp has loaded."""

    def __init__(self, file: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
        self.server = xllamacpp.Server(params)

    def write(self, tokens: list[int], count: int, likeliest: int = 1) -> list[dict[str, Any]]:
        """The next tokens, greedily; of each the likeliest ones with their log probabilities."""
        asked = {"prompt": tokens, "n_predict": count, "n_probs": likeliest, "temperature": 0.0, "ignore_eos": True}
        found: list[dict[str, Any]] = self.server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        return found

    def likeliest(self, tokens: list[int]) -> dict[int, float]:
        return {each["id"]: each["logprob"] for each in self.write(tokens, 1, 10)[0]["top_logprobs"]}


def compare(checkpoint: Checkpoint, other: LlamaCpp, text: str) -> str:
    model, tokens = checkpoint.module(torch.float32), checkpoint.tokenizer()(text).input_ids
    worst, agreed = 0.0, 0
    for length in LENGTHS:
        with torch.no_grad():
            own = model(input_ids=torch.tensor([tokens[:length]])).logits[0, -1].log_softmax(-1)
        found = other.likeliest(tokens[:length])
        worst = max(worst, *(abs(float(own[id]) - value) for id, value in found.items()))
        agreed += int(own.argmax()) == max(found, key=lambda id: found[id])
    prompt = tokens[: LENGTHS[2]]
    written = model.generate(
        torch.tensor([prompt]), max_new_tokens=WRITTEN, do_sample=False, eos_token_id=None, repetition_penalty=1.0
    )
    theirs = [token["id"] for token in other.write(prompt, WRITTEN)]
    same = sum(a == b for a, b in zip(written[0, len(prompt) :].tolist(), theirs, strict=False))
    return (
        f"log probabilities differ by {worst:.4f} at most, the likeliest token is the same {agreed} of {len(LENGTHS)} "
        f"times; of {WRITTEN} tokens written {same} are the same"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    options = parser.parse_args()
    text = options.text.read_text()[:4000]
    for folder in options.folders:
        with tempfile.TemporaryDirectory() as name:
            file = Path(name) / "model.gguf"
            convert(folder, options.llama_cpp, file)
            checkpoint = pr.load(folder)
            print(f"{folder} ({checkpoint.family.model_type}): {compare(checkpoint, LlamaCpp(file), text)}", flush=True)


if __name__ == "__main__":
    main()
