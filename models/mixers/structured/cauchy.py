"""A Cauchy matrix whose nodes come from the tokens (Hydra paper, section 2.4).

The paper's m[i, j] = sum_d 1 / (q[i, d] - k[j, d] + c) has poles; its release avoids them with
nodes exp(q) and -exp(k), which makes every denominator positive, and so does this. Changed: c is
the exponential of a parameter, so that training cannot reintroduce the pole (the release adds a
free parameter twice, initially 0.5), and exponents are clamped where entries vanish in float32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.derivatives import differentiated_once, in_plain_torch
from kernels.precision import widened
from models.bases.structured_matrix import (
    EntrywiseMixer,
    Features,
    PlaceTable,
    StructuredConfig,
    xavier_normal,
)
from models.mixer import MixFlops, Pattern, Slot, register
from models.sequences.whole import WholeSequence

HIGHEST = 40.0
"""Largest exponent of a node: 1 / exp(40) is negligible, and exp(40)^2 is finite in float32."""

TINY = 1e-8
"""The release's constant against a division by zero."""

# Entries computed at once: on a CPU few enough for a core's cache, on a GPU enough to fill it.
_WORKING_ON_CPU = 2**16
_WORKING_ELSEWHERE = 2**26


@dataclass(frozen=True)
class CauchyConfig(StructuredConfig):
    """Sizes of a Cauchy matrix.

    Attributes:
        d_qk: number of matrices in the sum, and of nodes per token.
    """

    kind: ClassVar[str] = "cauchy"
    d_qk: int = 16


class Nodes(NamedTuple):
    """The positive nodes of rows and columns."""

    rows: Float[Tensor, "B L H N"]
    columns: Float[Tensor, "B S H N"]


@register(CauchyConfig)
class Cauchy(EntrywiseMixer):
    """m[i, j] = sum_d 1 / (x[i, d] + y[j, d] + c), x and y positive.

    Materialised, one d at a time: the fast algorithm takes L log(L)^2 and is implemented neither
    here nor in the release. The backward pass recomputes the reciprocals.
    """

    patterns = frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF})
    sharded = frozenset({Pattern.CAUSAL_SELF})

    def __init__(self, config: CauchyConfig, slot: Slot) -> None:
        H, N = config.n_heads, config.d_qk
        aligned = config.sequence_aligned
        super().__init__(
            config, slot, convolved=2 * H * N * aligned, gain=1 / math.sqrt(config.d_qk)
        )
        self.d_qk = N
        if aligned:
            self.log_c = nn.Parameter(torch.empty(()))
        else:
            self.rows = PlaceTable((config.longest, H, N), xavier_normal)
            self.columns = PlaceTable((config.longest, H, N), xavier_normal)

    def structure(self, features: Features, sequence: WholeSequence) -> Nodes:
        """Nodes from the tokens' channels, or from their positions."""
        if self.config.sequence_aligned:
            heads = features.convolved.unflatten(2, (2, self.config.n_heads, self.d_qk))
            q, k = heads.unbind(2)
            return Nodes(
                _positive(q) + torch.exp(widened(self.log_c)), sequence.gather(_positive(k))
            )
        rows, columns = self.places(sequence), self.key_places(sequence)
        return Nodes(_positive(self.rows(rows)), _positive(self.columns(columns)))

    def entries(self, structure: Nodes, sequence: WholeSequence) -> Float[Tensor, "B H L S"]:
        """Sums of reciprocals, in float32."""
        del sequence
        rows, columns = (nodes.permute(3, 0, 2, 1) for nodes in structure)
        rows = rows + TINY
        if in_plain_torch():
            return (1 / (rows[..., None] + columns[..., None, :])).sum(dim=0)
        # The stub of Function.apply has no return type.
        sums = _Reciprocals.apply(rows, columns)
        assert isinstance(sums, Tensor)
        return sums

    def entry_flops(self, queries: int, keys: int) -> MixFlops:
        """Pointwise: two sums and a division for each d and pair."""
        each = 3.0 * self.config.n_heads * self.d_qk
        return MixFlops(elementwise=each * self.pairs(queries, keys))

    def draw(self, name: str, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The logarithm of c = 1, twice the release's 0.5."""
        return torch.zeros(())


def _positive(exponents: Float[Tensor, "B L H N"]) -> Float[Tensor, "B L H N"]:
    return torch.exp(widened(exponents).clamp(max=HIGHEST))


class _Reciprocals(torch.autograd.Function):
    """Sums over N of 1 / (row + column), a few rows at a time; backward recomputes them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: Float[Tensor, "N B H L"], columns: Float[Tensor, "N B H S"]
    ) -> Float[Tensor, "B H L S"]:
        ctx.save_for_backward(rows, columns)
        sums = rows.new_zeros(*rows.shape[1:], columns.shape[3])
        for part in _parts(rows, columns):
            for row, column in zip(rows[..., part], columns, strict=True):
                sums[:, :, part] += _reciprocals(row, column)
        return sums

    @staticmethod
    @differentiated_once("the sum of reciprocals of cauchy")
    def backward(
        ctx: BackwardCFunction, d_sums: Float[Tensor, "B H L S"]
    ) -> tuple[Float[Tensor, "N B H L"], Float[Tensor, "N B H S"]]:
        rows, columns = list(ctx.saved_tensors)
        d_rows, d_columns = torch.empty_like(rows), torch.zeros_like(columns)
        for part in _parts(rows, columns):
            negative = -d_sums[:, :, part]
            for n, (row, column) in enumerate(zip(rows[..., part], columns, strict=True)):
                # The derivative of 1 / z is -1 / z^2.
                slopes = _reciprocals(row, column).square_().mul_(negative)
                d_rows[n, :, :, part] = slopes.sum(dim=-1)
                d_columns[n] += slopes.sum(dim=-2)
        return d_rows, d_columns


def _reciprocals(
    row: Float[Tensor, "B H T"], column: Float[Tensor, "B H S"]
) -> Float[Tensor, "B H T S"]:
    return (row[..., :, None] + column[..., None, :]).reciprocal_()


def _parts(rows: Float[Tensor, "N B H L"], columns: Float[Tensor, "N B H S"]) -> Iterator[slice]:
    working = _WORKING_ON_CPU if rows.device.type == "cpu" else _WORKING_ELSEWHERE
    size = max(1, working // columns[0].numel())
    for begin in range(0, rows.shape[3], size):
        yield slice(begin, begin + size)
