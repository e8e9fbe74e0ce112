# Everything starts here: `make demo` and `make test` set up what they need by themselves.
PYTHON ?= python3
# GPU users choose their own build: make demo TORCH="torch==2.13.0 --index-url <CUDA wheel index>"
TORCH ?= torch==2.13.0

BIN := .venv/bin
READY := .venv/.ready-$(shell echo '$(TORCH)' | cksum | cut -d' ' -f1)

.PHONY: demo test lint format clean

demo: $(READY)  ## The main job on the embedded model and corpus, start to finish
	$(BIN)/strata demo

test: $(READY)  ## All tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu and not crash and not interop and not cluster" -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: test-crash
test-crash: $(READY)  ## The long forms: destruction of stores; whole runs in a bucket, on an encoder, within a disk budget; more of the plan's memory
	$(BIN)/python -m pytest -m crash

.PHONY: test-cluster
test-cluster: $(READY)  ## Real multi-node clusters on this machine: launch, placement, faults
	$(BIN)/python -m pytest -m cluster

.PHONY: interop
interop: $(READY)  ## Exports, loaded by SAELens, sparsify and dictionary_learning themselves, who get .peers/ for that
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m pytest -m interop

lint: $(READY)  ## Style, types and the layering of the folders
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Strata needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	rm -f .venv/.ready-*
	touch $@

clean:
	rm -rf .venv runs

# Sizes and rounds of a smaller run: make bench-training ARGS="--tokens 256 --d-model 128 --d-sae 2048"
.PHONY: bench-training bench-quality bench-store bench-sweep bench-progressive bench-dashboard bench-parallel bench-cluster
bench-training: $(READY)  ## Seconds of a training step against the peers, who get .peers/ for themselves
	$(BIN)/python -m benchmarks.training $(ARGS)

bench-quality: $(READY)  ## Dictionaries recovered, and the papers' claims on small language models
	$(BIN)/python -m benchmarks.quality $(ARGS)

bench-store: $(READY)  ## Harvest against the bare forward pass, the store against the peers'
	$(BIN)/python -m benchmarks.store $(ARGS)

bench-sweep: $(READY)  ## Early stopping against the full grid; Ray Tune, actors and MLflow against a plain loop
	$(BIN)/python -m benchmarks.sweep $(ARGS)

bench-progressive: $(READY)  ## One dictionary at many sizes: sorted pruning, Matryoshka prefixes, power laws
	$(BIN)/python -m benchmarks.progressive $(ARGS)

bench-dashboard: $(READY)  ## The dashboard of 65,536 latents in headless Chromium
	$(BIN)/python -m benchmarks.dashboard $(ARGS)

bench-parallel: $(READY)  ## One autoencoder over several processes: memory of each, bytes exchanged, seconds
	$(BIN)/python -m benchmarks.parallel $(ARGS)

bench-cluster: $(READY)  ## Harvest and sweep on one to eight simulated nodes, whose GPUs sleep
	$(BIN)/python -m benchmarks.cluster $(ARGS)
