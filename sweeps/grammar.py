"""Expand a sweep file into experiments: ladders x architectures x corpora x ..."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from data_pipelines.config import DataConfig
from data_pipelines.shares import require_amounts
from data_pipelines.tokenizers import vocabulary_size
from sweeps.architecture import ArchitectureConfig, read_architectures
from sweeps.cells import Cell, Probe, cells, is_probe, matches, read_rules
from sweeps.checks import check_run
from sweeps.config import CorporaConfig, LadderConfig, SweepConfig
from sweeps.optimizer_of import horizons_of, optimizer_of
from sweeps.overrides import refuse_unused
from sweeps.rungs import find_rung
from sweeps.sizing import ADMITTED_ERROR, OVERRIDDEN_ERROR, Shape, Sized, size_architecture
from sweeps.sizing import nominal_parameters as count_nominal
from trainer.config import (
    FORMS,
    BudgetConfig,
    EvaluationConfig,
    ExecutionConfig,
    RunConfig,
    check_hiding,
)
from trainer.ids import run_id, trunk_id
from trainer.recipe import ScheduleConfig
from trainer.schedule import decay_begins
from trainer.schema import ConfigError, load, merge, read_overrides, read_yaml, suggest
from untrusted.paths import plain_name


@dataclass(frozen=True)
class Experiment:
    """One point of a sweep: what is trained, how, and what is measured.

    Attributes:
        label: set where a run repeats another one under another execution; part of its folder.
        probe: set where a run checks the tuning of another; None for a run of the study itself.
    """

    run: RunConfig
    execution: ExecutionConfig
    evaluation: EvaluationConfig
    label: str = ""
    probe: Probe | None = None

    def __post_init__(self) -> None:
        check_hiding(self.run, self.evaluation.mask_rate, "evaluation.mask_rate")
        if self.label:
            plain_name("label", self.label)

    @property
    def run_id(self) -> str:
        """Hash of what is trained."""
        return run_id(self.run)

    @property
    def folder_name(self) -> str:
        """Name of its folder: the run id, and the label of a repeat."""
        return f"{self.run_id}.{self.label}" if self.label else self.run_id

    @property
    def trunk_id(self) -> str:
        """The id that it shares with its other horizons."""
        return trunk_id(self.run)


@dataclass(frozen=True)
class Sweep:
    """A sweep file, expanded."""

    config: SweepConfig
    experiments: tuple[Experiment, ...]

    @property
    def corpora(self) -> CorporaConfig:
        """The chosen corpora."""
        return self.config.corpora[self.config.corpus]

    @property
    def folder_name(self) -> str:
        """Folder of its runs: the sweep's name, and the ladder's where it is not the default."""
        name, ladder = self.config.name, self.config.ladder
        return name if ladder == "default" else f"{name}-{ladder}"


@dataclass(frozen=True)
class Trunk:
    """The constant-rate run that several horizons branch off.

    Attributes:
        experiment: the trunk as an experiment of its own, up to its last fork.
        forks: steps at which horizons begin to decay.
    """

    experiment: Experiment
    forks: frozenset[int]


def read_sweep_file(path: Path, overrides: Sequence[str]) -> Sweep:
    """Expand a sweep file.

    Raises:
        ConfigError: lists every problem of the file and the overrides.
    """
    try:
        over = read_overrides(overrides)
        config = load(SweepConfig, merge(read_yaml(path), over))
        _choose("ladder", config.ladder, config.ladders)
        _choose("corpus", config.corpus, config.corpora)
        experiments = tuple(_expand(config))
        refuse_unused(config, over, [e.run.corpus.name for e in experiments])
        return Sweep(config, experiments)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def trunks_of(experiments: Sequence[Experiment]) -> dict[str, Trunk | None]:
    """The trunk of each group that differs in horizon alone; None for a group of one."""
    groups: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        groups.setdefault(experiment.trunk_id, []).append(experiment)
    return {name: _trunk(group) if len(group) > 1 else None for name, group in groups.items()}


def _trunk(group: list[Experiment]) -> Trunk:
    first = group[0]
    forks = frozenset(decay_begins(experiment.run) for experiment in group)
    last = max(forks)
    if min(forks) == 0:
        raise ConfigError(
            f"schedule.decay_fraction {first.run.schedule.decay_fraction} leaves no step before "
            "the decay, from which horizons could branch; lower it"
        )
    run = replace(
        first.run,
        schedule=replace(first.run.schedule, decay_fraction=0.0),
        budget=BudgetConfig(last * first.run.optimizer.batch_tokens),
    )
    return Trunk(replace(first, run=run), forks)


def _expand(config: SweepConfig) -> Sequence[Experiment]:
    problems: list[str] = []
    seen: dict[str, Experiment] = {}
    for experiment in _kept(config, problems):
        name = experiment.folder_name
        # The study's own runs come first, and a probe that is one of them adds nothing.
        known = seen.setdefault(name, experiment)
        if known != replace(experiment, probe=known.probe):
            problems.append(
                f"also repeats run {name} with another execution; give the entry a label of its own"
            )
    if problems:
        raise ConfigError("\n  ".join(dict.fromkeys(problems)))
    if not seen:
        raise ConfigError("the sweep has no runs; check architectures, rungs and exclude")
    return list(seen.values())


def _kept(config: SweepConfig, problems: list[str]) -> Iterator[Experiment]:
    """The experiments of every cell that no rule excludes; what is wrong goes to `problems`."""
    architectures = read_architectures()
    rules = read_rules("exclude", config.exclude)
    unmatched = dict(enumerate(rules))

    def excluded(cell: Cell) -> bool:
        found = [i for i, rule in enumerate(rules) if matches(cell, rule)]
        for i in found:
            unmatched.pop(i, None)
        return bool(found)

    for cell in cells(config):
        if excluded(cell):
            continue
        try:
            made = list(_experiments(config, architectures, cell))
        except (ConfigError, ValueError) as error:
            problems.append(str(error))
            continue
        for experiment in made:
            if not excluded({**cell, "horizon": experiment.run.budget.tokens}):
                yield experiment
    for i in unmatched if not problems else ():
        problems.append(
            f"exclude[{i}] {config.exclude[i]} matches no run; correct it, or give exclude=[]"
        )


def _experiments(
    config: SweepConfig, architectures: Mapping[str, ArchitectureConfig], cell: Cell
) -> Iterator[Experiment]:
    name = cell["architecture"]
    _choose("architecture", name, architectures)
    architecture = _overridden(architectures[name], config)
    ladder, corpora = config.ladders[config.ladder], config.corpora[config.corpus]
    _choose("corpus mixture", cell["corpus"], corpora.mixtures)
    # Objectives that hide tokens have an id for what is hidden, after the tokenizer's.
    vocab_size = vocabulary_size(corpora.dataset.tokenizer) + (config.objective != "causal_lm")
    rung = find_rung(cell["rung"])
    # An overridden model may miss its rung by more; the plan shows by how much.
    tolerance = OVERRIDDEN_ERROR if config.model or ladder.model else ADMITTED_ERROR
    fitted = _fit(name, architecture, Shape(rung, vocab_size, ladder.seq_len), tolerance)
    nominal = count_nominal(rung, vocab_size)
    schedule = load(
        ScheduleConfig, merge({"warmup_tokens": ladder.warmup_tokens}, config.schedule), "schedule"
    )
    optimizer = optimizer_of(config, architecture, cell, nominal)
    for tokens in _horizons(cell, ladder, nominal, optimizer.batch_tokens):
        if schedule.kind != "wsd":
            optimizer = optimizer_of(config, architecture, cell, nominal, tokens)
        run = RunConfig(
            architecture=name,
            rung=rung.name,
            nominal_parameters=nominal,
            model=fitted.model,
            corpus=_corpus(cell, corpora, ladder),
            optimizer=optimizer,
            schedule=schedule,
            budget=BudgetConfig(tokens),
            precision=resolve_precision(ladder.precision),
            seed=cell["seed"],
            objective=config.objective,
            mask_rate=config.mask_rate,
            z_loss=config.z_loss,
        )
        require_amounts(run.corpus, tokens)
        execution = merge(merge(ladder.execution, config.execution), cell.get("execution", {}))
        evaluation = merge(ladder.evaluation, config.evaluation)
        execution = load(ExecutionConfig, execution, "execution")
        check_run(run, execution)
        yield Experiment(
            run,
            execution,
            load(EvaluationConfig, evaluation, "evaluation"),
            cell.get("label", ""),
            cell.get("probe"),
        )


def _fit(name: str, architecture: ArchitectureConfig, place: Shape, tolerance: float) -> Sized:
    key = (name, repr(architecture), place)
    if key not in _fitted:
        _fitted[key] = size_architecture(name, architecture, place, tolerance)
    return _fitted[key]


_fitted: dict[tuple, Sized] = {}


def _overridden(architecture: ArchitectureConfig, config: SweepConfig) -> ArchitectureConfig:
    """Merge the sweep's `model` keys over an architecture; keys of other blocks are ignored."""
    ladder = config.ladders[config.ladder]
    over = merge(ladder.model, config.model)
    blocks = over.pop("blocks", {})
    arms = [arm for arm in config.architectures if arm in read_architectures()]
    known = {block for arm in arms for block in read_architectures()[arm].blocks}
    for block in blocks:
        if block not in known:
            raise ConfigError(f"unknown key model.blocks.{block}; {suggest(block, sorted(known))}")
    mine = {key: value for key, value in blocks.items() if key in architecture.blocks}
    form, _ = FORMS[config.objective]
    model = merge({"form": form, **architecture.model}, over)
    pattern = model.pop("pattern", architecture.pattern)
    # Overrides also win over the architecture's keys for narrow widths.
    blocks, narrow = (merge(part, mine) for part in (architecture.blocks, architecture.narrow))
    return replace(architecture, blocks=blocks, narrow=narrow, model=model, pattern=str(pattern))


def _corpus(cell: Cell, corpora: CorporaConfig, ladder: LadderConfig) -> DataConfig:
    mixture, dataset = corpora.mixtures[cell["corpus"]], corpora.dataset
    return DataConfig(
        name=cell["corpus"],
        dataset=dataset.name,
        tokenizer=dataset.tokenizer,
        domains=mixture.domains,
        seq_len=ladder.seq_len,
        block_tokens=dataset.block_tokens,
        unique_bytes=mixture.unique_bytes,
        epoch_blocks=ladder.epoch_blocks or corpora.epoch_blocks,
        shuffle_seed=cell["order_seed"],
    )


def _horizons(cell: Cell, ladder: LadderConfig, nominal: int, batch: int) -> Sequence[int]:
    if "horizon" in cell:
        return [cell["horizon"]]
    horizons = horizons_of(ladder, nominal, batch)
    return [max(horizons)] if is_probe(cell) else horizons


def resolve_precision(asked: Literal["auto", "fp32", "bf16"]) -> Literal["fp32", "bf16"]:
    """What `auto` means on this machine: bf16 on a GPU, fp32 elsewhere."""
    if asked != "auto":
        return asked
    return "bf16" if torch.cuda.is_available() else "fp32"


def _choose(what: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise ConfigError(f"unknown {what} {name!r}; {suggest(name, list(known))}")
