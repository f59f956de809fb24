# Needs python3 (3.11 or newer), git and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo demo-dagster test check bench deployment wheel clean

help:
	@echo "make demo          the main job on a real Airflow (throw-away, SQLite) and the embedded provider"
	@echo "make demo-dagster  the same under the Dagster daemon"
	@echo "make test          the test suite"
	@echo "make check         ruff, mypy --strict, pyright"
	@echo "make wheel         build the wheel and test it in an environment of its own"
	@echo "make deployment    the slower suites: real Airflow and Dagster deployments"
	@echo "make bench         the benchmarks"
	@echo "make clean         remove .venv and caches"

$(READY): pyproject.toml constraints.txt
	@echo "==> setting up $(VENV) (about a minute the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "anybatch needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@$(BIN)/uv pip install --quiet --system-certs --compile-bytecode --python $(BIN)/python -c constraints.txt --group dev -e .
	@touch $@
	@echo "==> $(VENV) is ready"

demo: $(READY)
	@$(BIN)/python examples/demo_airflow.py

demo-dagster: $(READY)
	@$(BIN)/python examples/demo_dagster.py

test: $(READY)
	$(BIN)/python -m pytest -m "not deployment" --durations=5

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright

wheel: $(READY)
	$(BIN)/python -m pytest tests/packaging -m "deployment or not deployment"

deployment: $(READY)
	$(BIN)/python -m pytest -m deployment --durations=10

bench: $(READY)
	@$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache dist
