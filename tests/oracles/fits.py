"""Plain re-derivations of what analysis computes: slow, obvious, and sharing no code with it."""

import math

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.stats import t as student


def chinchilla(values, parameters, tokens):
    """L = E + A N^-alpha + B D^-beta with values = (E, A, alpha, B, beta)."""
    floor, size, alpha, data, beta = values
    return floor + size * parameters**-alpha + data * tokens**-beta


def huber_sum(values, parameters, tokens, loss, delta):
    """Sum over points of the Huber loss of ln predicted - ln observed."""
    total = 0.0
    for n, d, seen in zip(parameters, tokens, loss, strict=True):
        miss = abs(math.log(chinchilla(values, n, d)) - math.log(seen))
        total += 0.5 * miss**2 if miss <= delta else delta * (miss - 0.5 * delta)
    return total


def best_by_simplex(parameters, tokens, loss, delta, starts):
    """The lowest Huber sum found by restarted Nelder-Mead from given (E, A, alpha, B, beta)."""

    def in_logs(logs):
        return 1e3 * huber_sum(np.exp(logs), parameters, tokens, loss, delta)

    best = math.inf
    for start in starts:
        point = np.log(start)
        for _ in range(4):
            found = minimize(
                in_logs, point, method="Nelder-Mead",
                options={"maxiter": 4000, "maxfev": 4000, "xatol": 1e-9, "fatol": 1e-13},
            )  # fmt: skip
            point = found.x
        best = min(best, found.fun / 1e3)
    return best


def derivative(function, point, step):
    """Central differences of a vector function, one column per coordinate."""
    columns = []
    for place in range(len(point)):
        shift = np.zeros(len(point))
        shift[place] = step
        columns.append((function(point + shift) - function(point - shift)) / (2 * step))
    return np.stack(columns, axis=-1)


def ratios_not_rejected(numerator, denominator, grid):
    """Ratios r for which a paired t test does not reject mean(numerator - r * denominator) = 0."""
    count = len(numerator)
    limit = student.ppf(0.975, count - 1)
    kept = []
    for ratio in grid:
        rest = np.asarray(numerator) - ratio * np.asarray(denominator)
        statistic = rest.mean() / (rest.std(ddof=1) / math.sqrt(count))
        if abs(statistic) <= limit:
            kept.append(ratio)
    return min(kept), max(kept)


def tokens_for_loss(loss_at_tokens, loss):
    """Tokens at which a decreasing function of tokens reaches a loss, by bracketing."""
    return math.exp(
        brentq(lambda logs: loss_at_tokens(math.exp(logs)) - loss, math.log(1e3), math.log(1e12))
    )
