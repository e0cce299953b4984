"""The region of sizes and tokens that an arm was run in, and what a token costs by size.

Ours: the region is the convex hull of the runs in ln N and ln D, built by Andrew's monotone chain
(Andrew 1979).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.tables.frames import Array, floats

SIZES = 60


ROUNDING = 1e-3


@dataclass(frozen=True)
class SizeCurve:
    """A quantity that is known at some sizes: straight lines in logarithms between them.

    Attributes:
        sizes: parameters, rising.
        values: positive.
        beyond: the power of size that the quantity follows outside the known sizes.
    """

    sizes: Array
    values: Array
    beyond: float = 0.0

    @classmethod
    def medians(cls, sizes: Array, values: Array, beyond: float = 0.0) -> "SizeCurve":
        """The median of the values at each size."""
        known, place = np.unique(sizes, return_inverse=True)
        medians = [float(np.median(values[place == index])) for index in range(len(known))]
        return cls(known, np.array(medians), beyond)

    def __call__(self, sizes: Array) -> Array:
        """The quantity at each size."""
        logs, known = np.log(sizes), np.log(self.sizes)
        between = np.interp(logs, known, np.log(self.values))
        outside = np.maximum(logs - known[-1], 0.0) + np.minimum(logs - known[0], 0.0)
        return np.exp(between + self.beyond * outside)


def flops_per_token(rows: pd.DataFrame, convention: str = "flops") -> SizeCurve:
    """Training FLOPs of a token by size, by one way of counting.

    Outside the sizes that were run it grows with size, as products of weights make up nearly all
    of it there.
    """
    cost = floats(rows, convention) / floats(rows, "tokens")
    return SizeCurve.medians(floats(rows, "parameters"), cost, beyond=1.0)


def seconds_per_token(rows: pd.DataFrame) -> SizeCurve:
    """Measured training time of a token by size; the last size's outside those that were run."""
    return SizeCurve.medians(floats(rows, "parameters"), 1.0 / floats(rows, "tokens_per_second"))


@dataclass(frozen=True)
class RunRegion:
    """What one arm has been run with: sizes, and by size its tokens and training FLOPs per token.

    Tokens of a size lie between runs: inside the convex hull of all runs in ln N and ln D. In an
    isoFLOP design no size has a second horizon, and the hull is what its parabolas span.
    """

    parameters: Array
    fewest_tokens: Array
    most_tokens: Array
    cost: SizeCurve

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

    def grid(self) -> Array:
        """Sizes between the smallest and the largest that were run."""
        return np.geomspace(self.parameters[0], self.parameters[-1], SIZES)


def run_region(rows: pd.DataFrame) -> RunRegion:
    """The sizes and tokens of one arm's runs."""
    sizes, place = np.unique(floats(rows, "parameters"), return_inverse=True)
    tokens = floats(rows, "tokens")
    of_size = [place == index for index in range(len(sizes))]
    fewest = np.array([tokens[mine].min() for mine in of_size])
    most = np.array([tokens[mine].max() for mine in of_size])
    return RunRegion(
        # The lower hull of logs is the mirrored upper hull of the reciprocals.
        sizes, 1.0 / _upper_hull(sizes, 1.0 / fewest), _upper_hull(sizes, most),
        flops_per_token(rows),
    )  # fmt: skip


def _upper_hull(sizes: Array, values: Array) -> Array:
    """The least concave curve above values, log-log, at each of the rising sizes."""
    x, y = np.log(sizes), np.log(values)
    corners = [0]
    for right in range(1, len(x)):
        while len(corners) > 1:
            left, middle = corners[-2:]
            chord = (y[right] - y[left]) * (x[middle] - x[left])
            # Slopes compared without dividing: the middle corner stays if it lies above the chord.
            if (y[middle] - y[left]) * (x[right] - x[left]) > chord:
                break
            corners.pop()
        corners.append(right)
    return np.exp(np.interp(x, x[corners], y[corners]))
