# `make demo` and `make test` need Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test test-slow lint bench docs clean

install: $(READY)

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, found " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" TOTAL=300 STEPS=150 JOBS=2 bash examples/fairdiff_pipeline.sh

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m 'not slow and not gpu'

test-slow: $(READY)
	$(BIN)/python -m pytest -m 'slow or gpu'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/moe.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/geometry.py
	$(BIN)/python benchmarks/point_sampling.py
	$(BIN)/python benchmarks/generation_metrics.py
	$(BIN)/python benchmarks/controlnet.py
	$(BIN)/python benchmarks/paired_sampling.py
	$(BIN)/python benchmarks/paired_step.py
	$(BIN)/python benchmarks/lesion_unet.py
	$(BIN)/python benchmarks/inpaint.py
	$(BIN)/python benchmarks/volumes.py
	$(BIN)/python benchmarks/volume_mixture.py
	$(BIN)/python benchmarks/edges.py
	$(BIN)/python benchmarks/patch_merge.py
	$(BIN)/python benchmarks/guidance.py
	$(BIN)/python benchmarks/fairness_phantom.py

docs: $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs site build dist *.egg-info
