# make demo   set up and run one ablation on this machine, to its verdicts
# make test   set up and pass the tests
# make check  lint and types
# Another interpreter or place: make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
# Only the tests need torch, as an oracle. Asked for alone, first and by version, pip can take a
# CPU build that is at hand; a range makes it look for the newest, which brings gigabytes of CUDA.
TORCH ?= torch==2.13.0
WORKERS ?= 2

.PHONY: demo test test-slow check clean

demo: $(VENV)/.core
	$(VENV)/bin/ablate run architecture/gqa --scale=cpu --workdir=runs/demo

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n $(WORKERS) -m "not slow and not gpu"

test-slow: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m slow

check: $(VENV)/.check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: setup.cfg | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/.check: $(VENV)/.test
	$(VENV)/bin/python -m pip install --quiet --editable ".[check]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
