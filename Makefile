# One vocabulary of verbs, for people and for CI. `make run` and `make test` need Python 3.11 and git, nothing else.
PYTHON ?= python3.11
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup run up test test-slow test-services test-peers screenshots timeline lint fix bench docs lock

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

run: setup
	$(BIN)/slateloop run

up: setup
	$(BIN)/slateloop up

# Two processes, each with whole files, whose tests share servers (tests/conftest.py groups them); what takes longest,
# tests/end_to_end, comes early as it stands.
test: setup lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(BIN)/pytest -m slow

test-services: setup
	$(BIN)/pytest -m services

# Pictures for the documentation, taken by the browser tests.
screenshots: setup
	$(BIN)/pytest -m services tests/end_to_end/test_user_interface.py --screenshots docs/screenshots

# The recording in docs/timeline.md: half an hour of a platform that is left to itself.
timeline: setup
	$(BIN)/pytest -m slow tests/end_to_end/test_operated_loop.py -k sqlite --timeline docs/timeline.md

# The peers are installed beside the rest: their own pins reach none of ours.
test-peers: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,peers]"
	$(BIN)/pytest tests/evaluation/test_peers.py tests/agents/test_peer_agents.py

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports
	$(BIN)/mypy

fix: setup
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: setup
	for name in $$($(BIN)/python -c "from flows.benchmarks import names; print(*names())"); do $(BIN)/slateloop benchmark $$name || exit; done

docs: setup
	$(BIN)/slateloop schema > docs/configuration.schema.json

# Recompile the lock after a change of pyproject.toml. Local version labels (+cpu) exist in no registry and are cut off.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --editable ".[dev]"
	.venv-lock/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' | grep '==' > constraints.txt
	rm -rf .venv-lock
