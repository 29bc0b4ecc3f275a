# Two commands: `make demo` and `make test`. Each sets up .venv by itself, once.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
TRAIN := $(VENV)/.ready-train
TEST := $(VENV)/.ready-test
PEERS := $(VENV)/.ready-peers
DOCS := $(VENV)/.ready-docs
INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# libgomp spins while it waits; on a busy machine that turns microseconds into milliseconds
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test test-isa test-sanitize test-fuzz test-all test-real test-peers lint bench docs wheels clean

demo: $(TRAIN)
	$(VENV)/bin/rlhf-train demo --out runs/demo --overwrite

# What the GPU kernels compute is judged by the tests of the CPU backends, under Triton's interpreter. That needs a
# process of its own: it leaves triton.language patched, and nothing compiles after it.
INTERPRETED := tests/contracts/test_every_loss.py tests/gpu \
               $(addprefix tests/kernels/engine/test_,token_stats.py numerics.py fused.py tolerance.py)

# What judges the native backend.
NATIVE := tests/contracts/test_every_loss.py tests/kernels/backends/native tests/kernels/backends/test_gae.py \
          tests/kernels/backends/test_sparse.py tests/kernels/losses/test_losses.py \
          $(addprefix tests/kernels/engine/test_,autograd.py fused.py kept.py numerics.py threads.py token_stats.py tolerance.py)

# one thread per test process: two processes keep two cores busy
test: $(TEST)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 $(INTERPRETED)
	@$(MAKE) --no-print-directory test-isa

# the native backend as an older CPU would run it: RLHF_KERNELS_ISA caps the instruction set
test-isa: $(TEST)
	@OMP_NUM_THREADS=1 .ci/isas lower $(PY) $(PY) -m pytest -q -n 2 -k "not eager" $(NATIVE)

# the native backend under AddressSanitizer and UndefinedBehaviorSanitizer; wants gcc
test-sanitize: $(TEST)
	.ci/sanitize $(PY) $(NATIVE)

# random calls of every public function: a right answer, or one error that names the argument
test-fuzz: $(TEST)
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz --calls 5000

# and what takes long
test-all: test
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 -m slow tests

# a pretrained model under the defaults: every stage, and whether reinforcement learning helps; about 15 minutes
REAL_MODEL ?= build/smollm2-135m-instruct
test-real: $(TEST)
	@test -f $(REAL_MODEL)/config.json || $(PY) -m tests.real.make_model $(REAL_MODEL)
	REAL_MODEL=$(abspath $(REAL_MODEL)) OMP_NUM_THREADS=1 $(PY) -m pytest -q -m real tests/real

lint: $(TEST)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports

# the adapters beside the packages that they adapt
test-peers: $(PEERS)
	PYTHONPATH=$(VENV)/peers OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 -m "" tests/peers tests/kernels/integrations/test_peft.py

# a site in build/site, from docs/, README and docstrings
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

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

# The wheels of openrlhf and verl bring folders named like ours, so they stay out of site-packages.
$(PEERS): $(TEST)
	@$(INSTALL) -e ".[peers]"
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/peers \
		openrlhf==0.11.2 verl==0.9.1 liger-kernel==0.8.5
	@rm -rf $(VENV)/peers/tests $(VENV)/peers/scripts
	@touch $@

$(DOCS): $(TEST)
	@$(INSTALL) -e ".[docs]"
	@touch $@

# an sdist and a wheel in dist/, the wheel tried in a clean environment with each of these versions of torch
TORCHES ?= 2.11.* 2.13.*
wheels:
	PYTHON=$(PYTHON) .ci/wheels $(foreach torch,$(TORCHES),"$(torch)")

clean:
	rm -rf $(VENV) build dist rlhf_kernels/_C*.so rlhf_kernels/_cuda*.so
