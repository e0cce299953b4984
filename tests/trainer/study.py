"""A tiny dataset and tiny runs, for tests that really train."""

import copy
import importlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import data_pipelines.fault_points
from data_pipelines.build import build_dataset
from data_pipelines.config import DatasetConfig, SourceConfig, TokenizerConfig
from sweeps.grammar import Experiment
from tests.trainer.conftest import PLAIN
from trainer.config import EvaluationConfig, ExecutionConfig, RunConfig
from trainer.record import EXACT_COLUMNS, StoredRun, read_run
from trainer.schema import load, merge
from trainer.session import Lineage, Outcome
from trainer.train import train

MAMBA = {
    "architecture": "mamba",
    "model": {
        "blocks": {"m": {"mixer": {"kind": "mamba"}, "channel": {"kind": "none"}}},
        "pattern": "m",
        "n_layers": 2,
        "d_model": 8,
        "vocab_size": 257,
    },
}


def build_tiny(root: Path, seed: int = 5, tokenizer: TokenizerConfig | None = None) -> Path:
    """A dataset of two domains of made-up text; returns the root."""
    draw = random.Random(seed)
    words = {"python": ["def", "return", "self", "(x)", ":"], "prose": ["the", "of", "state", "."]}
    shard = root / "tiny.jsonl"
    root.mkdir(parents=True, exist_ok=True)
    with shard.open("w") as file:
        for i in range(400):
            for domain, choices in words.items():
                text = f"{i} " + " ".join(draw.choices(choices, k=draw.randint(20, 200)))
                file.write(json.dumps({"text": text, "meta": {"pile_set_name": domain}}) + "\n")
    source = SourceConfig("jsonl", (str(shard),))
    config = DatasetConfig(
        "tiny",
        source,
        tokenizer=tokenizer or TokenizerConfig(),
        block_tokens=128,
        validation_fraction=0.1,
    )
    build_dataset(config, root, processes=1, report=lambda *_: None)
    return root


def make(root: Path, changes: dict[str, Any] | None = None, **execution: Any) -> Experiment:
    """A run of 20 steps on the tiny dataset."""
    plain = copy.deepcopy(PLAIN)
    for key, value in (changes or {}).items():
        plain[key] = value if key in ("architecture", "model") else merge(plain, {key: value})[key]
    evaluation = EvaluationConfig(milestones=(5120,), blocks_per_set=4, batch_sequences=4)
    options = {"data_root": str(root), "save_every_tokens": 2048, **execution}
    return Experiment(load(RunConfig, plain), ExecutionConfig(**options), evaluation)


def at_budget(experiment: Experiment, tokens: int) -> Experiment:
    """The same run with another horizon."""
    return replace(
        experiment,
        run=replace(experiment.run, budget=replace(experiment.run.budget, tokens=tokens)),
    )


def trunk_of(experiment: Experiment, steps: int) -> Experiment:
    """The trunk of a run, as a sweep trains it: without a decay, to a number of steps."""
    schedule = replace(experiment.run.schedule, decay_fraction=0.0)
    trunk = replace(experiment, run=replace(experiment.run, schedule=schedule))
    return at_budget(trunk, steps * trunk.run.optimizer.batch_tokens)


def run(experiment: Experiment, folder: Path, lineage: Lineage | None = None) -> Outcome:
    """Train here and now."""
    return train(
        experiment.run, experiment.execution, experiment.evaluation, folder, lineage or Lineage()
    )


def in_child(action: Callable[[], object], fault: str = "") -> int:
    """Do something in a forked process, under a fault; returns how it ended, negative if killed."""
    child = os.fork()
    if child == 0:
        os.environ["CROSSLADDER_FAULT"] = fault
        importlib.reload(data_pipelines.fault_points)
        rebind_faults()
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def rebind_faults() -> None:
    """Hand the reloaded fault point to the modules that imported it by name."""
    import trainer.checkpoint
    import trainer.session
    import trainer.train

    for module in (trainer.checkpoint, trainer.session, trainer.train):
        module.fault_point = data_pipelines.fault_points.fault_point  # type: ignore[attr-defined]


def exact(stored: StoredRun) -> tuple[list[tuple], list[tuple], str]:
    """What must be bit-identical: exact columns of both kinds of rows, and the weights' hash."""
    return (
        [_exact_row(row) for row in stored.metrics],
        [_exact_row(row) for row in stored.evaluations],
        str(stored.summary.get("parameters_sha256")),
    )


def read_exact(folder: Path) -> tuple[list[tuple], list[tuple], str]:
    """`exact` of a run folder."""
    return exact(read_run(folder))


def _exact_row(row: dict) -> tuple:
    values = ((key, row[key]) for key in sorted(EXACT_COLUMNS & set(row)))
    return tuple((k, v.hex() if isinstance(v, float) else v) for k, v in values)
