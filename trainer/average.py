"""An exponential moving average of the weights, beside those that are trained."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """The mean of the weights after each step, of which earlier ones count less by `decay` a step.

    Divided by the sum of what each counts, as Adam's means are, so that initial weights have no
    part in it.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = dict(module.named_parameters())
        self._averages = {n: w.detach().clone() for n, w in self._weights.items()}

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The averages, by the names of the parameters."""
        return self._averages

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after that many steps."""
        share = (1 - self._decay) / (1 - self._decay**steps)
        for name, weight in self._weights.items():
            self._averages[name].lerp_(weight, share)

    @torch.no_grad()
    def load(self, stored: Mapping[str, Tensor]) -> None:
        """Go on from stored averages."""
        for name, average in self._averages.items():
            average.copy_(stored[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages into the module, and afterwards the weights that are trained."""
        trained = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._fill(self._averages)
        try:
            yield
        finally:
            self._fill(trained)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])
