# Each target sets up what it needs. PYTHON chooses the interpreter of the environment.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test tiny check native bench

.venv/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

setup: .venv/.ready          ## environment with everything, native kernels included where a compiler is found

demo: setup                  ## the whole line on handwritten digits; writes report/report.html
	$(BIN)/bitwright demo

test: setup                  ## all tests, one process per core
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

tiny: setup                  ## the tests that take less than a minute together
	$(BIN)/pytest -m "not slow and not shared_data"

check: setup                 ## format, lint, types, layers, size limits
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/sizes.py

native: setup                ## rebuild the native kernels in place
	$(BIN)/pip install -q -c constraints.txt --no-deps --force-reinstall -e .

bench: setup                 ## every benchmark behind the README's figures (from onnx_parity on they need the development data)
	for script in latency overhead qat_step onnx_parity resnet20 qat_resnet20 char_lstm minilm ptq_resnet20 ladder_resnet20 ptq_transformers tiny_models gptq_llama; do $(BIN)/python benchmarks/$$script.py || exit 1; done
