# Two commands: `make demo` runs the whole pipeline on this machine, `make test` checks everything.
# Both first create .venv and install the versions of constraints.txt, if something has changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-gpu lint docker-test clean

demo: $(VENV)/installed-all
	$(BIN)/fst demo $(ARGS)

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m gpu -s tests/test_gpu.py $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# With docker or podman, whichever runs here; FST_DOCKER_BUILD_ARGS are more words for its build.
docker-test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m docker -v -s tests/test_docker_images.py $(ARGS)

# The installation also builds the C++ decoder.
$(VENV)/installed-%: pyproject.toml constraints.txt setup.py $(wildcard full_stack_transformer/generation/runners/native/*.[ch]*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
