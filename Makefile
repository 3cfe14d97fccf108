# make quickstart   train a small GPT with Sophia-G on text that every Python has, and show what it learnt
# make test         run every test
# make gpu-check    on a GPU: the tests that need one, then the speed of every optimizer
# make format       format and lint the sources

PYTHON ?= python3
BIN := .venv/bin
QUICKSTART_FLAGS ?=
OUT := out/quickstart
# glibc keeps freed memory for the next step, which is faster on a CPU (docs/running.md)
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000

.PHONY: quickstart test gpu-check format

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 …" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/quickstart: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

TEST_TOOLS := tests/requirements.txt tools/requirements.txt requirements.txt
.venv/test: $(TEST_TOOLS) | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

# what the tests of CUDA need, unless PyTorch brought it; a CPU build does not expect it in the environment itself
.venv/triton: tests/cuda/requirements.txt | .venv/test
	rm -rf $@
	$(BIN)/python -c "import triton" 2> /dev/null \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ -r $< \
		|| echo "Triton cannot be installed here: the tests of CUDA are skipped"

data/stdlib/meta.json: data/stdlib/prepare.py .venv/quickstart
	$(BIN)/python data/stdlib/prepare.py --overwrite

quickstart: .venv/quickstart data/stdlib/meta.json
	rm -rf $(OUT)
	$(KEEP_MEMORY) $(BIN)/python train.py config/quickstart.py --out_dir=$(OUT) $(QUICKSTART_FLAGS)
	$(BIN)/python sample.py --out_dir=$(OUT) --start="def " --max_new_tokens=600
	$(BIN)/python plot.py $(OUT) -o $(OUT)/curves.png

test: .venv/test .venv/triton
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# without pip, as a GPU machine may have no network
gpu-check: HERE := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-check: NEEDED := torch numpy tiktoken tqdm safetensors filelock matplotlib pytest
gpu-check:
	@$(HERE) -c 'import sys; from importlib.util import find_spec as find; m = [n for n in sys.argv[1:] if not find(n)]; \
	  sys.exit(f"missing: {chr(32).join(m)}; make .venv/test installs them into .venv" if m else 0)' $(NEEDED)
	$(HERE) -m tools.gpu_check

format: .venv/test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
