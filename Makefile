# `make demo`, `make test` and `make lint` each work alone: they need Python 3.11 or newer, make and pip.
# `make sanitize` runs the native code under g++'s sanitizers.
#
#   PYTHON=...       the interpreter the environment is made with
#   VENV=...         where the environment lives
#   WORKERS=...      how many processes run the tests
#   TORCH_FLAGS=...  pip flags for torch alone, for example an index of CPU-only builds (see README.md)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
WORKERS ?= 2
TORCH_FLAGS ?=

BIN := $(VENV)/bin
# The environment needs no pip of its own: the one beside PYTHON installs into it.
PIP := $(PYTHON) -m pip --python $(BIN)/python
STAMP := $(VENV)/.pagedllm-installed
TEST_STAMP := $(VENV)/.pagedllm-test-installed
PROJECTS := pyproject.toml integrations/langchain/pyproject.toml integrations/llama_index/pyproject.toml
CLINIC := examples/clinic_assistant/requirements.txt
SOURCES := pagedllm_core integrations/langchain/langchain_pagedllm integrations/llama_index/llama_index

.PHONY: demo test lint format sanitize install clean

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python examples/quickstart.py

test: $(TEST_STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(TEST_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(SOURCES)

format: $(TEST_STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

sanitize: $(TEST_STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.kernels.sanitize

install: $(TEST_STAMP)

# What the demo needs.
$(STAMP): $(PROJECTS) constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	$(PIP) install -c constraints.txt $(TORCH_FLAGS) torch
	$(PIP) install -c constraints.txt -e . -e integrations/langchain -e integrations/llama_index
	touch $@

# What the tests need besides: the clinic assistant is tested, too.
$(TEST_STAMP): $(STAMP) $(CLINIC)
	$(PIP) install -c constraints.txt -e ".[test,lint]" -r $(CLINIC)
	touch $@

clean:
	rm -rf $(VENV)
