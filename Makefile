# Needs python3 (3.11 or newer), git and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The quick tests run in one process more than there are cores: half of what they take is waiting.
PROCESSES := $(shell $(PYTHON) -c 'import os; print(1 + max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2))')
SIDE_BY_SIDE := -n $(PROCESSES) --dist worksteal

# Older Airflows that are supported, each with an environment and a constraints file of its own.
OLDER := 3.1 3.2
OLDER_RUNS := $(OLDER:%=airflow-%)
OLDER_PACKAGES := apache-airflow-providers-openlineage pandas pytest pytest-asyncio

# The Pythons that the core is for, newest first, each with an environment of its own; .ci/find-python finds them.
PYTHONS := 3.14 3.13 3.12 3.11
PYTHON_RUNS := $(PYTHONS:%=python-%)
PYTHON_PACKAGES := jsonschema openai pandas pytest pytest-asyncio
# tests/test_options.py holds all three packages to one table, and so needs Airflow and Dagster.
FASTEST_TESTS := $(filter-out tests/test_options.py,$(wildcard tests/test_*.py)) tests/local
CORE_TESTS := $(FASTEST_TESTS) tests/conformance tests/exactly_once tests/fakes tests/golden

# The newest Dagster that there is, with whatever it needs, in an environment of its own.
DAGSTER_PACKAGES := dagster-dg-cli dagster-postgres dagster-webserver openai pandas psutil pytest pytest-asyncio

# What .ci/run leaves out.
NIGHTLY := airflow-versions pythons dagster-newest long-kills bench
LONG_KILLS := 300

.DEFAULT_GOAL := help
.PHONY: help demo demo-dagster test check options bench bench-airflow deployment wheel clean nightly
.PHONY: airflow-versions $(OLDER_RUNS) pythons other-python $(PYTHON_RUNS) dagster-newest long-kills

help:
	@echo "make demo          the main job on a real Airflow (throw-away, SQLite) and the embedded provider"
	@echo "make demo-dagster  the same job on a real Dagster with its daemon"
	@echo "make test          the quick tests, $(PROCESSES) side by side"
	@echo "make check         ruff, mypy --strict, pyright"
	@echo "make options       write docs/options.md from the table of options in the core"
	@echo "make wheel         build the wheel and test it in an environment of its own"
	@echo "make deployment    the slower suites: real Airflow and Dagster deployments"
	@echo "make airflow-versions  the Airflow tests on the older Airflows that are supported: $(OLDER)"
	@echo "make pythons       the core's quick tests on each of these Pythons that is installed: $(PYTHONS)"
	@echo "make other-python  the fastest of them on the newest other Python than that of $(VENV)"
	@echo "make dagster-newest  the quick Dagster tests on the newest Dagster release"
	@echo "make long-kills    $(LONG_KILLS) attempts killed at random points, where .ci/run has 80"
	@echo "make nightly       what .ci/run leaves out: $(NIGHTLY)"
	@echo "make bench         the benchmarks"
	@echo "make bench-airflow 500 waiting batches in one triggerer, next to Airflow's common-ai provider (20 minutes)"
	@echo "make clean         remove the environments and caches"

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
	$(BIN)/python -m pytest -m "not deployment" --durations=5 $(SIDE_BY_SIDE)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy tests/typing
	$(BIN)/pyright

options: $(READY)
	$(BIN)/python docs/make_options.py

wheel: $(READY)
	$(BIN)/python -m pytest tests/packaging -m "deployment or not deployment"

deployment: $(READY)
	$(BIN)/python -m pytest -m deployment --durations=10

airflow-versions: $(OLDER_RUNS)

$(OLDER_RUNS): airflow-%: .venv-airflow-%/.ready
	@echo "==> Airflow $*: the quick tests"
	@$(<D)/bin/python -m pytest tests/airflow --ignore tests/airflow/cluster -m "not deployment" -q -rs
	@echo "==> Airflow $*: a real deployment"
	@$(<D)/bin/python -m pytest tests/airflow/test_older.py tests/airflow/test_watching.py -m deployment -q

.venv-airflow-%/.ready: constraints-airflow-%.txt pyproject.toml | $(READY)
	@echo "==> setting up $(@D) (about a minute the first time)"
	@test -x $(@D)/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python $(@D)
	@$(BIN)/uv pip install --quiet --system-certs --compile-bytecode --python $(@D)/bin/python -c $< -e '.[airflow,local]' "apache-airflow~=$*.0" $(OLDER_PACKAGES)
	@touch $@
	@echo "==> $(@D) is ready"

pythons:
	@$(MAKE) --no-print-directory --keep-going $(PYTHON_RUNS)

$(PYTHON_RUNS): python-%: | $(READY)
	@if .ci/find-python $* >/dev/null; then $(MAKE) --no-print-directory .venv-py$*/.ready; \
	else echo "==> Python $*: not found, skipped"; fi
	@! .ci/find-python $* >/dev/null || echo "==> Python $*: the core's quick tests, without Airflow and Dagster"
	@! .ci/find-python $* >/dev/null || .venv-py$*/bin/python -m pytest $(CORE_TESTS) -m "not deployment" -q -rs

.venv-py%/.ready: constraints.txt pyproject.toml | $(READY)
	@echo "==> setting up $(@D) (half a minute the first time)"
	@test -x $(@D)/bin/python || $(BIN)/uv venv --quiet --clear --python "$$(.ci/find-python $*)" $(@D)
	@$(BIN)/uv pip install --quiet --system-certs --compile-bytecode --python $(@D)/bin/python -c $< -e '.[local]' $(PYTHON_PACKAGES)
	@touch $@
	@echo "==> $(@D) is ready"

other-python: $(READY)
	@own=$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	for one in $(PYTHONS); do \
		if [ $$one != $$own ] && .ci/find-python $$one >/dev/null; then \
			exec $(MAKE) --no-print-directory python-$$one CORE_TESTS="$(FASTEST_TESTS)"; \
		fi; \
	done; echo "==> no other Python than $$own found"

dagster-newest: | $(READY)
	@echo "==> setting up .venv-$@"
	@test -x .venv-$@/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python .venv-$@
	@$(BIN)/uv pip install --quiet --system-certs --compile-bytecode --upgrade --python .venv-$@/bin/python -e '.[dagster,local]' $(DAGSTER_PACKAGES)
	@echo "==> $$(.venv-$@/bin/dagster --version): the quick tests"
	@.venv-$@/bin/python -m pytest tests/dagster --ignore tests/dagster/cluster -m "not deployment" -q -rs

long-kills: $(READY)
	@ANYBATCH_STORM_KILLS=$(LONG_KILLS) $(BIN)/python -m pytest tests/exactly_once/test_storm.py -m deployment -q -s

nightly:
	@passed=; failed=; for one in $(NIGHTLY); do \
		if $(MAKE) --no-print-directory --keep-going $$one; then passed="$$passed $$one"; else failed="$$failed $$one"; fi; \
	done; \
	echo "==> nightly of $$(git rev-parse --short HEAD) on $$(date -u +%F): passed:$${passed:- nothing}; failed:$${failed:- nothing}"; \
	test -z "$$failed"

bench: $(READY)
	@$(BIN)/python -m benchmarks

bench-airflow: $(READY)
	@test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@$(BIN)/uv pip install --quiet --system-certs --compile-bytecode --python .venv-bench/bin/python \
		-c constraints.txt -e ".[airflow,local]" apache-airflow-providers-common-ai openai psutil
	@.venv-bench/bin/python -m benchmarks.airflow_waiting
	@.venv-bench/bin/python -m benchmarks.airflow_expand

clean:
	rm -rf $(VENV) .venv-* .mypy_cache .ruff_cache .pytest_cache dist
