# `make test` and `make bench` need python3, a C++ compiler and make; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: test bench bench-full build clean FORCE
test: build
	$(RUN) -m pytest

bench: build
	$(RUN) -m bench.digits

# Every table of bench/results; half an hour on two cores, which nothing else should use meanwhile.
bench-full: build
	$(RUN) -m bench.digits
	$(RUN) -m bench.layers
	$(RUN) -m bench.kernels --reuse --threads 1 2 --seconds 3
	$(RUN) -m bench.overhead
	$(RUN) -m bench.optimizers
	$(RUN) -m bench.in_backward
	$(RUN) -m bench.models

build: $(VENV)/built

$(VENV)/installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check -r $<
	@touch $@

# The build's environment is an input too: a changed variable rebuilds.
BUILD_ENV := $(foreach v,WNKERNELS_CUDA TORCH_CUDA_ARCH_LIST CUDA_HOME CXX NVCC_APPEND_FLAGS NVCC_CCBIN,$(v)=$($(v)))
$(VENV)/environment: $(VENV)/installed FORCE
	@echo '$(BUILD_ENV)' | cmp -s - $@ || echo '$(BUILD_ENV)' > $@

$(VENV)/built: $(VENV)/installed $(VENV)/environment setup.py pyproject.toml $(shell find csrc -type f)
	$(RUN) -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(RUN) -m wnkernels info
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info wnkernels/*.so .pytest_cache .hypothesis
