# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
# Tests run on two processes of one thread each: torch's own threads only fight for two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help demo demo-diffusion test test-fast test-slow test-versions test-oldest test-newest docs lint types format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/.recipes: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[recipes]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.recipes $(VENV)/.diffusion $(VENV)/.docs

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) -e '.[dev,bench]'
	touch $@

$(VENV)/.diffusion: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[diffusion]'
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[docs]'
	touch $@

demo: $(VENV)/.recipes  ## LoRA on SmolLM2, SGD-SaI beside AdamW; DATA=folder for the real E2E set, BASE=toy offline
	@$(BIN)/python -m recipes.e2e.demo $(if $(BASE),--base $(BASE)) $(if $(DATA),--data $(DATA))

demo-diffusion: $(VENV)/.diffusion  ## concept LoRA on a toy world, optimizers at three learning rates each; run it again to resume
	$(BIN)/python -m recipes.diffusion.demo

test: $(VENV)/.dev  ## the whole suite less the tests marked slow
	$(PYTEST) -n 2 --dist loadfile -m "not slow and not cuda" $(ARGS)

test-fast: $(VENV)/.dev  ## the optimizer's core, under a minute: what `import hf_sai` loads
	$(PYTEST) -n 2 --core -m "not slow and not cuda" tests $(ARGS)

test-slow: $(VENV)/.bench  ## the long tests
	$(PYTEST) -m slow $(ARGS)

# The optimizer's core and the Trainer with the oldest versions that pyproject.toml allows and with the newest.
PYTHON_oldest ?= python3.10
PYTHON_newest ?= python3.13
oldest := 'torch==2.8.*' 'transformers==4.57.*' 'accelerate==1.10.*' 'peft==0.18.*'
newest := torch transformers accelerate peft
TRAINER_TESTS := $(addprefix tests/test_,trainer.py register.py resume_trainer.py callbacks.py optim_args.py)

test-versions: test-oldest test-newest  ## core and Trainer tests with the oldest and the newest torch and transformers

test-oldest test-newest: test-%:
	test -x $(VENV)-$*/bin/python || $(PYTHON_$*) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --disable-pip-version-check -q -e . $($*) \
		numpy pytest pytest-timeout pytest-xdist hypothesis 'sgd-sai==1.0.3'
	OMP_NUM_THREADS=1 $(VENV)-$*/bin/python -m pytest -n 2 --core -m "not slow and not cuda" tests $(ARGS)
	OMP_NUM_THREADS=1 $(VENV)-$*/bin/python -m pytest -n 2 -m "not slow and not cuda" $(TRAINER_TESTS) $(ARGS)

# The variable silences a notice that mkdocs-material prints at each start; warnings of the build still fail it.
docs: $(VENV)/.docs  ## the site, into site/; a broken link or a public name without a docstring is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.dev  ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy strict on the package and the recipes
	$(BIN)/mypy

format: $(VENV)/.dev  ## rewrite in the house format
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest .pytest_cache .mypy_cache .ruff_cache .hypothesis
