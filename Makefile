# Two commands: `make demo` and `make test`. Each sets up .venv by itself, once.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
TRAIN := $(VENV)/.ready-train
TEST := $(VENV)/.ready-test
INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# libgomp spins while it waits; on a busy machine that turns microseconds into milliseconds
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test test-all lint bench clean

demo: $(TRAIN)
	$(VENV)/bin/rlhf-train demo --out runs/demo --overwrite

# What the GPU kernels compute is judged by the tests of the CPU backends, under Triton's interpreter. That needs a
# process of its own: it leaves triton.language patched, and nothing compiles after it.
INTERPRETED := tests/test_token_stats.py tests/test_numerics.py tests/test_fused_loss.py tests/test_every_loss.py tests/gpu

# one thread per test process: two processes keep two cores busy
test: $(TEST)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 $(INTERPRETED)

# and what takes long
test-all: test
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 -m slow tests

lint: $(TEST)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports

bench: $(TEST)
	$(PY) -m pytest benchmarks/ --benchmark-only -q

$(TRAIN): pyproject.toml constraints.txt setup.py $(wildcard csrc/*.* csrc/*/*.*)
	@echo "Setting up $(VENV): downloads torch and transformers (about 300 MB with a CPU torch, several GB where"
	@echo "pip picks a CUDA one), then builds the extension."
	@start=$$(date +%s); \
	$(PYTHON) -m venv $(VENV) \
	&& $(INSTALL) -e ".[train]" \
	&& echo "Set up in $$(( $$(date +%s) - start )) seconds."
	@touch $@

$(TEST): $(TRAIN)
	@echo "Adding what the tests and linters need."
	@$(INSTALL) -e ".[train,test,bench,lint,triton]"
	@touch $@

clean:
	rm -rf $(VENV) build rlhf_kernels/_C*.so rlhf_kernels/_cuda*.so
