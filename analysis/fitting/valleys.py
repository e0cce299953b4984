"""Loss against learning rate as valleys: many searches fitted together, with one shape a family.

A valley is ln L = floor + curvature * bend(x - centre) in x = log2 of the rate. It is a parabola at
its lowest point whose arms become straight, with a slope of their own below and above: small models
rise gently on one side and steeply on the other, and far trials are not quadratic.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

REACH = (0.25, 32.0)
"""Octaves over which an arm turns from a parabola into a line; the ends of what is tried."""
ROBUST = 2.0
"""Seed standard deviations from which a residual counts linearly."""
LEVERAGE = 0.9
"""Beyond which a residual is not enlarged further."""
SHAPE = 3
"""Parameters of a shape: ln of the curvature and of the reach below and above."""


@dataclass(frozen=True)
class Trials:
    """Trials to fit.

    Attributes:
        x: log2 of the rate.
        y: ln of the loss.
        cell: each trial's cell, 0 to n - 1; each has a floor of its own.
        family: whose shape a trial has, 0 to n - 1.
        design: centre of each trial's valley = design @ coefficients.
        trunk: trials of one trunk share training, so their errors are kept together; 0 to n - 1.
        noise: standard deviation of ln L between seeds.
    """

    x: np.ndarray
    y: np.ndarray
    cell: np.ndarray
    family: np.ndarray
    design: np.ndarray
    trunk: np.ndarray
    noise: float


@dataclass(frozen=True)
class ValleyFit:
    """What the trials say.

    Attributes:
        parameters: coefficients of the centres, then the shapes, then the cells' floors.
        coefficients: of the centres alone.
        draws: parameters by replicate; each trunk's residuals change sign together.
        residuals: of ln L.
        scatter: their root mean square, with degrees of freedom.
        freedom: trunks less the parameters, at least 1.
    """

    parameters: np.ndarray
    coefficients: np.ndarray
    draws: np.ndarray
    residuals: np.ndarray
    scatter: float
    freedom: int


def rise(shape: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Ln of the loss over its lowest value, `z` octaves from the best rate.

    The last axis of `shape` holds ln of the curvature and of the reach below and above.
    """
    curvature, below, above = np.moveaxis(np.exp(shape), -1, 0)
    reach = np.where(z < 0, below, above)
    return curvature * reach**2 * (np.sqrt(1 + (z / reach) ** 2) - 1)


def fit_valleys(trials: Trials, start: np.ndarray, count: int, seed: int) -> ValleyFit:
    """The coefficients, shapes and floors that fit best, and replicates of them.

    Replicates are those of a score bootstrap (Kline and Santos 2012): one Newton step for each
    draw of signs, with residuals enlarged for their leverage, and up to the seed noise where the
    fit leaves less than it.

    Args:
        trials: what was measured.
        start: coefficients to start from.
        count: of replicates.
        seed: of the replicates.
    """
    width, families = trials.design.shape[1], int(trials.family.max()) + 1
    cells, trunks = int(trials.cell.max()) + 1, int(trials.trunk.max()) + 1
    lowest = np.array([np.min(trials.y[trials.cell == cell]) for cell in range(cells)])
    shapes = np.tile(np.log([0.03, 2.0, 2.0]), families)
    low = np.tile(np.log([1e-3, REACH[0], REACH[0]]), families)
    high = np.tile(np.log([2.0, REACH[1], REACH[1]]), families)
    free = np.full(width, np.inf), np.full(cells, np.inf)
    solved = least_squares(
        lambda theta: _residuals(trials, theta),
        np.concatenate([start, shapes, lowest]),
        jac=lambda theta: _slopes(trials, theta),  # type: ignore[arg-type]
        bounds=(
            np.concatenate([-free[0], low, -free[1]]),
            np.concatenate([free[0], high, free[1]]),
        ),
        loss="soft_l1",
        f_scale=ROBUST * trials.noise,
        x_scale="jac",
        ftol=1e-7,
        xtol=1e-6,
    )
    theta = solved.x
    residuals, slopes = _residuals(trials, theta), _slopes(trials, theta)
    weights = 1 / np.sqrt(1 + (residuals / (ROBUST * trials.noise)) ** 2)
    spare = max(len(trials.x) - len(theta), 1)
    scatter = float(np.sqrt(np.sum(weights * residuals**2) / spare))
    inverse = np.linalg.pinv(slopes.T @ (slopes * weights[:, None]), rcond=1e-10)
    scores = _scores(trials.trunk, residuals, slopes, weights, inverse)
    scores *= max(1.0, trials.noise / max(scatter, 1e-12))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(count, trunks))
    steps = signs @ scores @ inverse
    return ValleyFit(
        theta, theta[:width], theta + steps, -residuals, scatter, max(trunks - len(theta), 1)
    )


def _scores(
    trunk: np.ndarray,
    residuals: np.ndarray,
    slopes: np.ndarray,
    weights: np.ndarray,
    inverse: np.ndarray,
) -> np.ndarray:
    """Each trunk's pull on the parameters, its residuals as if the fit had not seen it (CR3)."""
    root = np.sqrt(weights)
    scores = []
    for which in range(int(trunk.max()) + 1):
        mine = trunk == which
        rows = slopes[mine] * root[mine, None]
        values, vectors = np.linalg.eigh(rows @ inverse @ rows.T)
        # A trunk that alone decides a parameter has no residual to enlarge.
        kept = vectors @ (
            (vectors.T @ (residuals * root)[mine]) / (1 - np.minimum(values, LEVERAGE))
        )
        scores.append(rows.T @ kept)
    return np.array(scores)


def shapes_of(parameters: np.ndarray, width: int, families: int) -> np.ndarray:
    """Each family's shape, out of parameters whose first `width` are those of the centres."""
    stored = parameters[..., width : width + SHAPE * families]
    low, high = np.log([1e-3, *REACH[:1] * 2]), np.log([2.0, *REACH[1:] * 2])
    return np.clip(stored.reshape(*stored.shape[:-1], families, SHAPE), low, high)


def _parts(trials: Trials, theta: np.ndarray) -> tuple[np.ndarray, ...]:
    width, families = trials.design.shape[1], int(trials.family.max()) + 1
    z = trials.x - trials.design @ theta[:width]
    shape = np.exp(theta[width : width + SHAPE * families]).reshape(families, SHAPE)[trials.family]
    reach = np.where(z < 0, shape[:, 1], shape[:, 2])
    return z, shape[:, 0], reach, np.sqrt(1 + (z / reach) ** 2)


def _residuals(trials: Trials, theta: np.ndarray) -> np.ndarray:
    _, curvature, reach, root = _parts(trials, theta)
    cells = int(trials.cell.max()) + 1
    return theta[-cells:][trials.cell] + curvature * reach**2 * (root - 1) - trials.y


def _slopes(trials: Trials, theta: np.ndarray) -> np.ndarray:
    z, curvature, reach, root = _parts(trials, theta)
    width, cells = trials.design.shape[1], int(trials.cell.max()) + 1
    rows = np.arange(len(z))
    slopes = np.zeros((len(z), len(theta)))
    slopes[:, :width] = -(curvature * z / root)[:, None] * trials.design
    first = width + SHAPE * trials.family
    slopes[rows, first] = curvature * reach**2 * (root - 1)
    # d/d ln(reach) of reach^2 (root - 1) = 2 reach^2 (root - 1) - z^2 / root.
    turn = curvature * (2 * reach**2 * (root - 1) - z**2 / root)
    slopes[rows, first + np.where(z < 0, 1, 2)] = turn
    slopes[rows, len(theta) - cells + trials.cell] = 1.0
    return slopes
