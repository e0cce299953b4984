"""The error that an evaluation set's documents leave on an effect, against resampled documents."""

import numpy as np
import pandas as pd
import pytest

from analysis.effects.contrasts import Contrast, contrasts
from analysis.effects.evaluation_error import Influence, influence, shared_error
from analysis.effects.seed_noise import Detectable, detectable
from analysis.inference.intervals import Interval, SharedError, ratio_interval, t_interval
from analysis.tables.document_losses import DocumentLosses
from analysis.tables.run_table import Table
from analysis.validity.refusal import Refusal
from analysis.words.sentences import evaluation_sentence

DOCUMENTS, SIZES = 300, ("s", "m", "l")
ARMS = {"transformer": 0.0, "mamba": -0.1}


def losses(generator: np.random.Generator) -> dict[str, dict[str, DocumentLosses]]:
    """Runs of two arms at three sizes: what a document likes in an arm holds at every size."""
    targets = generator.geometric(1 / 200, DOCUMENTS).astype(float)
    hard = np.exp(generator.normal(0, 0.4, DOCUMENTS))
    taste = generator.normal(0, 0.2, DOCUMENTS)
    return {
        f"{arm}/{size}": {
            "prose": DocumentLosses(
                targets * hard * (2.5 - 0.3 * place) * np.exp(effect + (effect != 0) * taste),
                targets,
            )
        }
        for arm, effect in ARMS.items()
        for place, size in enumerate(SIZES)
    }


def pairs() -> pd.DataFrame:
    """One pair at two sizes, two at the third: a size weighs the same, however many pairs."""
    rows = [(s, f"transformer/{s}", f"mamba/{s}") for s in (*SIZES, SIZES[-1])]
    return pd.DataFrame(rows, columns=pd.Index(["rung", "run_id_baseline", "run_id_other"]))


def effect(documents: dict[str, dict[str, DocumentLosses]], chosen: np.ndarray) -> float:
    """The mean over sizes of the difference of ln L, on documents drawn with repeats."""
    by_size = []
    for size in SIZES:
        a, b = (documents[f"{arm}/{size}"]["prose"].nats[chosen].sum() for arm in ARMS)
        by_size.append(np.log(b / a))
    return float(np.mean(by_size))


def test_the_error_is_that_of_resampled_documents() -> None:
    generator = np.random.default_rng(1)
    documents = losses(generator)
    found = influence(pairs(), documents, "prose")
    assert isinstance(found, Influence)
    draws = [effect(documents, generator.integers(0, DOCUMENTS, DOCUMENTS)) for _ in range(4000)]
    # The bootstrap's own error of a standard deviation is 1.1 %, linearisation adds some.
    assert shared_error(found.logs).error == pytest.approx(np.std(draws), rel=0.06)
    assert found.logs.sum() == pytest.approx(0, abs=1e-12)
    assert found.nats.sum() == pytest.approx(0, abs=1e-12)


def test_the_influence_on_nats_is_the_derivative_by_a_documents_weight() -> None:
    documents = losses(np.random.default_rng(2))
    found = influence(pairs(), documents, "prose")
    assert found is not None

    def nats(weights: np.ndarray) -> float:
        by_size = []
        for size in SIZES:
            a, b = (documents[f"{arm}/{size}"]["prose"] for arm in ARMS)
            by_size.append((weights @ (b.nats - a.nats)) / (weights @ a.targets))
        return float(np.mean(by_size))

    for document in (0, 7, 100):
        step = 1e-5 * (np.arange(DOCUMENTS) == document)
        slope = (nats(1 + step) - nats(1 - step)) / 2e-5
        assert found.nats[document] == pytest.approx(slope, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("missing", ["a run", "a set", "other documents"])
def test_without_the_same_documents_there_is_no_error(missing: str) -> None:
    documents = losses(np.random.default_rng(3))
    if missing == "a run":
        del documents["mamba/l"]
    elif missing == "a set":
        documents["mamba/l"] = {}
    else:
        there = documents["mamba/l"]["prose"]
        documents["mamba/l"] = {"prose": DocumentLosses(there.nats, there.targets + 1)}
    assert influence(pairs(), documents, "prose") is None


def coverage(shared: bool, studies: int = 300) -> float:
    """How often the interval holds the effect on all documents of the domain."""
    generator = np.random.default_rng(4)
    inside = 0
    for _ in range(studies):
        documents = losses(generator)
        found = influence(pairs(), documents, "prose")
        assert found is not None
        by_size = np.array([effect(documents, np.arange(DOCUMENTS))] * 3)
        by_size += generator.normal(0, 0.002, 3)
        error = shared_error(found.logs) if shared else None
        interval = t_interval(by_size, "sizes", error)
        assert isinstance(interval, Interval)
        # E[t h exp(taste)] = E[t h] exp(0.2^2 / 2): draws of the parts are independent.
        inside += not interval.excludes(-0.1 + 0.02)
    return inside / studies


def test_the_interval_covers_the_effect_on_the_domain_and_without_documents_does_not() -> None:
    assert 0.91 < coverage(shared=True) < 0.98
    assert coverage(shared=False) < 0.6


def test_a_shared_error_widens_an_interval_and_adds_degrees_of_freedom() -> None:
    values = np.array([0.1, 0.2, 0.3])
    own = t_interval(values, "sizes")
    wide = t_interval(values, "sizes", SharedError(0.05, 99, "documents"))
    tiny = t_interval(values, "sizes", SharedError(1e-9, 99, "documents"))
    assert isinstance(own, Interval)
    assert isinstance(wide, Interval)
    assert isinstance(tiny, Interval)
    assert tiny.low == pytest.approx(own.low, abs=1e-6)
    # By hand: 0.01/3 + 0.0025 with Satterthwaite's (0.00583)^2 / (0.00333^2/2 + 0.0025^2/99).
    assert wide.high - 0.2 == pytest.approx(2.4414 * np.sqrt(0.01 / 3 + 0.0025), rel=2e-3)
    assert wide.method == "t interval over 3 sizes and 100 documents"


def test_a_ratio_takes_the_shared_error_in() -> None:
    x, y = np.array([0.10, 0.11, 0.12]), np.array([0.30, 0.31, 0.33])
    alone = ratio_interval(x, y)
    shared = ratio_interval(x, y, np.array([[1e-4, 0.0], [0.0, 1e-4]]))
    refused = ratio_interval(x, y, np.array([[1e-4, 0.0], [0.0, 1.0]]))
    assert isinstance(alone, Interval)
    assert isinstance(shared, Interval)
    assert shared.low < alone.low < alone.high < shared.high
    assert isinstance(refused, Refusal)


def test_contrasts_and_what_can_be_detected_know_the_documents() -> None:
    documents = losses(np.random.default_rng(5))
    rows = pd.DataFrame(
        [
            {
                "run_id": f"{arm}/{size}", "architecture": arm, "corpus": "c", "rung": size,
                "tokens": 1e6, "seed": 0, "order_seed": 0, "parameters": 10.0 ** place,
                "evaluation_set": "prose", "targets": 1.0, "utf8_bytes": 1.0, "certificate": "x",
                "loss_nats": documents[f"{arm}/{size}"]["prose"].nats.sum(),
            }
            for arm in ARMS
            for place, size in enumerate(SIZES)
        ]
    )  # fmt: skip
    known = Table("t", "prose", rows, rows, (), {}, documents=documents)
    unknown = Table("t", "prose", rows, rows, (), {})
    with_documents, without = (contrasts(t, "architecture", "prose")[0] for t in (known, unknown))
    assert isinstance(with_documents, Contrast)
    assert isinstance(without, Contrast)
    assert without.evaluation_error is None
    assert with_documents.effect.method.endswith(f"and {DOCUMENTS} documents")
    noise = Refusal("R-SEED", "none", "none")
    more, less = (detectable(each, noise) for each in (with_documents, without))
    assert isinstance(more, Detectable)
    assert isinstance(less, Detectable)
    assert more.value > less.value
    assert "documents of the evaluation set" in more.basis


@pytest.mark.parametrize("other", [608, 64])
def test_the_size_of_the_set_is_told_if_it_is_one(other: int) -> None:
    rows = pd.DataFrame(
        {
            "evaluation_set": "prose", "blocks": [608, other], "documents": [142, 142],
            "targets": [311_000, 311_000],
        }
    )  # fmt: skip
    text = evaluation_sentence(Table("t", "prose", rows, rows, (), {}))
    expected = "Prose: 311 k tokens of 142 documents (608 blocks), the same for every run."
    assert text.startswith(expected) if other == 608 else text == ""
