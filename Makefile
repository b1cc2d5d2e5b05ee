# Two commands: `make demo` trains on real data, `make test` runs the fast tests.
# Each makes the environment that it needs. Others: test-slow, lint, types, docs, lock.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
RUNS ?= runs/demo

.PHONY: demo test test-slow lint types docs lock

$(VENV)/.made: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: $(VENV)/.made
	rm -rf $(RUNS)
	$(RUN) -m supcon_jax.train --config configs/digits.py --workdir $(RUNS)/digits-supcon
	$(RUN) -m supcon_jax.train --config configs/digits.py:cross_entropy \
	  --workdir $(RUNS)/digits-cross_entropy
	$(RUN) -m supcon_jax.train --config configs/digits.py:cross_entropy \
	  --config.cross_entropy.epochs=90 --config.cross_entropy.warmup_epochs=9 \
	  --workdir $(RUNS)/digits-cross_entropy-equal_epochs
	$(RUN) -m supcon_jax.report $(RUNS)/digits-supcon $(RUNS)/digits-cross_entropy \
	  $(RUNS)/digits-cross_entropy-equal_epochs --out $(RUNS)

test: $(VENV)/.made
	$(RUN) -m pytest -q -n 2 --dist loadfile -m "not slow" --durations=10

test-slow: $(VENV)/.made
	$(RUN) -m pytest -q -n 2 -m slow --durations=10

lint: $(VENV)/.made
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.made
	$(RUN) -m mypy

# The site, in site/; a warning is an error.
docs: $(VENV)/.made
	$(RUN) -m mkdocs build --strict

# The newest versions that fit, for every supported Python, in one file.
lock:
	uv pip compile --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	  --no-emit-find-links --extra train --extra dev --extra docs pyproject.toml --output-file requirements.lock
