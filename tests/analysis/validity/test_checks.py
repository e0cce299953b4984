"""Every guard fires on one side of its threshold and is silent on the other."""

import numpy as np
import pandas as pd
import pytest

from analysis.compute_optimal.frontier import budget_warnings
from analysis.compute_optimal.isoflop import IsoFlopCurve, budgets, exponents, grid_bias, token_bias
from analysis.fitting.estimator import Estimator
from analysis.laws.catalog import CHINCHILLA
from analysis.study.findings import _first_of
from analysis.validity.checks import (
    check,
    clusters,
    counting,
    decay,
    evaluation,
    exponent_sum,
    lossy,
    rates,
    repetition,
    seeds,
    tokenizers,
    units,
)
from analysis.validity.extrapolation import Target, extrapolation
from analysis.validity.refusal import Refusal
from analysis.validity.warnings import WARNINGS, Caveat

LAW = (1.69, 406.4, 410.7, 0.34, 0.28)
BASE = pd.DataFrame(
    {
        "run_id": ["a", "b", "c", "d"],
        "architecture": "transformer",
        "corpus": ["web", "web", "web", "web"],
        "tokenizer": "bytes",
        "vocab_size": 50000.0,
        "seed": [0, 1, 0, 0],
        "parameters": [2e8, 2e8, 4e8, 8e8],
        "tokens": [4e9, 4e9, 8e9, 1.6e10],
        "unique_tokens": 2e10,
        "learning_rate_tuned": 1.0,
        "decayed": 1.0,
        "evaluation_set": ["c4", "c4", "pile", "pile"],
        "loss_nats": [3.0, 3.01, 2.8, 2.6],
    }
).assign(flops=lambda rows: 6 * rows["parameters"] * rows["tokens"])


def curve(span, centre=1.0, points=7, flops=1e20, law=LAW):
    """An isoFLOP curve of a law with C = 6 N D, around `centre` times its optimum."""
    floor, a, b, alpha, beta = law
    best = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    sizes = best * centre * np.geomspace(1 / span, span, points)
    tokens = flops / 6 / sizes
    loss = floor + a * sizes**-alpha + b * tokens**-beta
    rows = pd.DataFrame({"parameters": sizes, "tokens": tokens, "flops": flops, "loss_nats": loss})
    return rows, best


SIDES = [
    (rates, {}, {"learning_rate_tuned": [1.0, 1.0, 1.0, np.nan]}, "W-LR"),
    (decay, {"step": 10.0, "horizon_steps": 10.0}, {"step": 9.0, "horizon_steps": 10.0}, "W-DECAY"),
    (decay, {}, {"decayed": [1.0, 1.0, 0.0, 1.0]}, "W-DECAY"),
    (counting, {"flops": 1.09 * BASE["flops"]}, {"flops": 1.12 * BASE["flops"]}, "W-COUNT"),
    (
        counting,
        {"parameters": np.nan, "non_embedding_parameters": 1.1e8},
        {"parameters": np.nan, "non_embedding_parameters": 0.9e8},
        "W-COUNT",
    ),
    (clusters, {}, {"run_id": ["a", "a", "c", "d"]}, "W-CLUSTER"),
    (tokenizers, {}, {"tokenizer": ["bytes", "bpe", "bpe", "bpe"]}, "W-TOK"),
    (lossy, {"tokenizer": "file 300 a.json"}, {"tokenizer": "lossy_file 300 a.json"}, "W-LOSSY"),
    (evaluation, {}, {"evaluation_set": "c4"}, "W-EVAL"),
    (evaluation, {"corpus": "webtext"}, {"corpus": "C4"}, "W-EVAL"),
    (repetition, {"unique_tokens": 1.6e10}, {"unique_tokens": 1.59e10}, "W-REPEAT"),
    (repetition, {"domain_repeats": 1.0}, {"domain_repeats": [1.0, 1.0, 9.7, 1.0]}, "W-REPEAT"),
    (seeds, {}, {"seed": 0}, "W-SEED"),
    (units, {"loss_nats": 10.81}, {"loss_nats": 10.83}, "W-UNIT"),
    (units, {"tokens": 0.011 * BASE["parameters"], "flops": np.nan},
     {"tokens": 0.0099 * BASE["parameters"], "flops": np.nan}, "W-UNIT"),
    (units, {"flops_counted": 1.9 * BASE["flops"]}, {"flops_counted": 2.1 * BASE["flops"]},
     "W-UNIT"),
    (units, {"flops": 9 * BASE["flops"]}, {"flops": 11 * BASE["flops"]}, "W-UNIT"),
]  # fmt: skip


@pytest.mark.parametrize(("guard", "quiet", "loud", "code"), SIDES)
def test_a_row_guard_fires_on_one_side_of_its_threshold_only(guard, quiet, loud, code):
    assert guard(BASE.assign(**quiet)) is None
    caveat = guard(BASE.assign(**loud))
    assert isinstance(caveat, Caveat)
    assert caveat.code == code
    assert caveat in check(BASE.assign(**loud))


def test_a_clean_table_raises_nothing():
    assert check(BASE) == ()


@pytest.mark.parametrize(("best", "fires"), [(0, True), (1, False), (2, True)])
def test_a_best_rate_at_the_edge_of_its_search_is_raised(best, fires):
    losses = np.full(3, 3.1)
    losses[best] = 3.0
    one = BASE.iloc[[0]].drop(columns="learning_rate_tuned")
    rows = pd.concat([one] * 3).assign(learning_rate=[1e-3, 2e-3, 4e-3], loss_nats=losses)
    caveat = rates(rows)
    assert (caveat is not None) == fires
    assert not fires or "last one tried" in caveat.finding


@pytest.mark.parametrize(
    ("factor", "kind"), [(2.9, type(None)), (3.1, Caveat), (9.9, Caveat), (10.1, Refusal)]
)
def test_extrapolation_is_free_then_warned_then_refused(factor, kind):
    flops = factor * BASE["flops"].max()
    size = np.sqrt(flops / 120)
    target = Target(size, 20 * size, flops)
    assert isinstance(extrapolation(BASE, target, allow=False), kind)
    if kind is Refusal:
        assert isinstance(extrapolation(BASE, target, allow=True), Caveat)


@pytest.mark.parametrize(
    ("ratio", "refused"), [(59.0, False), (61.0, True), (6.7, False), (6.6, True)]
)
def test_a_ratio_of_tokens_to_parameters_beyond_the_data_is_refused(ratio, refused):
    target = Target(4e8, ratio * 4e8, 6 * ratio * 4e8**2)
    found = extrapolation(BASE, target, allow=False)
    assert isinstance(found, Refusal) == refused


@pytest.mark.parametrize(("exponents_", "fires"), [((0.5, 0.55), False), ((0.5, 0.551), True)])
def test_exponents_that_do_not_make_up_the_compute_are_raised(exponents_, fires):
    assert (exponent_sum(*exponents_, implied=1.0) is not None) == fires


def test_published_frontiers_for_dna_are_flagged_where_they_are_inconsistent():
    published = {"transformer": (0.552, 0.551), "mamba": (0.388, 0.487), "hyena": (0.504, 0.499)}
    found = {name for name, pair in published.items() if exponent_sum(*pair, implied=1.0)}
    assert found == {"transformer", "mamba"}


@pytest.mark.parametrize(("centre", "fires"), [(1.0, False), (2.0, True), (5.0, True)])
def test_a_minimum_without_two_sizes_on_each_side_is_raised(centre, fires):
    rows, best = curve(3.0, centre, points=5)
    (budget,) = budgets(rows)
    assert (budget.warning is not None) == fires
    if centre == 5.0:
        assert isinstance(budget.size, Refusal)
    if centre == 1.0:
        assert budget.size.estimate == pytest.approx(best, rel=0.05)


@pytest.mark.parametrize(
    ("exponents_", "published"),
    [
        ((0.34, 0.28), (-0.33, -1.30, -2.90, -5.10)),
        ((0.465, 0.155), (-1.67, -6.50, -13.91, -23.12)),
    ],
)
def test_the_bias_of_approach_two_is_the_published_one(exponents_, published):
    for span, expected in zip((2, 4, 8, 16), published, strict=True):
        grid = np.linspace(-np.log(span), np.log(span), 15)
        assert 100 * token_bias(*exponents_, grid) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(
    ("span", "centre", "fires"),
    [(3.9, 1.0, False), (4.1, 1.0, True), (3.0, 1.9, False), (3.0, 2.1, True)],
)
def test_wide_or_off_centre_grids_are_raised_with_their_bias(span, centre, fires):
    rows, best = curve(span, centre)
    (budget,) = budgets(rows)
    caveat = grid_bias(budget, 0.34, 0.28, best)
    assert (caveat is not None) == fires
    assert not fires or "D* off by" in caveat.finding


def test_approach_two_finds_the_exponents_of_a_symmetric_law():
    rows = pd.concat(
        curve(3.0, flops=c, law=(1.7, 400.0, 400.0, 0.3, 0.3))[0] for c in (1e18, 1e19, 1e20, 1e21)
    )
    noisy = rows.assign(
        loss_nats=rows["loss_nats"] * np.exp(np.random.default_rng(0).normal(0, 1e-4, len(rows)))
    )
    found = exponents(budgets(noisy))
    assert found["parameters"].estimate == pytest.approx(0.5, abs=0.01)
    assert found["parameters"].low < 0.5 < found["parameters"].high
    assert exponent_sum(found["parameters"].estimate, found["tokens"].estimate, 1.0) is None


def test_two_budgets_give_no_exponent_and_a_refusal_instead():
    rows = pd.concat(curve(3.0, flops=c)[0] for c in (1e18, 1e20))
    found = budgets(rows)
    assert [isinstance(each, IsoFlopCurve) for each in found] == [True, True]
    assert exponents(found).code == "R-UNDER"


def test_every_warning_reads_as_a_sentence_with_its_remedy():
    for code, (meaning, action) in WARNINGS.items():
        assert code.startswith("W-")
        assert meaning
        assert action
        assert action in str(Caveat(code, "found so"))


@pytest.mark.parametrize(("span", "codes"), [(3.0, set()), (6.0, {"W-A2BIAS"})])
def test_the_report_raises_the_bias_of_its_own_isoflop_grids(span, codes):
    rows = pd.concat(curve(span, flops=c)[0] for c in (1e18, 1e19, 1e20)).reset_index(drop=True)
    rows = rows.assign(architecture="a", corpus="web", trunk_id=[str(i) for i in range(len(rows))])
    rows["loss_nats"] *= np.exp(np.random.default_rng(0).normal(0, 1e-4, len(rows)))
    found = Estimator().fit(rows, CHINCHILLA)
    assert {each.code for each in budget_warnings(budgets(rows), found)} == codes


def test_a_guard_that_many_budgets_raise_is_told_by_the_first_of_them():
    assert _first_of(["a", "b"]) == "a; b"
    assert _first_of(["a", "b", "c", "d"]) == "a; b; and 2 more like them"
