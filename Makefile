# Two commands: `make train` and `make test`. Everything else is listed by `make help`.
PYTHON ?= python3
VENV   ?= .venv
CUDA   ?= 13
N      ?= 2000
MINUTES ?= 10
BIN    := $(VENV)/bin
RUN    := $(BIN)/python
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)

.DEFAULT_GOAL := help
.PHONY: help install train test test-gpu fuzz lint format types compile-kernels sanitize benchmark benchmark-cpu clean

help:  ## List these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

install: $(VENV)/.installed-cuda$(CUDA)  ## Make .venv and install everything (CUDA=12 for PyTorch built for CUDA 12)

$(VENV)/.installed-cuda$(CUDA): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastna needs Python 3.11 or newer; say which: make PYTHON=python3.12 install")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@# CuPy's wheels for CUDA 12 and 13 own the same files: one must go before the other comes.
	if [ "$(CUDA)" = 12 ]; then $(RUN) -m pip uninstall --quiet --yes cupy-cuda13x && $(RUN) -m pip install --quiet --force-reinstall --no-deps "cupy-cuda12x>=14" && $(RUN) -m pip install --quiet "cupy-cuda12x[ctk]>=14"; fi
	rm -f $(VENV)/.installed-cuda* && touch $@

train: install  ## Train a small DiNAT on real handwritten digits, evaluate it, say where the report is
	$(RUN) train.py experiment=digits

test: install  ## Pass the tests (no GPU needed)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadgroup

test-gpu:  ## Pass the GPU tests, with this machine's own Python: make test-gpu RUN=python3
	$(RUN) -m pytest -m gpu tests/gpu

fuzz: install  ## Compare `tiled` with `reference` on N random problems: make fuzz N=10000
	FASTNA_FUZZ=$(N) $(RUN) -m pytest tests/kernels/test_fuzz.py

lint: install  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## Rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compile-kernels: install  ## Compile every kernel for every architecture; show registers and spills
	$(RUN) scripts/compile_kernels.py

sanitize:  ## Run compute-sanitizer over a short selection (needs a GPU)
	$(RUN) scripts/sanitize.py

benchmark:  ## The whole evaluation and its report, resumable: make benchmark MINUTES=10 RUN=python3
	$(RUN) scripts/benchmark.py --minutes $(MINUTES)

benchmark-cpu: install  ## Time nat_tiny and dinat_tiny against Swin on this CPU
	$(RUN) scripts/benchmark_cpu.py

clean:  ## Remove what tests and builds leave behind (not .venv, not outputs)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
