"""Variance decomposition and loss to loss: against an oracle, and against known truths."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.effects.loss_to_loss import transfers
from analysis.effects.variance_shares import (
    COMPONENTS,
    Decomposition,
    decompose,
    decompositions,
    matched_cells,
)
from analysis.tables.frames import where
from analysis.tables.run_table import final
from analysis.tables.sweep_folder import load
from analysis.validity.refusal import Refusal
from tests.analysis.synthetic_study import Study, write
from tests.oracles import decomposition as oracle


def neutral(table):
    return where(final(table).rows, "evaluation_set", "prose")


def effects_of(root, count=200, **changes):
    table = load(write(Study(**changes), root, np.random.default_rng(4)))
    return decompose(neutral(table), count, np.random.default_rng(0))


def test_shares_equal_those_of_explicit_dummy_regression(sweep):
    rows = neutral(load(sweep))
    result = decompose(rows, 20, np.random.default_rng(0))
    cells = matched_cells(rows)
    arm = cells["architecture"] + "/" + cells["corpus"]
    expected = oracle.shares(
        list(cells["cell"]),
        list(cells["corpus"]),
        list(cells["architecture"]),
        list(arm + "/" + cells["cell"].astype(str)),
        np.log(cells["loss_nats"].to_numpy()),
    )
    mine = [result.shares[name].estimate for name in COMPONENTS]
    np.testing.assert_allclose(mine, expected, rtol=1e-9, atol=1e-12)
    assert sum(mine) == pytest.approx(1.0)


def test_a_study_without_noise_gives_back_its_effects(noise_free, study):
    result = decompose(neutral(noise_free), 50, np.random.default_rng(0))
    assert result.effects["corpus"].estimate == pytest.approx(study.corpus_effect, rel=1e-6)
    # N of the arms differs by 2 %, which is worth about as much as the law says and no more.
    assert result.effects["architecture"].estimate == pytest.approx(0.0165, abs=2e-3)
    assert result.shares["interaction"].estimate < 1e-9
    assert result.shares["corpus"].estimate > 0.9


def test_an_interaction_is_told_from_main_effects(tmp_path):
    result = effects_of(
        tmp_path / "crossed", corpus_effect=0.0, architecture_effect=0.0, interaction=0.08,
        seed_sd=0.0, point_sd=0.0,
    )  # fmt: skip
    # A corner of 0.08 in a two-by-two table: a quarter each to mains, a quarter to interaction.
    assert result.shares["interaction"].estimate == pytest.approx(1 / 3, abs=0.05)


def test_intervals_cover_the_shares_of_the_truth_and_shrink_to_it(tmp_path):
    exact = effects_of(tmp_path / "exact", seed_sd=0.0, point_sd=0.0)
    noisy = effects_of(tmp_path / "noisy")
    assert (
        noisy.shares["corpus"].low <= exact.shares["corpus"].estimate <= noisy.shares["corpus"].high
    )


def test_an_effect_is_worth_the_compute_that_moves_the_loss_as_much(noise_free):
    rows = neutral(noise_free)
    result = decompose(rows, 50, np.random.default_rng(0))
    cells = matched_cells(rows)
    slope = np.polyfit(np.log(cells["flops"]), np.log(cells["loss_nats"]), 1)[0]
    expected = np.exp(result.effects["corpus"].estimate / -slope)
    assert result.worth["corpus"].estimate == pytest.approx(expected, rel=1e-9)


def test_every_evaluation_set_is_decomposed_the_neutral_one_first(sweep):
    result = decompositions(final(load(sweep)), 20, np.random.default_rng(0))
    assert list(result) == ["prose", "code"]
    assert all(isinstance(each, Decomposition) for each in result.values())


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"corpora": ("web",)}, "R-FACTOR"),
        ({"architectures": ("mamba",)}, "R-FACTOR"),
        ({"sizes": {"r9k": 9e3, "r16k": 1.6e4}, "seeds": {}}, "R-CELLS"),
    ],
)
def test_too_narrow_a_study_is_refused_with_its_remedy(tmp_path, changes, code):
    result = effects_of(tmp_path / "narrow", count=5, **changes)
    assert isinstance(result, Refusal)
    assert result.code == code


def test_cells_that_lack_an_arm_are_not_used(sweep):
    rows = neutral(load(sweep))
    gone = (rows["architecture"] == "mamba") & (rows["corpus"] == "web") & (rows["rung"] == "r9k")
    cells = matched_cells(rows[~gone].reset_index(drop=True))
    assert "r9k" not in set(cells["rung"])
    assert set(cells["rung"]) == set(rows["rung"]) - {"r9k"}


def test_sizes_three_percent_apart_are_one_cell_and_further_apart_are_two():
    def cells_of(ratio):
        rows = pd.DataFrame(
            {
                "architecture": ["a", "b"] * 2, "corpus": ["x", "x", "y", "y"],
                "parameters": [1e6, ratio * 1e6] * 2, "tokens": 1e8, "loss_nats": 3.0,
            }
        )  # fmt: skip
        return len(matched_cells(rows))

    assert cells_of(1.029) == 4
    assert cells_of(1.032) == 0


def test_at_equal_neutral_loss_the_corpus_shifts_the_line_and_the_architecture_does_not(noise_free):
    result = transfers(final(noise_free), 50, np.random.default_rng(0))["code"]
    # Corpora differ by +0.08 on prose and -0.12 on code; arms by the same on both.
    corpus = result.shifts["corpus", "code"]
    assert corpus.estimate == pytest.approx(-0.12 - 0.08 * result.slope.estimate, abs=1e-6)
    assert abs(result.shifts["architecture", "mamba"].estimate) < 1e-6
    assert result.slope.estimate == pytest.approx(1.0, abs=1e-6)


def test_one_evaluation_set_has_no_loss_to_loss_view(sweep):
    points = final(load(sweep))
    assert transfers(replace(points, rows=neutral(points)), 5, np.random.default_rng(0)) == {}
