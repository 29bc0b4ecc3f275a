# Two commands: `make demo` and `make test`. Each sets up .venv by itself, once.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# libgomp spins while it waits; on a busy machine that turns microseconds into milliseconds
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test lint bench clean

demo: $(READY)
	$(VENV)/bin/rlhf-train demo --out runs/demo --overwrite

# one thread per test process: two processes keep two cores busy
test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadgroup

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports

bench: $(READY)
	$(PY) -m pytest benchmarks/ --benchmark-only -q

$(READY): pyproject.toml constraints.txt setup.py $(wildcard csrc/*.* csrc/*/*.*)
	@echo "Setting up $(VENV): downloads torch and transformers, about 1 GB, then builds the extension."
	@start=$$(date +%s); \
	$(PYTHON) -m venv $(VENV) \
	&& $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,test,bench,lint]" \
	&& echo "Set up in $$(( $$(date +%s) - start )) seconds."
	@touch $@

clean:
	rm -rf $(VENV) build rlhf_kernels/_C*.so
