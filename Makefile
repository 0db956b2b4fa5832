# Every target does its own set-up: a virtual environment in .venv with the pinned packages of constraints.txt.
PYTHON ?= python3
VENV   := .venv
STAMP  := $(VENV)/.installed
BIN    := $(VENV)/bin
# Compiled afterwards, by all cores: pip would do it with one, for two minutes.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Where there is no GPU: PyTorch's CPU build, a tenth of the size. It is looked for here and wherever pip is told to look.
TORCH_CPU ?= https://download.pytorch.org/whl/cpu

.PHONY: demo test test-slurm faults check bench browser clean help

help:            ## what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP)   ## the main job on real input: SFT, sampling, DPO, evaluation, report
	$(BIN)/alignment run experiment=quickstart

test: check browser  ## all tests, after the checks
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder  # the long files first, not the full ones
	$(MAKE) test-slurm

test-slurm: $(STAMP)  ## the tests on a SLURM cluster that they start themselves, as root; part of `make test`
	$(BIN)/python -m pytest -m slurm -n 2 --dist loadfile --no-loadscope-reorder tests/slurm  # a cluster each; they wait much

faults: $(STAMP)  ## every fault in every engine, into docs/reliability.md; about an hour on two cores, best as root
	FAULTS_RESULTS=docs/reliability.json $(BIN)/python -m pytest -n 2 --dist load -m "faults or not faults" tests/faults tests/distributed/test_joined.py; \
	  code=$$?; $(BIN)/python -m tests.faults.report && exit $$code

check: $(STAMP)  ## ruff, mypy and the architecture's contracts
	$(BIN)/ruff check alignment bench launchers tests
	$(BIN)/ruff format --check alignment bench launchers tests
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## TRL's trainers against ours: speed and memory, into docs/performance.md; at most an hour
	$(BIN)/python -m bench

browser:         # headless Chromium for the report's test; without it, and without root, that test is skipped
	@command -v chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null; } \
	  || echo "chromium is not installed: the report's browser test will be skipped"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@command -v nvidia-smi >/dev/null || $(PIP) --no-deps --retries 0 --extra-index-url $(TORCH_CPU) torch
	$(PIP) -e '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib >/dev/null || true  # some packages have files that are no Python 3
	@touch $@

clean:           ## removes the virtual environment; the store in outputs/ stays
	rm -rf $(VENV)
