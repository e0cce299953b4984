# The front door. Each target sets everything up first (once), then calls one module.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

.PHONY: setup sweep smoke test check conformance bench faults slurm lock
sweep: setup ; $(BIN)/python launch/sweep.py sweeps/scaling.yaml
smoke: setup ; $(BIN)/python launch/sweep.py sweeps/smoke.yaml
test:  setup ; $(BIN)/python -m tests.run
check: setup ; $(BIN)/python -m tests.check
conformance: setup ; $(BIN)/python -m tests.conformance.run
bench: setup ; $(BIN)/python -m tests.bench
faults: setup ; $(BIN)/python -m tests.faults.run
slurm: setup ; $(BIN)/python -m tests.cluster.run
lock:  setup ; $(BIN)/python setup_environment.py --lock

# Idempotent, and goes on after an interrupt: every step leaves a mark only when it is complete.
setup:
	@$(PYTHON) setup_environment.py
