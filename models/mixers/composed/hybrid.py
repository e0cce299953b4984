"""Window attention and a gated recurrence on the same queries, keys and values, mixed per head.

After the "Hybrid Attention" system of JohannaWeb (2026, projects/Sisyphus/src/model.py). Changed:
the gates read the keys but not the state, so that the recurrence is a linear scan; they are those
of RG-LRU (De et al. 2024, section 2.4) or minGRU (Feng et al. 2024) behind a short convolution; and
each branch is normalised before the two are mixed, because their initial scales differ fourfold.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels.precision import widened
from kernels.rowwise.rms_norm import rms_norm
from models.bases.heads import head_width
from models.mixer import Mixer, MixerConfig, MixFlops, Pattern, Slot, register
from models.parts.gates import GATES, Mode, Steps, begins_document, gate_map, recur
from models.parts.layers import Linear
from models.parts.rotary import rotate, rotation_of
from models.parts.short_convs import ShortConv
from models.parts.window import attend_window
from models.sequences.continued import Memory
from models.sequences.whole import WholeSequence

Branches = Literal["both", "window", "recurrence"]


@dataclass(frozen=True)
class HybridConfig(MixerConfig):
    """Heads, window and gates of a hybrid.

    Attributes:
        n_heads: heads of both branches; head_dim is d_model / n_heads and even.
        window: most keys that a query sees, its own included.
        mode: the gates of the recurrence.
        branches: both, or one alone without the other's parameters, for ablations.
        rope_theta: base of the rotary frequencies.
        d_conv: width of the convolution that the gates read the keys through.
        branch_norms: whether each branch is normalised, head by head.
        alpha_bias: initial bias of the window's share alpha = sigmoid(map of x + bias).
        initial_std: standard deviation of initial weights; None scales it with the width.
    """

    kind: ClassVar[str] = "hybrid"
    n_heads: int
    window: int
    mode: Mode = "rglru"
    branches: Branches = "both"
    rope_theta: float = 1e4
    d_conv: int = 4
    branch_norms: bool = True
    alpha_bias: float = 1.0
    initial_std: float | None = 0.02

    def __post_init__(self) -> None:
        for name in ("n_heads", "window", "d_conv"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive; take 1 or more")


class Scores(NamedTuple):
    """Rotated queries and keys of the window branch."""

    queries: Float[Tensor, "B L H P"]
    keys: Float[Tensor, "B L H P"]


class Coefficients(NamedTuple):
    """Coefficients of each branch, None if it is off, and the window branch's share by head."""

    scores: Scores | None
    steps: Steps | None
    alpha: Float[Tensor, "B L H 1"] | None


@register(HybridConfig)
class Hybrid(Mixer):
    """y = out(alpha norm(M_window v) + (1 - alpha) norm(M_recurrence v)), alpha for each head.

    Each channel has its own decays and is one head of the matrix view: `materialize` returns the
    matrices of channel c at 2 c (window; equal within an attention head) and 2 c + 1 (recurrence).
    """

    patterns = frozenset({Pattern.CAUSAL_SELF})
    sharded = frozenset({Pattern.CAUSAL_SELF})
    constant_state = True

    def __init__(self, config: HybridConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config, E, std = config, slot.d_model, config.initial_std
        self.head_dim, H = head_width(E, config.n_heads), config.n_heads
        self.attends = config.branches != "recurrence"
        self.recurs = config.branches != "window"
        self.qkv = Linear(E, 3 * E if self.attends else 2 * E, std=std)
        self.out = Linear(E, E, std=std, scale=slot.residual_scale)
        if self.recurs:
            self.conv = ShortConv(E, config.d_conv, std=config.d_conv**-0.5)
            self.gates = GATES[config.mode](H, E)
            self.candidate = gate_map(H, E)
        if config.branch_norms:
            self.norms = nn.ModuleList(HeadNorm(H, E) for _ in range(self.attends + self.recurs))
        if config.branches == "both":
            self.alpha = Linear(E, H, std=std)
            self.alpha_bias = nn.Parameter(torch.empty(H))

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B L E 1"], Coefficients]:
        """Values are the channels of the value heads."""
        del memory
        parts = 3 if self.attends else 2
        *queries, keys, values = self.qkv.in_parts(x, parts * [x.shape[-1]])
        scores = self._scores(queries[0], keys, sequence) if self.attends else None
        steps = self._steps(keys, sequence) if self.recurs else None
        alpha = None
        if self.config.branches == "both":
            alpha = torch.sigmoid(widened(self.alpha(x)) + widened(self.alpha_bias))[..., None]
        return values.unsqueeze(-1), Coefficients(scores, steps, alpha)

    def mix(
        self,
        values: Float[Tensor, "B L E P"],
        coefficients: Coefficients,
        sequence: WholeSequence,
    ) -> Float[Tensor, "B L F P"]:
        """Apply the matrix of each branch to the same values, and interleave the results."""
        mixed = []
        if coefficients.scores is not None:
            # Channels of a head are contiguous, so P values per channel become one head of width P
            # * P_head.
            heads = values.reshape(*values.shape[:2], self.config.n_heads, -1)
            local = attend_window(*coefficients.scores, heads, self.config.window, sequence)
            mixed.append(local.reshape(values.shape))
        if coefficients.steps is not None:
            mixed.append(recur(values, coefficients.steps, sequence))
        return torch.stack(mixed, dim=3).flatten(2, 3)

    def merge(
        self, mixed: Float[Tensor, "B L F 1"], coefficients: Coefficients
    ) -> Float[Tensor, "B L D"]:
        """Normalise each branch, mix the two and project out."""
        heads = mixed.reshape(*mixed.shape[:2], self.config.n_heads, self.head_dim, -1)
        branches = list(heads.unbind(dim=-1))
        if self.config.branch_norms:
            branches = [norm(x) for norm, x in zip(self.norms, branches, strict=True)]
        merged = branches[0]
        if coefficients.alpha is not None:
            merged = coefficients.alpha * merged + (1 - coefficients.alpha) * branches[1]
        return self.out(merged.flatten(2).to(mixed.dtype))

    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """Two products for each pair in a window, and four pointwise steps of the recurrence.

        A row of the window has W - W (W - 1) / (2 T) keys on average over T tokens. The recurrence
        needs, for each channel and token, exp, decay h, write v and their sum.
        """
        E, W = self.out.in_features, self.config.window
        # The pairs of the last `queries` tokens.
        seen = visible_in_window(keys, W) - visible_in_window(keys - queries, W)
        return MixFlops(
            needed=4.0 * E * seen * self.attends,
            full_square=4.0 * E * queries * keys * self.attends,
            elementwise=4.0 * E * queries * self.recurs,
        )

    def draw(self, name: str, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The initial bias of alpha."""
        assert name == "alpha_bias"
        return torch.full(self.alpha_bias.shape, self.config.alpha_bias)

    def _scores(self, queries: Tensor, keys: Tensor, sequence: WholeSequence) -> Scores:
        P = self.head_dim
        by = rotation_of(sequence, P, self.config.rope_theta)
        queries, keys = (rotate(x.unflatten(-1, (-1, P)), by) for x in (queries, keys))
        return Scores(self.slot.scaled(queries), keys)

    def _steps(self, keys: Tensor, sequence: WholeSequence) -> Steps:
        u = self.conv(keys, sequence)
        return self.gates(u, begins_document(sequence), self.candidate(u))


class HeadNorm(nn.Module):
    """RMS norm of each head, in float32.

    Args:
        n_heads: heads.
        width: channels of all heads.
    """

    def __init__(self, n_heads: int, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self._heads, self._eps = n_heads, eps

    def forward(self, x: Float[Tensor, "B L H P"]) -> Float[Tensor, "B L H P"]:
        """Normalise the last dimension."""
        return rms_norm(x.flatten(2), self.weight, self._eps, self._heads).view_as(x)

    def draw(self, name: str, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Ones."""
        return torch.ones(self.weight.shape)


def visible_in_window(tokens: int, window: int) -> float:
    """Visible query-key pairs among the first `tokens` tokens of a sequence."""
    growing = min(tokens, window)
    return growing * (growing + 1) / 2 + (tokens - growing) * window
