# SPDX-License-Identifier: Apache-2.0
# make demo and make test do their own set-up; make setup does nothing when it is current.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin/python
CURRENT := $(VENV)/.requirements-installed

.PHONY: setup demo test test-slow lint

setup: $(CURRENT)

$(CURRENT): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'make: Python 3.10 or newer is needed; name one, such as: make PYTHON=python3.12 $(MAKECMDGOALS)'; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo 'make: this Python lacks venv; install it (Debian, Ubuntu: apt install python3-venv) or use environment.yml'; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@echo 'Installing requirements.txt into $(VENV)'
	@$(BIN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: setup
	$(BIN) examples/demo.py

# One process a core, each with one thread: the networks of the tests are too small to share.
test: setup
	OMP_NUM_THREADS=1 $(BIN) -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal

test-slow: setup
	$(BIN) -m pytest -m slow

lint: setup
	$(BIN) -m ruff check .
