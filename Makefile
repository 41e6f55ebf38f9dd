# Each goal makes what it needs: `make quickstart` and `make test` work in a fresh clone.
# PYTHON=python3.12 picks another interpreter, VENV=/path another place for the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Whole files side by side: most tests wait for processes of one or two ranks.
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest
PARALLEL := -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# Tests never ask a hub, and ranks that share two cores must not start a thread per core each.
TEST_ENV := HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help quickstart install test-fast test test-again test-ci test-ci-part test-slow test-all golden test-gpu gpu-report gpu-kit verify docs lint format clean debian java

help:
	@echo "make quickstart  install, fetch the sample model and data, fine-tune on this machine"
	@echo "make install     only make $(VENV) and install dstune into it"
	@echo "make test-fast   configuration, launcher and planner without ranks, while you edit (under 2 minutes)"
	@echo "make test        before you push: unit tests, and one of each proof on ranks (about 12 minutes on 2 cores)"
	@echo "make test-again  what failed in the run before, one test at a time"
	@echo "make test-ci     everything but soak and real models: every proof of exactness (about 44 minutes on 2 cores)"
	@echo "make test-ci-part CI_PART=3/8   the third of eight parts of what it has beside make test"
	@echo "make test-slow   what it leaves out: real models, soak, faults, Spark, Delta, MLflow's registry, installation into an empty environment, further layouts and launchers (one to two hours)"
	@echo "make test-all    make test-ci, then make test-slow"
	@echo "make test-gpu    the GPU tests, with a report to paste (up to 50 minutes: every case of all parts of gpu-report too)"
	@echo "make gpu-report PART=1   what one GPU does, parts 1 to 4 of at most eight minutes, as a report to send (PART=5 GPUS=8: several)"
	@echo "make gpu-kit     wheels for gpu-report on a machine without a network, and the commands to type there (PRESENT=freeze.txt PYTHON_TARGET=3.12)"
	@echo "make verify      build/dstune-verify.pyz: one file that checks whether an installed training stack is right (docs/verify.md)"
	@echo "make docs        the site of docs/, into build/site; a warning or a broken link inside it is an error"
	@echo "make golden      write the wording of errors (tests/data/golden) anew, after reading what changed"
	@echo "make lint        ruff, mypy, import contracts, shellcheck, hadolint"
	@echo "make format      let ruff rewrite the code"
	@echo "make clean       remove what the goals above made, except runs/ and the cache of samples"

quickstart: $(VENV)/.installed
	$(BIN)/dstune samples smollm2 chitchat
	$(BIN)/dstune train

install: $(VENV)/.installed

# Named, since collecting the others loads torch and more for half a minute.
FAST := config_compose config_ignored config_validate ds_config launch_hostfile launch_rank_env launch_records launch_rundir \
	launch_summary launch_verdict layers method_rules plan_architecture plan_memory redact run_format schedule store sweep_space
FAST := $(patsubst %,tests/unit/test_%.py,$(FAST)) $(patsubst %,tests/packaging/test_%.py,documents imports structure)

test-fast: $(VENV)/.installed-test
	$(TEST_ENV) $(PYTEST) $(PARALLEL) -m "not slow and not ci" $(FAST)

test: $(VENV)/.installed-test debian
	$(TEST_ENV) $(PYTEST) $(PARALLEL) -m "not slow and not ci and not gpu"

# What failed in the run before, once more and one at a time: exits with an error where that was nothing.
test-again: $(VENV)/.installed-test
	$(TEST_ENV) $(PYTEST) --last-failed --last-failed-no-failures none -m "not slow and not gpu"

test-ci: $(VENV)/.installed-test debian
	$(TEST_ENV) $(PYTEST) $(PARALLEL) -m "not slow and not gpu"

# Of what `make test` leaves to `make test-ci`, the files of one part, which take as long as those of each other: all parts
# together are all of it.
CI_PART ?= 1/8
test-ci-part: $(VENV)/.installed-test debian
	$(TEST_ENV) $(PYTEST) $(PARALLEL) -m "ci and not slow and not gpu" --ci-part $(CI_PART)

test-slow: $(VENV)/.installed-all $(VENV)/.clients debian java
	$(TEST_ENV) DSTUNE_NPM=$(CLIENTS) DSTUNE_OPENAI_1=$(CLIENTS)/openai-1 $(PYTEST) $(PARALLEL) -m "slow and not gpu"

# A failure of the first is seen an hour earlier; -k goes on.
test-all: test-ci test-slow

# The committed wording of errors; its diff is to be read.
golden: $(VENV)/.installed-test
	$(TEST_ENV) $(BIN)/python tools/golden.py

test-gpu: $(VENV)/.installed-test
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		|| { echo "test-gpu: PyTorch finds no GPU here (python -c 'import torch; print(torch.version.cuda)' names its CUDA build)"; exit 1; }
	$(TEST_ENV) $(PYTEST) -m gpu

# No internet once the environment is there. SIMULATE=--simulate rehearses it on a machine without a GPU.
PART ?= 1
GPUS ?= 1
gpu-report: $(VENV)/.installed-test
	$(TEST_ENV) $(BIN)/python benchmarks/gpu_report.py $(PART) --gpus $(GPUS) $(SIMULATE)

PYTHON_TARGET ?= 3.12
PRESENT ?= benchmarks/gpu_image.txt
gpu-kit: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/gpu_kit.py --python $(PYTHON_TARGET) --present $(PRESENT)

# Needs no packages: the file is built where it is wanted.
verify:
	$(PYTHON) tools/build_verify.py build/dstune-verify.pyz
	@echo "verify: torchrun --nproc_per_node 8 build/dstune-verify.pyz"

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -E -b html -W --keep-going -q -d build/site-cache docs build/site
	@echo "docs: build/site/index.html"

lint: $(VENV)/.installed-dev debian
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@if command -v shellcheck >/dev/null; then scripts=$$(.ci/shell-scripts) && shellcheck $$scripts; \
	else echo "lint: shell scripts are not checked (install shellcheck)"; fi
	$(BIN)/hadolint docker/Dockerfile.*

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What the tests and the lint use beside Python packages; says what will be skipped where it cannot install.
debian:
	@.ci/debian-packages shellcheck openmpi-bin iproute2 zsh fish openssh-client openssh-server pdsh \
		slurmctld slurmd slurm-client munge postgresql docker-compose

java:
	@.ci/debian-packages default-jre-headless

clean:
	rm -rf '$(VENV)' build dist dstune.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make an installation happen once per change of pyproject.toml.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "dstune needs Python 3.11 or newer: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "no virtual environment could be made (Debian: apt-get install python3-venv)"; exit 1; }
	@# An older pip builds source packages without an environment of their own: seqeval fails then.
	$(BIN)/python -m pip install --quiet 'pip>=23.1'

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --editable '.[docs]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-all: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --editable '.[test,delta,spark,mlflow-server]'
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed

# Clients of others that the server has to bear: the last of version 1, which needs another httpx, and npm's.
CLIENTS := $(abspath $(VENV))/clients
$(VENV)/.clients: | $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --target $(CLIENTS)/openai-1 openai==1.109.1
	@if command -v npm >/dev/null; then npm install --silent --no-fund --prefix $(CLIENTS) openai; \
	else echo "npm is not installed; the tests of its client are skipped (Debian: apt-get install npm)"; fi
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed
