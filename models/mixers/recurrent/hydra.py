"""Hydra: a quasiseparable matrix, made of two scans of Mamba-2 (Hwang et al. 2024, section 3).

Layout, defaults and initial values follow the authors' release. Changed: packed documents and
padding are supported, in both scans and in the shifts; no initial states are learned; the residual
scale counts the backbone's residual branches once.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.precision import widened
from kernels.rowwise.swiglu import silu_gated
from models.bases.ssm import count_heads, require_positive, require_range, scan_flops, step_biases
from models.mixer import Mixer, MixerConfig, MixFlops, Pattern, Slot, register
from models.parts.layers import Linear, RMSNorm
from models.parts.short_convs import CentredConv
from models.sequences.continued import Memory
from models.sequences.recurrence import BidirectionalSsd
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class HydraConfig(MixerConfig):
    """Sizes of a Hydra.

    Attributes:
        d_state: state size N that each channel of a head has in each direction.
        d_conv: width of the centred convolution, an odd number.
        expand: inner width over d_model.
        head_dim: channels of a head, which share a matrix; a divisor of the inner width.
        n_groups: groups of heads that share B and C.
        dt_min, dt_max: range of the initial step sizes, drawn log-uniformly.
    """

    kind: ClassVar[str] = "hydra"
    d_state: int = 64
    d_conv: int = 7
    expand: int = 2
    head_dim: int = 64
    n_groups: int = 1
    dt_min: float = 1e-3
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        for name in ("d_state", "expand", "head_dim", "n_groups"):
            require_positive(name, getattr(self, name))
        require_range("dt_min, dt_max", (self.dt_min, self.dt_max))

    def n_heads(self, d_model: int) -> int:
        """Heads.

        Raises:
            ValueError: heads do not fill the inner width, or groups do not divide them.
        """
        return count_heads(self.expand * d_model, self.head_dim, self.n_groups)


class Coefficients(NamedTuple):
    """What determines both triangles of the matrix and its diagonal, and the gate of its output."""

    dt: Float[Tensor, "B L 2 H"]
    B: Float[Tensor, "B L 2 G N"]
    C: Float[Tensor, "B L 2 G N"]
    diagonal: Float[Tensor, "B L H"]
    gate: Float[Tensor, "B L E"]


@register(HydraConfig)
class Hydra(Mixer):
    """The sum of a shifted forward scan, a shifted backward scan and a diagonal.

    m[i, j] = C[i-1] . B[j] exp(A sum(dt[j+1..i-1])) dt[j] below the diagonal; the mirror image with
    dt, B and C of the backward direction above it; delta[i] on it.
    """

    patterns = frozenset({Pattern.NONCAUSAL_SELF})
    sharded = frozenset({Pattern.NONCAUSAL_SELF})
    no_decay = frozenset({"A_log", "D", "dt_bias"})

    def __init__(self, config: HydraConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config = config
        H = self.n_heads = config.n_heads(slot.d_model)
        E, GN = H * config.head_dim, config.n_groups * config.d_state
        self.in_proj = Linear(slot.d_model, 2 * E + 4 * GN + 2 * H)
        self.conv = CentredConv(E + 4 * GN, config.d_conv)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H))
        self.fc_D = Linear(E, H)
        self.norm = RMSNorm(E)
        self.out_proj = Linear(E, slot.d_model, scale=slot.residual_scale)

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B L H P"], Coefficients]:
        """Values are the convolved inputs, which also determine the diagonal."""
        del memory
        config, H = self.config, self.n_heads
        G, E, GN = config.n_groups, H * config.head_dim, config.n_groups * config.d_state
        gate, inner, steps = self.in_proj.in_parts(x, [E, E + 4 * GN, 2 * H])
        values, BC = self.conv.silu_in_parts(inner, sequence, [E, 4 * GN])
        B, C = BC.unflatten(2, (2, 2, G, -1)).unbind(3)
        # Both directions share the biases, as in the release.
        dt = F.softplus(widened(steps.unflatten(2, (2, H))) + widened(self.dt_bias))
        diagonal = widened(self.fc_D(values)) + widened(self.D)
        return values.unflatten(2, (H, -1)), Coefficients(dt, B, C, diagonal, gate)

    def mix(
        self, values: Float[Tensor, "B L H P"], coefficients: Coefficients, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Scan in both directions, and add the diagonal."""
        dt, B, C, diagonal, _ = coefficients
        A = -torch.exp(widened(self.A_log))
        triangles = sequence.recur(BidirectionalSsd(values, dt, A, B, C, sequence))
        return torch.addcmul(triangles, diagonal[..., None], values).to(values.dtype)

    def merge(
        self, mixed: Float[Tensor, "B L H P"], coefficients: Coefficients
    ) -> Float[Tensor, "B L D"]:
        """Normalise, gate and project out."""
        # The release normalises first and then gates; Mamba-2 does the reverse.
        normed = self.norm(widened(mixed.flatten(2)))
        gated = silu_gated(normed, widened(coefficients.gate))
        return self.out_proj(gated.to(mixed.dtype))

    def mix_flops(self, queries: int, keys: int) -> MixFlops:  # noqa: ARG002
        """Both scans, and 3 per channel and token: the diagonal's product and two sums."""
        config = self.config
        scan = scan_flops(queries, self.n_heads, config.head_dim, config.n_groups, config.d_state)
        diagonal = 3.0 * self.n_heads * config.head_dim * queries
        return MixFlops(2 * scan.needed, 2 * scan.full_square, 2 * scan.elementwise + diagonal)

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Rates of -1, D of ones, and step size biases."""
        if name == "A_log":
            return torch.zeros(self.n_heads)
        if name == "D":
            return torch.ones(self.n_heads)
        config = self.config
        return step_biases(self.n_heads, config.dt_min, config.dt_max, generator)
