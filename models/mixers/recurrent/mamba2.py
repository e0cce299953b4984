"""Mamba-2: a state space with one decay per head (Dao and Gu 2024, sections 6 and 7).

Layout, defaults and initial values follow the authors' release; the residual scale counts the
backbone's residual branches once. Changed: the limit on step sizes also holds in decoding, where
the release ignores it; all initial weights are drawn once.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.precision import widened
from models.bases.ssm import (
    GroupedNorm,
    count_heads,
    require_positive,
    require_range,
    scan_flops,
    step_biases,
)
from models.mixer import Mixer, MixerConfig, MixFlops, Pattern, Slot, register
from models.parts.layers import Linear
from models.parts.short_convs import ShortConv
from models.sequences.continued import Memory
from models.sequences.recurrence import Ssd
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class Mamba2Config(MixerConfig):
    """Sizes of a Mamba-2.

    Attributes:
        d_state: state size N that each channel of a head has.
        d_conv: width of the short convolution.
        expand: inner width over d_model.
        head_dim: channels of a head, which share a decay; a divisor of the inner width.
        n_groups: groups of heads that share B and C, and of channels that are normalised together.
        dt_min, dt_max: range of the initial step sizes, drawn log-uniformly.
        A_init_range: range of the initial rates' sizes, drawn uniformly.
        dt_limit: least and largest step size; None for any.
    """

    kind: ClassVar[str] = "mamba2"
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    head_dim: int = 64
    n_groups: int = 1
    dt_min: float = 1e-3
    dt_max: float = 0.1
    A_init_range: tuple[float, float] = (1.0, 16.0)
    dt_limit: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("d_state", "d_conv", "expand", "head_dim", "n_groups"):
            require_positive(name, getattr(self, name))
        require_range("dt_min, dt_max", (self.dt_min, self.dt_max))
        require_range("A_init_range", self.A_init_range)
        if self.dt_limit is not None and (
            len(self.dt_limit) != 2 or not 0 <= self.dt_limit[0] <= self.dt_limit[1]
        ):
            raise ValueError(f"dt_limit {self.dt_limit} is not a range; take 0 <= low <= high")

    def n_heads(self, d_model: int) -> int:
        """Heads.

        Raises:
            ValueError: heads do not fill the inner width, or groups do not divide them.
        """
        return count_heads(self.expand * d_model, self.head_dim, self.n_groups)


class Coefficients(NamedTuple):
    """The state space's inputs at each token, and the gate of its output."""

    dt: Float[Tensor, "B L H"]
    B: Float[Tensor, "B L G N"]
    C: Float[Tensor, "B L G N"]
    gate: Float[Tensor, "B L E"]


@register(Mamba2Config)
class Mamba2(Mixer):
    """h[t] = exp(dt A) h[t-1] + dt x[t] (x) B[t], y[t] = h[t] C[t] + D x[t] for each head."""

    patterns = frozenset({Pattern.CAUSAL_SELF})
    sharded = frozenset({Pattern.CAUSAL_SELF})
    no_decay = frozenset({"A_log", "D", "dt_bias"})
    constant_state = True

    def __init__(self, config: Mamba2Config, slot: Slot) -> None:
        super().__init__(slot)
        self.config = config
        H = self.n_heads = config.n_heads(slot.d_model)
        E, GN = H * config.head_dim, config.n_groups * config.d_state
        self.in_proj = Linear(slot.d_model, 2 * E + 2 * GN + H)
        self.conv = ShortConv(E + 2 * GN, config.d_conv)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H))
        self.norm = GroupedNorm(E, config.n_groups)
        self.out_proj = Linear(E, slot.d_model, scale=slot.residual_scale)

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B L H P"], Coefficients]:
        """Values are the convolved inputs; B and C are convolved too, step sizes are not."""
        del memory
        config, H = self.config, self.n_heads
        E, GN = H * config.head_dim, config.n_groups * config.d_state
        gate, inner, steps = self.in_proj.in_parts(x, [E, E + 2 * GN, H])
        values, B, C = self.conv.silu_in_parts(inner, sequence, [E, GN, GN])
        # Float32: a small step size rounded to half precision changes the decay's time scale.
        dt = F.softplus(widened(steps) + widened(self.dt_bias))
        if config.dt_limit is not None:
            dt = dt.clamp(*config.dt_limit)
        B, C = (part.unflatten(2, (config.n_groups, -1)) for part in (B, C))
        return values.unflatten(2, (H, -1)), Coefficients(dt, B, C, gate)

    def mix(
        self, values: Float[Tensor, "B L H P"], coefficients: Coefficients, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Scan the state space by chunks, and add D x."""
        dt, B, C, _ = coefficients
        A, D = -torch.exp(widened(self.A_log)), widened(self.D)
        documents = sequence.packed_documents
        return sequence.recur(Ssd(values, dt, A, B, C, documents, D)).to(values.dtype)

    def merge(
        self, mixed: Float[Tensor, "B L H P"], coefficients: Coefficients
    ) -> Float[Tensor, "B L D"]:
        """Gate, normalise and project out."""
        return self.out_proj(self.norm(mixed.flatten(2), coefficients.gate))

    def mix_flops(self, queries: int, keys: int) -> MixFlops:  # noqa: ARG002
        """The chunked scan, and 2 per channel and token for adding D x."""
        config = self.config
        scan = scan_flops(queries, self.n_heads, config.head_dim, config.n_groups, config.d_state)
        skip = 2.0 * self.n_heads * config.head_dim * queries
        return MixFlops(scan.needed, scan.full_square, scan.elementwise + skip)

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Initial rates, D of ones, and step size biases."""
        config = self.config
        if name == "D":
            return torch.ones(self.n_heads)
        if name == "dt_bias":
            return step_biases(self.n_heads, config.dt_min, config.dt_max, generator)
        low, high = config.A_init_range
        return torch.log(torch.rand(self.n_heads, generator=generator) * (high - low) + low)
