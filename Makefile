# make demo | test | build | lint | wheel | clean
#
# PYTHON  the interpreter to start from; a PyTorch of 2.11 or later that it has is used as it is
# VENV    the virtual environment to make; `VENV=` uses PYTHON itself
# The build's own switches (DG_CUDA_ARCHS, MAX_JOBS, DG_SKIP_CUDA_BUILD, CUDA_HOME, ...): setup.py

PYTHON ?= python3
VENV ?= .venv
RUN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))

export PYTHONPATH := $(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))

# torch.compile on a CPU hashes its precompiled headers with this program; where it is missing, no header is precompiled.
ifeq ($(shell command -v openssl),)
export TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS ?= 0
endif

.PHONY: demo test build lint wheel clean env env-test

# Builds for the GPU found here (sm_90a where there is none), then serves two models with it.
demo: export DG_CUDA_ARCHS ?= native
demo: build
	$(RUN) examples/demo.py $(ARGS)

# Builds for both architectures, then runs every test that this machine can run, in a process for each core, or in one
# where there is a GPU; ARGS="--processes 4" and pytest's own. Some tests call nvcc themselves, hence the compiler from
# PyPI at the end of PATH.
test: export DG_CUDA_ARCHS ?= 90a;100a
test: env-test build
	PATH="$$PATH:$$($(RUN) tools/toolchain.py)" $(RUN) tools/run_tests.py $(ARGS)

build: env
	$(RUN) setup.py --quiet build_ext --inplace

lint: env-test
	$(RUN) -m ruff check .

wheel: env
	$(RUN) setup.py --quiet bdist_wheel
	@ls -l dist

env:
	@$(PYTHON) tools/make_env.py --venv "$(VENV)"

env-test:
	@$(PYTHON) tools/make_env.py --venv "$(VENV)" test

clean:
	rm -rf build dist python/deep_gemm_ops/*.so python/*.egg-info
