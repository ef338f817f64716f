# One environment, .venv, serves every target; the first one asked for makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDER := build/transformers-4.57
SOURCES := $(sort $(shell find csrc -name '*.[ch]*'))

# Goes to the command behind demo, test, test-slow and bench: make test ARGS="-k dropout".
ARGS ?=

# A compiler is expected here, so that a failure to compile shows its errors; with 0 the package
# installs without the kernels, as it does under plain pip.
export FASTDEBERTA_FORCE_EXT_BUILD ?= 1

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow test-transformers4 test-triton test-simt test-mutants \
	test-sanitized resources bench lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

env: $(INSTALLED)  ## make .venv: the pinned packages, and this one with its kernels compiled

# torch comes before the package, whose kernels compile against the one that is installed.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools setuptools-scm wheel ninja torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[train,ner,triton,onnx,test,bench,dev]'
	@touch $@

demo: $(INSTALLED)  ## the main job on the embedded data: a few minutes on two cores
	$(BIN)/fastdeberta demo $(ARGS)

test: $(INSTALLED)  ## the tests but the slow, the interpreted and the simulated ones
	$(BIN)/python -m pytest -q -m "not slow and not interpreted and not simulated" $(ARGS)

test-slow: $(INSTALLED)  ## the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow and not simulated" -n auto $(ARGS)

# The same environment, in which an older transformers hides the newer one.
test-transformers4: $(OLDER)/.installed  ## accelerate() under transformers 4.57, and inside GLiNER
	PYTHONPATH=$(OLDER) $(BIN)/python -m pytest -q tests/test_accelerate.py tests/test_integrations.py $(ARGS)

$(OLDER)/.installed: tests/transformers-4.57.txt $(INSTALLED)
	rm -rf $(OLDER)
	$(BIN)/python -m pip install -q --no-deps --target $(OLDER) -r $<
	@touch $@

# The interpreter has one thread.
test-triton: $(INSTALLED)  ## the Triton kernels in Triton's interpreter, on every core: long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m interpreted -n auto $(ARGS)

# Built first, so that no two processes do.
test-simt: $(INSTALLED)  ## the CUDA kernels on the CPU, also under sanitizers and valgrind
	PYTHONPATH=. $(BIN)/python tests/simulated.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "simulated and not slow" -n auto $(ARGS)

test-mutants: $(INSTALLED)  ## bugs put into the CUDA kernels, each of which some test must notice
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "simulated and slow" -n auto $(ARGS)

resources: $(INSTALLED)  ## the GPU kernels compiled for every GPU family, against their limits
	$(BIN)/python -m benchmarks.triton_resources --check
	$(BIN)/python -m benchmarks.cuda_resources --check

# A build with the compiler's sanitizers, apart from the installed one, runs the tests of the op.
test-sanitized: $(INSTALLED)  ## the CPU kernels' tests under ASan and UBSan
	FASTDEBERTA_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitized
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$$(echo $(CURDIR)/build/sanitized/lib*) \
	$(BIN)/pytest -q tests/test_cpu_kernels.py -k "instruction_set or unusual or more_threads" $(ARGS)

bench: $(INSTALLED)  ## the benchmarks
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

lint: $(INSTALLED)  ## ruff, ruff-format, mypy and clang-format, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

format: $(INSTALLED)  ## let ruff and clang-format rewrite the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(SOURCES)

clean:  ## remove what was built or cached, but not .venv
	rm -rf build dist *.egg-info fastdeberta/*.so $(INSTALLED)
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find fastdeberta tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
