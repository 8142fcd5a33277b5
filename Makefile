PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := cli.py pipeline stages store tests benchmarks docs

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo install test lint types unit ffcv ffcv-libs clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=$(PYTHON) (3.11 to 3.13)  VENV=$(VENV)  PYTEST_ARGS='-k store'"
	@echo "  STRATA_TEST_DATA=<folder> lets the tests that want real data find it"

demo: $(VENV)/.stamp-run  ## train on the digits and write a report (minutes, no GPU)
	$(BIN)/python cli.py run digits
	@echo
	@echo "report: $$(ls -t "$(CURDIR)"/runs/digits/*/report.html | head -n 1)"

install: $(VENV)/.stamp-dev  ## make the environment, with the development tools

test: $(VENV)/.stamp-dev  ## everything that must pass: lint, types, unit
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory types
	$(MAKE) --no-print-directory unit

lint: $(VENV)/.stamp-dev  ## ruff
	$(BIN)/ruff check .

types: $(VENV)/.stamp-dev  ## pyright
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

unit: $(VENV)/.stamp-dev  ## pytest
	$(BIN)/python -m pytest $(PYTEST_ARGS)

ffcv: ffcv-libs $(VENV)/.stamp-ffcv  ## add the optional ffcv loader (built from source)

ffcv-libs:
	@pkg-config --exists opencv4 && pkg-config --exists libturbojpeg || { \
	    echo "ffcv is built against OpenCV 4 and TurboJPEG, and pkg-config does not find both."; \
	    echo "Debian, Ubuntu:  sudo apt-get install -y g++ pkg-config libturbojpeg0-dev libopencv-dev"; \
	    echo "conda:           conda install -c conda-forge cxx-compiler pkg-config libjpeg-turbo libopencv"; \
	    echo "Then run: make ffcv"; \
	    exit 1; }

clean:  ## remove build leftovers; runs, features and the environment stay
	rm -rf build dist strata.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -rf __pycache__
	find $(wildcard $(SOURCES)) -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamps: what is installed is installed again only when pyproject.toml has changed.

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo "Strata needs Python 3.11 to 3.13, and $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	    echo "Name another one: make PYTHON=python3.12 ..."; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-run: pyproject.toml | $(VENV)/.stamp-venv
	@echo "installing Strata and PyTorch into $(VENV): some gigabytes, a few minutes"
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml | $(VENV)/.stamp-venv
	@echo "installing Strata, PyTorch and the tools into $(VENV): some gigabytes, a few minutes"
	$(PIP) install --quiet --editable '.[dev]'
	@touch $(VENV)/.stamp-run $@

$(VENV)/.stamp-ffcv: pyproject.toml | $(VENV)/.stamp-run
	$(PIP) install --quiet --editable '.[ffcv]'
	@touch $(VENV)/.stamp-run $@
