"""One arm's fitted loss over parameters and tokens, and its inverses.

L(N, D) = E + (A N^-alpha + B D^-beta)^power; a law without `power` has 1 (Hoffmann et al.
2203.15556, equation 2; with the outer exponent Busbridge et al. 2502.08606). Everything that asks a
fit "what loss" or "how many tokens until this loss" asks here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.laws.bound import Form
from analysis.laws.law import Law
from analysis.tables.frames import Array

LARGEST_LOG = 700.0
"""exp of more overflows a float64."""


@dataclass(frozen=True)
class LossSurface:
    """L(N, D) of one group of a fit, for each of several parameter vectors.

    Results have one row per parameter vector; sizes, tokens and losses broadcast along it.

    Attributes:
        terms: ln A, alpha, ln B, beta, ln E and ln power, each (replicates, 1).
    """

    terms: Mapping[str, Array]

    def loss(self, sizes: Array | float, tokens: Array | float) -> Array:
        """The fitted loss [nats]."""
        reducible = self._by_size(sizes) + self._by_data(tokens)
        return np.exp(self.terms["E"]) + reducible ** np.exp(self.terms["power"])

    def tokens(self, sizes: Array | float, loss: Array | float) -> Array:
        """Tokens that reach a loss at a size; infinite where no number of tokens does."""
        left = self._reducible(loss) - self._by_size(sizes)
        return _solved(left, self.terms["B"], self.terms["beta"])

    def sizes(self, tokens: Array | float, loss: Array | float) -> Array:
        """Parameters that reach a loss with so many tokens; infinite where no size does."""
        left = self._reducible(loss) - self._by_data(tokens)
        return _solved(left, self.terms["A"], self.terms["alpha"])

    def _by_size(self, sizes: Array | float) -> Array:
        return np.exp(self.terms["A"] - self.terms["alpha"] * np.log(sizes))

    def _by_data(self, tokens: Array | float) -> Array:
        return np.exp(self.terms["B"] - self.terms["beta"] * np.log(tokens))

    def _reducible(self, loss: Array | float) -> Array:
        """A N^-alpha + B D^-beta at a loss; not positive where the floor lies above the loss."""
        above = loss - np.exp(self.terms["E"])
        # A negative number has no real root: the floor is taken off before the power is undone.
        return np.where(above > 0, np.maximum(above, 0.0) ** np.exp(-self.terms["power"]), above)


def surface_of(form: Form, theta: Array, group: str) -> LossSurface:
    """The loss surface of one group, theta being (replicates, parameters).

    Raises:
        ValueError: the law is no sum of a term in parameters and a term in tokens.
    """
    law = form.law
    if not isinstance(law, Law) or law.transform is not None:
        raise ValueError(f"the {law.name} law is no sum of powers; ask a chinchilla or gamma law")
    natural = {name: value[:, None] for name, value in form.natural(theta, group).items()}
    zero = np.zeros((len(theta), 1))
    terms = {
        "E": natural[law.floor] if law.floor else np.full_like(zero, -np.inf),
        "power": natural[law.power] if law.power else zero,
    }
    names: dict[tuple[tuple[str, float], ...], tuple[str, str]] = {
        (("parameters", 1.0),): ("A", "alpha"),
        (("tokens", 1.0),): ("B", "beta"),
    }
    for term in law.terms:
        key = term.factors[0].columns if len(term.factors) == 1 else ()
        if key not in names:
            raise ValueError(
                f"the {law.name} law is no function of parameters and tokens; ask a chinchilla "
                "or gamma law"
            )
        coefficient, exponent = names.pop(key)
        power = term.factors[0].exponent
        terms[coefficient] = natural[term.coefficient]
        terms[exponent] = natural[power] if isinstance(power, str) else np.full_like(zero, power)
    if names:
        raise ValueError(f"the {law.name} law lacks a term; ask a chinchilla or gamma law")
    return LossSurface(terms)


def _solved(left: Array, log_coefficient: Array, exponent: Array) -> Array:
    """X with coefficient X^-exponent = left, and infinity where left is not positive."""
    reachable = left > 0
    logs = (log_coefficient - np.log(np.where(reachable, left, 1.0))) / exponent
    return np.where(reachable, np.exp(np.clip(logs, -LARGEST_LOG, LARGEST_LOG)), np.inf)
