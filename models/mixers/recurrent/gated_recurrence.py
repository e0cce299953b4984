"""Griffin's recurrent block: a gated linear recurrence beside a GeLU gate (De et al. 2024).

Source: section 2.3 for the block, 2.4 for the recurrence; `mode: mingru` uses the gate of Feng et
al. 2024 instead. Changed: only the gates have biases, and the backbone's residual scale replaces
the paper's depth-dependent one.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.mixer import Mixer, MixerConfig, MixFlops, Pattern, Slot, register
from models.parts.gates import GATES, Mode, Steps, begins_document, recur
from models.parts.layers import Linear
from models.parts.short_convs import ShortConv
from models.sequences.continued import Memory
from models.sequences.whole import WholeSequence

CONV_SCALE = 0.1
"""Initial scale of the convolution's output relative to its input, as in the release."""


@dataclass(frozen=True)
class GatedRecurrenceConfig(MixerConfig):
    """Sizes of a gated recurrence.

    Attributes:
        n_heads: blocks of channels that a gate mixes; they divide the width.
        mode: the gates, `rglru` of Griffin or `mingru`.
        width: channels of the recurrence; None for 4/3 d_model, rounded to 4 channels a block.
        d_conv: width of the short convolution.
        initial_std: standard deviation of initial weights; None for 1/sqrt(inputs), as in Griffin.
    """

    kind: ClassVar[str] = "gated_recurrence"
    n_heads: int
    mode: Mode = "rglru"
    width: int | None = None
    d_conv: int = 4
    initial_std: float | None = None

    def __post_init__(self) -> None:
        for name in ("n_heads", "d_conv"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive; take 1 or more")
        if self.width is not None and (self.width < 1 or self.width % self.n_heads):
            raise ValueError(
                f"n_heads {self.n_heads} does not divide width {self.width}; choose a divisor"
            )

    def channels(self, d_model: int) -> int:
        """Channels of the recurrence."""
        return self.width or 4 * self.n_heads * max(1, round(d_model / (3 * self.n_heads)))


class Coefficients(NamedTuple):
    """The recurrence's gates at each token, and the gate of its output."""

    steps: Steps
    gate: Float[Tensor, "B L E"]


@register(GatedRecurrenceConfig)
class GatedRecurrence(Mixer):
    """h[t] = decay[t] h[t-1] + write[t] u[t], y = out(h * gelu(gate)), u a convolved map of x.

    There is no nonlinearity between the convolution and the gates: after a SiLU, whose outputs are
    almost never negative, no gate could close.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF})
    sharded = frozenset({Pattern.CAUSAL_SELF})

    def __init__(self, config: GatedRecurrenceConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config, d_model = config, slot.d_model
        E, std = config.channels(d_model), config.initial_std
        self.in_proj = Linear(d_model, 2 * E, std=std or d_model**-0.5)
        self.conv = ShortConv(E, config.d_conv, std=CONV_SCALE * config.d_conv**-0.5)
        self.gates = GATES[config.mode](config.n_heads, E)
        self.out_proj = Linear(E, d_model, std=std or E**-0.5, scale=slot.residual_scale)

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B L E 1"], Coefficients]:
        """Values are the convolved inputs, one channel per head; the gates read them as well."""
        del memory
        inner, gate = self.in_proj.in_parts(x, 2 * [self.out_proj.in_features])
        u = self.conv(inner, sequence)
        return u.unsqueeze(-1), Coefficients(self.gates(u, begins_document(sequence)), gate)

    def mix(
        self,
        values: Float[Tensor, "B L E P"],
        coefficients: Coefficients,
        sequence: WholeSequence,
    ) -> Float[Tensor, "B L E P"]:
        """Run the recurrence."""
        return recur(values, coefficients.steps, sequence)

    def merge(
        self, mixed: Float[Tensor, "B L E 1"], coefficients: Coefficients
    ) -> Float[Tensor, "B L D"]:
        """Gate and project out."""
        return self.out_proj(mixed.squeeze(-1) * F.gelu(coefficients.gate))

    def mix_flops(self, queries: int, keys: int) -> MixFlops:  # noqa: ARG002
        """Pointwise only, for each channel and token: exp, decay h, write v and their sum."""
        return MixFlops(elementwise=queries * 4.0 * self.out_proj.in_features)
