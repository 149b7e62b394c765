# Nothing needs to be installed beforehand but Python 3.11 or 3.12 with venv: each target makes .venv when it is
# missing, or older than what it is made from.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11,$(shell \
	$(p) -c 'import sys, venv, ensurepip; (3, 11) <= sys.version_info[:2] <= (3, 12) and print("$(p)")' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
WORKERS ?= 2
DEMO_OUT ?= out/demo

.PHONY: help demo test check aarch64 clean

help:
	@echo "make demo    lower the example network for the ASIC target and show what came of it ($(DEMO_OUT))"
	@echo "make test    the whole test suite ($(WORKERS) workers)"
	@echo "make check   ruff, mypy --strict and the fast tests"
	@echo "make aarch64 cross-compile, fetch TVM's runtime for aarch64 (98 MB) and run under qemu"
	@echo "make clean   remove .venv, build results and caches"

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: rankc needs Python 3.11 or 3.12 with venv; none found: pass PYTHON=/path/to/python3" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,demo]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python tools/lower.py examples/digits.onnx --target asic --latency 60% \
		--calib examples/digits_data.py:calibration --eval examples/digits_data.py:evaluation \
		-o $(DEMO_OUT) --force

# One thread per worker: the libraries' thread pools would fight for the cores, and sums stay reproducible.
test: export OMP_NUM_THREADS := 1
test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS)

check: export OMP_NUM_THREADS := 1
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

# Needs g++-aarch64-linux-gnu and qemu-user-static.
aarch64: export OMP_NUM_THREADS := 1
aarch64: export RANKC_AARCH64_WHEELS := $(CURDIR)/build/aarch64
aarch64: $(STAMP)
	mkdir -p $(RANKC_AARCH64_WHEELS)
	$(BIN)/python -m pytest tests/codegen/runner/test_cross.py

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
