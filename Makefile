# Each target works on a fresh machine by itself: the first use makes .venv and installs everything with pinned versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check docs gpu mutants torture evidence results clean

demo: $(READY)  ## train gpt-mini with three methods under three seeds, compare them: table, curves, a sample, the sentence
	$(BIN)/python examples/demo.py

test: $(READY)  ## everything: lint, types and the whole suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

check: $(READY)  ## the fast tier, under two minutes: lint, types, arrows, laws
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not slow" tests/test_arrows.py tests/laws

docs: $(READY)  ## the pages as a site, into site/: README first, then docs/ and what they link to; broken links stop it
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	rm -rf build/pages site && mkdir -p build/pages
	cp -r docs examples results ARCHITECTURE.md CHANGELOG.md CITATION.cff CONTRIBUTING.md LICENSE build/pages
	cp README.md build/pages/index.md
	$(BIN)/zensical build --strict
	@echo "open site/index.html"

gpu: $(READY)  ## the tests that need a CUDA device, then what works there and how fast: ten minutes, into gpu-results/
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(BIN)/python -m pytest -m gpu; tests=$$?; PYTHONPATH=src $(BIN)/python -m benchmarks.gpu && exit $$tests; \
	else \
		echo "no CUDA device here; without one: PYTHONPATH=src $(BIN)/python -m benchmarks.gpu --device cpu --tiny"; \
	fi

mutants: $(READY)  ## how many faults the suite notices: a fixed random sample of mutants, about an hour; in a clone of its own
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[mutants]"
	$(BIN)/python tests/mutants.py

evidence: $(READY)  ## docs/evidence.md anew from the committed results, without a run
	PYTHONPATH=src $(BIN)/python -m benchmarks.evidence

results: $(READY)  ## all experiments at the small size, one after the other, then the evidence; DATA=folder of the data
	PYTHONPATH=src $(BIN)/python -m benchmarks.evidence --run $(or $(DATA),../shared/data)

torture: $(READY)  ## every method killed, and its disk full, before each operation on a file; an hour
	$(BIN)/python -m tests.hostile.torture

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
