# The front door. Each target sets everything up first (once), then calls one module.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

.PHONY: setup sweep ladder smoke hip test quick check conformance large kernels sequence-parallel wire long-context
.PHONY: bench growth laws recovery decode faults slurm lock
sweep: setup ; $(BIN)/python launch/sweep.py sweeps/scaling.yaml
smoke: setup ; $(BIN)/python launch/sweep.py sweeps/smoke.yaml
hip:   setup ; $(BIN)/python launch/sweep.py sweeps/hip.yaml && $(BIN)/python launch/swap.py runs/hip
test:  setup ; $(BIN)/python -m tests.run
quick: setup ; $(BIN)/python -m tests.quick
check: setup ; $(BIN)/python -m tests.check
ladder: setup ; $(BIN)/python launch/ladder.py
conformance: setup ; $(BIN)/python -m tests.conformance.run
large: setup ; $(BIN)/python -m tests.benchmarks.memory.large_step
kernels: setup ; $(BIN)/python -m tests.kernels.run && $(BIN)/python -m tests.benchmarks.kernels.report
sequence-parallel: setup ; $(BIN)/python -m tests.sequence_parallel.run
wire: setup ; $(BIN)/python -m tests.benchmarks.wire.wire
long-context: setup ; $(BIN)/python -m tests.benchmarks.memory.long_context
growth: setup ; $(BIN)/python -m tests.benchmarks.growth.bench_growth
bench: setup ; $(BIN)/python -m tests.benchmarks.training.bench && $(BIN)/python -m tests.benchmarks.training.bench_architectures && $(BIN)/python -m tests.benchmarks.training.bench_profile
laws: setup ; $(BIN)/python -m tests.laws --out reports
recovery: setup ; $(BIN)/python -m tests.benchmarks.statistics.recovery
decode: setup ; $(BIN)/python -m tests.benchmarks.decode.bench_decode
faults: setup ; $(BIN)/python -m tests.faults.run
slurm: setup ; $(BIN)/python -m tests.cluster.run
lock:  setup ; $(BIN)/python setup_environment.py --lock

# Idempotent, and goes on after an interrupt: every step leaves a mark only when it is complete.
setup:
	@$(PYTHON) setup_environment.py
