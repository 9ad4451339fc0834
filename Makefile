# Two commands: `make demo` runs the whole pipeline on this machine, `make test` checks everything.
# Both first create .venv and install the versions of constraints.txt, if something has changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed-all
	$(BIN)/fst demo $(ARGS)

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The installation also builds the C++ decoder.
$(VENV)/installed-%: pyproject.toml constraints.txt setup.py $(wildcard full_stack_transformer/generation/runners/native/*.[ch]*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
