# `make demo` and `make test` set up everything they need in .venv; nothing has to be installed before.
PYTHON ?= python3
TORCH  ?= 2.13.0
BIN    := .venv/bin
STAMP  := .venv/.ready

.PHONY: demo test lint setup clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/python examples/rlhf_demo.py

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(STAMP)

# Without an NVIDIA driver the CPU build of torch is taken: from wherever pip finds one by that name, else by uv's
# own knowledge of PyTorch's builds. With torch in place the rest installs without touching it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	if command -v nvidia-smi >/dev/null 2>&1; then \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)"; \
	else \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)+cpu" 2>/dev/null || \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu "torch==$(TORCH)"; \
	fi
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable ".[test]"
	$(BIN)/lit-models fit --help >/dev/null  # remembered, so that the next one is instant
	touch $(STAMP)

clean:
	rm -rf .venv runs
