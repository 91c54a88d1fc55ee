# Two commands from a fresh clone: `make demo` and `make test`. Nothing but Python 3.11 or newer and make is needed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# One maths thread a process: tests and the demo start as many processes as there are cores.
export OMP_NUM_THREADS ?= 1
# Test files at once. A file's tests stay in one process, which makes what they share once; many start ranks of their own.
AT_ONCE ?= 2

.PHONY: demo test test-all test-gpu faults lint format tensorboard clean

demo: $(VENV)/.installed  ## the whole pipeline in miniature; DATA=folder uses your own SA-1B-format images
	$(RUN) -m trainer.demo --out demo $(if $(DATA),--data "$(DATA)") $(if $(SEED),--seed $(SEED))

test: $(VENV)/.installed  ## one representative of every promise
	$(RUN) -m pytest -n $(AT_ONCE) --dist loadfile -m "not slow and not slurm"

test-all: $(VENV)/.installed  ## the matrices and the long ones too
	$(RUN) -m pytest

test-gpu: $(VENV)/.installed  ## what only a GPU shows
	$(RUN) -m pytest -m gpu

faults: $(VENV)/.installed  ## break training on purpose in every way we know; prints what was lost
	$(RUN) -m tests.faults

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

tensorboard: $(VENV)/.installed  ## open TensorBoard on the last run
	@run=$$(ls -td demo/runs runs 2>/dev/null | head -n 1); \
	test -n "$$run" || { echo "no run yet: make demo"; exit 1; }; \
	$(VENV)/bin/tensorboard --logdir "$$run"

# Installed again only when what it was installed from changed.
$(VENV)/.installed: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed: $(PYTHON) is $$($(PYTHON) --version 2>&1 || true). Try make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt -c constraints.txt
	@touch $@

clean:
	rm -rf demo .pytest_cache .ruff_cache
