"""Several independent mixers on the same tokens, after Hymba's parallel heads (Dong et al. 2024).

Source: section 2.1. Changed: any mixers, each with projections and an output map of its own, so the
norms and the learned weights of `merge: learned` stand behind the output maps instead of before a
shared one.
"""

import dataclasses
from dataclasses import dataclass
from math import lcm
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.precision import widened
from models.mixer import Mixer, MixerConfig, MixFlops, Pattern, Slot, register
from models.sequences.continued import Memory
from models.sequences.whole import WholeSequence

Merge = Literal["mean", "learned"]
EPS = 1e-5
"""Added to mean squares of outputs."""


@dataclass(frozen=True)
class ParallelConfig(MixerConfig):
    """The mixers of a parallel layer.

    Attributes:
        mixers: mixers by name.
        merge: `mean` of their outputs; or `learned`, the sum of their outputs, each divided by its
            root mean square, with a weight for each mixer and channel.
    """

    kind: ClassVar[str] = "parallel"
    mixers: dict[str, MixerConfig]
    merge: Merge = "mean"

    def __post_init__(self) -> None:
        if not self.mixers:
            raise ValueError("mixers is empty; name one mixer or more")
        for name in self.mixers:
            if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
                raise ValueError(
                    f"mixers.{name} is not a valid name for a mixer; take another identifier"
                )


@dataclass
class MemberCoefficients:
    """The coefficients of one mixer, and the shape of its values.

    Attributes:
        length, heads, width, dtype: S, G, P and dtype of its values.
        copies: output heads per value head, known only after its `mix`, which sets it.
    """

    coefficients: Any
    length: int
    heads: int
    width: int
    dtype: torch.dtype
    copies: int = 1

    @property
    def channels(self) -> int:
        """Channels of its values."""
        return self.heads * self.width


@register(ParallelConfig)
class Parallel(Mixer):
    """y = sum of w_i mixer_i(x): its matrix is block-diagonal in those of its mixers.

    Every value channel is a head here, so that values with any number of heads can be concatenated.
    Values of a mixer that keeps fewer tokens than another are padded with zeros in front. Learned
    weights start at the slot's residual scale over the number of mixers; the mixers themselves then
    start without that scale, which the norms would undo.
    """

    patterns = frozenset(Pattern)

    def __init__(self, config: ParallelConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config = config
        if config.merge == "learned":
            slot = dataclasses.replace(slot, n_residuals=1)
        self.mixers = nn.ModuleDict({n: _built(n, part, slot) for n, part in config.mixers.items()})
        if config.merge == "learned":
            self.weights = nn.Parameter(torch.empty(len(self.mixers), slot.d_model))
        mixers = self._each()
        # Class attributes of other mixers depend here on which mixers are combined.
        for name, value in (
            ("no_decay", frozenset({"weights"} if config.merge == "learned" else ())),
            ("approximate", "; ".join(m.approximate for m in mixers if m.approximate)),
            ("uses_fft", any(m.uses_fft for m in mixers)),
            ("stops_nan", all(m.stops_nan for m in mixers)),
            ("constant_state", all(m.constant_state for m in mixers)),
            ("ordered_memory", any(m.ordered_memory for m in mixers)),
        ):
            setattr(self, name, value)

    def unsharded(self) -> str:
        """Why one of its mixers does not support sequence parallelism."""
        named = (
            (name, mixer.unsharded()) for name, mixer in zip(self.mixers, self._each(), strict=True)
        )
        return "; ".join(f"{name} has {reason}" for name, reason in named if reason)

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B S E 1"], list[MemberCoefficients]]:
        """Values are the channels of all mixers' values."""
        parts, channels = [], []
        for mixer in self._each():
            values, coefficients = mixer.project(x, sequence, memory)
            _, S, G, P = values.shape
            parts.append(MemberCoefficients(coefficients, S, G, P, values.dtype))
            channels.append(values.flatten(2))
        S = max(part.length for part in parts)
        filled = [F.pad(own, (0, 0, S - own.shape[1], 0)) for own in channels]
        return torch.cat(filled, dim=2).unsqueeze(-1), parts

    def mix(
        self,
        values: Float[Tensor, "B S E P"],
        coefficients: list[MemberCoefficients],
        sequence: WholeSequence,
    ) -> Float[Tensor, "B L F P"]:
        """Let each mixer mix its own values."""
        mixed = []
        channels = values.split([part.channels for part in coefficients], dim=2)
        for mixer, part, own in zip(self._each(), coefficients, channels, strict=True):
            # Without the padding of a mixer that keeps fewer tokens.
            own = own[:, own.shape[1] - part.length :].unflatten(2, (part.heads, part.width))
            mixed_values = mixer.mix(own.flatten(3).to(part.dtype), part.coefficients, sequence)
            part.copies = mixed_values.shape[2] // part.heads
            mixed_values = mixed_values.unflatten(3, (part.width, -1)).unflatten(
                2, (part.heads, part.copies)
            )
            mixed.append(mixed_values.transpose(3, 4).flatten(2, 3))  # (B, L, E_i, copies, P)
        copies = _common_copies(coefficients)
        repeated = [x.repeat_interleave(copies // x.shape[3], dim=3) for x in mixed]
        return torch.cat(repeated, dim=2).flatten(2, 3)

    def merge(
        self, mixed: Float[Tensor, "B L F 1"], coefficients: list[MemberCoefficients]
    ) -> Float[Tensor, "B L D"]:
        """Merge each mixer, and combine their outputs."""
        copies, outputs = _common_copies(coefficients), []
        channels = mixed.squeeze(-1).unflatten(2, (-1, copies))
        channels = channels.split([part.channels for part in coefficients], dim=2)
        for mixer, part, own in zip(self._each(), coefficients, channels, strict=True):
            # One of the equal copies that `mix` made to reach the common number.
            own = own[..., :: copies // part.copies].unflatten(2, (part.heads, part.width))
            own = own.transpose(3, 4).flatten(2, 3)  # (B, L, H_i, P_i)
            outputs.append(mixer.merge(own.to(part.dtype), part.coefficients))
        return self._weighted(torch.stack(outputs))

    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """Those of the mixers; the weighted sum is not counted."""
        each = [mixer.mix_flops(queries, keys) for mixer in self._each()]
        return MixFlops(
            needed=sum(flops.needed for flops in each),
            full_square=sum(flops.full_square for flops in each),
            elementwise=sum(flops.elementwise for flops in each),
        )

    def draw(self, name: str, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The initial weights."""
        assert name == "weights"
        return torch.full(self.weights.shape, self.slot.residual_scale / len(self.mixers))

    def _each(self) -> list[Mixer]:
        return [mixer for mixer in self.mixers.values() if isinstance(mixer, Mixer)]

    def _weighted(self, outputs: Float[Tensor, "M B L D"]) -> Float[Tensor, "B L D"]:
        if self.config.merge == "mean":
            return outputs.mean(dim=0)
        normed = F.rms_norm(widened(outputs), outputs.shape[-1:], eps=EPS)
        return (widened(self.weights)[:, None, None] * normed).sum(dim=0).to(outputs.dtype)


def _built(name: str, config: MixerConfig, slot: Slot) -> Mixer:
    try:
        mixer = config.build(slot)
    except ValueError as error:
        raise ValueError(f"mixers.{name}: {error}") from error
    if not mixer.linear:
        raise ValueError(
            f"mixers.{name}: {config.kind} is not linear in its values, so it cannot be one of "
            "several in parallel; give it a block of its own"
        )
    return mixer


def _common_copies(parts: list[MemberCoefficients]) -> int:
    return lcm(*(part.copies for part in parts))
