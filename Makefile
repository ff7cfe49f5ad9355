# make demo: the whole curriculum on this CPU.  make test: the quick tests.  Each makes .venv first if absent.
# make real: a real pretrained model through every part; make real-short: a few steps of it.
# make engines, make test-engines: real SGLang and vLLM servers, in environments of their own.
# make bench: speed, side by side.
SHELL := /bin/bash
PYTHON ?= python3
# Another Python has another environment: make test PYTHON=python3.13 VENV=.venv-3.13
VENV := .venv
BIN := $(VENV)/bin
# Small tensors on few cores: a second thread in a process only spins.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
CONSTRAINTS ?= constraints.txt
# What pip installs first, for another build of torch: TORCH=ADDRESS_OF_A_WHEEL
TORCH :=
# A file's tests stay in one process, for they share what is dear to set up.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
# A demo that shows every part within a minute, and learns nothing.
SHORT := name=tiny_short stages.arithmetic.steps=30 stages.cold_start.steps=20 stages.rl_easy.steps=2 \
	stages.rl_hard.steps=3 evaluation.problems=64

.PHONY: demo demo-short real real-short test test-all test-most test-slurm test-pythons engines engines-sglang engines-vllm test-engines \
	bench lint clean

demo: $(VENV)/ready
	$(BIN)/parallel-r1 curriculum recipes/tiny/demo.yaml

demo-short: $(VENV)/ready
	$(BIN)/parallel-r1 curriculum recipes/tiny/demo.yaml --fresh $(SHORT)

# A real pretrained model, SmolLM2-135M-Instruct, through every part (docs/real_model.md); the short form takes minutes.
real real-short: export OMP_NUM_THREADS = $(THREADS)
THREADS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
real: $(VENV)/ready
	$(BIN)/python -m recipes.smollm2.run

real-short: $(VENV)/ready
	$(BIN)/python -m recipes.smollm2.run --short

test: $(VENV)/ready
	$(PYTEST) -m "not slow and not engines and not slurm"

test-all: test-most test-slurm

test-most: $(VENV)/ready
	$(PYTEST) -m "not engines and not slurm"

# Each worker has a cluster of its own. These tests wait for a good part of their time, so one worker may well run
# beside the others: make -j 2 SLURM_WORKERS=1 test-all
SLURM_WORKERS ?= $(WORKERS)
test-slurm: $(VENV)/ready
	$(BIN)/python -m pytest -n $(SLURM_WORKERS) --dist loadfile -m "slurm and not engines"

# Installs for each Python of this machine, or for PYTHONS, and tries what is installed; see tests/install/try.
test-pythons:
	tests/install/try $(PYTHONS)

# The inference servers' own environments, side by side, for an install keeps one core busy; see engines/build.
engines:
	$(MAKE) -j 2 engines-sglang engines-vllm

engines-sglang engines-vllm: engines-%:
	PYTHON=$(PYTHON) engines/build $*

# Skips what no environment is built for. Tests that share a server are one group; the longest group comes first.
test-engines: $(VENV)/ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder -m engines

# Every claim about speed, measured beside its alternative; writes docs/performance.md.
bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.run

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x slurm/*.sh make-venv tests/install/try .ci/run

$(VENV)/ready: setup.cfg constraints.txt
	@PYTHON="$(PYTHON)" CONSTRAINTS="$(CONSTRAINTS)" TORCH="$(TORCH)" ./make-venv $(VENV)

clean:
	rm -rf $(VENV) .venv-sglang .venv-vllm runs .pytest_cache .ruff_cache .hypothesis
