"""The parameter vector of a law with known parameters, for tests that start from a truth."""

from collections.abc import Mapping

import numpy as np

from analysis.laws.bound import Form


def theta_of(form: Form, values: Mapping[str, float]) -> np.ndarray:
    """Parameters as they are reported (A, not ln A), by label, in a form's own coordinates."""
    theta = np.zeros(len(form.labels))
    for group in form.groups:
        slots = form.slots_of(group)
        named = {name: values[form.labels[slot]] for name, slot in slots.items()}
        inner = form.law.internal(named | dict(form.law.fixed), form.centres)
        for name, slot in slots.items():
            theta[slot] = inner[name]
    return theta
