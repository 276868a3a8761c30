# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv first if need be.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PY := $(VENV)/bin/python
DEMO ?= build/demo
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: demo test check format clean
.DEFAULT_GOAL := test

$(STAMP):
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(PY) tools/make_demo.py $(DEMO)
	$(VENV)/bin/qvsplit extract $(DEMO)/photos --model $(DEMO)/checkpoint --out $(DEMO)/embeds
	$(VENV)/bin/qvsplit ask --embeds $(DEMO)/embeds "What is in the picture?" "Is it day or night?"

test: $(STAMP)
	$(PY) -m pytest

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
