"""Nystrom attention: softmax attention through a few landmarks (Xiong et al. 2021, section 3).

Changed: landmarks are means of segments of a document, equal up to one token, with one per token in
short documents; the iteration is scaled by each matrix's own largest column sum, as in section 3.2,
where the release takes the largest of the batch. The convolution of the values is optional
(`d_conv`), within documents and linear in the values. There is no rotary embedding: a mean of
rotated keys has no position.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kernels.precision import widened, without_autocast
from models.bases.heads import Heads, HeadsConfig
from models.mixer import Mixer, MixFlops, Pattern, Slot, register
from models.parts.layers import uniform
from models.sequences.continued import Memory
from models.sequences.documents import DocumentRows, documents_by_length, landmarks_of, put_back
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class NystromConfig(HeadsConfig):
    """Sizes of a Nystrom attention.

    Attributes:
        n_landmarks: most landmarks per document.
        iterations: steps of the iterative pseudoinverse.
        d_conv: taps of a convolution of each head's values, an odd number; None for none.
    """

    kind: ClassVar[str] = "nystrom"
    n_landmarks: int = 16
    iterations: int = 6
    d_conv: int | None = None

    def __post_init__(self) -> None:
        if self.n_landmarks < 1 or self.iterations < 0:
            raise ValueError(
                f"n_landmarks {self.n_landmarks} or iterations {self.iterations} is too small; "
                "take n_landmarks 1 or more and iterations 0 or more"
            )
        if self.d_conv is not None and self.d_conv % 2 == 0:
            raise ValueError(f"d_conv {self.d_conv} has no central tap; take an odd number")


class Coefficients(NamedTuple):
    """What determines a bucket's matrices, heads before tokens; a mask of None hides nothing."""

    bucket: DocumentRows
    queries: Float[Tensor, "N H T P"]
    keys: Float[Tensor, "N H T P"]
    query_landmarks: Float[Tensor, "N H C P"]
    key_landmarks: Float[Tensor, "N H C P"]
    inverse: Float[Tensor, "N H C C"]
    tokens_present: Bool[Tensor, "N 1 1 T"] | None
    landmarks_present: Bool[Tensor, "N 1 1 C"] | None


@register(NystromConfig)
class Nystrom(Mixer):
    """M = softmax(q k~^T) Z softmax(q~ k^T), with Z the iterated inverse of softmax(q~ k~^T).

    The rank is at most the number of landmarks. Rows sum to 1 once the iteration has converged.
    """

    patterns = frozenset({Pattern.NONCAUSAL_SELF})
    stops_nan = True

    def __init__(self, config: NystromConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config = config
        self.heads = Heads(config, slot)
        if config.d_conv is not None:
            self.taps = nn.Parameter(torch.empty(config.n_heads, config.d_conv))

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B L H P"], list[Coefficients]]:
        """Values are the value heads; queries, keys and landmarks determine the matrix."""
        del memory
        queries, keys, values = self.heads(x)
        return values, [
            self._coefficients(bucket, bucket.take(queries), bucket.take(keys))
            for bucket in documents_by_length(sequence)
        ]

    def mix(
        self,
        values: Float[Tensor, "B L H P"],
        coefficients: list[Coefficients],
        sequence: WholeSequence,
    ) -> Float[Tensor, "B L H P"]:
        """Attend from the landmarks to the tokens, and from the tokens to the landmarks."""
        parts = [self._mix(c.bucket.take(values), c) for c in coefficients]
        return put_back(parts, [c.bucket for c in coefficients], sequence)

    def merge(
        self, mixed: Float[Tensor, "B L H P"], coefficients: list[Coefficients]
    ) -> Float[Tensor, "B L D"]:
        """Mix the heads."""
        del coefficients
        return self.heads.merge(mixed)

    def mix_flops(self, queries: int, keys: int) -> MixFlops:  # noqa: ARG002
        """Products with C landmarks, per head: 8 C P per token, 4 C^2 P, and 8 C^3 per iteration.

        Pointwise: adding up the landmarks. Softmaxes are not counted, as in attention.
        """
        H, P, T = self.config.n_heads, self.heads.head_dim, keys
        C = min(self.config.n_landmarks, T)
        taps = 2 * (self.config.d_conv or 0) * P * T
        needed = 8.0 * C * P * T + 4 * C * C * P + 8 * C**3 * self.config.iterations + taps
        return MixFlops(H * needed, H * needed, H * 2.0 * P * T)

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Initial taps as in torch's Conv1d: U(-1/sqrt(width), 1/sqrt(width))."""
        assert name == "taps"
        return uniform(self.taps.shape, self.taps.shape[1] ** -0.5, generator)

    def _coefficients(self, bucket: DocumentRows, queries: Tensor, keys: Tensor) -> Coefficients:
        count = self.config.n_landmarks
        means, present = landmarks_of(torch.cat([queries, keys], dim=2), bucket, count)
        query_means, key_means = means.transpose(1, 2).chunk(2, dim=1)
        kernel = _kernel(query_means, key_means, present)
        inverse = iterated_inverse(kernel, self.config.iterations)
        tokens = bucket.present
        return Coefficients(
            bucket,
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            query_means,
            key_means,
            inverse,
            None if tokens is None else tokens[:, None, None],
            None if present is None else present[:, None, None],
        )

    def _mix(self, values: Float[Tensor, "N T H P"], c: Coefficients) -> Tensor:
        q, k, v = c.queries, c.keys, values.transpose(1, 2).to(c.queries.dtype)
        seen = F.scaled_dot_product_attention(
            c.query_landmarks.to(k.dtype), k, v, attn_mask=c.tokens_present
        )
        with without_autocast(values):
            known = c.inverse @ widened(seen)
        mixed = F.scaled_dot_product_attention(
            q, c.key_landmarks.to(q.dtype), known.to(q.dtype), attn_mask=c.landmarks_present
        )
        mixed = mixed.transpose(1, 2)
        return mixed if self.config.d_conv is None else mixed + self._convolve(values)

    def _convolve(self, values: Float[Tensor, "N T H P"]) -> Float[Tensor, "N T H P"]:
        channels = values.permute(0, 3, 2, 1)  # (N, P, H, T)
        taps = self.taps.to(values.dtype)[:, None]
        middle, heads = taps.shape[-1] // 2, taps.shape[0]
        mixed = F.conv1d(channels.flatten(0, 1), taps, padding=middle, groups=heads)
        return mixed.view(channels.shape).permute(0, 3, 2, 1)


def iterated_inverse(
    matrix: Float[Tensor, "*batch C C"], iterations: int
) -> Float[Tensor, "*batch C C"]:
    """Iterate towards the pseudoinverse of row-stochastic matrices (section 3.2, equation 11)."""
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    with without_autocast(matrix):
        largest = matrix.sum(dim=-2).amax(dim=-1)[..., None, None]
        # The paper's start; rows of a softmax sum to 1, so its other norm is 1 (section 3.2).
        z = matrix.transpose(-1, -2) / largest
        for _ in range(iterations):
            near = matrix @ z
            z = 0.25 * z @ (13 * one - near @ (15 * one - near @ (7 * one - near)))
    return z


def _kernel(
    queries: Float[Tensor, "N H C P"],
    keys: Float[Tensor, "N H C P"],
    present: Bool[Tensor, "N C"] | None,
) -> Float[Tensor, "N H C C"]:
    """softmax(queries keys^T / sqrt(P)), with zeros for absent landmarks."""
    with without_autocast(queries):
        scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    if present is None:
        return scores.softmax(dim=-1)
    column, row = present[:, None, None], present[:, None, :, None]
    shares = scores.masked_fill(~column, float("-inf")).softmax(dim=-1)
    return shares.masked_fill(~row, 0.0)
