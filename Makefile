# make demo: the whole curriculum on this CPU.  make test: the quick tests.  Each makes .venv first if absent.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Small tensors on few cores: a second thread in a process only spins.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
CONSTRAINTS ?= constraints.txt
# A demo that shows every part within a minute, and learns nothing.
SHORT := name=tiny_short stages.arithmetic.steps=30 stages.cold_start.steps=20 stages.rl_easy.steps=2 \
	stages.rl_hard.steps=3 evaluation.count=64

.PHONY: demo demo-short test test-all lint clean

demo: $(VENV)/ready
	$(BIN)/parallel-r1 curriculum recipes/tiny/demo.yaml

demo-short: $(VENV)/ready
	$(BIN)/parallel-r1 curriculum recipes/tiny/demo.yaml --fresh $(SHORT)

test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/ready
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .

$(VENV)/ready: setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c $(CONSTRAINTS) torch
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
