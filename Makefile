# Two commands: `make train` and `make test`. Both make .venv from the lock file first; nothing is needed but Python >= 3.11 with pip.
#   make train ARGS="--data.dir photos --train.steps 50"    words for the trainer
#   make test ARGS="-k images -x"                           words for pytest
#   make native         the C++ kernels, where a compiler is found (train and test do it themselves)
#   make bench-smoke    every bench at its smallest, to see that it runs
#   make clean          what was built, and .venv; never runs/

PYTHON ?= python3
VENV := .venv
RUN := PYTHONPATH=.:kernels $(VENV)/bin/python
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(8, len(os.sched_getaffinity(0))))' 2>/dev/null || echo 1)
COMPILER := $(shell command -v c++ || command -v g++ || command -v clang++)
ARGS ?=

.PHONY: train test native bench-smoke clean

train: native
	$(RUN) -m vise_fast.train $(ARGS)

# one thread a worker: torch's own threads would fight over the cores
test: native
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(JOBS) $(ARGS)

bench-smoke: native
	for bench in bench/[a-z]*.py; do echo "== $$bench"; $(RUN) $$bench --smoke || exit 1; done

native: $(VENV)/native.stamp

# a compiler that is there must succeed; without one the plain paths run
$(VENV)/native.stamp: $(VENV)/packages.stamp CMakeLists.txt $(wildcard kernels/csrc/*)
ifeq ($(COMPILER),)
	@echo "no C++ compiler: the plain kernels will run (same results, slower images)"
else
	$(RUN) -m vise_kernels.build
endif
	@touch $@

# some systems ship venv without pip: then the system's pip fills the environment
$(VENV)/packages.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; say make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install -q pip; }
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis
	find kernels -name '_native*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
