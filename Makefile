# Three commands: `make demo` runs the whole pipeline on this machine, `make demo-chat` teaches a pretrained
# model to answer questions, `make test` checks everything.
# All first create .venv and install the versions of constraints.txt, if something has changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-chat test test-gpu test-sanitizers lint docker-test clean

demo: $(VENV)/installed-all
	$(BIN)/fst demo $(ARGS)

demo-chat: $(VENV)/installed-all,peft
	$(BIN)/fst demo --chat $(ARGS)

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m gpu -s tests/test_gpu.py $(ARGS)

# The tests of the C++ decoder, and ten minutes of its fuzz, with a decoder that stops at a wrong address or at
# undefined arithmetic; optimized, it takes minutes to compile. Integers may wrap, as library.py says. Python
# itself leaks on purpose.
SANITIZED = FST_CXXFLAGS="-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
test-sanitizers: $(VENV)/installed-dev
	$(SANITIZED) $(BIN)/python -m pytest -q tests/generation/runners $(ARGS)
	$(SANITIZED) $(BIN)/python -m tests.generation.runners.fuzz --minutes 10

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
