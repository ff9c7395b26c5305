# The two commands are `make demo` and `make test`. Each target installs what it needs
# into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The extras of the two commands.
EXTRAS := examples,test
# The interpreters that `make package-check` tries; `uv` finds or downloads them.
PYTHONS ?= 3.11 3.12 3.13

.PHONY: demo test lint docs package package-check clean

demo: $(VENV)/installed
	$(BIN)/python examples/run_demo.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	git ls-files | xargs $(BIN)/codespell
	@git grep -InwiEf .ci/phrases -- . ':!.ci/phrases'; test $$? -eq 1
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/docs
	$(BIN)/python -m sphinx -E -W --keep-going -j auto docs docs/_build/html

package: $(VENV)/package
	rm -rf dist
	$(BIN)/uv build --quiet
	ls dist

package-check: package
	.ci/package-check $(BIN)/uv $(PYTHONS)

clean:
	rm -rf $(VENV) demo_out dist docs/_build

# uv where it is present, otherwise pip; torch in neither.
define install
	@if command -v uv >/dev/null; then \
	  uv pip install --quiet --python $(BIN)/python -e '.[$(1)]'; \
	else \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(1)]'; \
	fi
	@touch $@
endef

$(VENV)/bin/python:
	@if command -v uv >/dev/null; then \
	  uv venv --quiet --seed --python $(PYTHON) $(VENV); \
	else \
	  $(PYTHON) -m venv $(VENV); \
	fi

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(call install,$(EXTRAS))

$(VENV)/lint $(VENV)/docs $(VENV)/package: $(VENV)/installed
	$(call install,$(@F))
