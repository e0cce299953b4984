"""The title of a report, for every kind of answer."""

from dataclasses import replace

import pytest

from analysis.inference.intervals import Interval
from analysis.study.headline import Headline, headline
from analysis.study.study import Settings, analyse
from analysis.tables.sweep_folder import load
from analysis.validity.refusal import Refusal
from analysis.words.title import title_sentence


@pytest.fixture(scope="module")
def answered(sweep) -> Headline:
    return headline(analyse(load(sweep), Settings(replicates=20)))


@pytest.mark.parametrize(
    ("ratio", "title"),
    [
        ((0.4, 0.3, 0.5), "changing the architecture moved the loss 2.5 times as much as changing"),
        ((3.0, 2.0, 5.0), "changing the corpus moved the loss 3 times as much as changing the arc"),
        ((0.9, 0.7, 1.3), "changing the corpus and changing the architecture moved the loss about"),
        ((0.43, 0.22, 1.28), "this study cannot tell whether changing the corpus or changing the"),
        ((0.2, 0.0, 0.5), "changing the architecture moved the loss at least 2 times as much as"),
    ],
)
def test_a_ratio_becomes_a_sentence(answered: Headline, ratio: tuple, title: str) -> None:
    found = title_sentence(replace(answered, ratio=Interval(*ratio, "")))
    assert found.startswith(f"On prose, {title}")


def test_a_ratio_without_an_upper_end_is_at_least_so_much(answered: Headline) -> None:
    found = title_sentence(replace(answered, ratio=Interval(3.0, 2.0, float("inf"), "")))
    assert "moved the loss at least 2 times as much" in found


@pytest.mark.parametrize(
    ("code", "title"),
    [
        ("R-RATIO", "and changing the architecture by too little for this study to detect"),
        ("R-INTERACTION", "what the architecture does to the loss depends on the corpus"),
        ("R-TUNING", "is not answered: an arm's learning rate or batch is not bracketed"),
        ("R-FACTOR", "moved the loss more is not answered: because"),
    ],
)
def test_a_refused_ratio_says_what_is_missing(answered: Headline, code: str, title: str) -> None:
    assert title in title_sentence(replace(answered, ratio=Refusal(code, "because", "do")))


def test_one_refused_effect_leaves_the_other_in_the_title(answered: Headline) -> None:
    refused = Refusal("R-FACTOR", "one corpus only so far (web)", "add a second corpus")
    found = title_sentence(replace(answered, corpus=refused))
    assert found.startswith("On prose, changing the architecture moved the loss by 1.")
    assert found.endswith("changing the corpus does is not answered: one corpus only so far (web)")
    both = title_sentence(replace(answered, corpus=refused, architecture=refused))
    assert both == "Data against architecture: not answered, as one corpus only so far (web)"
