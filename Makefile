# make demo    create .venv, install, train the demo model, compress it, print the table
# make test    install with [train,test] and run the tests
# make test-triton   install Triton too (1 GB) and run its kernels in its interpreter: no GPU needed
# make check   format, lint, types, import arrows, stale help pages
# make fuzz    attack the compiled kernels with malformed input, under the sanitizers (FUZZ_COUNT, FUZZ_SEED, FUZZ_CORPUS)
# make cross-neon  compile the kernels for 64-bit ARM and compare their results under qemu-aarch64
# make emulate-avx512  the same for the AVX-512 kernels on a processor that has only AVX2; needs the headers of SIMDe
# make clean   remove everything that make made
# Needs Python 3.10 or newer, a C++ compiler and a package index. Re-runs do only what is out of date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Installed in place: Python edits are live, only these files need a new installation.
BUILD_FILES := pyproject.toml CMakeLists.txt constraints.txt $(wildcard kernels/csrc/*.*)
DATA := --calibration demo-model/calibration.txt --eval demo-model/heldout.txt

.PHONY: demo test test-triton check docs fuzz cross-neon emulate-avx512 clean

demo: build/demo.txt
	@cat build/demo.txt

# Folder after folder, so that the last files are short ones and no worker waits long for the other.
test: $(VENV)/installed-test
	$(BIN)/python -c "import peft, bitsandbytes, datasets, pyarrow"
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_OPTIONS)

test-triton: $(VENV)/installed-triton
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/kernels/test_triton.py $(PYTEST_OPTIONS)

check: $(VENV)/installed-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYTHON=$(CURDIR)/$(BIN)/python .ci/typecheck
	$(BIN)/pytest -q tests/test_arrows.py tests/test_help_pages.py tests/test_package.py

docs: $(VENV)/installed
	$(BIN)/python docs/make_cli_page.py

# Both need cmake beside the compiler. 100,000 inputs take a few minutes.
FUZZ := kernels/csrc/fuzz
FUZZ_COUNT ?= 100000
FUZZ_SEED ?= 1
FUZZ_CORPUS ?=

fuzz:
	cmake -S $(FUZZ) -B build/fuzz
	cmake --build build/fuzz --parallel 2
	build/fuzz/fuzz --seed $(FUZZ_SEED) --count $(FUZZ_COUNT) $(if $(FUZZ_CORPUS),--corpus $(wildcard $(FUZZ_CORPUS)))

# The same driver without sanitizers: every tier against float64. Static, so that qemu needs no libraries of that system.
cross-neon:
	cmake -S $(FUZZ) -B build/neon -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static \
	  -DCMAKE_BUILD_TYPE=Release -DGOSSAMER_SANITIZE=OFF
	cmake --build build/neon --parallel 2
	@if command -v qemu-aarch64 > /dev/null; then qemu-aarch64 build/neon/fuzz --seed $(FUZZ_SEED) --count 2000; \
	else echo "compiled; there is no qemu-aarch64 to run it"; fi

# What the source of these tiers computes, not the instructions: those run where a processor has them.
emulate-avx512:
	cmake -S $(FUZZ) -B build/avx512 -DCMAKE_BUILD_TYPE=Release -DGOSSAMER_SANITIZE=OFF -DGOSSAMER_EMULATE=ON
	cmake --build build/avx512 --parallel 2
	build/avx512/fuzz --seed $(FUZZ_SEED) --count 2000

clean:
	rm -rf $(VENV) build dist demo-model demo-model.partial demo-sparse demo-sparse.partial
	rm -rf .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

build/demo.txt: demo-model/config.json $(VENV)/installed
	rm -rf demo-sparse demo-sparse.partial
	mkdir -p build
	$(BIN)/gossamer compress demo-model -o demo-sparse $(DATA) > $@.part
	mv $@.part $@

demo-model/config.json: | $(VENV)/installed
	$(BIN)/gossamer demo demo-model

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Every installation compiles: one that holds more stands for those that hold less.
$(VENV)/installed: $(BUILD_FILES) | $(VENV)/bin/python
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-test: $(BUILD_FILES) | $(VENV)/bin/python
	$(INSTALL) -e '.[train,test]'
	touch $(VENV)/installed $@

# Without its dependencies, which are torch's own: for a GPU, torch brings the Triton that fits.
$(VENV)/installed-triton: $(VENV)/installed-test
	$(BIN)/python -c "import triton" || $(BIN)/python -m pip install --quiet --no-deps "triton>=3.3,<4"
	touch $@

$(VENV)/installed-check: $(BUILD_FILES) | $(VENV)/bin/python
	$(INSTALL) -e '.[train,test,dev]'
	touch $(VENV)/installed $(VENV)/installed-test $@
