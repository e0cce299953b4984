"""Implicit long filters: a small network maps each lag to a tap (Poli et al. 2023, "Hyena").

Network, features and window follow M2's release (Fu et al. 2023, "Monarch Mixer"). Changed: the
unit of time is `max_len`, whatever the length of the input, and no filter is longer.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels.precision import widened, without_autocast
from models.parts.layers import uniform


@dataclass(frozen=True)
class FilterConfig:
    """Sizes of implicit filters; the defaults are M2-BERT's.

    Attributes:
        max_len: longest document, and the unit of the filter's time.
        filter_features: features E of a lag, the lag itself and pairs of cosine and sine; odd.
        filter_hidden: width h of the network.
        filter_layers: hidden layers between the first and the last.
        filter_frequency: initial factor within the sines.
        fast_decay, slow_decay: share of max_len after which the window of the fastest, slowest
            channel has fallen to `decay_target`.
        decay_target: what the window falls to there.
        window_shift: added to every window, which otherwise falls to zero.
        trainable_features: whether the features are learned from their initial values.
    """

    max_len: int
    filter_features: int = 5
    filter_hidden: int = 128
    filter_layers: int = 2
    filter_frequency: float = 10.0
    fast_decay: float = 0.3
    slow_decay: float = 1.5
    decay_target: float = 0.01
    window_shift: float = 0.0
    trainable_features: bool = True

    def __post_init__(self) -> None:
        if self.filter_features < 3 or self.filter_features % 2 == 0:
            raise ValueError(
                f"filter_features {self.filter_features} is not one lag plus pairs of cosine and "
                "sine; take an odd number, 3 or more"
            )
        for name in ("max_len", "filter_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive; take 1 or more")
        if self.filter_layers < 0:
            raise ValueError(f"filter_layers {self.filter_layers} is negative; take 0 or more")
        if not (self.fast_decay > 0 and self.slow_decay > 0 and 0 < self.decay_target < 1):
            raise ValueError(
                f"fast_decay {self.fast_decay}, slow_decay {self.slow_decay} and decay_target "
                f"{self.decay_target} define no window; take decays above 0 and a target in (0, 1)"
            )


class ImplicitFilter(nn.Module):
    """A filter per channel and direction: k[l] = network(features(l)) * window(l), plus a skip.

    Its maps act on lags, not on tokens, so no count of FLOPs per token includes them. It computes
    in float32 or wider: in half precision neighbouring lags would have equal features. The sines
    are in float64, because each amplifies the rounding of its input about sixfold.

    Args:
        channels: filters per direction.
        directions: 1, or 2 with another filter for later tokens, from lag -1 on. Both use the same
            features and frequencies.
    """

    no_decay = frozenset({"features", "frequency", "inner_bias", "in_bias", "skip"})

    def __init__(self, config: FilterConfig, channels: int, directions: int) -> None:
        super().__init__()
        self.config = config
        E, h, R = config.filter_features, config.filter_hidden, directions
        if config.trainable_features:
            self.features = nn.Parameter(torch.empty(config.max_len, E))
        else:
            self.no_decay = self.no_decay - {"features"}
        self.frequency = nn.Parameter(torch.empty(h))
        self.in_weight = nn.Parameter(torch.empty(R, E, h))
        self.in_bias = nn.Parameter(torch.empty(R, h))
        self.inner_weight = nn.Parameter(torch.empty(R, config.filter_layers, h, h))
        self.inner_bias = nn.Parameter(torch.empty(R, config.filter_layers, h))
        self.out_weight = nn.Parameter(torch.empty(R, h, channels))
        self.skip = nn.Parameter(torch.empty(channels))

    def forward(self, length: int, direction: int = 0) -> Float[Tensor, "C K"]:
        """The first `length` taps of a direction, at most max_len."""
        length = min(length, self.config.max_len)
        with without_autocast(self.frequency):
            taps = self._network(length, direction) * self._window(length)
            if direction == 0:
                taps = torch.cat([taps[:1] + widened(self.skip), taps[1:]])
            return taps.transpose(0, 1)

    @torch.no_grad()
    def norm(self) -> Float[Tensor, "C"]:
        """The 1-norm of each channel's filter, both directions together."""
        taps = [self(self.config.max_len, r) for r in range(len(self.in_bias))]
        return torch.cat(taps, dim=1).abs().sum(dim=1)

    def flops(self, length: int) -> float:
        """Forward FLOPs of computing the filters once, for all channels and directions."""
        lags = min(length, self.config.max_len)
        maps = self.in_weight, self.inner_weight, self.out_weight
        return 2.0 * lags * sum(weight.numel() for weight in maps)

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Initial values: torch's for dense maps, N(0, 1) for the skip, `lag_features`."""
        shape = getattr(self, name).shape
        if name == "features":
            return lag_features(self.config.max_len, self.config, torch.device("cpu")).float()
        if name == "frequency":
            return torch.full(shape, self.config.filter_frequency)
        if name == "skip":
            return torch.randn(shape, generator=generator)
        fan_in = self.in_weight.shape[1] if name.startswith("in_") else self.frequency.shape[0]
        return uniform(shape, fan_in**-0.5, generator)

    def _network(self, length: int, direction: int) -> Float[Tensor, "K C"]:
        out = widened(self.out_weight[direction])
        maps = [(self.in_weight[direction], self.in_bias[direction])]
        maps += zip(self.inner_weight[direction], self.inner_bias[direction], strict=True)
        x, frequency = self._features(length).double(), self.frequency.double()
        for weight, bias in maps:
            x = torch.sin(frequency * (x @ weight.double() + bias.double()))
        return x.to(out.dtype) @ out

    def _features(self, length: int) -> Float[Tensor, "K E"]:
        if self.config.trainable_features:
            return self.features[:length]
        return lag_features(length, self.config, self.frequency.device)

    def _window(self, length: int) -> Float[Tensor, "K C"]:
        config, skip = self.config, widened(self.skip)
        fall = -math.log(config.decay_target)
        slowest, fastest = fall / config.slow_decay, fall / config.fast_decay
        # Rates, not time scales, are spread evenly over the channels.
        rates = torch.linspace(slowest, fastest, len(skip), device=skip.device, dtype=skip.dtype)
        time = lag_times(length, config, skip.device).to(skip.dtype)
        return torch.exp(-time[:, None] * rates) + config.window_shift


def lag_times(length: int, config: FilterConfig, device: torch.device) -> Float[Tensor, "K"]:
    """Lags as shares of the longest, in float64."""
    lags = torch.arange(length, device=device, dtype=torch.float64)
    return lags / max(1, config.max_len - 1)


def lag_features(length: int, config: FilterConfig, device: torch.device) -> Float[Tensor, "K E"]:
    """Features of each lag: its share of the longest, cosines and negative sines, in float64."""
    bands = (config.filter_features - 1) // 2
    frequencies = torch.linspace(1e-4, bands - 1, bands, device=device, dtype=torch.float64)
    lags = torch.arange(length, device=device, dtype=torch.float64)
    angles = (lags * (2 * math.pi / config.max_len))[:, None] * frequencies
    time = lag_times(length, config, device)[:, None]
    return torch.cat([time, torch.cos(angles), -torch.sin(angles)], dim=1)


def fft_flops(length: int) -> float:
    """Forward FLOPs of convolving one channel by FFT, without the filter's spectrum."""
    # Two transforms of 2 L real points at 2.5 n log2 n each, and 6 for each of L complex products.
    return 10.0 * length * math.log2(2 * length) + 6.0 * length
