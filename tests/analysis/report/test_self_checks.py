"""The checks that a study makes of itself pass on a sound study and fail on a spoilt one."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.report.sections import sections
from analysis.study.self_checks import (
    against_ngrams,
    believable_exponents,
    falls_with_size,
    forecast_of_the_largest,
    self_checks,
)
from analysis.study.study import Settings, Study, analyse
from analysis.tables.run_table import BASELINE_COLUMNS, Table, final
from analysis.tables.sweep_folder import load


@pytest.fixture(scope="module")
def studied(sweep) -> Study:
    return analyse(load(sweep), Settings(replicates=60))


@pytest.fixture(scope="module")
def rows(studied: Study) -> pd.DataFrame:
    points = final(studied.table)
    return points.rows[points.rows["evaluation_set"] == "prose"].reset_index(drop=True)


def spoilt(rows: pd.DataFrame, factor: float, **place: object) -> pd.DataFrame:
    chosen = np.logical_and.reduce([rows[name] == level for name, level in place.items()])
    assert chosen.any()
    return rows.assign(loss_nats=rows["loss_nats"] * np.where(chosen, factor, 1.0))


def test_a_sound_study_passes(rows: pd.DataFrame) -> None:
    assert falls_with_size(rows).passed
    check = forecast_of_the_largest(rows)
    assert check.passed
    assert check.detail.startswith("r100k: 12 of 12 runs inside")


def test_a_size_that_is_worse_than_a_smaller_one_is_named(rows: pd.DataFrame) -> None:
    place = {"architecture": "mamba", "corpus": "web", "rung": "r55k", "tokens": 1.8e6}
    check = falls_with_size(spoilt(rows, 1.1, **place))
    assert check.passed is False
    assert "it rises: mamba on web at 1.8 M tokens, r30k to r55k: +" in check.detail


def test_a_rise_within_the_noise_is_none(rows: pd.DataFrame) -> None:
    flat = rows.assign(loss_nats=2.0)
    assert "no fall" in falls_with_size(flat).detail
    assert "it rises" not in falls_with_size(flat).detail


def test_a_largest_size_off_the_law_is_not_forecast(rows: pd.DataFrame) -> None:
    check = forecast_of_the_largest(spoilt(rows, 1.2, rung="r100k", architecture="mamba"))
    assert check.passed is False
    assert "mamba on" in check.detail


def test_three_sizes_are_too_few_to_hold_one_out(rows: pd.DataFrame) -> None:
    few = rows[rows["rung"].isin(["r9k", "r16k", "r30k"])]
    assert forecast_of_the_largest(few).passed is None


def test_an_exponent_above_one_or_apart_from_all_others_is_named(studied: Study) -> None:
    cells = [law for law in studied.cells if law.evaluation_set == "prose"]
    low, high = (
        {"alpha": replace(cells[0].intervals["alpha"], estimate=e, low=e - 0.1, high=e + 0.1)}  # type: ignore[type-var]
        for e in (0.35, 1.6)
    )
    same = [replace(law, intervals=low) for law in cells]
    assert believable_exponents(same).passed
    check = believable_exponents([replace(cells[0], intervals=high), *same[1:]])
    assert check.passed is False
    assert "is 1.60" in check.detail
    assert f"alpha of {cells[0].part} [1.50, 1.70] excludes" in check.detail


def test_the_best_model_is_compared_with_the_highest_order(
    rows: pd.DataFrame, studied: Study
) -> None:
    best = rows.groupby("corpus")["loss_nats"].min()

    def table(ratio: float) -> Table:
        counted = [
            (corpus, "prose", order, 1.8e6, 1e3 * loss * scale, 1e3)
            for corpus, loss in best.items()
            for order, scale in ((2, 5.0), (5, ratio))
        ]
        frame = pd.DataFrame(counted, columns=pd.Index(BASELINE_COLUMNS))
        return replace(studied.table, baselines=frame)

    assert against_ngrams(rows, table(1 / 1.02)).passed
    check = against_ngrams(rows, table(1 / 1.05))
    assert check.passed is False
    assert "(+5.0 %)" in check.detail
    assert against_ngrams(rows, studied.table).passed is None


def test_the_checks_are_part_of_the_page_and_of_its_numbers(studied: Study) -> None:
    (section,) = [each for each in sections(studied) if each.name == "checks"]
    assert len(section.shown) == len(self_checks(studied)) == 4
    assert section.numbers["passed"].tolist()[:2] == [True, True]
