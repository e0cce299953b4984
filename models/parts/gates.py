"""Gates of linear recurrences: how much each channel keeps of its state, and how much it adds.

The recurrence h[t] = exp(log_decay[t]) h[t-1] + write[t] v[t] is linear in v: the gates depend on
the tokens but not on the state. RG-LRU: De et al. 2024 ("Griffin"), section 2.4; minGRU: Feng et
al. 2024 ("Were RNNs All We Needed?"), section 3.1.
"""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kernels.precision import widened
from kernels.scans.rglru import Steps, rglru
from models.mup import FanIn
from models.parts.layers import BlockDiagonal, uniform
from models.sequences.recurrence import LinearScan
from models.sequences.whole import WholeSequence

Mode = Literal["rglru", "mingru"]

SHARPNESS = 8.0
SLOWEST, FASTEST = 0.999, 0.9
"""Range of the initial decays of an RG-LRU whose recurrence gate is fully open."""


class RGLRU(nn.Module):
    """log_decay = -8 r softplus(Lambda), write = i sqrt(1 - decay^2), with gates r and i.

    The first token of a document has no state to keep and writes i v. Initial values follow the
    paper: the decay at r = 1 is uniform in [0.9, 0.999]. The released code draws decay^(1/8) from
    that range instead, which forgets eight times as fast.

    Args:
        n_heads: blocks of the block-diagonal gate maps.
        width: channels.
    """

    no_decay: ClassVar[frozenset[str]] = frozenset(
        {"Lambda", "recurrence_gate.bias", "input_gate.bias"}
    )

    def __init__(self, n_heads: int, width: int) -> None:
        super().__init__()
        self.recurrence_gate = gate_map(n_heads, width)
        self.input_gate = gate_map(n_heads, width)
        self.Lambda = nn.Parameter(torch.empty(width))

    def forward(
        self,
        u: Float[Tensor, "B L E"],
        begins: Bool[Tensor, "B L"],
        candidate: Float[Tensor, "B L E"] | None = None,
    ) -> Steps:
        """The steps for features u; `begins` marks the first token of each document.

        With a candidate, tanh(candidate) multiplies what is written.
        """
        rate = SHARPNESS * F.softplus(widened(self.Lambda))
        return rglru(self.recurrence_gate(u), self.input_gate(u), rate, begins, candidate)

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Initial Lambda: the inverse softplus of -log(decay) / 8."""
        assert name == "Lambda"
        # Uniform decays at r = 1, then solved for Lambda: decay = exp(-8 softplus(Lambda)).
        middle, reach = (SLOWEST + FASTEST) / 2, (SLOWEST - FASTEST) / 2
        decay = middle + uniform(self.Lambda.shape, reach, generator)
        return torch.log(torch.expm1(-torch.log(decay) / SHARPNESS))


class MinGRU(nn.Module):
    """decay = 1 - z and write = z, with one gate z; the state starts at zero.

    Changed: the gate reads the features u, not the layer's input. The candidate may have either
    sign, so the paper's log-space form does not apply to it.

    Args:
        n_heads: blocks of the block-diagonal gate map.
        width: channels.
    """

    no_decay: ClassVar[frozenset[str]] = frozenset({"update_gate.bias"})

    def __init__(self, n_heads: int, width: int) -> None:
        super().__init__()
        self.update_gate = gate_map(n_heads, width)

    def forward(
        self,
        u: Float[Tensor, "B L E"],
        begins: Bool[Tensor, "B L"],
        candidate: Float[Tensor, "B L E"] | None = None,
    ) -> Steps:
        """The steps for features u; the candidate is as in `RGLRU`."""
        del begins
        z = widened(self.update_gate(u))
        write = torch.sigmoid(z)
        if candidate is not None:
            write = write * torch.tanh(widened(candidate))
        # log(1 - sigmoid(z)), without the cancellation of 1 - sigmoid(z) for large z.
        return Steps(F.logsigmoid(-z), write)


GATES: dict[Mode, type[RGLRU] | type[MinGRU]] = {"rglru": RGLRU, "mingru": MinGRU}


def gate_map(n_heads: int, width: int) -> BlockDiagonal:
    """A block-diagonal map with bias; weights from N(0, 1 / inputs of a block)."""
    std = math.sqrt(n_heads / width)
    gates = BlockDiagonal(n_heads, width, width, bias=True, std=std)
    gates.fan_in = {"weight": FanIn.HEAD}
    return gates


def begins_document(sequence: WholeSequence) -> Bool[Tensor, "B L"]:
    """Mark tokens that begin a document; a document continued from earlier tokens has none."""
    return sequence.positions() == 0


def recur(
    values: Float[Tensor, "B L E P"], steps: Steps, sequence: WholeSequence
) -> Float[Tensor, "B L E P"]:
    """The states h[t] = exp(log_decay[t]) h[t-1] + write[t] v[t] of each channel.

    P > 1 applies each channel's recurrence to several values.
    """
    log_decay, P = steps.log_decay, values.shape[-1]
    if P > 1:
        log_decay = log_decay.repeat_interleave(P, dim=-1)
    written = (steps.write[..., None] * values).flatten(2)
    documents = sequence.packed_documents
    states = sequence.recur(LinearScan(log_decay, written, documents))
    return states.view(values.shape).to(values.dtype)
