# Two commands: `make train` and `make test`. Both make .venv from the lock file first; nothing is needed but Python >= 3.11 with pip.
# After either, `.venv/bin/vise-fast train` works as it is typed, with no variable set.
#   make train ARGS="--data.dir photos --train.steps 50"    words for the trainer
#   make test ARGS="-k images -x"                           words for pytest
#   make native         the C++ kernels, where a compiler is found (train and test do it themselves)
#   make bench-smoke    every bench that has a smallest form, to see that it runs
#   make sanitize       the C++ kernels' own tests, with every access to memory watched (some minutes)
#   make soak           200 kills of whole short runs (ten minutes), into bench/results/soak.json
#   make mutants        small faults planted in the code: do its tests notice? (tests/mutants.py, half an hour)
#   make lint           format, linter and types, as CI asks for them
#   make consumers      what others do with an adapter (PEFT, AutoProcessor, lmms-eval), in an environment of 7 GB
#   make vllm           the same for vLLM, in an environment of 4 GB beside that one
#   make clean          what was built, and .venv; never runs/

PYTHON ?= python3
VENV := .venv
MUTANTS := .venv-mutants
RUN := $(VENV)/bin/python
CONSUMERS := build/consumers
VLLM := build/vllm
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(8, len(os.sched_getaffinity(0))))' 2>/dev/null || echo 1)
COMPILER := $(shell command -v c++ || command -v g++ || command -v clang++)
ARGS ?=

.PHONY: train test native bench-smoke sanitize soak mutants lint consumers vllm clean

train: native
	$(RUN) -m vise_fast.train $(ARGS)

# one thread a worker: torch's own threads would fight over the cores
test: native
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(JOBS) $(ARGS)

# peers.py apart: it needs TRL, in an environment of its own
bench-smoke: native
	for bench in $$(grep -l -e '"--smoke"' -e 'of_scenes(__doc__' bench/[a-z]*.py | grep -v peers); do echo "== $$bench"; $(RUN) $$bench --smoke || exit 1; done

# the watched module is built beside, under build/: the one that runs stays as it is
sanitize: $(VENV)/checkout.stamp
	$(RUN) tests/kernels/sanitize.py $(ARGS)

soak: native
	OMP_NUM_THREADS=1 $(RUN) bench/soak.py --write $(ARGS)

# cosmic-ray in an environment of its own: it makes the faults, the trainer's environment runs the tests
mutants: native $(MUTANTS)/packages.stamp
	$(MUTANTS)/bin/python tests/mutants.py draw $(MUTANTS)/faults.json $(ARGS)
	OMP_NUM_THREADS=1 $(RUN) tests/mutants.py run $(MUTANTS)/faults.json

$(MUTANTS)/packages.stamp: $(VENV)/packages.stamp Makefile
	$(PYTHON) -m venv $(MUTANTS) || $(PYTHON) -m venv --clear --without-pip $(MUTANTS)
	$(RUN) -m pip --python $(MUTANTS)/bin/python install -q --disable-pip-version-check cosmic-ray==8.7.0
	@touch $@

native: $(VENV)/native.stamp

# a compiler that is there must succeed; without one the plain paths run
$(VENV)/native.stamp: $(VENV)/checkout.stamp CMakeLists.txt $(wildcard kernels/csrc/*)
ifeq ($(COMPILER),)
	@echo "no C++ compiler: the plain kernels will run (same results, slower images)"
else
	@echo "compiling the image kernels, once"
	$(RUN) -m vise_kernels.build
endif
	@touch $@

# The checkout and its kernels/ join the path of the environment's Python, named from there on: checkout and
# environment may move together. What PYTHONPATH names, or pip installs into the environment, still comes first.
$(VENV)/checkout.stamp: $(VENV)/packages.stamp
	@$(RUN) -c 'import os, pathlib, sysconfig; \
	site = pathlib.Path(sysconfig.get_path("purelib")); \
	places = [os.path.relpath(place, site) for place in (".", "kernels")]; \
	(site / "vise_fast_checkout.pth").write_text("\n".join(places) + "\n")'
	@printf '#!/bin/sh\nexec "$$(dirname "$$0")/python" -m vise_fast "$$@"\n' > $(VENV)/bin/vise-fast
	@chmod +x $(VENV)/bin/vise-fast
	@touch $@

# some systems ship venv without pip: then the system's pip fills the environment
$(VENV)/packages.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; say make PYTHON=/path/to/python3"; exit 1; }
	@echo "making $(VENV) and installing the packages of constraints.txt: about 2 GB to download (torch), some minutes, once"
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install -q pip; }
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r constraints.txt
	@touch $@

lint: $(VENV)/packages.stamp
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(if $(wildcard .clang-format kernels/csrc/.clang-format),$(VENV)/bin/clang-format --dry-run -Werror kernels/csrc/*)

consumers: $(CONSUMERS)/made.stamp
	OMP_NUM_THREADS=1 $(CONSUMERS)/bin/python -m pytest -q tests/consumers $(ARGS)

$(CONSUMERS)/made.stamp: tests/consumers/requirements.txt vise_fast/table/environment.txt
	@echo "installing lmms-eval and what it needs into $(CONSUMERS): 7 GB, once"
	$(PYTHON) -m venv $(CONSUMERS) || { $(PYTHON) -m venv --clear --without-pip $(CONSUMERS) && $(PYTHON) -m pip --python $(CONSUMERS)/bin/python install -q pip; }
	$(CONSUMERS)/bin/python -m pip install -q --disable-pip-version-check -r tests/consumers/requirements.txt
	@touch $@

vllm: $(CONSUMERS)/made.stamp $(VLLM)/made.stamp
	OMP_NUM_THREADS=1 $(CONSUMERS)/bin/python -m pytest -q tests/consumers/test_vllm.py $(ARGS)

$(VLLM)/made.stamp: tests/consumers/vllm.txt tests/consumers/declare_ops.py
	$(PYTHON) -m venv $(VLLM) || { $(PYTHON) -m venv --clear --without-pip $(VLLM) && $(PYTHON) -m pip --python $(VLLM)/bin/python install -q pip; }
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check -r tests/consumers/vllm.txt
	$(VLLM)/bin/python -m pip uninstall -q -y torchaudio torchcodec
	$(VLLM)/bin/python tests/consumers/declare_ops.py
	@touch $@

clean:
	rm -rf $(VENV) $(MUTANTS) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find kernels -name '_native*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
