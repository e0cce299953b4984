"""The noise between seeds of weights and of order, against variances that were put in."""

import itertools

import numpy as np
import pandas as pd
import pytest

from analysis.effects.seed_noise import VARIED, SeedNoise, seed_noise
from analysis.validity.checks import seeds
from analysis.validity.refusal import Refusal

WEIGHTS, ORDER, REST = 0.003, 0.004, 0.002
BOTH, WEIGHTS_ALONE, ORDER_ALONE = VARIED.values()


def runs(pairs: list[tuple[int, int]], cells: int = 200) -> pd.DataFrame:
    """A run for each pair of seeds in each cell; weights, order and the rest add up in ln L."""
    generator = np.random.default_rng(0)
    rows = []
    for cell in range(cells):
        weights = {seed: generator.normal(0, WEIGHTS) for seed, _ in pairs}
        order = {seed: generator.normal(0, ORDER) for _, seed in pairs}
        for seed, order_seed in pairs:
            noise = weights[seed] + order[order_seed] + generator.normal(0, REST)
            rows.append(("a", "c", str(cell), 1e6, 1e4, seed, order_seed, 2.0 * np.exp(noise)))
    columns = ["architecture", "corpus", "rung", "tokens", "parameters", "seed", "order_seed"]
    return pd.DataFrame(rows, columns=pd.Index([*columns, "loss_nats"]))


@pytest.mark.parametrize(
    ("pairs", "varied", "variance", "freedom"),
    [
        ([(17, 17), (18, 18), (19, 19)], BOTH, WEIGHTS**2 + ORDER**2 + REST**2, 2),
        (list(itertools.product((1, 2), (1, 2))), BOTH, WEIGHTS**2 + ORDER**2 + REST**2, 1),
        ([(17, 17), (18, 17), (19, 17)], WEIGHTS_ALONE, WEIGHTS**2 + REST**2, 2),
        ([(17, 17), (17, 18)], ORDER_ALONE, ORDER**2 + REST**2, 1),
    ],
)
def test_the_noise_is_that_of_what_the_seeds_change(
    pairs: list[tuple[int, int]], varied: str, variance: float, freedom: int
) -> None:
    found = seed_noise(runs(pairs))
    assert isinstance(found, SeedNoise)
    assert found.varied == varied
    assert found.freedom == 200 * freedom
    # Four standard errors of a variance with as many degrees of freedom.
    assert found.sd.estimate**2 == pytest.approx(variance, rel=4 * np.sqrt(2 / found.freedom))


def test_one_run_a_cell_has_no_noise() -> None:
    assert isinstance(seed_noise(runs([(17, 17)])), Refusal)


def test_seeds_of_weights_alone_are_a_warning() -> None:
    assert seeds(runs([(17, 17), (18, 18)])) is None
    caveat = seeds(runs([(17, 17), (18, 17)]))
    assert caveat is not None
    assert "not the order" in caveat.finding
