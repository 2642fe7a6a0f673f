# The commands of this project. `make run` and `make test` need only Python (3.11 or later), pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

.PHONY: setup run test crash bench lint docs images lock client
.DEFAULT_GOAL := run

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the locked dependencies into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

run: setup
	@$(BIN)/orchestrator dev $(ARGS)

test: setup
	@$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

# The long versions of what `make test` tries for seconds: hundreds of kills, and of lives with faults in them.
crash: setup
	@ORCH_TEST_KILLS=$${ORCH_TEST_KILLS:-300} ORCH_TEST_EXAMPLES=$${ORCH_TEST_EXAMPLES:-200} ORCH_TEST_RANDOM=1 \
		ORCH_TEST_TURN_S=60 ORCH_TEST_IDLE_S=5 $(BIN)/python -m pytest -s $(ARGS) \
		tests/integration/test_crash.py tests/integration/test_state_machine.py tests/integration/test_takeover.py \
		tests/integration/test_sleep_races.py

bench: setup
	@$(BIN)/python -m bench $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python scripts/reference_docs.py --check

# The references that are made from the code: docs/configuration.md and docs/api.md.
docs: setup
	@$(BIN)/python scripts/reference_docs.py

# Needs a Docker Engine; works where no image registry answers.
images:
	@deploy/images.sh $(ARGS)

# The blocking client is written from the one on asyncio.
client: setup
	@$(BIN)/python scripts/client_twins.py

# Needs `uv`: resolves for every supported platform and Python.
lock:
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-header -o requirements.lock
