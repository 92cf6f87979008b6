# make quickstart   eight methods on digits, five seeds, a table: minutes on two CPU cores
# make test         all tests
PYTHON ?= python3
PROFILE ?= full
# cpu: PyTorch without CUDA; else what the package index has.
TORCH ?=
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-quick test-long test-gpu fuzz peers bench bench-gpu bench-loading speed-gpu docs lint types check reproduce-cifar reproduce-crd lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

setup: $(VENV)/.ready ## make the environment in .venv, from requirements.lock

$(VENV)/.ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
	  || { echo "kdbench needs Python 3.11 to 3.14; choose one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.7'
	@grep -vE '$(if $(filter cpu,$(TORCH)),^(nvidia-|cuda-|triton),^$$)' requirements.lock > $(VENV)/requirements.lock
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --requirement $(VENV)/requirements.lock \
	  $(if $(TORCH),--torch-backend $(TORCH))
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

quickstart: setup ## train the quickstart's cells, print and write the table
	$(BIN)/kdbench run quickstart --no-adopt

test: setup ## all tests
	$(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_FLAGS)

test-quick: setup ## tests without the slow ones
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow and not long'

test-long: setup ## beside the suite: random kills, every method compiled, every public teacher
	$(BIN)/python -m pytest -n auto -m long

fuzz: setup ## recipes and run folders that are wrong in ways nobody thought of; SEED= chooses others
	$(BIN)/python tests/fuzzing.py recipes 10000 $(if $(SEED),--seed $(SEED))
	$(BIN)/python tests/fuzzing.py folders 2000 $(if $(SEED),--seed $(SEED))

test-gpu: setup ## tests that need a GPU
	$(BIN)/python -m pytest -n 4 --dist worksteal -m gpu

# torchdistill's metadata asks for a newer torch than the pinned one; it is measured on the same torch as everything else.
peers: setup ## install what the benchmark compares with
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps torchdistill==1.1.5

bench: peers ## images per second, technique by technique, against torchdistill and a plain loop
	$(BIN)/kdbench bench --json runs/bench.json

OUT ?= runs/gpu
bench-gpu: peers ## the same on a GPU, with whole runs extrapolated and the quickstart timed; writes to OUT
	$(BIN)/kdbench bench --device cuda --json $(OUT)/bench.json

bench-loading: setup ## images per second that one core reads from JPEG files, beside torchvision's loaders
	$(BIN)/kdbench bench --loading --rounds 40 --json runs/loading.json

speed-gpu: setup ## one 240-epoch run of the usual tables' protocol on a GPU, in full, with its teacher; writes to OUT
	$(BIN)/kdbench run speed --no-adopt --device cuda --runs $(OUT)

# Strict: a link or an anchor that leads nowhere is an error (not with --quiet, which hides it from the count).
docs: setup ## the documentation as a site in build/site, to be read without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: setup ## ruff
	$(BIN)/ruff check .

types: setup ## mypy, also for what Windows lacks
	$(BIN)/mypy
	$(BIN)/mypy docs/hooks.py
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32

check: lint types docs test ## everything that CI checks

reproduce-cifar: setup ## AB's comparisons on CIFAR-10 into results/, without cells that are there; PROFILE=small: few images
	$(BIN)/kdbench reproduce cifar --profile $(PROFILE)

reproduce-crd: setup ## CRD's 13 pairs on CIFAR-100 into results/: days on a GPU; PROFILE=small takes hours on two CPU cores
	$(BIN)/kdbench reproduce crd --profile $(PROFILE)

lock: setup ## renew requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --extra docs --no-emit-index-url --no-header \
	  --no-annotate --output-file requirements.lock pyproject.toml

clean: ## remove the environment and caches, keep runs and results
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build dist
