# `make demo` and `make test` need Python 3.11 or newer and a package registry;
# each makes its own environment in $(VENV).
PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= runs/demo

.PHONY: demo test lint clean

demo: $(VENV)/.installed-experiments,cpu
	$(VENV)/bin/python experiments/train.py \
	  --config=experiments/configs/synthetic.py --workdir=$(DEMO_DIR)
	$(VENV)/bin/python experiments/benchmark.py \
	  --workdir=$(DEMO_DIR) --lengths=256 --candidates=512 \
	  --output=$(DEMO_DIR)/benchmark

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), \
	  "histjax needs Python 3.11 or newer; set PYTHON=..."'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
