# `make demo` and `make test` need Python 3.11 or newer and a package registry;
# each makes its own environment in $(VENV). `make test` takes minutes; what
# takes longer has pytest's marker "slow" and runs with `make test-all`.
PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= runs/demo
EQUIVALENCE = tests/scoring/test_scorer.py tests/scoring/test_paged.py \
  tests/scoring/test_many.py tests/scoring/test_flight.py \
  tests/models/test_ranker.py tests/models/test_packed.py \
  tests/nn/test_fusion.py tests/nn/test_interaction.py \
  tests/ops/history_attention/test_backends.py \
  tests/ops/history_attention/test_xla.py \
  tests/ops/candidate_tower/test_backends.py

.PHONY: demo serve test test-all test-oldest lint docs dist notebooks clean

demo: $(VENV)/.installed-experiments,cpu
	$(VENV)/bin/python experiments/train.py \
	  --config=experiments/configs/synthetic.py --workdir=$(DEMO_DIR)
	$(VENV)/bin/python experiments/benchmark.py \
	  --workdir=$(DEMO_DIR) --lengths=256 --candidates=512 \
	  --output=$(DEMO_DIR)/benchmark

# What `make demo` trained; first trains it if there is none, or to its end.
serve: $(VENV)/.installed-experiments,cpu,serving
	test -f $(DEMO_DIR)/metrics.json || $(VENV)/bin/python \
	  experiments/train.py --config=experiments/configs/synthetic.py \
	  --workdir=$(DEMO_DIR)
	$(VENV)/bin/python experiments/serve.py --workdir=$(DEMO_DIR) \
	  --cache_dir=$(DEMO_DIR)/programs

test: $(VENV)/.installed-test $(VENV)/.installed-libtpu
	$(VENV)/bin/python -m pytest

# All tests, with random examples. Those of equal scores as XLA optimizes for a
# user, but for the slow ones: these and all others compile as fast as can be.
RANDOM_TESTS = $(VENV)/bin/python -m pytest --hypothesis-profile=random
test-all: $(VENV)/.installed-test $(VENV)/.installed-libtpu
	$(RANDOM_TESTS) -m '' $(EQUIVALENCE:%=--ignore=%)
	HISTJAX_TEST_XLA=default $(RANDOM_TESTS) $(EQUIVALENCE)
	$(RANDOM_TESTS) -m slow $(EQUIVALENCE)

# Tests of what leans on other packages most, with the oldest versions of these
# that setup.cfg allows.
test-oldest: $(VENV)-oldest/.installed
	$(VENV)-oldest/bin/python -m pytest tests/data tests/features \
	  tests/serving tests/training

$(VENV)-oldest/.installed: setup.cfg
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet uv
	$(VENV)-oldest/bin/python -m uv pip install --quiet --compile-bytecode \
	  --python $(VENV)-oldest/bin/python --resolution lowest-direct -e '.[test]'
	touch $@

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site, in docs/_build/index.html.
docs: $(VENV)/.installed-docs
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m sphinx -q -W --keep-going \
	  -b html docs docs/_build

# Runs the notebooks and keeps their outputs.
notebooks: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(VENV)/bin/python colab/execute.py

# What would be uploaded, checked and installed into an empty environment of
# each Python that is there.
dist: $(VENV)/.installed-dist
	VENV=$(VENV) .ci/dist

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), \
	  "histjax needs Python 3.11 or newer; set PYTHON=..."'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -e '.[$*]'
	touch $@

# With libtpu, tests compile for TPUs that are not there. It lies where they
# alone look (tests/tpu.py): where Python can import it, every program on a
# machine without a TPU would look for one, which takes up to a minute.
$(VENV)/.installed-libtpu: | $(VENV)/bin/python
	$(VENV)/bin/python -m pip uninstall --quiet --yes libtpu
	[ "$$(uname -sm)" != 'Linux x86_64' ] || $(VENV)/bin/python -m pip \
	  install --quiet --no-deps --target $(VENV)/libtpu libtpu
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist docs/_build *.egg-info
