# make demo   set up; train two arms of one ablation to verdicts, a picture and a text
# make test   set up and pass the tests
# make soak   kill a run 50 times, also in the middle of a save
# make soak-server  ten minutes of requests whose clients leave at random
# make fuzz   mutate files that users have, 100,000 times each: refused in one line, or read
# make check  lint and types
# make test-gpu          the kernels on this machine's NVIDIA GPU
# make test-gpu-compile  compile them for an H100; no GPU is needed
# Another interpreter or place: make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
# Only the tests need torch, as an oracle. Asked for alone, first and by version, pip can take a
# CPU build that is at hand; a range makes it look for the newest, which brings gigabytes of CUDA.
TORCH ?= torch==2.13.0
WORKERS ?= 2

.PHONY: demo test test-slow soak soak-server fuzz test-gpu test-gpu-compile check clean

demo: $(VENV)/.core
	$(VENV)/bin/ablate run architecture/gqa --arms=mha,gqa --seeds=0,1 --workdir=runs/demo
	@echo; echo "A text by the model with grouped queries:"
	@$(VENV)/bin/ablate generate runs/demo/gqa/seed0 --prompt="def " --temperature=0.5
	@echo; echo "The picture: runs/demo/figure.png"

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist=worksteal -m "not slow and not soak and not gpu"

test-slow: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m slow

soak: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m soak --ignore=tests/research/inference/server

soak-server: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m soak tests/research/inference/server/test_soak.py

fuzz: $(VENV)/.test
	$(VENV)/bin/python tests/fuzz.py

test-gpu: $(VENV)/.cuda
	JAX_PLATFORMS=cuda,cpu $(VENV)/bin/python -m pytest -m gpu

test-gpu-compile: $(VENV)/.gpu-compile
	$(VENV)/bin/python -m pytest -m gpu_compile

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

$(VENV)/.cuda: $(VENV)/.test
	$(VENV)/bin/python -m pip install --quiet --editable ".[cuda]"
	touch $@

$(VENV)/.gpu-compile: $(VENV)/.test
	$(VENV)/bin/python -m pip install --quiet --editable ".[gpu-compile]"
	touch $@

$(VENV)/.check: $(VENV)/.test
	$(VENV)/bin/python -m pip install --quiet --editable ".[check]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
