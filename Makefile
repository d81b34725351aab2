# make chat   sets everything up in .venv, fetches the built-in model, opens the chat
# make test   the same, then all tests        make lint    style and types
# make test-long     slow tests: every instruction set, sanitizers, slips in the host code of Metal, ranks
#                    that are lost or differ, apps on several ranks; under 25 minutes on 2 cores
# make test-system   as root, with Debian packages that it installs: NEON kernels under qemu, hosts as
#                    network namespaces
# make test-macos-link   compiles and links the extension for Apple silicon, on any machine
# make clean  removes what make made here
# Works with GNU make 3.81 (macOS) and any POSIX shell. Everything but an answer goes to stderr.

SHELL = /bin/sh
VENV = .venv
PY = $(VENV)/bin/python
SETUP = PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/setup.sh
SYSTEM_PACKAGES = qemu-user iproute2
CXX_FILES = $$(find csrc tests/kernels tests/sanitizer tests/macos tests/msl -name '*.cpp' -o -name '*.mm' -o -name '*.h')
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

# A prompt is passed on through the environment and as it is, so quotes and dollar signs survive.
override PROMPT := $(value PROMPT)
override MODEL := $(value MODEL)
export PROMPT MODEL

.PHONY: chat test test-long test-system test-macos-link lint format clean

chat: $(VENV)/.package $(if $(value MODEL),,$(VENV)/.model)
	@set -- ; \
	if [ -n "$$MODEL" ]; then set -- "$$@" --model "$$MODEL"; fi; \
	if [ -n "$$PROMPT" ]; then set -- "$$@" --prompt "$$PROMPT"; fi; \
	exec $(PY) -m torch_q4metal.chat "$$@"

test: $(VENV)/.package $(VENV)/.model $(VENV)/.dev
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(VENV)/.package $(VENV)/.model $(VENV)/.dev
	$(PY) -m pytest tests/long

test-system: $(VENV)/.package $(VENV)/.model $(VENV)/.dev
	@sh scripts/system.sh $(SYSTEM_PACKAGES) >&2
	$(PY) -m pytest tests/system

test-macos-link: $(VENV)/.package $(VENV)/.dev
	$(PY) tests/macos/link.py

lint: $(VENV)/.package $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --platform darwin --cache-dir .mypy_cache/darwin
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/codespell README.md CHANGELOG.md CONTRIBUTING.md csrc torch_q4metal tests examples scripts benchmarks

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build torch_q4metal.egg-info torch_q4metal/_build.json torch_q4metal/_C.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.torch: scripts/setup.sh
	@$(SETUP) torch >&2

$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	@$(SETUP) package >&2

$(VENV)/.model: $(VENV)/.package
	@$(SETUP) model >&2

$(VENV)/.dev: $(VENV)/.package pyproject.toml
	@$(SETUP) dev >&2
