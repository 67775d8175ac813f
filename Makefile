# Every target sets up what it needs: a virtual environment in .venv, the dependencies, the built extension.
# Nothing has to be installed by hand beyond Python >= 3.10, make and (for the compiled backends) a C++ compiler.
#
#   make demo      the main job on real images: train, fuse, verify, time, draw (CUDA module only where a GPU is)
#   make test      all tests, in two processes (Triton's interpreter must be chosen before a process starts)
#   make test-isa  the CPU tests again as on lesser processors: AVX-512 alone, AVX2, any other
#   make lint      ruff, mypy, clang-format
#   make bench     benchmarks (BENCH="--full -k cpu" for more or less) and their table
#   make docs      the documentation site, into site/ (strict: a broken link fails)
#   make static    compile every CUDA and Triton kernel for every architecture and check the machine code
#   make matrix    the tests on every stack of the support table that can be had here (MATRIX="--short" for less)
#   make mutants   plant each known bug in the CUDA kernels and see that a test catches it
#   make clean     remove what was built (make distclean: the virtual environment as well)

VENV    ?= .venv
PYTHON  ?= $(shell for python in python3.11 python3.12 python3.13 python3.10 python3; do \
  $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$python; break; }; done)
TORCH   ?= torch torchvision
JOBS    ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); if [ $$n -gt 8 ]; then echo 8; else echo $$n; fi)
PIP_ARGS ?=
BENCH   ?=
MATRIX  ?=
TESTS   ?= tests fused_resnet/testing
# What depends on the instruction set beyond the kernels, which tests/cpu/test_cpu_kernels.py runs with each in any case.
ISA_TESTS ?= tests/cpu/test_cpu_backend.py tests/cpu/test_cpu_stem.py tests/ops/test_properties.py fused_resnet/testing
RESULTS ?= benchmarks/results/latest.json

# A GPU decides what is built here; `pip install` and wheels never look for one. Without a GPU one architecture is
# enough: whatever compares several compiles them itself.
GPU     := $(shell { nvidia-smi -L || ls /dev/nvidia[0-9]*; } >/dev/null 2>&1 && echo yes)
CAPABILITY := $(if $(GPU),$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
  grep -x '[0-9]*\.[0-9]' | sort -u))
ARCHS   := $(or $(TORCH_CUDA_ARCH_LIST),$(CAPABILITY),8.0)

BIN     := $(VENV)/bin
SOURCES := $(shell find csrc -type f 2>/dev/null)
CXX_ALL := $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' 2>/dev/null)
# One thread of torch per pytest worker: with more, the workers of a small machine fight for its cores.
WORKERS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST  := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: demo test test-interpreter test-rest test-isa lint format bench docs static matrix mutants install clean distclean FORCE

demo: $(VENV)/.demo-$(if $(GPU),cuda,cpu)
	$(BIN)/fused-resnet demo

test: $(VENV)/.dev
	@status=0; \
	$(MAKE) --no-print-directory test-interpreter || status=$$?; \
	$(MAKE) --no-print-directory test-rest || status=$$?; \
	exit $$status

test-interpreter: $(VENV)/.dev
	@$(WORKERS) TRITON_INTERPRET=1 $(PYTEST) -m interpreter $(TESTS)

test-rest: $(VENV)/.dev
	@env -u TRITON_INTERPRET $(WORKERS) $(PYTEST) -m "not interpreter" $(TESTS)

test-isa: $(VENV)/.dev
	@$(WORKERS) .ci/instruction_sets $(BIN)/python -q -n $(JOBS) --dist load $(ISA_TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CXX_ALL),$(BIN)/clang-format --dry-run -Werror $(CXX_ALL))

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_ALL),$(BIN)/clang-format -i $(CXX_ALL))

bench: $(VENV)/.dev $(VENV)/.rivals
	@mkdir -p $(dir $(RESULTS))
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=$(RESULTS) -q $(BENCH)
	$(BIN)/python -m benchmarks.report $(RESULTS)

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

static: $(VENV)/.dev
	$(BIN)/python -m benchmarks.static
	$(BIN)/python -m benchmarks.static.training
	$(BIN)/python -m benchmarks.static.triton

# Environments, builds and logs lie in .matrix; MATRIX="--short --legs oldest" for less.
matrix:
	python3 tests/support/matrix.py $(MATRIX)

mutants: $(VENV)/.dev
	@$(if $(wildcard ../shared/ptxi),PTXI_HOME=$${PTXI_HOME:-$(abspath ../shared/ptxi)} )$(WORKERS) $(PYTEST) \
	  --dist load -m mutant -q tests/cuda/test_mutants.py

install: $(VENV)/.dev

# torch and the build tools come first: the package is built against the torch that it will run with, so without
# pip's build isolation. `pip` is left as the environment has it. --no-compile: most modules are never imported, and
# Python compiles the others when they are.
$(VENV)/.torch:
	@python="$(PYTHON)"; test -n "$$python" || { \
	  echo "fused_resnet: found no Python >= 3.10 with its venv module; install one or set PYTHON=..."; exit 1; }; \
	echo "creating $(VENV) with $$python"; $$python -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile $(PIP_ARGS) $(TORCH) "setuptools>=77" ninja
	@touch $@

# Editable, so that Python changes need nothing. A changed pyproject.toml installs again; a changed C++ source
# rebuilds in place, and ninja compiles only what changed. $(1): pyproject.toml's extra, $(2): FUSED_RESNET_CUDA.
install = FUSED_RESNET_CUDA=$(2) TORCH_CUDA_ARCH_LIST="$(ARCHS)" MAX_JOBS=$(JOBS) $(if $(filter pyproject.toml,$?),\
  $(BIN)/python -m pip install -q --no-compile $(PIP_ARGS) --no-build-isolation -e ".[$(1)]",\
  $(BIN)/python setup.py -q build_ext --inplace)

# A stamp says what is there: `.dev` everything, `.demo-cuda` what the demo needs, `.demo-cpu` the same without the
# CUDA module. Each stands for those after it as well.
$(VENV)/.dev: pyproject.toml setup.py $(SOURCES) $(VENV)/.archs | $(VENV)/.torch
	$(call install,dev,auto)
	@touch $(VENV)/.demo-cpu $(VENV)/.demo-cuda $@

$(VENV)/.demo-cuda: pyproject.toml setup.py $(SOURCES) $(VENV)/.archs | $(VENV)/.torch
	$(call install,demo,auto)
	@touch $(VENV)/.demo-cpu $@

# An older CUDA module does not belong to these sources.
$(VENV)/.demo-cpu: pyproject.toml setup.py $(SOURCES) | $(VENV)/.torch
	@rm -f fused_resnet/_C_cuda*.so $(VENV)/.demo-cuda $(VENV)/.dev
	$(call install,demo,0)
	@touch $@

# Touched where it changes, so that other architectures are another build.
$(VENV)/.archs: FORCE | $(VENV)/.torch
	@echo "$(ARCHS)" | cmp -s - $@ || echo "$(ARCHS)" > $@

# A rival that cannot be installed is listed in the tables as not timed.
$(VENV)/.rivals: | $(VENV)/.dev
	-$(BIN)/python -m pip install -q $(PIP_ARGS) onnx onnxruntime openvino ncnn pnnx
	@touch $@

clean:
	rm -rf build dist site *.egg-info demo_output .benchmarks .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f fused_resnet/*.so fused_resnet/_C_cuda.txt
	rm -f $(VENV)/.dev $(VENV)/.demo-*
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
