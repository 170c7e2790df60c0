# Two commands do everything: `make run` and `make test`. Both set up .venv first, from requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: run test test-ray test-rest test-fast fast-half fast-rest test-all lint lock clean

# The stamp is renewed when the lock or the package's metadata change.
$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ddoq_ray needs Python 3.11 or newer; this is " + sys.version.split()[0] + " (make PYTHON=python3.11 ...)")'
	@echo "Setting up $(VENV) (about two minutes and 9 GB, once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

run: $(VENV)/.installed  ## distil the digits and measure the result; ARGS="ipc=1 quantizer=gram" changes it
	$(BIN)/ddoq-ray $(ARGS)

# Beside each other: what shares one Ray, and the rest, with the processes that tests start for themselves.
test: $(VENV)/.installed  ## the default suite: 13 minutes on two cores, or less
	@$(MAKE) --no-print-directory -k -j2 test-ray test-rest
test-ray: $(VENV)/.installed
	$(BIN)/python -m pytest -m 'ray and not slow and not assets'
test-rest: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not ray and not slow and not assets'

# Two halves of about the same time, a core each.
FAST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not processes and not slow and not assets'
HALF := tests/config tests/storage tests/data tests/execution tests/commands
test-fast: $(VENV)/.installed  ## what starts neither Ray nor a Python process
	@$(MAKE) --no-print-directory -j2 fast-half fast-rest
fast-half:
	@$(FAST) $(HALF)
fast-rest:
	@$(FAST) $(HALF:%=--ignore=%)

test-all: $(VENV)/.installed  ## also the tests marked slow and assets
	$(BIN)/python -m pytest -m ''

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ddoq_ray benchmarks studies

lock: $(VENV)/.installed  ## write what is installed now to requirements.lock
	$(BIN)/python -m pip freeze --exclude-editable --disable-pip-version-check \
	  | sed -E "s/^((nvidia|cuda)-[^ ]+|triton==[^ ]+|faiss-gpu==[^ ]+)$$/\1 ; platform_system == 'Linux'/; s/^faiss-gpu==([^ ]+)(.*)/&\nfaiss-cpu==\1 ; platform_system != 'Linux'/" \
	  | { echo "# Every version that \`make run\` and \`make test\` install (Python 3.11). Made by \`make lock\`; no index addresses in it."; cat; } > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
