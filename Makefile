# Each target sets up what it needs, on a fresh machine too: a virtual environment in .venv, then the work.
# PYTHON=python3.12 make test    uses another interpreter (3.10 or newer).

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
TYPES := $(VENV)/types
OUTPUT ?= demo

.PHONY: help demo test lint types docs format release-check clean

help:
	@echo "make demo    what dilations do for a detector, on drawn images: minutes on two CPU cores (OUTPUT=$(OUTPUT))"
	@echo "make test    run the tests"
	@echo "make lint    check style and formatting"
	@echo "make types   check type hints"
	@echo "make docs    build the API reference into site/"
	@echo "make format  format the code"
	@echo "make release-check  build what a release uploads and try it in a fresh environment (FLAGS=--borrow: no download)"
	@echo "make clean   remove the virtual environment"

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $(READY)

demo: $(READY)
	$(VENV)/bin/nats demo --output $(OUTPUT)

test: $(READY)
	$(VENV)/bin/python -m pytest --numprocesses 2

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# mypy follows no import hook, by which an editable install maps two folders into the package: links lay it out as the
# wheel has it.
types: $(READY)
	rm -rf $(TYPES)
	mkdir -p $(TYPES)/nats_zoo
	ln -s $(CURDIR)/nats_zoo/* $(CURDIR)/detection $(CURDIR)/search $(TYPES)/nats_zoo
	cd $(TYPES) && $(CURDIR)/$(VENV)/bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir ../.mypy_cache

docs: $(READY)
	$(VENV)/bin/python scripts/api_reference.py site

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

release-check: $(READY)
	$(VENV)/bin/python scripts/release_check.py $(FLAGS)

clean:
	rm -rf $(VENV)
