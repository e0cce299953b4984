"""Mamba's selective state space, S6 (Gu and Dao 2023, sections 3.2-3.4, algorithm 2).

Layout, defaults and initial values follow the authors' release; the residual scale counts the
backbone's residual branches once.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.precision import widened
from kernels.rowwise.swiglu import silu_gated
from models.mixer import Mixer, MixerConfig, MixFlops, Pattern, Slot, register
from models.mup import FanIn
from models.parts.layers import Linear
from models.parts.short_convs import ShortConv
from models.sequences.continued import Memory
from models.sequences.recurrence import SelectiveScan
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class MambaConfig(MixerConfig):
    """Sizes of a Mamba.

    Attributes:
        d_state: state size N of each channel.
        d_conv: width of the short convolution.
        expand: inner width over d_model.
        dt_rank: rank of the step size's projection; None for ceil(d_model / 16).
        dt_min, dt_max: range of the initial step sizes, drawn log-uniformly.
    """

    kind: ClassVar[str] = "mamba"
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    dt_min: float = 1e-3
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        for name in ("d_state", "d_conv", "expand"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive; take 1 or more")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(
                f"dt_min {self.dt_min} and dt_max {self.dt_max} are not a range; "
                "take 0 < dt_min <= dt_max"
            )


class Coefficients(NamedTuple):
    """The state space's inputs at each token, and the gate of its output."""

    dt: Float[Tensor, "B L E"]
    B: Float[Tensor, "B L N"]
    C: Float[Tensor, "B L N"]
    gate: Float[Tensor, "B L E"]


@register(MambaConfig)
class Mamba(Mixer):
    """h[t] = exp(dt A) h[t-1] + dt B x[t], y[t] = C h[t] + D x[t], for each channel separately."""

    patterns = frozenset({Pattern.CAUSAL_SELF})
    sharded = frozenset({Pattern.CAUSAL_SELF})
    no_decay = frozenset({"A_log", "D", "dt_bias"})

    def __init__(self, config: MambaConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config, d_model = config, slot.d_model
        E, N = config.expand * d_model, config.d_state
        self.dt_rank = config.dt_rank or math.ceil(d_model / 16)
        self.in_proj = Linear(d_model, 2 * E)
        self.conv = ShortConv(E, config.d_conv)
        self.x_proj = Linear(E, self.dt_rank + 2 * N)
        grows = FanIn.WIDTH if config.dt_rank is None else None
        self.dt_proj = Linear(self.dt_rank, E, fan_in=grows)
        self.dt_bias = nn.Parameter(torch.empty(E))
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))
        self.out_proj = Linear(E, d_model, scale=slot.residual_scale)

    def project(
        self,
        x: Float[Tensor, "B L D"],
        sequence: WholeSequence,
        memory: Memory | None = None,
    ) -> tuple[Float[Tensor, "B L E 1"], Coefficients]:
        """Values are the convolved inputs, one channel per head; dt, B and C come from them."""
        del memory
        inner, gate = self.in_proj.in_parts(x, 2 * [self.out_proj.in_features])
        (inner,) = self.conv.silu_in_parts(inner, sequence, [inner.shape[2]])
        N = self.config.d_state
        low, B, C = self.x_proj(inner).split([self.dt_rank, N, N], dim=-1)
        dt = F.softplus(widened(self.dt_proj(low)) + widened(self.dt_bias))
        return inner.unsqueeze(-1), Coefficients(dt, B, C, gate)

    def mix(
        self,
        values: Float[Tensor, "B L E P"],
        coefficients: Coefficients,
        sequence: WholeSequence,
    ) -> Float[Tensor, "B L E P"]:
        """Scan the state space; P > 1 applies each channel's matrix to several values."""
        dt, B, C, _ = coefficients
        P = values.shape[-1]
        A, D = -torch.exp(widened(self.A_log)), widened(self.D)
        if P > 1:
            # Each of the P values of a channel gets the channel's own step sizes and rates.
            dt = dt.repeat_interleave(P, dim=-1)
            A, D = (x.repeat_interleave(P, dim=0) for x in (A, D))
        inputs = values.flatten(2)
        documents = sequence.packed_documents
        mixed = sequence.recur(SelectiveScan(inputs, dt, A, B, C, documents, D))
        return mixed.view(values.shape).to(values.dtype)

    def merge(
        self, mixed: Float[Tensor, "B L E 1"], coefficients: Coefficients
    ) -> Float[Tensor, "B L D"]:
        """Gate and project out."""
        return self.out_proj(silu_gated(mixed.squeeze(-1), coefficients.gate))

    def mix_flops(self, queries: int, keys: int) -> MixFlops:  # noqa: ARG002
        """Pointwise only: 7 for each channel, state and token, 2 for each channel and token.

        For each state: dt A, exp, decay times state, input times B, add, C times state, add.
        For each channel: dt x and D x.
        """
        E, N = self.A_log.shape
        return MixFlops(elementwise=queries * (7.0 * E * N + 2.0 * E))

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Initial values of A_log (S4D-real), D and dt_bias (inverse softplus of a step size)."""
        config = self.config
        if name == "A_log":
            ladder = torch.arange(1, config.d_state + 1, dtype=torch.float32)
            return ladder.log().expand(self.A_log.shape)
        if name == "D":
            return torch.ones(self.D.shape)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = torch.exp(torch.rand(self.dt_bias.shape, generator=generator) * (high - low) + low)
        dt = dt.clamp(min=1e-4)
        # The inverse of softplus, log(exp(dt) - 1), in a form that keeps the digits of a small dt.
        return dt + torch.log(-torch.expm1(-dt))
