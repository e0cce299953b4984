"""A training curve small enough for a table: one SVG of at most two lines per run."""

import math

import numpy as np
import pandas as pd
from markupsafe import Markup

from analysis.tables.frames import floats
from analysis.words.numbers import with_unit

WIDTH, HEIGHT, MARGIN = 110, 26, 2
"""Pixels."""


def loss_scale(training: pd.DataFrame) -> tuple[float, float]:
    """Ends of the loss axis that all curves of a table share, in ln L.

    The top is the highest loss at which a run began: a run that diverged leaves at the top instead
    of pressing all others flat.
    """
    if not len(training):
        return 0.0, 1.0
    first = training.drop_duplicates("run_id")
    low = float(floats(training, "loss_nats").min())
    high = float(floats(first, "loss_nats").max())
    return math.log(low), max(math.log(high), math.log(low) + 1e-6)


def sparkline(curve: pd.DataFrame, scale: tuple[float, float]) -> Markup:
    """Loss on the shared log axis against the run's tokens; the steps of its trunk are faint."""
    if not len(curve):
        return Markup("")
    x, y = coordinates(curve, scale)
    points = [f"{across:.1f},{down:.1f}" for across, down in zip(x, y, strict=True)]
    # Both lines hold the point where the run branched.
    branch = int(np.sum(curve["of_trunk"]))
    drawn = _line("trunk", points[: branch + 1] if branch else []) + _line("own", points[branch:])
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">{drawn}</svg>')


def coordinates(curve: pd.DataFrame, scale: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Where each recorded point lies in the drawing [pixels from the top left]."""
    tokens, logs = floats(curve, "tokens"), np.log(floats(curve, "loss_nats"))
    low, high = scale
    across = (tokens - tokens[0]) / max(float(tokens[-1] - tokens[0]), 1.0)
    down = np.clip((high - logs) / (high - low), 0.0, 1.0)
    return MARGIN + (WIDTH - 2 * MARGIN) * across, MARGIN + (HEIGHT - 2 * MARGIN) * down


def curve_words(curve: pd.DataFrame) -> str:
    """The ends of a curve in words."""
    if not len(curve):
        return "no step recorded"
    losses, tokens = floats(curve, "loss_nats"), floats(curve, "tokens")
    return (
        f"training loss {losses[0]:.3g} nats after {with_unit(tokens[0])} tokens, "
        f"{losses[-1]:.3g} after {with_unit(tokens[-1])}"
    )


def _line(name: str, points: list[str]) -> str:
    return f'<polyline class="{name}" points="{" ".join(points)}"/>' if points else ""
