"""Masked and sequence-to-sequence runs go through the same loop, and are checked before it."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import study
from tests.trainer.conftest import PLAIN
from trainer.config import RunConfig
from trainer.record import read_run
from trainer.schema import ConfigError, load

ATTENTION = {"kind": "attention", "n_heads": 2}
SWIGLU = {"kind": "swiglu", "d_hidden": 36}
ENCODER = {"form": "encoder", "vocab_size": 258}
BOTH = {
    "blocks": {
        "a": {"mixer": ATTENTION, "channel": SWIGLU, "cross": ATTENTION},
        "e": {"mixer": ATTENTION, "channel": SWIGLU},
    },
    "encoder": {"pattern": "e"},
    "vocab_size": 258,
}


def model(changes: dict[str, Any]) -> dict[str, Any]:
    return {**copy.deepcopy(PLAIN["model"]), **changes}


@pytest.mark.parametrize(("objective", "changes"), [("masked_lm", ENCODER), ("seq2seq", BOTH)])
def test_a_masked_run_learns_and_two_micro_batches_equal_one(
    objective: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    root = study.build_tiny(tmp_path / "data")
    plain = {**PLAIN, "objective": objective, "model": model(changes)}
    plain["optimizer"] = {**plain["optimizer"], "learning_rate": 0.01}
    losses = []
    for name, micro in (("whole", None), ("halves", 4)):
        experiment = study.make(root, {}, micro_batch_sequences=micro)
        run = load(RunConfig, plain)
        made = type(experiment)(run, experiment.execution, experiment.evaluation)
        assert study.run(made, tmp_path / name).state == "done"
        stored = read_run(tmp_path / name)
        losses.append([row["loss_nats"] for row in stored.metrics])
        nats = {r["evaluation_set"]: r["total_nats"] / r["targets"] for r in stored.evaluations}
        assert all(0 < value < math.log(258) for value in nats.values())
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    assert losses[0][-1] < losses[0][0] - 0.5


def test_an_objective_wants_its_form_of_backbone() -> None:
    message = "objective masked_lm is for encoder-only models, but the model is decoder-only"
    with pytest.raises(ConfigError, match=message):
        load(RunConfig, {**PLAIN, "objective": "masked_lm"})
    message = "objective causal_lm is for decoder-only models, but the model is encoder-decoder"
    with pytest.raises(ConfigError, match=message):
        load(RunConfig, {**PLAIN, "model": model(BOTH)})


def test_an_approximate_mixer_is_not_trained() -> None:
    changes = {"a": {"mixer": {**ATTENTION, "kind": "hip", "k": 8, "selection": "block"}}}
    blocks = {"a": {**changes["a"], "channel": SWIGLU}}
    with pytest.raises(ConfigError, match=r"blocks\.a\.mixer is for evaluation only"):
        load(RunConfig, {**PLAIN, "model": model({"blocks": blocks})})


def test_a_context_beyond_a_mixers_longest_length_is_refused() -> None:
    mixer = {"kind": "monarch", "max_len": 8}
    blocks = {"a": {"mixer": mixer, "channel": SWIGLU}}
    with pytest.raises(ConfigError, match=r"mixer\.max_len 8 is shorter than corpus\.seq_len"):
        load(RunConfig, {**PLAIN, "model": model({"blocks": blocks})})
