# What people and CI type. Every target makes the environment it needs, once; a second run starts at once.
#
# Where python3 already imports a torch that sees a GPU, that python is used as it is and nothing is installed.
# Elsewhere .venv is made and gets exactly what the target needs: pyproject.toml's extras, and torch as pinned here.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDEXPANSION:

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv

# GPUs that python3's torch sees; empty where there are none or no torch. Asked only when needed, and once.
GPUS = $(eval GPUS := $(shell $(PYTHON) -c 'import torch; print(torch.cuda.device_count() or "")' 2>/dev/null))$(GPUS)
RUN = $(if $(GPUS),$(PYTHON),OMP_NUM_THREADS=1 $(VENV)/bin/python)
RANKS ?= $(or $(GPUS),2)
WORKERS ?= $(if $(GPUS),8,2)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# NOTE: packages are installed without bytecode (PIP below). Where the environment forbids to keep it, every process of a run
# would compile a thousand modules anew, 8 s each; empty allows it.
export PYTHONDONTWRITEBYTECODE :=

# $(call environment,NAME): the stamp of .venv holding NAME's packages, or nothing where python3 is used as it is.
environment = $(if $(GPUS),,$(VENV)/.$(1))

.PHONY: help
help: ## print this text
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18
	@echo
	@echo '  ARGS="..."           passed on to train, test, bench, attention, context, step, gradients,'
	@echo '                       accuracy, pair, scaling and tune'
	@echo '  RANKS=N              processes of make train and make context (default: one a GPU, else 2)'
	@echo '  FA3_DIST_ROWS="..."  kernels to build: patterns ("delta_bf16,*fp16"), or one-per-family'
	@echo '  TORCH="torch==..."   the torch that goes into .venv (default: $(TORCH))'

# ---- what people do --------------------------------------------------------------------------------------------------

.PHONY: train
train: $$(call environment,train) ## train a small transformer on long text, sequence sharded over ranks
	$(RUN) -m torch.distributed.run --standalone --nproc-per-node $(RANKS) examples/train.py $(ARGS)

.PHONY: test
test: $$(call environment,test) ## run the tests; those marked gpu need a CUDA device
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

.PHONY: kernels
kernels: $$(call environment,kernels) ## build the compiled library and check its machine code
	$(RUN) csrc/build_library.py
	$(RUN) csrc/machine_code.py

.PHONY: check
check: $$(call environment,dev) lint test ## lint, types and tests: what CI runs

.PHONY: lint
lint: $$(call environment,dev)
	$(RUN) -m ruff check
	$(RUN) -m mypy
	$(RUN) benchmarks/check_results.py

.PHONY: bench
bench: $$(call environment,train) ## measure the kernels on a GPU against a device copy
	$(RUN) benchmarks/delta.py $(ARGS)

.PHONY: attention
attention: $$(call environment,train) ## measure attention on a GPU beside its peers (SUITE=forward, backward, few_kv_heads, host, continuation, ablation)
	$(RUN) benchmarks/attention.py --suite $(or $(SUITE),forward) $(ARGS)

.PHONY: context
context: $$(call environment,train) ## measure context parallelism on all GPUs beside one of them; on CPUs a small one, to try it
	$(RUN) -m torch.distributed.run --standalone --nproc-per-node $(RANKS) benchmarks/context_parallel.py \
	  $(if $(GPUS),,--scale 256 --repeats 3) $(ARGS)

.PHONY: step
step: $$(call environment,train) ## measure training steps of a 1.3 G model on a GPU, with our attention and with cuDNN's
	$(RUN) benchmarks/end_to_end.py $(ARGS)

.PHONY: gradients
gradients: $$(call environment,train) ## measure the error of a 1.3 G model's gradients on a GPU, with our attention and with cuDNN's
	$(RUN) benchmarks/gradient_error.py $(ARGS)

.PHONY: accuracy
accuracy: $$(call environment,train) ## measure the error of context parallelism against fp64 with 2 to 8 ranks on one GPU
	$(RUN) benchmarks/ring_error.py $(if $(GPUS),,--device cpu --scale 64) $(ARGS)

.PHONY: pair
pair: $$(call environment,train) ## train the example's 1.3 G model on one GPU and on all, and compare losses and speed
	$(RUN) benchmarks/train_scaling.py $(if $(GPUS),,--dim 32 --layers 2 --heads 2 --kv-heads 1 --seqlen 256 --steps 6) $(ARGS)

.PHONY: scaling
scaling: $$(call environment,train) ## predict the efficiency of context parallelism on 2 to 512 GPUs from one GPU's speed
	$(RUN) benchmarks/scaling_model.py $(ARGS)

.PHONY: tune
tune: $$(call environment,kernels) ## build tile shapes (HEAD_DIM=128 TILES=128x128,128x112) and, on a GPU, time them
	$(if $(TILES),$(RUN) benchmarks/tune.py build --head-dim $(HEAD_DIM) --candidates $(TILES))
	$(if $(GPUS),$(RUN) benchmarks/tune.py run $(ARGS))

.PHONY: clean
clean: ## remove what was built (.venv stays; remove it by hand to start over)
	rm -rf build dist fa3_dist/lib *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# ---- .venv -----------------------------------------------------------------------------------------------------------

# NOTE: --no-compile halves the time to the first training step: only what is imported gets compiled.
PIP := $(VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check

# $(call requirements,EXTRA): the packages of one of pyproject.toml's extras; `core` is what the package itself needs.
requirements = $(VENV)/bin/python -c 'import tomllib; \
  project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*{"core": project["dependencies"], **project["optional-dependencies"]}["$(1)"], sep="\n")'

TOOLKIT := $(foreach name,cuda-nvcc cuda-crt nvvm cuda-runtime cuda-cccl,'nvidia-$(name)==13.0.*')

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "make needs Python 3.11 or newer: make PYTHON=...")'
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.train: pyproject.toml | $(VENV)/.python
	@echo 'installing what training needs: $(TORCH), ...'
	@$(PIP) '$(TORCH)' -r <($(call requirements,core)) -r <($(call requirements,train))
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.train
	@echo 'installing what the tests need'
	@$(PIP) '$(TORCH)' -r <($(call requirements,test)) -r <($(call requirements,hf))
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.test
	@echo 'installing what the checks need'
	@$(PIP) -r <($(call requirements,dev))
	@touch $@

# A local nvcc is used if there is one. NOTE: of nvidia-cutlass only the headers are wanted, hence --no-deps.
$(VENV)/.kernels: pyproject.toml | $(VENV)/.train
	@echo 'installing what building the kernels needs'
	@$(PIP) ninja nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	@$(PIP) --no-deps 'nvidia-cutlass==4.2.*'
	@PYTHONPATH=csrc $(VENV)/bin/python -c 'from build_library import *; sys.exit(find_cuda_tool("nvcc") is None)' || { \
	  echo 'no nvcc here: installing the toolkit'; $(PIP) $(TOOLKIT); }
	@touch $@
