"""Trends of an effect: exact slopes by hand, and their words."""

import numpy as np
import pandas as pd
import pytest

from analysis.effects.contrasts import Contrast, summarise
from analysis.effects.trend import trend
from analysis.words.trend import trend_sentence

SIZES = {"r10k": 1e4, "r100k": 1e5, "r1M": 1e6, "r10M": 1e7}


def contrast(by_decade: float, by_budget: float, noise: float = 0.0) -> Contrast:
    """An effect of -5 % at the smallest size and budget, with known changes per tenfold."""
    generator = np.random.default_rng(0)
    records = []
    for place, (rung, size) in enumerate(SIZES.items()):
        for step, tokens in enumerate((1e6, 1e7)):
            percent = -5 + by_decade * place + by_budget * step + generator.normal(0, noise)
            other = 2 * (1 + percent / 100)
            records.append(
                {"rung": rung, "tokens": tokens, "parameters": size, "loss_nats_baseline": 2.0,
                 "loss_nats_other": other, "difference": np.log(other / 2), "nats": other - 2,
                 "same_samples": True}
            )  # fmt: skip
    found = summarise("architecture", ("a", "b"), "prose", pd.DataFrame(records), None)
    assert isinstance(found, Contrast)
    return found


def test_exact_slopes_are_found() -> None:
    found = trend(contrast(-4.0, -1.0))
    assert found.by_budget is not None
    assert found.by_size is not None
    assert found.by_budget.estimate == pytest.approx(-1.0)
    # Means of ln L over budgets are a little off the mean of percents.
    assert found.by_size.estimate == pytest.approx(-4.0, abs=1e-2)
    assert list(found.places["percent"].round(6)) == [-5, -6, -9, -10, -13, -14, -17, -18]


def test_the_words_name_both_ends_and_the_direction() -> None:
    text = trend_sentence(contrast(-4.0, -1.0))
    assert "runs from -5.5 % at r10k to -17.5 % at r10M" in text
    assert "with size it grows (-4.0" in text
    assert "Over all sizes and budgets: -18.0 to -5.0 %." in text
    assert "with size it shrinks" in trend_sentence(contrast(1.0, 0.0))


def test_a_trend_within_noise_is_none() -> None:
    assert "neither grows nor shrinks beyond noise" in trend_sentence(contrast(0.1, 0.0, 2.0))
