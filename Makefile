# `make run` on a fresh machine does everything; `make help` lists the rest.
PYTHON ?= python3
VENV := $(CURDIR)/.venv
READY := $(VENV)/.ready
SITE := $(VENV)/.site

# mlflow runs the project by whatever `python` comes first on the path.
export PATH := $(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(VENV)
export MLFLOW_TRACKING_URI ?= sqlite:///$(CURDIR)/mlflow.db
# Without git, mlflow would say so three times, at length.
export GIT_PYTHON_REFRESH ?= quiet
PORT ?= 5000

.PHONY: help setup browser run ui test test-lowest test-gpu lint format typecheck audit fuzz test-project test-package docs bench anyinit claims model-claims screenshots lock clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z0-9.%-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## the virtual environment with the pinned packages, in .venv

# Compiled once here, because without it every start of torch and mlflow compiles them again
# where PYTHONDONTWRITEBYTECODE is set.
$(READY): requirements.lock requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "initflow needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	@echo "Installing the pinned packages into .venv, once; on Linux this is 6 GB, PyTorch with CUDA."
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check $$(grep '^uv==' requirements-dev.lock)
	uv pip install --quiet --compile-bytecode -r requirements.lock -r requirements-dev.lock
	uv pip install --quiet --no-deps --editable .
	@touch $@

# MLflow's page and the report are tested in a real browser; without one, those tests are skipped.
browser: ## Chromium, from Debian's packages where there is none
	@command -v chromium chromium-browser google-chrome > /dev/null || \
		{ apt-get update --quiet && apt-get install --yes --quiet --no-install-recommends chromium; }

run: $(READY) ## one network under He initialization, on scikit-learn's digits
	mlflow run . --env-manager local --experiment-name initflow -P init=he -P dataset=digits
	@echo "The run is in MLflow: make ui serves its page. For the next command: source .venv/bin/activate"

ui: $(READY) ## MLflow's page of the runs, on 127.0.0.1, opened at the last comparison
	initflow ui --port $(PORT)

# One thread each, because OpenMP's threads spin while they wait, and take each other's cores; in
# their own order, because the files with the fewest tests, which would come last, take longest.
# Compiled once, as is what setup installs.
ON_ALL_CORES := -n auto --dist loadfile --no-loadscope-reorder
test: $(READY) ## the whole test suite, on all cores
	python -m compileall -q initflow plugins tests/warm.py
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m pytest -m "not project" $(ON_ALL_CORES)

# The suite in an environment of its own, build/NAME: without a browser, a cluster, servers and the
# optional packages. PART is what is run of it. An interpreter that is not here is not downloaded.
# Packages that are newer than those that use them deprecate what these do, which no user sees.
LOWEST_PYTHON := 3.11
PART ?= tests/core tests/initializers tests/theory tests/models tests/training tests/diagnostics tests/reporting tests/tracking tests/experiments tests/cli plugins
FOR_TESTS := cmaes hypothesis platformdirs 'psycopg[binary]' pytest pytest-xdist
define test-in
	uv venv --quiet --clear --no-python-downloads --python $(2) build/$(1)
	uv pip install --quiet --compile-bytecode --python build/$(1)/bin/python --requirements $(3)
	uv pip install --quiet --python build/$(1)/bin/python --constraints $(3) $(FOR_TESTS)
	uv pip install --quiet --python build/$(1)/bin/python --no-deps --editable .
	PATH=$(CURDIR)/build/$(1)/bin:$(PATH) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE build/$(1)/bin/python -m pytest -m "not project and not end_to_end" $(ON_ALL_CORES) -W ignore::DeprecationWarning --ignore tests/tracking/test_callbacks.py --ignore tests/experiments/tuning/test_cluster.py $(PART)
endef

test-lowest: $(READY) ## the suite on the lowest versions that pyproject.toml allows; PART="tests/core …"
	mkdir -p build
	PYENV_VERSION=$(LOWEST_PYTHON) uv pip compile --quiet --no-python-downloads --resolution lowest-direct --python-version $(LOWEST_PYTHON) --output-file build/lowest.txt pyproject.toml
	$(call test-in,lowest,$(LOWEST_PYTHON),build/lowest.txt)

# pyenv has a python3.13 on the path also where it is not the chosen one, which then only fails.
test-3.%: $(READY) ## the suite on the pinned versions and another Python: make test-3.13
	@if PYENV_VERSION=3.$* uv python find --quiet --no-python-downloads 3.$* > /dev/null 2>&1; then \
		$(MAKE) --no-print-directory test-on PYTHON_FOUND="$$(PYENV_VERSION=3.$* uv python find --no-python-downloads 3.$*)" NAME=python3.$*; \
	else \
		echo "There is no Python 3.$* here: nothing was tested on it."; \
	fi

.PHONY: test-on
test-on:
	$(call test-in,$(NAME),$(PYTHON_FOUND),requirements.lock)

# All others leave a GPU alone, as their numbers are the CPU's.
test-gpu: $(READY) ## the tests that need a GPU
	python -m pytest -m gpu

lint: $(READY) ## the linter, and the order of the rooms
	ruff check .
	lint-imports --no-logo

format: $(READY) ## is everything formatted? (ruff format . does it)
	ruff format --check --diff .

typecheck: $(READY) ## the type checker
	mypy

# Strict, or it would pass where PyPI's records cannot be reached.
audit: $(READY) ## known vulnerabilities of the pinned packages, by PyPI's records
	uvx pip-audit --strict --no-deps --disable-pip --progress-spinner off -r requirements.lock -r requirements-dev.lock

# The targets are those of tests/targets.py; what is found is left in build/fuzz.
FUZZ_S ?= 60
TARGETS := spec setting toml metadata idx packed npz sampler journal bundle secret
fuzz: $(READY) ## hostile bytes made by what they cover, FUZZ_S seconds for each target
	mkdir -p build/fuzz
	for target in $(TARGETS); do python -m tests.fuzz $$target -max_total_time=$(FUZZ_S) -artifact_prefix=build/fuzz/ || exit 1; done

# From a clone in which nothing was installed: a leftover *.egg-info would hide what is missing there.
test-project: $(READY) ## every entry point in the environment that MLflow builds from conda.yaml
	python -m pytest -m project tests/test_in_environment.py

test-package: $(READY) ## what pip installs of the wheel and the sdist, in fresh environments
	python -m pytest -m project tests/test_installed.py

# What it takes is installed at its first use. Each notebook is run, and a warning is an error.
$(SITE): $(READY) requirements-docs.lock
	uv pip install --quiet --compile-bytecode -r requirements-docs.lock
	@touch $@

docs: $(SITE) ## the site, in build/docs, with the tutorials run anew
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m mkdocs build --quiet --config-file docs/site/mkdocs.yml
	@echo "The site is in build/docs: python -m http.server --bind 127.0.0.1 --directory build/docs"

bench: $(READY) ## speed against the usual way, both sides in one run
	python -m bench

# It is no dependency: what is held against it is installed apart.
anyinit: $(READY) ## whose prediction lies nearer to the mean over 50 draws, AnyInit's or ours
	uv pip install --quiet --no-deps --target build/anyinit anyinit==0.4.0
	PYTHONPATH=build/anyinit python -m bench.anyinit

claims: $(READY) ## the figures of docs/claims.md, but those of other models
	python docs/claims.py

model-claims: $(READY) ## those of other models, an hour's work
	python -m docs.model_claims

screenshots: $(READY) ## the pictures of MLflow's page and of the report in docs/, on MNIST
	INITFLOW_SCREENSHOTS=$(CURDIR)/docs/images OMP_NUM_THREADS=1 python -m pytest tests/test_browser.py

# The CUDA libraries are left out: torch pins its own, and its CPU build needs none of them.
CUDA := /^(cuda-|nvidia-|triton=)/d
COMPILE := uv pip compile --quiet --universal --upgrade --python-version 3.11 --no-header --no-annotate
lock: $(READY) ## pin the newest packages that pyproject.toml allows
	$(COMPILE) pyproject.toml --output-file requirements.lock
	sed -i -E '$(CUDA)' requirements.lock
	$(COMPILE) --group dev --constraint requirements.lock --output-file requirements-dev.lock
	sed -i -E '$(CUDA)' requirements-dev.lock
	$(COMPILE) --group docs --constraint requirements.lock --constraint requirements-dev.lock --output-file requirements-docs.lock

clean: ## remove the environment and the tools' caches, keep the runs
	rm -rf $(VENV) .mlflow-envs .pytest_cache .hypothesis .import_linter_cache .mypy_cache .ruff_cache build *.egg-info
