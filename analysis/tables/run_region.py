"""Which sizes and token counts were run, and what a token of training costs there."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.tables.frames import Array, floats

SIZES = 60


ROUNDING = 1e-3


@dataclass(frozen=True)
class Reach:
    """What one arm has been run with: sizes, and by size its tokens and FLOPs per token.

    Tokens of a size lie between runs: inside the convex hull of all runs in ln N and ln D. In a
    design of budgets no size has a second horizon, and the hull is what its parabolas span.
    """

    parameters: Array
    fewest_tokens: Array
    most_tokens: Array
    flops_per_token: Array

    @property
    def tokens(self) -> tuple[float, float]:
        """The fewest and the most tokens of any size."""
        return float(self.fewest_tokens.min()), float(self.most_tokens.max())

    def was_run(self, sizes: Array, tokens: Array) -> Array:
        """Whether points lie between runs."""
        logs, known = np.log(sizes), np.log(self.parameters)
        low = np.interp(logs, known, np.log(self.fewest_tokens)) - ROUNDING
        high = np.interp(logs, known, np.log(self.most_tokens)) + ROUNDING
        return (np.log(tokens) >= low) & (np.log(tokens) <= high)

    def cost(self, sizes: Array) -> Array:
        """Headline FLOPs per token of a size, log-log between the sizes that were run."""
        logs = np.interp(np.log(sizes), np.log(self.parameters), np.log(self.flops_per_token))
        return np.exp(logs)

    def grid(self) -> Array:
        """Sizes between the smallest and the largest that were run."""
        return np.geomspace(self.parameters[0], self.parameters[-1], SIZES)


def reach(rows: pd.DataFrame) -> Reach:
    """The range of one arm's runs."""
    priced = rows.assign(cost=rows["flops"] / rows["tokens"])
    sizes, place = np.unique(floats(rows, "parameters"), return_inverse=True)
    tokens, cost = floats(priced, "tokens"), floats(priced, "cost")
    of_size = [place == index for index in range(len(sizes))]
    fewest = np.array([tokens[mine].min() for mine in of_size])
    most = np.array([tokens[mine].max() for mine in of_size])
    return Reach(
        sizes,
        1.0 / _upper_hull(sizes, 1.0 / fewest),
        _upper_hull(sizes, most),
        np.array([cost[mine].mean() for mine in of_size]),
    )


def _upper_hull(sizes: Array, values: Array) -> Array:
    """The least concave curve above values, log-log, at each of the rising sizes."""
    x, y = np.log(sizes), np.log(values)
    corners = [0]
    for right in range(1, len(x)):
        while len(corners) > 1:
            left, middle = corners[-2:]
            chord = (y[right] - y[left]) * (x[middle] - x[left])
            if (y[middle] - y[left]) * (x[right] - x[left]) > chord:
                break
            corners.pop()
        corners.append(right)
    return np.exp(np.interp(x, x[corners], y[corners]))
