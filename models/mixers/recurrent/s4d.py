"""S4D: a time-invariant diagonal state space (Gu et al. 2022, "S4D").

Complex states in conjugate pairs, zero-order hold, B = 1 and the S4D-Lin initialisation of the
paper's sections 3 and 4, in the paper's layer: skip, GELU, and a channel map with a GLU. In the
bidirectional form each direction has its own C, and the backward filter starts at lag -1. Changed:
initial and final states in closed form, for decoding and sequence parallelism; packed documents.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from kernels.convolution.long_conv import long_conv
from kernels.precision import widened, without_autocast
from models.mixer import Coefficients, Mixer, MixerConfig, MixFlops, Pattern, Slot, register
from models.parts.filters import fft_flops
from models.parts.layers import Linear
from models.ranks.carry import Summary
from models.sequences.continued import Memory
from models.sequences.recurrence import Recurrence, in_last_document, zero_unless
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class S4DConfig(MixerConfig):
    """Sizes of an S4D.

    Attributes:
        d_state: real numbers in a channel's state, two per conjugate pair.
        dt_min, dt_max: range of the initial step sizes, drawn log-uniformly.
        glu: whether the output map is gated by a second one.
    """

    kind: ClassVar[str] = "s4d"
    d_state: int = 16
    dt_min: float = 1e-3
    dt_max: float = 0.1
    glu: bool = True

    def __post_init__(self) -> None:
        if self.d_state < 2 or self.d_state % 2:
            raise ValueError(
                f"d_state {self.d_state} is not a number of conjugate pairs; take an even number"
            )
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(
                f"dt_min {self.dt_min} and dt_max {self.dt_max} are not a range; "
                "take 0 < dt_min <= dt_max"
            )


class Diagonal(NamedTuple):
    """A discrete diagonal system: h[t] = exp(rate) h[t-1] + u[t], y[t] = 2 Re <out, h[t]>."""

    rate: Complex[Tensor, "E N"]
    out: Complex[Tensor, "E N"]

    def several(self, times: int) -> "Diagonal":
        """The system with each channel repeated."""
        return Diagonal(*(x.repeat_interleave(times, dim=0) for x in self))


@register(S4DConfig)
class S4D(Mixer):
    """M = the Toeplitz matrix of k[l] = 2 Re <C, A^l B>, plus D, for each channel separately."""

    patterns = frozenset({Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF})
    sharded = patterns
    no_decay = frozenset({"A_log", "A_imag", "log_dt", "D"})
    uses_fft = True
    stops_nan = True
    constant_state = True

    def __init__(self, config: S4DConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config, E, N = config, slot.d_model, config.d_state // 2
        self.log_dt = nn.Parameter(torch.empty(E))
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.A_imag = nn.Parameter(torch.empty(E, N))
        self.C = nn.Parameter(torch.empty(1 if slot.causal else 2, E, N, 2))
        self.D = nn.Parameter(torch.empty(E))
        width = 2 * E if config.glu else E
        self.out_proj = Linear(E, width, bias=True, scale=slot.residual_scale)

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B L D 1"], Coefficients]:
        """Values are the inputs, one channel per head; the matrix does not depend on them."""
        del sequence, memory
        return x.unsqueeze(-1), None

    def mix(
        self,
        values: Float[Tensor, "B L E P"],
        coefficients: Coefficients,
        sequence: WholeSequence,
    ) -> Float[Tensor, "B L E P"]:
        """Convolve, from the preceding state; P > 1 applies a channel's matrix several times."""
        del coefficients
        inputs, P = values.flatten(2), values.shape[-1]
        skip = self.D.repeat_interleave(P)
        with without_autocast(values):
            systems = [self.discrete(r).several(P) for r in range(len(self.C))]
            if self.slot.causal:
                documents = sequence.packed_documents
                mixed = sequence.recur(DiagonalScan(inputs, systems[0], skip, documents))
            else:
                ahead, back = (lambda n, s=system: impulse_response(s, n) for system in systems)
                mixed = sequence.convolve(inputs, lambda n: with_skip(ahead(n), skip), back)
        return mixed.view(values.shape)

    def merge(
        self, mixed: Float[Tensor, "B L E 1"], coefficients: Coefficients
    ) -> Float[Tensor, "B L D"]:
        """GELU, then a channel map with a GLU."""
        del coefficients
        outputs = self.out_proj(F.gelu(mixed.squeeze(-1)))
        return F.glu(outputs, dim=-1) if self.config.glu else outputs

    def discrete(self, direction: int) -> Diagonal:
        """The zero-order-hold discretisation, with the factor of B folded into the output map."""
        A_log, A_imag, C = (widened(x) for x in (self.A_log, self.A_imag, self.C[direction]))
        A = torch.complex(-torch.exp(A_log), A_imag)
        rate = A * torch.exp(widened(self.log_dt))[:, None]
        # Zero-order hold: B_bar = (exp(dt A) - 1) / A * B with B = 1; expm1 for a small dt A.
        return Diagonal(rate, torch.view_as_complex(C) * torch.expm1(rate) / A)

    def filter_norm(self) -> float:
        """A bound on the filter's 1-norm at any length."""
        with torch.no_grad():
            systems = [self.discrete(r) for r in range(len(self.C))]
            each = [2 * s.out.abs() / -torch.expm1(s.rate.real) for s in systems]
            return (sum(x.sum(dim=1) for x in each) + self.D.abs()).max().item()

    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """FFTs, and 4 for each lag, channel and number of the state to make the filter.

        A token by itself is a step of the recurrence: for each pair 8 to decay and take it in, 4 to
        read it out.
        """
        R, E, N, _ = self.C.shape
        if queries < keys:
            return MixFlops(elementwise=queries * 12.0 * E * N)
        needed = E * (fft_flops(keys) + R * 8.0 * N * keys)
        return MixFlops(needed, needed)

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Initial values: A = -1/2 + i pi n (S4D-Lin), C and D of variance 1, dt log-uniform."""
        shape = getattr(self, name).shape
        if name == "A_log":
            return torch.full(shape, math.log(0.5))
        if name == "A_imag":
            return (math.pi * torch.arange(shape[1], dtype=torch.float32)).expand(shape)
        if name == "log_dt":
            low, high = math.log(self.config.dt_min), math.log(self.config.dt_max)
            return torch.rand(shape, generator=generator) * (high - low) + low
        drawn = torch.randn(shape, generator=generator)
        return drawn * math.sqrt(0.5) if name == "C" else drawn


@dataclass
class DiagonalScan(Recurrence):
    """The recurrence of a diagonal system, and the skip connection of each channel."""

    inputs: Float[Tensor, "B L E"]
    system: Diagonal
    skip: Float[Tensor, "E"]
    documents: Int[Tensor, "B L"] | None

    def __call__(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolve, and add the contribution of the state."""
        return run_diagonal(self.inputs, self.system, self.skip, initial, self.documents)

    def summary(self) -> Summary:
        """The state from zero; the log decay is the rate times the number of tokens."""
        B, L, _ = self.inputs.shape
        state = final_state(self.system, in_last_document(widened(self.inputs), self.documents))
        tokens = torch.full((B, 1, 1), float(L), dtype=state.real.dtype, device=state.device)
        return Summary(state, tokens, self.system.rate)

    def carried(self, initial: Tensor, continues: Tensor) -> Tensor:
        """The state's contribution to each output."""
        return zero_unless(decayed_outputs(self.system, initial, self.inputs.shape[1]), continues)


def run_diagonal(
    inputs: Float[Tensor, "B L E"],
    system: Diagonal,
    skip: Float[Tensor, "E"],
    initial: Float[Tensor, "B E N 2"] | None,
    documents: Int[Tensor, "B L"] | None,
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E N 2"]]:
    """Run a system over tokens; return the outputs, and the state after the last token.

    Args:
        inputs: one number per token and channel.
        system: the system of each channel.
        skip: factor D of the input in the output.
        initial: the state before the first token, zero if not given.
        documents: document of each token; 0 continues the initial state.
    """
    L = inputs.shape[1]
    wide = widened(inputs)
    outputs = long_conv(wide, with_skip(impulse_response(system, L), skip), documents)
    if documents is not None:
        wide = wide.masked_fill((documents != documents[:, -1:])[:, :, None], 0.0)
    final = final_state(system, wide)
    if initial is not None:
        before = torch.view_as_complex(initial.contiguous())
        carried, decayed = decayed_outputs(system, before, L), before * torch.exp(L * system.rate)
        if documents is not None:
            carried = carried.masked_fill((documents != 0)[:, :, None], 0.0)
            decayed = decayed.masked_fill((documents[:, -1] != 0)[:, None, None], 0.0)
        outputs, final = outputs + carried, final + decayed
    return outputs.to(inputs.dtype), torch.view_as_real(final)


def impulse_response(system: Diagonal, length: int) -> Float[Tensor, "E K"]:
    """The filter k[l] = 2 Re <out, exp(l rate)>."""
    coarse, fine = powers(system.rate, length)
    taps = (coarse * system.out[:, None]) @ fine.transpose(1, 2)
    return 2 * taps.real.flatten(1)[:, :length]


def decayed_outputs(
    system: Diagonal, initial: Complex[Tensor, "B E N"], length: int
) -> Float[Tensor, "B L E"]:
    """A state's contribution to the outputs after it: 2 Re <out, exp((t + 1) rate) initial>."""
    coarse, fine = powers(system.rate, length)
    weight = system.out * torch.exp(system.rate) * initial
    outputs = (coarse * weight[:, :, None]) @ fine.transpose(1, 2)
    return 2 * outputs.real.flatten(2)[..., :length].transpose(1, 2)


def final_state(system: Diagonal, inputs: Float[Tensor, "B L E"]) -> Complex[Tensor, "B E N"]:
    """The state after the last token: the sum of exp((L - 1 - s) rate) u[s]."""
    coarse, fine = powers(system.rate, inputs.shape[1])
    J, C = coarse.shape[1], fine.shape[1]
    reversed_inputs = F.pad(inputs.flip(1), (0, 0, 0, J * C - inputs.shape[1])).transpose(1, 2)
    # Real inputs times real and imaginary parts: half the work of a complex product.
    tables = torch.view_as_real(fine).flatten(2)
    inner = reversed_inputs.unflatten(2, (J, C)) @ tables
    inner = torch.view_as_complex(inner.unflatten(3, (-1, 2)).contiguous())
    return (coarse * inner).sum(dim=2)


def powers(
    rate: Complex[Tensor, "E N"], length: int
) -> tuple[Complex[Tensor, "E J N"], Complex[Tensor, "E C N"]]:
    """Two tables of about sqrt(length) rows: exp((j C + c) rate) = coarse[:, j] * fine[:, c]."""
    C = math.isqrt(max(0, length - 1)) + 1
    steps = torch.arange(C, device=rate.device, dtype=rate.real.dtype)[:, None]
    coarse = steps[: -(-length // C)] * C
    return torch.exp(coarse * rate[:, None]), torch.exp(steps * rate[:, None])


def with_skip(taps: Float[Tensor, "E K"], skip: Float[Tensor, "E"]) -> Float[Tensor, "E K"]:
    """The filter with `skip` added at lag 0."""
    return torch.cat([taps[:, :1] + skip[:, None], taps[:, 1:]], dim=1)
