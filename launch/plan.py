"""What a sweep will cost, before anything is submitted: parameters, FLOPs and time."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from rich.table import Table

from analysis.planning.expected_precision import (
    USUAL,
    evaluation_error,
    expectation_lines,
    measured_noise,
)
from analysis.tables.run_table import final
from analysis.tables.sweep_folder import load
from analysis.words.numbers import seeds_text
from launch.job import Unit
from models.accounting import Account, account
from models.backbone import BackboneConfig
from sweeps.config import LadderConfig
from sweeps.grammar import Experiment, Sweep, trunks_of
from trainer.machine import gemm_peak_flops
from trainer.record import number, read_rows
from trainer.schedule import decay_begins
from untrusted.paths import inside

STEP_OVERHEAD_SECONDS = 0.005
"""Fixed cost of a step of a tiny model: launching small operations, the optimizer."""
PEAK_SHARE = 0.35
"""Share of the GEMM peak that small models reach, until speeds of finished runs are known."""
GPU_FLOPS, GPU_SHARE = 989e12, 0.4
"""Dense bf16 peak of an H100 SXM (NVIDIA's data sheet), and the share of it that a plan counts on
where no GPU is at hand to measure."""
STATE_CONTEXTS = (1_024, 8_192, 65_536)


@dataclass(frozen=True)
class PlannedRun:
    """One line of the plan."""

    experiment: Experiment
    account: Account
    unit: Unit
    new_tokens: int

    @property
    def flops(self) -> float:
        """Training FLOPs of the whole horizon, trunk included."""
        return self.account.training_flops_per_token * self.experiment.run.budget.tokens


@dataclass(frozen=True)
class Plan:
    """A sweep with its costs.

    Attributes:
        runs: every run, in the order of the sweep.
        units: what is trained together, longest first.
        seconds: estimated for all units on one worker.
    """

    sweep: Sweep
    runs: tuple[PlannedRun, ...]
    units: tuple[Unit, ...]
    seconds: dict[str, float]


def make_plan(sweep: Sweep, folder: Path) -> Plan:
    """Count everything and estimate times, from runs in the folder where there are any."""
    units = _units(sweep)
    accounts: dict[str, Account] = {}
    runs = []
    for unit in units:
        for experiment in unit.branches:
            key = f"{experiment.run.model}{experiment.run.corpus.seq_len}"
            if key not in accounts:
                accounts[key] = account(experiment.run.model, experiment.run.corpus.seq_len)
            shared = 0
            if unit.trunk is not None:
                batch = experiment.run.optimizer.batch_tokens
                shared = decay_begins(experiment.run) * batch
            new = experiment.run.budget.tokens - shared
            runs.append(PlannedRun(experiment, accounts[key], unit, new))
    seconds = {unit.name: _seconds(unit, runs, folder) for unit in units}
    ordered = sorted(units, key=lambda unit: -seconds[unit.name])
    return Plan(sweep, tuple(runs), tuple(ordered), seconds)


def ladder_table(runs: Sequence[PlannedRun]) -> pd.DataFrame:
    """One row per architecture, rung and context: every count the accountant has.

    Besides the context length of the runs, it has those at which decoding states are compared; a
    mixer with a maximum length is built for each.
    """
    rows = {}
    for planned in runs:
        run = planned.experiment.run
        for seq_len in dict.fromkeys((run.corpus.seq_len, *STATE_CONTEXTS)):
            key = (run.architecture, run.rung, seq_len)
            if key in rows or (run.model.form == "encoder" and seq_len != run.corpus.seq_len):
                continue
            counts = planned.account
            if seq_len != run.corpus.seq_len:
                counts = account(at_context(run.model, seq_len), seq_len)
            rows[key] = {
                "architecture": run.architecture,
                "rung": run.rung,
                "nominal_parameters": run.nominal_parameters,
                "d_model": run.model.d_model,
                "n_layers": run.model.n_layers,
                "parameter_error": planned.account.total_parameters / run.nominal_parameters - 1,
                **asdict(counts),
            }
    return pd.DataFrame(list(rows.values()))


def planned_points(runs: Sequence[PlannedRun]) -> pd.DataFrame:
    """The final points that the planned runs will give, as the precision analysis reads them."""
    return pd.DataFrame(
        {
            "architecture": planned.experiment.run.architecture,
            "corpus": planned.experiment.run.corpus.name,
            "rung": planned.experiment.run.rung,
            "seed": planned.experiment.run.seed,
            "order_seed": planned.experiment.run.corpus.shuffle_seed,
            "trunk_id": planned.unit.name,
            "parameters": float(planned.account.total_parameters),
            "tokens": float(planned.experiment.run.budget.tokens),
            "flops": float(planned.flops),
        }
        for planned in runs
        if not planned.experiment.label and not planned.experiment.probe
    )


def expected_lines(plan: Plan, folder: Path) -> list[str]:
    """How precisely the planned runs would answer; nothing for a search over learning rates.

    Seed noise is taken from finished runs in the folder, or else a typical value.
    """
    ladder = plan.sweep.config.ladders[plan.sweep.config.ladder]
    points = planned_points(plan.runs)
    if is_search(ladder) or len(points["rung"].unique()) < 2:
        return []
    noise = measured_noise(final(load(folder))) if (folder / "sweep.yaml").exists() else None
    if noise is None:
        noise = replace(USUAL.noise, evaluation=evaluation_error(_evaluation_tokens(plan)))
    return expectation_lines(points, replace(USUAL, noise=noise))


def _evaluation_tokens(plan: Plan) -> int | None:
    """Tokens of the neutral set that runs read at their end; None while nothing limits them."""
    first = plan.sweep.experiments[0]
    blocks = first.evaluation.final_blocks_per_set
    return None if blocks is None else blocks * first.run.corpus.block_tokens


def is_search(ladder: LadderConfig) -> bool:
    """Whether a ladder searches over learning rates or batches."""
    return len(ladder.learning_rate_factors) > 1 or len(ladder.batch_factors) > 1


def at_context(model: BackboneConfig, seq_len: int) -> BackboneConfig:
    """The backbone with the maximum lengths of its mixers set to a context length."""
    blocks = {
        name: replace(block, mixer=replace(block.mixer, max_len=seq_len))  # type: ignore[call-arg]
        if getattr(block.mixer, "max_len", None) is not None
        else block
        for name, block in model.blocks.items()
    }
    return replace(model, blocks=blocks)


def plan_table(plan: Plan, statuses: dict[str, str]) -> Table:
    """The plan as a table, one line per group of horizons."""
    table = Table(title=None, pad_edge=False, box=None, header_style="bold")
    for name, right in (
        ("id", False), ("architecture", False), ("corpus", False), ("rung", False),
        ("seed", True), ("parameters", True), ("vs rung", True), ("M tokens", True),
        ("FLOPs", True), ("time", True), ("status", False),
    ):  # fmt: skip
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for unit in sorted(plan.units, key=_reading_order):
        mine = [planned for planned in plan.runs if planned.unit is unit]
        run = mine[0].experiment.run
        off = mine[0].account.total_parameters / run.nominal_parameters - 1
        table.add_row(
            unit.name.removeprefix("trunk-")[:8],
            " ".join([run.architecture, _marked(unit.branches[0])]).strip(),
            run.corpus.name,
            run.rung,
            seeds_text(run.seed, run.corpus.shuffle_seed),
            f"{mine[0].account.total_parameters:,}",
            f"{off:+.2%}",
            " ".join(f"{p.experiment.run.budget.tokens / 1e6:.2f}" for p in mine),
            f"{max(p.flops for p in mine):.1e}",
            duration(plan.seconds[unit.name]),
            statuses[unit.name],
        )
    return table


def _marked(experiment: Experiment) -> str:
    """What sets a run apart from those of the study itself."""
    if experiment.probe is None:
        return experiment.label
    probe = experiment.probe
    if probe.batch_factor != 1:
        return f"(batch x {probe.batch_factor:g})"
    return f"(rate x {probe.learning_rate_factor:g})"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _reading_order(unit: Unit) -> tuple:
    run = unit.branches[0].run
    return (run.architecture, run.corpus.name, run.nominal_parameters, run.seed, unit.name)


def _units(sweep: Sweep) -> list[Unit]:
    plain = [e for e in sweep.experiments if not e.label]
    units = [Unit(e.folder_name, (e,)) for e in sweep.experiments if e.label]
    groups: dict[str, list[Experiment]] = {}
    for experiment in plain:
        groups.setdefault(experiment.trunk_id, []).append(experiment)
    for name, trunk in trunks_of(plain).items():
        branches = tuple(groups[name])
        if trunk is None:
            units += [Unit(e.folder_name, (e,)) for e in branches]
        else:
            units.append(Unit(name, branches, trunk.experiment, trunk.forks))
    return units


def _seconds(unit: Unit, runs: Sequence[PlannedRun], folder: Path) -> float:
    planned = next(p for p in runs if p.unit is unit)
    run, execution = planned.experiment.run, planned.experiment.execution
    measured = _measured_rate(inside(folder, unit.name)) or _measured_rate(inside(folder, run.rung))
    if measured is not None:
        return unit.tokens / measured
    if on_absent_gpu(planned.experiment):
        work = planned.account.training_flops_per_token * unit.tokens
        return work / (GPU_SHARE * GPU_FLOPS * execution.ranks)
    steps = unit.tokens / run.optimizer.batch_tokens
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peak = gemm_peak_flops(device, torch.float32) * execution.ranks
    work = planned.account.training_flops_per_token + planned.account.scan_flops_per_token
    return steps * STEP_OVERHEAD_SECONDS + work * unit.tokens / (PEAK_SHARE * peak)


def on_absent_gpu(experiment: Experiment) -> bool:
    """Whether a run is for GPUs and this machine has none: bf16 products are not for CPUs."""
    return experiment.run.precision == "bf16" and not torch.cuda.is_available()


def _measured_rate(folder: Path) -> float | None:
    try:
        rows = read_rows(folder / "metrics.jsonl")[-50:]
        rates = sorted(number(row, "tokens_per_second") for row in rows)
    except RuntimeError:
        # A damaged record is named where its run is opened; an estimate can do without it.
        return None
    return rates[len(rates) // 2] if rates else None
