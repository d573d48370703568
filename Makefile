# `make` lists what there is. Everything runs in .venv, which the first call makes.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all docs bench clean
.DELETE_ON_ERROR:

# The first of these that runs, is 3.11 to 3.13 and can make environments. Your own: make PYTHON=/path/to/python test
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)
USABLE := import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

BIN := .venv/bin
READY := .venv/installed
RENDERER := smalldocs
STATISTICS := $(patsubst %,tests/test_%.py,likelihood networks posteriors flows priors bounds properties rows traced)
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile
export TF_CPP_MIN_LOG_LEVEL := 3

help:
	@echo "make demo    train the models on the embedded pancreas data; tables and figures in runs/demo"
	@echo "make test    what a change must pass: the chapters, the package, its commands; some 10 minutes"
	@echo "make test-all  the rest: outputs as kept, long processes, JAX, the oldest libraries, the site; some 20 minutes"
	@echo "make docs    build the documentation in _docs"
	@echo "make bench   measure speed beside scvi-tools and plain Keras, in an environment of its own; takes about 2 hours"
	@echo "make clean   remove what the other commands made, except runs/"

demo: $(READY)
	$(BIN)/vampsc report pancreas --max-epochs 30 --out runs/demo

test: $(READY)
	$(BIN)/python tools/check_notebooks.py
	$(BIN)/python tools/run_notebooks.py
	$(BIN)/python -m pytest tests -m "not slow" -rs $(SIDE_BY_SIDE)

# What `make test` leaves out. The chapters that it has executed are not executed again.
test-all: $(READY)
	$(BIN)/python tools/run_notebooks.py --strict
	$(BIN)/python -m pytest tests -m slow -rs $(SIDE_BY_SIDE)
	KERAS_BACKEND=jax $(BIN)/python -m pytest $(STATISTICS) -rs $(SIDE_BY_SIDE)
	$(MAKE) test-oldest
	$(BIN)/python tools/build_site.py

docs: $(READY)
	$(BIN)/python tools/build_site.py --with $(RENDERER)

# The packages compared with are no part of .venv.
.venv-benchmarks/installed: benchmarks/requirements.txt settings.ini | $(BIN)/python
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
	rm -rf .venv .venv-benchmarks _docs _proc build dist *.egg-info .pytest_cache .hypothesis nbs/nbdev.yml
	find nbs tests tools vampsc -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@found=; for python in $(CANDIDATES); do \
		if $$python -c '$(USABLE)' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "vampsc needs Python 3.11, 3.12 or 3.13 with venv and pip, and found none among: $(CANDIDATES)." \
			"Install one (on Debian or Ubuntu also python3-venv) or name it: make PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	$$found -m venv --clear .venv

# Again when the requirements change. An unfinished one leaves no stamp, so the next call goes on with it.
$(READY): settings.ini setup.py | $(BIN)/python
	@echo "Installing into .venv ($$($(BIN)/python --version)), about 2 minutes, once"
	@$(BIN)/python -m pip install -qq --no-input --disable-pip-version-check --editable '.[dev,jax,pipeline,r]'
	@touch $@
