# `make` lists what there is. Everything runs in .venv, which the first call makes.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-oldest slips docs bench clean
.DELETE_ON_ERROR:

# The newest of these that runs and can make environments. Your own: make PYTHON=/path/to/python test
# Pythons of pyenv are also looked for where it keeps them: its commands on the PATH run only the versions that were chosen.
PYTHON ?=
VERSIONS := 3.13 3.12 3.11
PYENV := $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions
places = python$(1) $(wildcard $(PYENV)/$(1)*/bin/python$(1))
CANDIDATES := $(or $(PYTHON),$(foreach version,$(VERSIONS),$(call places,$(version))) python3)
USABLE := (3, 11) <= sys.version_info[:2] <= (3, 13)
OLDEST := sys.version_info[:2] == (3, 11)
# The first of some Pythons ($1) of which something ($2) is true, in the shell.
first = for python in $(1); do \
		if $$python -c 'import sys, ensurepip; sys.exit(not $(2))' >/dev/null 2>&1; then echo $$python; break; fi; \
	done

BIN := .venv/bin
READY := .venv/installed
RENDERER := smalldocs
STATISTICS := $(foreach name,likelihood networks posteriors flows priors bounds rows traced precision steps,$(wildcard tests/*/test_$(name).py))
# What `make test` takes of the tests: all but these marks of pytest.ini.
QUICK := not slow and not study and not other_model and not long
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# JAX compiles each function for seconds, and these tests call it a few times.
COMPILED_QUICKLY := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true
export TF_CPP_MIN_LOG_LEVEL := 3

help:
	@echo "make demo    train the models on the embedded pancreas data; tables and figures in runs/demo"
	@echo "make test    what a change must pass: the chapters, the package, its commands; some 12 minutes"
	@echo "make test-all  the rest: outputs as kept, long processes, JAX, the oldest libraries, the site; most of an hour"
	@echo "make slips   put slips into the formulas, one at a time, and see that the tests catch each; some 5 minutes"
	@echo "make docs    build the documentation in _docs"
	@echo "make bench   measure speed beside scvi-tools and plain Keras, in an environment of its own; takes about 2 hours"
	@echo "make clean   remove what the other commands made, except runs/"

demo: $(READY)
	$(BIN)/vampsc report pancreas --max-epochs 30 --out runs/demo

test: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet || (echo 'not formatted: $(BIN)/ruff format, then $(BIN)/nbdev_export' >&2; exit 1)
	$(BIN)/python tools/check_notebooks.py
	$(BIN)/python tools/run_notebooks.py
	$(BIN)/python -m pytest tests -m "$(QUICK)" -rs $(SIDE_BY_SIDE)

# What `make test` leaves out. The chapters that it has executed are not executed again. Slow tests often wait for processes that they
# have started, so that there is room for a third one.
test-all: $(READY)
	$(BIN)/python tools/run_notebooks.py --strict
	$(BIN)/python -m pytest tests -m "not ($(QUICK))" -rs $(SIDE_BY_SIDE) -n 3
	KERAS_BACKEND=jax XLA_FLAGS="$(COMPILED_QUICKLY)" $(BIN)/python -m pytest $(STATISTICS) -m "not slow" -rs $(SIDE_BY_SIDE)
	$(MAKE) test-oldest
	$(BIN)/python tools/build_site.py

# The oldest versions that settings.ini names, on the oldest Python.
OLDEST_CANDIDATES := $(PYTHON) $(call places,3.11) python3
OLDEST_TESTS ?= tests -m "not slow" --libraries
test-oldest:
	@found=$$($(call first,$(OLDEST_CANDIDATES),$(OLDEST))); \
	if [ -z "$$found" ]; then \
		echo "Skipped: the oldest versions are tested on Python 3.11, and none was found among: $(OLDEST_CANDIDATES)"; \
	else \
		$(MAKE) --no-print-directory .venv-oldest/installed OLDEST_PYTHON=$$found && \
		.venv-oldest/bin/python -m pytest $(OLDEST_TESTS) -rs $(SIDE_BY_SIDE); \
	fi

# Some forty slips in the formulas, one at a time: each must be caught by the tests.
slips: $(READY)
	$(BIN)/python tools/slips.py

docs: $(READY)
	$(BIN)/python tools/build_site.py --with $(RENDERER)

# The packages compared with are no part of .venv.
.venv-benchmarks/installed: benchmarks/requirements.txt settings.ini | $(BIN)/python
	@$(BIN)/python -c 'import sys; sys.version_info < (3, 12) and sys.exit("scvi-tools 1.5 needs Python 3.12 or newer, and .venv has " \
		+ sys.version.split()[0] + ": make clean, then make bench with such a Python")'
	$(BIN)/python -m venv --clear .venv-benchmarks
	.venv-benchmarks/bin/python -m pip install -qq --no-input -r benchmarks/requirements.txt --editable .
	@touch $@

bench: .venv-benchmarks/installed
	.venv-benchmarks/bin/python benchmarks/speed.py
	.venv-benchmarks/bin/python benchmarks/silhouette.py
	.venv-benchmarks/bin/python benchmarks/scale.py
	.venv-benchmarks/bin/python benchmarks/pseudo_inputs.py
	.venv-benchmarks/bin/python benchmarks/time_to_quality.py --seeds 0

clean:
	rm -rf .venv .venv-oldest .venv-benchmarks _docs _proc build dist *.egg-info .pytest_cache .hypothesis nbs/nbdev.yml
	find nbs tests tools vampsc -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@found=$$($(call first,$(CANDIDATES),$(USABLE))); \
	if [ -z "$$found" ]; then \
		echo "vampsc needs Python 3.11, 3.12 or 3.13 with venv and pip, and found none among: $(CANDIDATES)." \
			"(TensorFlow has no release for 3.14 yet.)" \
			"Install one (on Debian or Ubuntu also python3-venv) or name it: make PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	$$found -m venv --clear .venv

# Again when the requirements change. An unfinished one leaves no stamp, so the next call goes on with it.
$(READY): settings.ini setup.py | $(BIN)/python
	@echo "Installing into .venv ($$($(BIN)/python --version)), about 2 minutes, once"
	@$(BIN)/python -m pip install -qq --no-input --disable-pip-version-check --editable '.[dev,jax,pipeline,r]'
	@touch $@

.venv-oldest/installed: settings.ini setup.py tools/oldest.txt
	@test -x .venv-oldest/bin/python || $(OLDEST_PYTHON) -m venv --clear .venv-oldest
	@echo "Installing the oldest versions into .venv-oldest ($$(.venv-oldest/bin/python --version)), about 2 minutes, once"
	@.venv-oldest/bin/python -m pip install -qq --no-input --disable-pip-version-check --no-compile --constraint tools/oldest.txt \
		--editable '.[dev,jax,pipeline,r]'
	@touch $@
