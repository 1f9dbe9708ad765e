# make test, make demo: each sets up all it needs (.venv, dependencies, build), once.
#
#   PYTHON=python3.12   the interpreter for .venv       TORCH=2.11.0  another torch than the pinned
#   EFFLLM_CUDA=on|off  see CMakeLists.txt              ARGS=...      passed on to the command
#   WORKERS=4           test processes
VENV_PYTHON := .venv/bin/python
READY := .venv/ready-$(or $(TORCH),pinned)
WORKERS ?= 2
# Threads in each of several processes would only compete.
PYTEST := OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest

.PHONY: build test demo lint bench clean
.DEFAULT_GOAL := build

# Another torch is another environment: the marks of all others go.
$(READY): pyproject.toml .ci/constraints.txt .ci/setup_venv.sh
	@rm -f .venv/ready-*
	@bash .ci/setup_venv.sh
	@touch $@

# Always asked: CMake compiles what has changed, in a second if nothing has.
build: $(READY)
	@$(VENV_PYTHON) setup.py -q build_ext --inplace

test: build
	@$(PYTEST) -n $(WORKERS) $(ARGS)

demo: build
	@$(VENV_PYTHON) -m effllm demo $(ARGS)

lint: $(READY)
	@$(VENV_PYTHON) -m ruff check
	@$(VENV_PYTHON) -m ruff format --check
	@$(VENV_PYTHON) -m mypy python/effllm
	@find csrc -name '*.[ch]*' | xargs .venv/bin/clang-format --dry-run -Werror

# Benchmarks run alone, with all threads.
bench: build
	@$(VENV_PYTHON) -m pytest bench --rows build/bench $(ARGS)
	@$(VENV_PYTHON) bench/report.py build/bench/*.json

# Keeps .venv: remove that by hand to start from nothing.
clean:
	@rm -rf build dist python/effllm/lib python/effllm/_host.*.so python/*.egg-info
