# The two commands: `make demo` and `make test`. Both make .venv first if need be.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/python examples/run_demo.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/linters
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) demo_out

# uv where it is present, otherwise pip; torch in neither.
$(VENV)/installed: pyproject.toml
	@if command -v uv >/dev/null; then \
	  uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
	  uv pip install --quiet --python $(BIN)/python -e '.[examples,test]'; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[examples,test]'; \
	fi
	@touch $@

$(VENV)/linters: $(VENV)/installed
	@if command -v uv >/dev/null; then \
	  uv pip install --quiet --python $(BIN)/python -e '.[lint]'; \
	else \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lint]'; \
	fi
	@touch $@
