"""A fit's loss surface is the law, and its inverses undo it."""

import numpy as np
import pandas as pd
import pytest

from analysis.fitting.loss_surface import surface_of
from analysis.laws.bound import bind, log_loss
from analysis.laws.catalog import CHINCHILLA, GADRE, GAMMA, KAPLAN

POINTS = pd.DataFrame(
    {
        "parameters": np.geomspace(1e7, 1e9, 12),
        "tokens": np.geomspace(1e9, 3e10, 12)[::-1],
        "flops": np.geomspace(1e17, 1e20, 12),
        "loss_nats": 3.0,
    }
)
SIZES, TOKENS = (POINTS[name].to_numpy() for name in ("parameters", "tokens"))


def bound(law):
    form = bind(law, POINTS)
    near = np.zeros((3, len(form.labels)))
    for (name, _), slot in form.slots.items():
        centre = {"A": -0.9, "B": -0.7, "E": 0.5, "alpha": 0.35, "beta": 0.4, "power": -0.2}[name]
        near[:, slot] = centre + np.array([0.0, 0.02, -0.03])
    return form, near


@pytest.mark.parametrize("law", [CHINCHILLA, GAMMA, KAPLAN], ids=lambda law: law.name)
def test_the_surface_is_the_law_for_every_parameter_vector(law):
    form, theta = bound(law)
    expected = np.exp(log_loss(form.design(POINTS), theta))
    np.testing.assert_allclose(surface_of(form, theta, "").loss(SIZES, TOKENS), expected, 1e-12)


@pytest.mark.parametrize("law", [CHINCHILLA, GAMMA, KAPLAN], ids=lambda law: law.name)
def test_tokens_and_sizes_for_a_loss_give_that_loss(law):
    surface = surface_of(*bound(law), "")
    loss = surface.loss(SIZES, TOKENS)
    np.testing.assert_allclose(surface.tokens(SIZES, loss), np.tile(TOKENS, (3, 1)), 1e-8)
    np.testing.assert_allclose(surface.sizes(TOKENS, loss), np.tile(SIZES, (3, 1)), 1e-8)


def test_a_loss_below_the_floor_or_the_other_term_is_never_reached():
    surface = surface_of(*bound(GAMMA), "")
    assert np.isinf(surface.tokens(SIZES, 1.0)).all()
    assert np.isinf(surface.sizes(1e9, surface.loss(np.inf, 1e9) - 0.01)).all()


def test_a_law_without_those_two_terms_is_refused_by_name():
    form = bind(GADRE, POINTS)
    with pytest.raises(ValueError, match="gadre law is no function of parameters and tokens"):
        surface_of(form, np.zeros((1, len(form.labels))), "")
