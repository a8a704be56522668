# make demo: train five models on associative recall, three seeds each, print the table, write runs/demo/report.html
# make test: every fast test, in 5 minutes on 2 cores; its last lines say what took how many processor seconds
# make test-plain: the fast tests of the ops as on a machine without kernels, and as on one without a compiler
# make check: lint, types, import contracts, docs     make check-all: the slow checks
# make parity: against other people's code, and with their trackers     make bench-ops: speed and exactness of the ops beside theirs
# make docs: the documentation as a site that works offline, build/docs/html/index.html
# make tutorial: the tutorial's study at its full size, into docs/tutorial_run
# make release-check: a wheel and a source archive in dist/, each installed in a fresh environment and tried
# make bench: a small first run of every benchmark of `zoo bench` over every mixer
# make gpu: what a machine with a GPU gives, in 8 minutes, without a network: docs/install-gpu.md
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CPU build of torch where the package index offers one at this version; the range in pyproject.toml admits it.
TORCH ?= torch==2.13.0

.PHONY: demo test test-plain check check-all docs tutorial parity bench bench-ops gpu release-check clean

demo: $(VENV)/.installed
	$(BIN)/zoo sweep mqar-demo-seeds --out runs/demo
	$(BIN)/zoo compare runs/demo --learned 0.9 --report runs/demo/report.html

# Each worker starts with one half of the tests, so that what a file or a word's laws share is made once.
# Bytecode is kept whatever the shell says, or every worker, and every process that a test starts, would compile all modules anew.
test: $(VENV)/.installed-dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

# Kernels that are switched off, and an empty cache with no compiler on the path: both leave the plain forms alone.
PLAIN := -m "not slow and not gpu" -n 2
test-plain: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 ZOO_KERNELS=off $(BIN)/python -m pytest $(PLAIN) tests/ops
	cache=`mktemp -d`; CXX= PATH=$(abspath $(BIN)) ZOO_CACHE=$$cache OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PLAIN) \
		tests/ops/test_gated_mlp.py tests/ops/test_scan.py; status=$$?; rm -r $$cache; exit $$status

check: $(VENV)/.installed-dev docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A page that leads nowhere, or an option or table that cannot be read, fails it.
docs: $(VENV)/.installed-dev
	$(BIN)/python docs/pages.py build/docs/pages
	$(BIN)/python docs/notebook.py build/docs/tutorial
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs -d build/docs/cache build/docs/pages build/docs/html

# The study of the tutorial, on a machine that does nothing else. Killed and started again, it continues.
tutorial: $(VENV)/.installed-dev
	$(BIN)/python docs/notebook.py docs/tutorial_run --full --work build/tutorial

check-all: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not gpu" tests/test_laws.py
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not gpu" --ignore=tests/test_laws.py -rs

# Environments of their own, as the peers disagree: where flash-linear-attention is installed, transformers calls it, GPU or
# not. Each sees this project's environment, so that torch is not installed again.
parity: $(VENV)/parity/peers/.installed $(VENV)/parity/fla/.installed $(VENV)/parity/tracking/.installed
	OMP_NUM_THREADS=1 $(VENV)/parity/peers/bin/python -m pytest -n 2 tests/parity/peers
	OMP_NUM_THREADS=1 $(VENV)/parity/fla/bin/python -m pytest -n 2 tests/parity/fla
	OMP_NUM_THREADS=1 $(VENV)/parity/tracking/bin/python -m pytest -n 2 tests/parity/tracking

# Sizes and budgets (seconds) with which all of it takes about 50 minutes on 2 cores that do nothing else.
BENCH := $(BIN)/zoo bench
BENCH_OUT ?= --out docs/results/data --pages docs/results

bench: $(VENV)/.installed
	$(BENCH) throughput --width 128 --length 256,1K,4K --budget 2 --repeats 5 $(BENCH_OUT)
	$(BENCH) memory --width 128 --length 1K,4K --repeats 3 --budget 15 $(BENCH_OUT)
	$(BENCH) decode --width 64 --budget 10 --drift 1000 $(BENCH_OUT)
	$(BENCH) long-context --preset niah --budget 20 $(BENCH_OUT)
	$(BENCH) mad --layers "{mixer} swiglu {mixer} swiglu" --width 64 --share 0.01 --batch-size 32 --lr 3e-3 --budget 5 \
		--train test_rows=320 $(BENCH_OUT)

# About 10 minutes on 2 cores that do nothing else.
bench-ops: $(VENV)/parity/peers/.installed $(VENV)/parity/fla/.installed $(VENV)/parity/runtimes/.installed
	$(VENV)/parity/runtimes/bin/python -m zoo.benchmarks.studies.forward_passes
	FLA_PATH=$(wildcard $(VENV)/parity/fla/lib/python*/site-packages) $(VENV)/parity/peers/bin/python -m zoo.benchmarks.studies.ops

# By the Python of that machine, which has its own torch for CUDA: nothing is installed, and $(VENV) is not used.
# GPU holds options, such as make gpu GPU="--parts sudoku --limit 450".
GPU_PYTHON ?= $(PYTHON)
gpu:
	PYTHONPATH=$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PYTHON) -m zoo.benchmarks.studies.gpu $(GPU)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: a later step then finds it satisfied and fetches no other build.
$(VENV)/.torch: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.installed

PEERS_peers := transformers==5.23.0 einops peft==0.21.2 ncps==1.0.1 rwkv==0.8.32 scipy
PEERS_tracking := wandb==0.31.0 mlflow==3.17.2
PEERS_runtimes := onnxruntime==1.32.0 onnx==1.23.0 ggml-python==0.0.45
PEERS_fla := transformers==5.23.0 einops setuptools wheel ninja packaging
# These name dependencies that the project brings, or that only their GPU kernels need.
BARE_peers := mambapy==1.2.0 xlstm==2.0.6 mlstm_kernels==2.0.6 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 dacite opt_einsum \
	hyper-connections==0.4.9 torch-einops-utils==0.2.0 s5-pytorch==0.2.1 linoss-dynamics==0.2.2
BARE_fla := flash-linear-attention==0.6.0 fla-core==0.6.0 triton==3.9.0 mlstm_kernels==2.0.6 flash-qla==0.1.3

# Read file by file, never installed: building them asks for torch's CUDA.
SOURCES_fla := mamba-ssm==2.3.1 causal-conv1d==1.6.1

$(VENV)/parity/%/.installed: Makefile | $(VENV)/.installed-dev
	$(PYTHON) -m venv $(VENV)/parity/$*
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
		> `$(VENV)/parity/$*/bin/python -c "import site; print(site.getsitepackages()[0])"`/project.pth
	$(VENV)/parity/$*/bin/python -m pip install --quiet $(PEERS_$*)
	if [ -n "$(BARE_$*)" ]; then $(VENV)/parity/$*/bin/python -m pip install --quiet --no-deps $(BARE_$*); fi
	mkdir -p $(VENV)/parity/$*/sources
	for package in $(SOURCES_$*); do MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
		$(VENV)/parity/$*/bin/python -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: \
		--dest $(VENV)/parity/$*/sources $$package || exit 1; done
	for archive in $(VENV)/parity/$*/sources/*.tar.gz; do \
		if [ -e $$archive ]; then tar -xzf $$archive -C $(VENV)/parity/$*/sources; fi; done
	touch $@

# The archives of a release in dist/, each tried in an environment of its own: see CONTRIBUTING.md.
release-check: $(VENV)/.installed-dev
	version=`$(BIN)/python -c "import zoo; print(zoo.__version__)"`; grep -q "^## $$version " CHANGELOG.md || \
		{ echo "CHANGELOG.md has no section: ## $$version (DATE)"; exit 1; }
	rm -rf dist
	$(BIN)/python -m build
	DIST=$(abspath dist) $(BIN)/python -m pytest -n 0 tests/test_wheel.py tests/test_docs.py -k "wheel or citation"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
