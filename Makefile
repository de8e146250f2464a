# One command each: a virtual environment with the tested versions, and what to do in it.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# A file's tests stay together, in their order: many wait for Ray, few keep two cores busy.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup run test test-all lint docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[samples,test]'
	touch $@

run: setup
	$(BIN)/python -m dmx.tune --attention butterfly --task text

test: setup
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: setup
	$(BIN)/python -m pytest $(PARALLEL)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

clean:
	rm -rf $(VENV) build dist site *.egg-info
