# Two commands for a fresh machine with Python 3.11 and git: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/tiny
MINUTES ?= 30

.PHONY: help demo test check bench gpu torture mutants clean

help: ## list what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# torch comes first and alone, so that a CPU build that is present serves and nothing else pulls in a CUDA one. What pip
# would warn of is that an editable install stands beside the folders that it is made of: so it should.
$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed ## compress the embedded teacher: a table, a report and three smaller models in runs/tiny
	$(BIN)/ppcl compress --recipe tiny --out $(DEMO)

check: $(VENV)/installed ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check ## style, types and every test, one process a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

bench: $(VENV)/installed ## speed of the hot paths, as ratios of medians
	$(BIN)/python tests/bench.py

gpu: $(VENV)/installed ## on a card of 80 GB or more, in eight minutes: speed and memory at full size, random weights
	$(BIN)/python tests/gpu.py --out runs/gpu

torture: $(VENV)/installed ## half an hour of kills, damage, full disks and mutated files: make torture MINUTES=120
	$(BIN)/python tests/torture.py --minutes $(MINUTES)

mutants: $(VENV)/installed ## change every operator of the statistics and the surgery in turn: which changes no test notices
	$(BIN)/python tests/mutate.py statistics surgery

clean: ## remove what was installed and made here
	rm -rf $(VENV) runs build dist *.egg-info
