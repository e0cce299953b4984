"""Shares of the GEMM peak and of evaluation, from records with known seconds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.tables.machine_use import machine_use
from analysis.words.machine_use import use_sentence
from trainer.record import StoredRun


def record(name: str, shares: list) -> StoredRun:
    metrics = [{"step": k, "step_seconds": 2.0, "gemm_peak_share": s} for k, s in enumerate(shares)]
    evaluations = [
        {"step": 9, "evaluation_set": each, "evaluation_id": "e", "evaluation_seconds": seconds}
        for each in ("prose", "code")
        # The blocks of milestones first, then all, on one clock.
        for seconds in (1.0, 1.5)
    ]
    return StoredRun(Path(name), {"architecture": "mamba"}, {}, {}, {}, metrics, evaluations)


def test_shares_are_medians_and_a_set_counts_once() -> None:
    use = machine_use([record("a", [0.1, 0.2, 0.9]), record("b", [0.4])])
    assert use["gemm_peak_share"].tolist() == [0.2, 0.4]
    assert use["training_seconds"].tolist() == [6.0, 2.0]
    assert use["evaluation_seconds"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("shares", [[], [None]])
def test_a_record_without_shares_has_none(shares: list) -> None:
    assert np.isnan(machine_use([record("a", shares)])["gemm_peak_share"][0])


def test_the_sentence_counts_seconds_of_trunks_and_shares_of_runs(noise_free) -> None:
    (name, *_) = noise_free.runs["run_id"]
    use = machine_use([record(name, [0.25]), record("trunk", [0.9] * 8)])
    text = use_sentence(replace(noise_free, use=use))
    assert text.startswith("Half of the runs reach 0.25 of the GEMM peak")
    assert "evaluation took 25 % of the time" in text
    assert use_sentence(replace(noise_free, use=use.assign(gemm_peak_share=np.nan))) == ""
