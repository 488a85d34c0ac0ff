# Everything runs in .venv, which these targets make and fill from PyPI; a second call installs nothing.
# A machine needs python3 >= 3.11 and make. Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
RAPIDS_EXTRA ?= image_cuda13
BIN := $(VENV)/bin
DEMO_DIR ?= demo

# pip's own work is kept in its cache, so that a fresh clone on the same machine downloads little.
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet
METADATA := setup.cfg pyproject.toml setup.py $(wildcard nemo_image/embedders/preprocess/*.c)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help demo test docs notebooks bench lint format types contract check check-extras check-rapids check-slurm test-gpu clean distclean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.demo-installed ## Curate a small dataset of real photographs, from tars to tars, into demo/
	$(BIN)/python scripts/demo/run.py --folder $(DEMO_DIR)

test: $(VENV)/.test-installed ## Run the tests (PYTEST_ARGS="-k export")
	$(BIN)/python -m pytest $(PYTEST_ARGS)

docs: $(VENV)/.test-installed ## Build the pages as a site, into docs/_build/html/index.html
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

notebooks: $(VENV)/.test-installed ## Execute the notebooks, and keep their outputs in them (NOTEBOOKS="01 03")
	$(BIN)/python scripts/notebooks.py $(NOTEBOOKS)

bench: $(VENV)/.test-installed ## Compare speeds with others', into benchmarks/results/ (BENCH_ARGS="decode --rounds 9")
	$(BIN)/python -m benchmarks.speed $(BENCH_ARGS)

lint: $(VENV)/.test-installed ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test-installed ## Apply the formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.test-installed ## Check the type hints
	$(BIN)/mypy

contract: $(VENV)/.test-installed ## Check that imports point down the layers only
	$(BIN)/lint-imports --config setup.cfg

check: lint types contract test ## All of these: what CI runs

check-extras: $(VENV)/bin/uv ## Resolve every extra as published, for several Pythons (needs the package index)
	UV=$(BIN)/uv scripts/check_extras.sh

check-rapids: ## Compare the calls into RAPIDS with the signatures of its release (RAPIDS_EXTRA=image_cuda12); needs no GPU
	$(PYTHON) -m venv --clear $(VENV)-rapids
	$(VENV)-rapids/bin/python -m pip install --disable-pip-version-check --quiet '.[$(RAPIDS_EXTRA)]'
	$(VENV)-rapids/bin/python scripts/check_rapids.py

test-gpu: ## Run the tests marked gpu, in an environment that has RAPIDS, DALI and the extra test (PYTHON=…)
	$(PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

check-slurm: $(VENV)/.test-installed ## Run the Slurm scripts on a Slurm of two nodes on this machine (Debian's slurm-wlm, root)
	PYTHON=$(abspath $(BIN)/python) scripts/check_slurm.sh

clean: ## Remove what the tools and the demo left
	rm -rf $(DEMO_DIR) docs/_build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find nemo_image tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv and the benchmarks' material as well
	rm -rf $(VENV) .bench nemo_image/embedders/preprocess/*.so

# Touched last: a folder left by an interrupted call has no pip yet. The pip that Python 3.11 brings (before 23.3) takes
# image_cpu for another extra than image-cpu, warns, and installs nothing of it.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	    "nemo-image needs Python 3.11 or newer; $(PYTHON) is not. Say which: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) --upgrade 'pip>=23.3'
	@touch $@

$(VENV)/.demo-installed: $(METADATA) | $(VENV)/.made
	@echo "Installing into $(VENV): some minutes and gigabytes the first time (torch)"
	$(PIP_INSTALL) -e '.[image_cpu,demo]'
	@touch $@

$(VENV)/.test-installed: $(METADATA) | $(VENV)/.made
	@echo "Installing into $(VENV): some minutes and gigabytes the first time (torch)"
	$(PIP_INSTALL) -e '.[image_cpu,dali,demo,docs,test]'
	@touch $@ $(VENV)/.demo-installed

$(BIN)/uv: | $(VENV)/.made
	$(PIP_INSTALL) uv
