# Every target makes the virtual environment that it needs; a second run finds it ready.
# Wanted on the machine: Python 3.11 or newer with pip. With g++ 12, clang++ 16 or newer the C++ extension is built too.

VENV := .venv
BIN := $(VENV)/bin
# The first of these that runs and is new enough; say PYTHON=... to choose another.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

# The home of builds of torch for the CPU alone: for Linux, PyPI's bring gigabytes of CUDA. It is passed over where it
# cannot be reached; TORCH_INDEX= (empty) asks for PyPI's.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL := $(PIP) install --constraint constraints.txt
# The tools of the build are in the environment, so that an installation that adds an extra compiles nothing again.
INSTALL_HERE = $(INSTALL) --no-build-isolation --config-settings build-dir=$(CURDIR)/build/package --editable
INSTALL_CPU = $(INSTALL) --no-deps --retries 2 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help demo test coverage native lint bench docs clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/package.stamp  ## quantize the embedded network and write a file and a picture to demo-out/
	$(BIN)/dsconv demo --out demo-out

test: $(VENV)/dev.stamp  ## run all tests and examples; or some: ARGS="-k packing"
	$(BIN)/pytest -n 2 --dist worksteal --durations 15 $(ARGS)

# Python below 3.12 takes half as much time again for it.
coverage: $(VENV)/dev.stamp  ## run all tests, and check how much of the source they execute
	$(BIN)/pytest -n 2 --dist worksteal --cov

native: $(VENV)/dev.stamp  ## test the C++ code under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/cmake -S . -B build/native -DDSCONV_NATIVE_TEST=ON -DCMAKE_BUILD_TYPE=None -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
		-DCMAKE_CXX_FLAGS="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
	$(BIN)/cmake --build build/native --parallel 2
	build/native/kernels_test 150 1 & other=$$!; build/native/kernels_test 150 2 && wait $$other
	build/native/network_test 1500 1 csrc/test/corpus/*.dsconv

lint: $(VENV)/dev.stamp  ## check style, formatting, types, spelling and prose
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(wildcard $(addprefix csrc/,*.h *.cpp */*.h */*.cpp) examples/deploy/*.c examples/deploy/cpp/*.cpp)
	$(BIN)/mypy
	@git ls-files '*.py' '*.md' '*.cpp' '*.h' '*.c' '*.j2' '*.toml' '*.yml' '*.cff' Makefile | xargs $(BIN)/codespell
	$(BIN)/python scripts/check_prose.py

bench: $(VENV)/dev.stamp  ## measure the accuracy of real networks; ARGS goes to the script
	$(BIN)/python benchmarks/accuracy.py $(ARGS)

docs: $(VENV)/dev.stamp  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

clean:  ## remove everything that these targets made
	rm -rf $(VENV) build dist site demo-out .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks scripts -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Debian's Python comes without ensurepip: there the environment borrows the pip that is already on the machine.
$(VENV)/torch.stamp: constraints.txt
	@test -n "$(PYTHON)" || { echo "dsconv needs Python 3.11 or newer, and none is on the PATH: install one," \
		"or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "creating $(VENV) with PyTorch: downloads about 200 MB, once"
	@$(PYTHON) -m venv --clear $(VENV) 2>/dev/null \
		|| { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	@$(INSTALL_CPU) torch
	@touch $@

$(VENV)/package.stamp: $(VENV)/torch.stamp pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	@echo "installing dsconv$(if $(DSCONV_NO_EXTENSION),,: compiling its kernels takes about 3 minutes of processor time; once, and after changes of csrc/)"
	@$(INSTALL) cmake nanobind ninja scikit-build-core
	@$(INSTALL_HERE) '.[report]'
	@$(BIN)/python -c 'from dsconv.cpu import cpu_info; print(cpu_info())'
	@touch $@

# torchvision has to match the build of torch, so it comes from the same place.
# dsconv-runtime is built in build/runtime, from which tests install the C library.
$(VENV)/dev.stamp: $(VENV)/package.stamp $(wildcard cmake/* include/* runtime/*.* runtime/src/*/*.py)
	@echo "installing the tools of development: downloads about 300 MB, once; dsconv-runtime is compiled where csrc/ changed"
	@$(INSTALL_CPU) torchvision
	@$(INSTALL_HERE) '.[dev,docs]'
	@$(if $(DSCONV_NO_EXTENSION),true,CMAKE_BUILD_PARALLEL_LEVEL=2 $(PIP) install --no-deps --no-build-isolation \
		--config-settings build-dir=$(CURDIR)/build/runtime ./runtime) || echo "dsconv-runtime is not installed: its tests are left out"
	@touch $@
