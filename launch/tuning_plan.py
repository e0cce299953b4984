"""What a plan says about learning rates: where they come from, their range, and their probes."""

from collections.abc import Iterator, Sequence

from launch.plan import Plan, duration, is_search
from sweeps.architecture import ArchitectureConfig, read_architectures
from sweeps.config import PowerRule
from sweeps.recipes import arms
from sweeps.tuning_rule import Place, TuningRule
from trainer.config import RunConfig


def tuning_lines(plan: Plan) -> list[str]:
    """How the rates of a study were found, and what checks them; nothing for a search."""
    config = plan.sweep.config
    ladder = config.ladders[config.ladder]
    if is_search(ladder):
        return []
    own = [each for each in plan.runs if not each.experiment.probe]
    lines = ["Learning rates:"]
    for name, architecture, _ in arms(config):
        mine = [e.experiment.run for e in own if e.experiment.run.architecture == name]
        mine.sort(key=lambda run: run.nominal_parameters)
        if mine and name == architecture:
            lines += [f"  {line}" for line in _of(name, plan, mine)]
        elif mine:
            lines.append(f"  {name}: {_rates(mine)}, by the same rule; no search of its recipe")
    return [*lines, f"  {_probe_line(plan)}"]


def _of(name: str, plan: Plan, runs: Sequence[RunConfig]) -> Iterator[str]:
    """The rates of an architecture from its smallest rung to its largest, and their source."""
    config = plan.sweep.config
    ladder, architecture = config.ladders[config.ladder], read_architectures()[name]
    rates, rule = _rates(runs), architecture.tuning
    if "learning_rate" in config.optimizer:
        yield f"{name}: {rates}, as optimizer.learning_rate says; no search stands behind it"
    elif ladder.learning_rate is not None:
        rule_of = f"the ladder's rule ({_source(ladder.learning_rate)})"
        yield f"{name}: {rates}, by {rule_of}{_scaled(architecture)}"
    elif rule is not None:
        yield f"{name}: {rates}, by its own rule (search {rule.search})"
        yield from dict.fromkeys(_outside(rule, run) for run in runs if _outside(rule, run))


def _outside(rule: TuningRule, run: RunConfig) -> str:
    """What of a run lies outside the search, each budget by itself; empty if nothing does."""
    batch = run.optimizer.batch_tokens
    found = rule.outside(Place(run.nominal_parameters, run.budget.tokens, batch))
    return f"  outside the search at {run.rung}: {', '.join(found)}" if found else ""


def _rates(runs: Sequence[RunConfig]) -> str:
    rates = f"{runs[0].optimizer.peak:.2g} at {runs[0].rung}"
    if runs[-1].rung != runs[0].rung:
        rates += f" to {runs[-1].optimizer.peak:.2g} at {runs[-1].rung}"
    return rates


def _source(rule: PowerRule) -> str:
    return rule.source or "no source stated"


def _scaled(architecture: ArchitectureConfig) -> str:
    scale = architecture.learning_rate_scale
    if scale == 1:
        return ""
    return f" x {scale:g} ({architecture.learning_rate_evidence or 'no evidence stated'})"


def _probe_line(plan: Plan) -> str:
    units = {each.unit.name for each in plan.runs if each.experiment.probe}
    config = plan.sweep.config
    if units:
        seconds = sum(plan.seconds[name] for name in units)
        return (
            f"tuning probes: {len(units)} runs at half and twice the rate or batch, "
            f"{duration(seconds)} of {duration(sum(plan.seconds.values()))} on one worker"
        )
    rung = config.ladders[config.ladder].rungs[0]
    return (
        "no tuning probes: the report cannot say what rate and batch cost each arm; ask for them "
        f"with ladders.{config.ladder}.tuning_probes={{rungs: [{rung}]}}"
    )
