# Each target does all its own set-up in .venv. Without make: README.md has the same in plain pip.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo life test clean

demo: .venv/installed
	$(BIN)/python scripts/pretrain.py --run runs/demo
	$(BIN)/python scripts/sample.py --checkpoint runs/demo --prompt "def " --prompt "class " --max_new_tokens 96
	@echo "To talk to it and to look inside: $(BIN)/python scripts/serve.py --checkpoint runs/demo"

life: .venv/installed
	$(BIN)/python scripts/life.py

test: .venv/installed-test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

clean:
	rm -rf .venv runs/demo runs/life

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet -e ".[serve]"
	touch $@

.venv/installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@
