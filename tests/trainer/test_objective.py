"""Masked and sequence-to-sequence runs go through the same loop, and are checked before it."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data_pipelines.batch import IGNORED, Batch, target_bytes
from data_pipelines.evaluation_sets import HeldOut
from data_pipelines.manifest import Stream
from data_pipelines.masking import infill_spans, mask_tokens
from data_pipelines.tokenizers import ByteTokenizer
from launch.train import read_experiment
from models.backbone import build_backbone
from sweeps.grammar import Experiment
from tests.trainer import study
from tests.trainer.conftest import PLAIN
from trainer import session
from trainer.config import EvaluationConfig, ExecutionConfig, RunConfig
from trainer.engine import Engine, prepare_process
from trainer.evaluate import Evaluator
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


MASKED = [("masked_lm", ENCODER), ("seq2seq", BOTH)]


@pytest.mark.parametrize(("objective", "changes"), MASKED)
@pytest.mark.parametrize("rate", [0.0, 1e-9, 0.5 / 64])
def test_a_rate_that_hides_nothing_is_refused(
    objective: str, changes: dict[str, Any], rate: float
) -> None:
    plain = {**PLAIN, "objective": objective, "model": model(changes)}
    with pytest.raises(ConfigError, match=rf"mask_rate {rate} hides no token of a sequence of 64"):
        load(RunConfig, {**plain, "mask_rate": rate})
    run, evaluation = load(RunConfig, plain), EvaluationConfig(mask_rate=rate)
    with pytest.raises(ValueError, match=rf"evaluation\.mask_rate {rate} hides no token"):
        Experiment(run, ExecutionConfig(), evaluation)
    assert load(RunConfig, {**plain, "mask_rate": 1 / 64}).mask_rate == 1 / 64
    assert Experiment(load(RunConfig, PLAIN), ExecutionConfig(), evaluation).run.mask_rate == 0.3


def test_a_single_run_is_checked_for_what_its_evaluation_hides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**PLAIN, "objective": "masked_lm", "model": model(ENCODER)}))
    with pytest.raises(ConfigError, match=r"run\.yaml: evaluation\.mask_rate 0\.0 hides no token"):
        read_experiment(file, ["evaluation.mask_rate=0"])


@pytest.mark.parametrize(("objective", "changes"), [*MASKED, ("causal_lm", {})])
@pytest.mark.parametrize(
    ("tokenizer", "ids"),
    [({"kind": "bytes"}, 257), ({"kind": "bpe", "vocab_size": 300}, 300)],
)
def test_every_special_id_is_its_own(
    objective: str, changes: dict[str, Any], tokenizer: dict[str, Any], ids: int
) -> None:
    needed = ids + (objective != "causal_lm")
    plain = {**PLAIN, "objective": objective, "corpus": {**PLAIN["corpus"], "tokenizer": tokenizer}}
    for size in (2, needed - 1):
        message = rf"model\.vocab_size is {size}, but .* {ids} ids, .*; set it to {needed}"
        with pytest.raises(ConfigError, match=message):
            load(RunConfig, {**plain, "model": model({**changes, "vocab_size": size})})
    for size in (needed, needed + 7):
        load(RunConfig, {**plain, "model": model({**changes, "vocab_size": size})})


def borders(sequences: int) -> Batch:
    """Sequences of documents without text: each token is a border, with nothing to follow it."""
    shape = (sequences, 64)
    return Batch(
        torch.full(shape, 256),
        torch.full(shape, IGNORED),
        torch.arange(64, dtype=torch.int32).expand(shape).contiguous(),
        np.arange(sequences),
    )


class Bordered(Evaluator):
    """An evaluator that finds documents without text in one set."""

    def _whole(self, described: Stream, groups: list[int]) -> Iterator[HeldOut]:
        if described.domain != "prose":
            return super()._whole(described, groups)
        return iter([HeldOut(borders(4), np.zeros(4, np.int64), np.array(groups[:4]))])


def test_a_batch_without_a_target_has_no_loss(tmp_path: Path) -> None:
    made = study.make(study.build_tiny(tmp_path / "data"))
    prepare_process(made.execution)
    engine = Engine(build_backbone(made.run.model, 1), made.run, made.execution)
    try:
        before = engine.weights()
        with pytest.raises(RuntimeError, match=r"no token of a global batch of 8 .* no loss"):
            engine.step(borders(8), 0.1)
        after = engine.weights()
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        found = Bordered(made.run, made.evaluation, tmp_path / "data").evaluate(engine, final=False)
        assert next(found).figures.evaluation_set == "python"
        with pytest.raises(RuntimeError, match="evaluation sets prose of tiny have no text"):
            next(found)
    finally:
        engine.close()


@pytest.mark.parametrize("hide", [mask_tokens, infill_spans])
def test_borders_alone_are_no_text_to_predict(hide) -> None:
    hidden = hide(borders(8), 1, 0.3, 257)
    assert int((hidden.targets != IGNORED).sum()) > 0
    assert target_bytes(hidden, ByteTokenizer().byte_lengths) == 0


def test_sets_with_text_are_recorded_beside_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = study.make(study.build_tiny(tmp_path / "data"))
    monkeypatch.setattr(session, "Evaluator", Bordered)
    study.run(made, tmp_path / "run")
    stored = read_run(tmp_path / "run").evaluations
    assert [row["evaluation_set"] for row in stored if not row.get("error")] == ["python"] * 3
    failed = [row for row in stored if row.get("error")]
    assert [row["step"] for row in failed] == [10, 20]
    assert all("prose of tiny have no text to predict" in str(row["error"]) for row in failed)


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
