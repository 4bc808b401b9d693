# make demo | make test | make gpu | make clean
# The first two create .venv and install into it; later runs find it ready and start at once.
# clean removes caches and build output; .venv stays (rm -r .venv to start over).

SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# The oldest Triton that is supported, in a folder that PYTHONPATH puts before the pinned one. It is for Linux alone.
OLDEST_TRITON := 3.6.0
OLDEST := $(if $(filter Linux,$(shell uname -s)),$(VENV)/triton-$(OLDEST_TRITON))
# The oldest PyTorch that is supported, in an environment of its own.
OLDEST_TORCH := 2.11.0
TORCH_VENV := $(VENV)/torch-$(OLDEST_TORCH)

# Threads that spin while they wait make two busy processes on one machine many times slower.
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test gpu wheels install clean oldest-triton oldest-torch
.DEFAULT_GOAL := demo

demo: install
	$(PY) -m nestloop demo

test: install $(if $(OLDEST),$(OLDEST)/.installed)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(PY) -m pytest -n 2 -q --durations=15
	@$(if $(OLDEST),$(MAKE) --no-print-directory oldest-triton,echo 'Triton $(OLDEST_TRITON) is for Linux: not tested here')

# Part of `test`: generated Triton with the oldest release.
oldest-triton: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(PY) -c 'import triton; assert triton.__version__ == "$(OLDEST_TRITON)", triton'
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(PY) -m pytest -n 2 -q -m oldest_triton tests/lowering

# Not part of `test`: the compiler with the oldest PyTorch and the Triton that comes with it, another few GB to fetch.
oldest-torch: $(TORCH_VENV)/.installed
	OMP_NUM_THREADS=1 TRITON_PTXAS_PATH=$(firstword $(wildcard $(VENV)/lib/python3*/site-packages/nvidia/*/bin/ptxas)) \
	    $(TORCH_VENV)/bin/python -m pytest -n 2 -q tests/lowering tests/zoo tests/test_golden.py

# Runs on the machine's own Python where that one sees a GPU (GPU_PYTHON=... names another), else in .venv.
GPU_PYTHON ?= python3
gpu:
	@if $(GPU_PYTHON) -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; then \
	    if ls wheels/*.whl >/dev/null 2>&1; then \
	        $(GPU_PYTHON) -m pip install -q --no-index --no-deps --upgrade --target wheels/installed wheels/*.whl; \
	    fi; \
	    PYTHONPATH=.:wheels/installed $(GPU_PYTHON) -m benchmarks.gpu; \
	else \
	    $(MAKE) --no-print-directory install && $(PY) -m benchmarks.gpu; \
	fi

# For `make gpu` on a machine that nothing can be downloaded to: fla-core's kernels, to measure beside, and an assembler.
wheels:
	python3 -m pip download -q --no-deps --only-binary=:all: --dest wheels -c constraints.txt fla-core einops nvidia-cuda-nvcc

install: $(INSTALLED)

# setuptools is installed first so that the build uses the pinned one instead of fetching its own.
$(INSTALLED): pyproject.toml constraints.txt
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	    for python in $${PYTHON:-python3.11 python3.12}; do \
	        if $$python -c '' 2>/dev/null; then found=$$python; fi; \
	        if $$python -c 'import ensurepip, venv' 2>/dev/null; then usable=$$python; break; fi; \
	    done; \
	    if [ -z "$$usable" ] && [ -n "$$found" ]; then \
	        echo "make: $$found cannot create environments: its venv module is not installed." >&2; \
	        echo "      On Debian or Ubuntu: sudo apt install python3-venv" >&2; \
	        exit 1; \
	    elif [ -z "$$usable" ]; then \
	        echo "make: nestloop needs Python 3.11 or 3.12; none of $${PYTHON:-python3.11 python3.12} runs here." >&2; \
	        echo "      On Debian or Ubuntu: sudo apt install python3 python3-venv; elsewhere: make PYTHON=/path/to/python" >&2; \
	        exit 1; \
	    fi; \
	    echo "creating $(VENV) with $$usable"; \
	    $$usable -m venv $(VENV) || exit 1; \
	fi
	@echo 'installing nestloop and its dependencies (about 2.5 GB on disk, some minutes the first time)'
	$(PY) -m pip install -qq -c constraints.txt setuptools
	$(PY) -m pip install -qq -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(OLDEST)/.installed: | $(INSTALLED)
	$(PY) -m pip install -qq --no-deps --upgrade --target $(OLDEST) triton==$(OLDEST_TRITON)
	@touch $@

$(TORCH_VENV)/.installed: | $(INSTALLED)
	$(PY) -m venv $(TORCH_VENV)
	grep -vE '^(torch|torchvision|triton|setuptools|nvidia-.*)==' constraints.txt > $(TORCH_VENV)/constraints.txt
	$(TORCH_VENV)/bin/python -m pip install -qq -c $(TORCH_VENV)/constraints.txt \
	    torch==$(OLDEST_TORCH) numpy rich safetensors tyro hypothesis pytest pytest-xdist
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
