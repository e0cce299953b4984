"""Twelve cases that must be refused, each beside a neighbour that must not."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from analysis.compute_optimal.isoflop import budgets, exponents
from analysis.effects.answer import answer
from analysis.effects.contrasts import contrasts
from analysis.effects.seed_noise import seed_noise
from analysis.effects.variance_shares import decompose
from analysis.fitting.estimator import Estimator
from analysis.inference.bootstrap import Bootstrap
from analysis.inference.intervals import ratio_interval, t_interval
from analysis.laws.bound import bind, log_loss
from analysis.laws.catalog import CHINCHILLA, POWER
from analysis.study.headline import ratio_of
from analysis.tables.run_table import Table
from analysis.validity.extrapolation import Target, extrapolation
from analysis.validity.refusal import CODES, Refusal
from tests.analysis.parameters import theta_of
from tests.analysis.validity.test_checks import curve

TRUTH = {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69}


def runs(sizes=4, ratios=(5, 20, 80), arms=("transformer", "mamba"), corpora=("web", "code"),
         seeds=(0,)):  # fmt: skip
    """A full factorial of a known law, with small effects of arm and corpus."""
    records = [
        (arm, corpus, f"r{place}", seed, size, ratio * size)
        for place, size in enumerate(np.geomspace(1e7, 1e9, sizes))
        for arm in arms
        for corpus in corpora
        for seed in seeds
        for ratio in ratios
    ]
    columns = ["architecture", "corpus", "rung", "seed", "parameters", "tokens"]
    rows = pd.DataFrame(records, columns=columns)
    rows = rows.assign(
        flops=6 * rows["parameters"] * rows["tokens"], evaluation_set="prose", targets=1.0,
        flops_full_attention=6.1 * rows["parameters"] * rows["tokens"],
        flops_six_n=5.9 * rows["parameters"] * rows["tokens"],
        order_seed=rows["seed"], utf8_bytes=1.0, certificate="same", tokenizer="bytes",
        trunk_id="t" + rows["rung"], run_id=[f"run{n}" for n in range(len(rows))],
    )  # fmt: skip
    form = bind(CHINCHILLA, rows)
    effect = 0.05 * (rows["corpus"] == "code") - 0.02 * (rows["architecture"] == "mamba")
    noise = np.random.default_rng(0).normal(0, 0.002, len(rows))
    exact = log_loss(form.design(rows), theta_of(form, TRUTH)[None])[0]
    return rows.assign(loss_nats=np.exp(exact + effect + noise))


def fitted(rows, law=CHINCHILLA):
    return Estimator(starts=4).fit(rows, law)


def contrast(rows, factor):
    return contrasts(Table("t", "prose", rows, rows, (), {}), factor, "prose")[0]


def undefined(share):
    values = np.where(np.arange(100) < share, np.nan, 1.0 + 0.01 * np.arange(100))
    return Bootstrap(np.zeros((100, 1)), "bootstrap", 10, 1.0).interval(1.5, values)


def iso(count):
    generator = np.random.default_rng(0)
    rows = pd.concat(curve(3.0, flops=c)[0] for c in np.geomspace(1e18, 1e21, count))
    return rows.assign(loss_nats=rows["loss_nats"] * np.exp(generator.normal(0, 1e-4, len(rows))))


def far(factor):
    rows = runs()
    flops = factor * rows["flops"].max()
    size = np.sqrt(flops / 120)
    return extrapolation(rows, Target(size, 20 * size, flops), allow=False)


@dataclass(frozen=True)
class Case:
    code: str
    refused: object
    answered: object


ONE = {"arms": ("transformer",), "corpora": ("web",)}
CASES = {
    "seven runs for five parameters": Case(
        "R-UNDER", lambda: fitted(runs(4, **ONE).iloc[:7]), lambda: fitted(runs(4, **ONE).iloc[:9])
    ),
    "two sizes": Case(
        "R-UNDER",
        lambda: fitted(runs(2, (2, 5, 20, 80, 300), **ONE)),
        lambda: fitted(runs(3, (5, 20, 80), **ONE)),
    ),
    "a ladder of one ratio": Case(
        "R-UNDER", lambda: fitted(runs(12, (20,), **ONE)),
        lambda: fitted(runs(12, (20,), **ONE), POWER),
    ),
    "ratios that spread ninefold": Case(
        "R-UNDER", lambda: fitted(runs(5, (5, 15, 45), **ONE)),
        lambda: fitted(runs(5, (5, 15, 51), **ONE)),
    ),
    "eleven times the compute": Case("R-EXTRAP", lambda: far(11.0), lambda: far(9.0)),
    "one corpus": Case(
        "R-FACTOR", lambda: contrast(runs(corpora=("web",)), "corpus"),
        lambda: contrast(runs(), "corpus"),
    ),
    "pairs at one size": Case(
        "R-PAIRS", lambda: t_interval(np.array([0.1]), "sizes"),
        lambda: t_interval(np.array([0.1, 0.2]), "sizes"),
    ),
    "other evaluation targets": Case(
        "R-EVAL",
        lambda: contrast(runs().assign(targets=np.arange(48.0)), "architecture"),
        lambda: contrast(runs(), "architecture"),
    ),
    "a run that stands twice": Case(
        "R-AMBIGUOUS",
        lambda: contrast(pd.concat([runs(), runs().iloc[:1]], ignore_index=True), "architecture"),
        lambda: contrast(runs(seeds=(0, 1)), "architecture"),
    ),
    "a ratio over nothing": Case(
        "R-RATIO",
        lambda: ratio_interval(np.array([0.05, 0.06, 0.05]), np.array([0.01, -0.01, 0.002])),
        lambda: ratio_interval(np.array([0.05, 0.06, 0.05]), np.array([0.01, 0.011, 0.0105])),
    ),
    "one seed": Case(
        "R-SEED", lambda: seed_noise(runs()), lambda: seed_noise(runs(seeds=(0, 1)))
    ),
    "a multiplier undefined in six of a hundred": Case(
        "R-MULT", lambda: undefined(6), lambda: undefined(5)
    ),
    "two budgets": Case(
        "R-UNDER", lambda: exponents(budgets(iso(2))), lambda: exponents(budgets(iso(3)))
    ),
    "a minimum outside the sizes": Case(
        "R-REACH", lambda: budgets(curve(3.0, 5.0)[0])[0].size,
        lambda: budgets(curve(3.0, 1.2)[0])[0].size,
    ),
    "cells at two sizes": Case(
        "R-CELLS",
        lambda: decompose(runs(2), 20, np.random.default_rng(0)),
        lambda: decompose(runs(3), 20, np.random.default_rng(0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_what_cannot_be_answered_is_refused_with_its_code_and_a_remedy(name):
    found = CASES[name].refused()
    assert isinstance(found, Refusal)
    assert found.code == CASES[name].code
    assert found.reason
    assert found.remedy


@pytest.mark.parametrize("name", list(CASES))
def test_its_neighbour_is_answered(name):
    assert not isinstance(CASES[name].answered(), Refusal)


def test_the_cases_are_at_least_twelve_and_every_code_is_declared():
    assert len(CASES) >= 12
    assert {case.code for case in CASES.values()} <= set(CODES)


def test_a_refusal_cannot_carry_an_undeclared_code():
    with pytest.raises(AssertionError, match="undeclared"):
        Refusal("R-NONE", "because", "do")


@pytest.mark.parametrize(("interaction", "refused"), [(0.03, True), (0.0, False)])
def test_an_architecture_effect_that_depends_on_the_corpus_is_not_one_number(interaction, refused):
    rows = runs()
    crossed = (rows["corpus"] == "code") & (rows["architecture"] == "mamba")
    rows = rows.assign(loss_nats=rows["loss_nats"] * np.exp(interaction * crossed))
    found = answer(Table("t", "prose", rows, rows, (), {}), "prose")
    ratio = ratio_of(found.corpus[0], found.arms[0].contrast, found.arms[0])
    assert isinstance(ratio, Refusal) == refused
    assert not refused or ratio.code == "R-INTERACTION"
