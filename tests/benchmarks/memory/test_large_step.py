"""The command that trains large models by one step, at a size where a step is quick."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.benchmarks.memory import large_step
from tests.benchmarks.memory.large_step import (
    LOSS_BOUND,
    Step,
    main,
    take_step,
    trained_architectures,
)

GOOD = Step("mamba", 1000, 8.1, 5.2, 5.6, 8.0, 3.0, True, 1.0, 2000, 2000)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", trained_architectures())
def test_a_step_starts_at_an_even_guess_and_learns(name: str) -> None:
    step = take_step(name, "1M", threads=1)
    assert step.holds
    assert abs(step.loss_apart - math.log(258)) < LOSS_BOUND
    assert step.loss_after < step.loss
    assert 0 < step.gradient_norm < math.inf
    assert step.predicted_bytes > 16 * step.parameters


def test_all_named_architectures_take_part() -> None:
    wanted = (
        "hybrid hydra m2 m2_bert mamba mamba2 samba scout_mamba scout_window transformer window"
    )
    assert trained_architectures() == wanted.split()


@pytest.mark.parametrize(
    ("step", "code", "near"),
    [
        (GOOD, 0, True),
        (replace(GOOD, loss_apart=6.2), 0, False),
        (replace(GOOD, finite=False), 1, True),
    ],
)
def test_the_command_fails_by_gradient_and_reports_a_missed_loss(
    step: Step, code: int, near: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_step, "step_alone", lambda *_: step)
    assert main(["mamba", "--root", str(tmp_path)]) == code
    stored = json.loads((tmp_path / "reports" / "large_step_part.json").read_text())
    rows = {row["name"]: row for row in stored["rows"]}
    assert rows["mamba_loss"]["value"] == step.loss
    assert rows["mamba_memory_ratio"]["value"] == 1.0
    assert rows["mamba_apart_from_even_guess"]["holds"] == near
    assert rows["mamba_finite"]["holds"] == (code == 0)
