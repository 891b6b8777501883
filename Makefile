# `make demo` and `make test` need nothing but Python 3.11 or newer and a network that reaches a package index.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= runs/minilm
BENCHMARKS ?= startup scoring surgery memory export_overhead int8 speedup prediction verdict selection

.PHONY: demo test test-all bench lint types schema families lock clean

demo: $(VENV)/.installed
	$(BIN)/slimheads run pipelines/minilm.yaml --out $(OUT)

# One model type per layout, and of exported graphs one per way of writing them; one seed, no slow test.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

# Every covered model type, every seed and the slow tests.
test-all: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal --whole

# What docs/performance.md shows: what slimheads itself costs, and what its verdicts, predictions and speedups are worth.
# Half an hour on a machine that does nothing else, 16 GB of memory and 6 GB of disk. BENCHMARKS= names some of them.
bench: $(VENV)/.installed
	@for benchmark in $(BENCHMARKS); do \
	  echo "== benchmarks/$$benchmark.py"; $(BIN)/python benchmarks/$$benchmark.py || failed="$$failed $$benchmark"; \
	done; test -z "$$failed" || { echo "not reached:$$failed"; exit 1; }

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

types: $(VENV)/.installed
	$(BIN)/mypy

# Everything pinned, then this package itself, editable. The stamp makes a second call cheap.
$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "slimheads needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# The JSON Schema that the recipes name for editors.
schema: $(VENV)/.installed
	$(BIN)/slimheads schema > slimheads.schema.json

# What the tests prove of each model type, and the page made from it.
families: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m evidence --evidence=slimheads/families/evidence.json
	$(BIN)/slimheads families --markdown > docs/families.md

# Pin anew what pyproject.toml allows. torch stays fixed: looser, pip fetches gigabytes of CUDA on Linux.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet torch==2.13.0
	.venv-lock/bin/python -m pip install --quiet -e '.[dev]' 'setuptools>=77'
	( sed -n '/^#/p' requirements.lock; \
	  .venv-lock/bin/python -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu$$//' ) > requirements.new
	mv requirements.new requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
