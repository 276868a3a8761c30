# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv first if need be.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PY := $(VENV)/bin/python
DEMO ?= build/demo
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# changes with what is to be installed; a half-made environment has none
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: demo test check format docs train-demo setup clean
.DEFAULT_GOAL := test

# pip keeps all it downloads until all is installed; torch's largest needs go first, one by one, so that 8 GB of disk do
ifeq ($(shell uname -sm),Linux x86_64)
LARGE := triton nvidia-cudnn-cu13 nvidia-cublas torch
endif

$(STAMP):
	$(PYTHON) -m venv $(VENV)
	@set -e; for package in $(LARGE); do $(PIP) $$package; done
	$(PIP) -e '.[dev]'
	@pwd > $(VENV)/.checkout
	@touch $@

# an environment kept outside the checkout may belong to another one: then only the package itself is installed anew
setup: $(STAMP)
	@test "$$(cat $(VENV)/.checkout)" = "$$(pwd)" || { $(PIP) --no-deps -e . && pwd > $(VENV)/.checkout; }

demo: setup
	$(VENV)/bin/qvsplit demo $(DEMO)

test: setup
	$(PY) -m pytest -n 2 --dist worksteal

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: setup
	$(PY) tools/make_docs.py --picture

# the checkpoint of qvsplit/demo/ from nothing; see tools/train_demo/README.md
train-demo: setup
	cd tools && $(abspath $(PY)) -m train_demo ../build/train-demo $(TRAIN)

clean:
	rm -rf $(DEMO) .mypy_cache .import_linter_cache .ruff_cache .pytest_cache
