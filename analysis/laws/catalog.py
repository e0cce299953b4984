"""The laws that are fitted here, by name, with their sources."""

from dataclasses import replace

from analysis.laws.law import Factor, Law, Term


def _term(coefficient: str, exponent: str | float, **powers: float) -> Term:
    return Term(coefficient, (Factor(exponent, tuple(powers.items())),))


_SIZE = _term("A", "alpha", parameters=1.0)


_DATA = _term("B", "beta", tokens=1.0)


CHINCHILLA = Law("chinchilla", (_SIZE, _DATA))
"""Hoffmann et al. 2203.15556: L = E + A N^-alpha + B D^-beta."""


POWER = Law("power", (_term("K", "gamma", flops=1.0),))
"""Kaplan et al. 2001.08361, with a floor: L = E + K C^-gamma."""


GAMMA = Law("gamma", (_SIZE, _DATA), power="power")
"""Busbridge et al. 2502.08606: L = E + (A N^-alpha + B D^-beta)^power."""


KAPLAN = Law("kaplan", (_SIZE, _term("B", 1.0, tokens=1.0)), power="power")
"""Kaplan et al. 2001.08361, with a floor: L = E + (A N^-alpha + B / D)^power."""


GADRE = Law(
    "gadre",
    (
        _term("P", "h", flops=1.0, tokens=-1.0, parameters=1.0),
        _term("Q", "h", flops=1.0, tokens=1.0, parameters=-1.0),
    ),
)
"""Gadre et al. 2403.08540: L = E + (P M^h + Q M^-h) C^-h with M = D / N."""


RATE = Law(
    "rate",
    (
        Term(
            "c",
            (Factor("p", (("parameters", -1.0),)), Factor("q", (("tokens", -1.0),))),
        ),
    ),
    floor=None,
    target="learning_rate",
)
"""Step-law 2503.04715: best learning rate = c N^p D^q."""


BATCH = Law("batch", (_term("c", "r", tokens=-1.0),), floor=None, target="batch_tokens")
"""Step-law 2503.04715: best batch = c D^r, in tokens."""


def nested_family(by: tuple[str, ...]) -> dict[str, Law]:
    """The Chinchilla laws between "no difference" (M0) and "nothing shared" (Mfull)."""
    varying = {
        "M0": "",
        "Ma": "A",
        "Mb": "B",
        "Mab": "A B",
        "Me": "E",
        "Meab": "A B E",
        "Mfull": "A B E alpha beta",
    }
    return {
        name: replace(CHINCHILLA, name=name, by=by, varies=frozenset(names.split()))
        for name, names in varying.items()
    }
