# `make train`, `make test`: all that a fresh machine needs is Python 3.11+, git and make.
PYTHON ?= python3
# One environment for each Python version, so that PYTHON=python3.13 leaves the default one alone.
VENV ?= .venv$(shell $(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; print("" if "$(PYTHON)" == "python3" else "-" + v)')
BIN = $(VENV)/bin
RUNS ?= runs

.PHONY: train test test-slow seeds lint clean
train: $(VENV)/.train
	$(BIN)/python experiments/digits/run.py --runs=$(RUNS)

seeds: $(VENV)/.train
	$(BIN)/python experiments/digits/run.py --runs=$(RUNS) --seeds=0,1,2

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist=worksteal -m "not slow"

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.test
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

$(VENV)/.train: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vit_jax needs Python 3.11 or later, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,plot,tensorboard]'
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,plot,tensorboard,test,dev]'
	touch $@

clean:
	rm -rf .venv* build *.egg-info
