"""The sweep of encoders on hidden bytes."""

from itertools import product
from pathlib import Path

from models.accounting import total_parameters
from sweeps.grammar import read_sweep_file

MASKED_LM = Path(__file__).parent.parent.parent / "sweeps" / "masked_lm.yaml"


def test_encoders_are_trained_alike_on_hidden_bytes() -> None:
    runs = [experiment.run for experiment in read_sweep_file(MASKED_LM, ()).experiments]
    arms = {(run.architecture, run.seed) for run in runs}
    assert len(runs) == len(arms) == 9
    assert arms == set(product(("transformer", "hydra", "m2_bert"), (17, 18, 19)))
    assert {(run.objective, run.model.form) for run in runs} == {("masked_lm", "encoder")}
    assert {(run.budget.tokens, run.rung) for run in runs} == {(450_560, "31k")}


def test_encoders_have_the_parameters_of_the_rung_within_a_hundredth() -> None:
    for experiment in read_sweep_file(MASKED_LM, ()).experiments:
        run = experiment.run
        assert abs(total_parameters(run.model) / run.nominal_parameters - 1) < 0.01
