# setup makes .venv with everything; test-gpu, sanitize-gpu and bench use $(PYTHON) as it is, because GPU
# machines bring their own torch.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
NATIVE := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/kernels/* csrc/ops/*)
TEST_BUILD := build/tests

.PHONY: setup demo test test-gpu lint sanitize sanitize-gpu fuzz bench docs figures wheel clean size todo

setup: $(VENV)/built.stamp

# torch by name and first: the newest where there is a GPU, else a version whose wheel is the CPU build.
$(VENV)/tools.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q "setuptools>=77" wheel "cmake>=3.25" ninja "pybind11>=2.12"
	touch $@

$(VENV)/built.stamp: $(VENV)/tools.stamp $(NATIVE)
	$(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m pgolf demo

# One worker per core; the tests of a file stay together, as many share what a file's first test made. Files are
# in the order of tests/conftest.py; xdist would start those with the fewest tests last, which take longest.
test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m pytest -m gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -regex '.*\.\(cpp\|h\|cuh?\)' | xargs $(BIN)/clang-format --dry-run -Werror

sanitize: setup
	$(BIN)/cmake -S . -B $(TEST_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DPGOLF_BUILD_MODULE=OFF -DPGOLF_BUILD_TESTS=ON -DPGOLF_CUDA=OFF
	$(BIN)/cmake --build $(TEST_BUILD)
	$(BIN)/ctest --test-dir $(TEST_BUILD) --output-on-failure --no-tests=error
	$(if $(shell command -v nvidia-smi),$(MAKE) sanitize-gpu PYTHON=$(BIN)/python,@echo "no GPU: CUDA not checked")

sanitize-gpu:
	compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m pytest -q -m gpu tests/ops
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) -m pytest -q -m gpu tests/ops

# About 20 minutes on two idle cores; a few thousand of these inputs are part of `make test` and `make sanitize`.
fuzz: setup
	$(BIN)/python -m bench.fuzz

bench:
	set -e; for file in $(filter-out %range_coder.py,$(wildcard bench/ops/bench_*.py)); do $(PYTHON) -m bench.ops.$$(basename $$file .py); done

# The site, into build/site. Strict: a broken link or an unknown name ends it (never with --quiet, which counts no warnings).
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The pictures of README and docs/, from the committed result files.
figures: setup
	$(BIN)/python -m bench.figures

# One wheel for every torch from 2.11 and every Python from 3.10, audited and tested; TORCHES="2.11.0 2.15.0".
wheel: setup
	TORCHES="$(TORCHES)" bash .ci/wheel

clean:
	rm -rf build dist pgolf/_C*.so pgolf/_build_info.json *.egg-info $(VENV)/built.stamp .mypy_cache .pytest_cache .ruff_cache .hypothesis

size:
	git ls-files '*.py' '*.cpp' '*.h' '*.cu' '*.cuh' | xargs wc -l | sort -n

todo:
	@git grep -n 'TODO(' -- ':!Makefile' ':!tests/test_architecture.py' || echo "no TODO"
