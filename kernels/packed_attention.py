"""Softmax attention over rows of packed documents, without a mask of all pairs of tokens.

On a CPU every document goes through torch's fused attention by itself. Forward and backward took
0.03 to 0.77 of the time of one masked call, at 512 to 8,192 tokens and documents of 20 to 1,500;
the tiles of `window_attention` took 0.6 to 2.4 of it.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kernels.interval_attention import interval_attention, neighbours
from kernels.runtime import uses_triton
from kernels.window_attention import FEW, window_attention


# The number of documents is not the compiler's business: it would compile again for each.
@torch.compiler.disable
def packed_attention(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B S G P"],
    values: Float[Tensor, "B S G Q"],
    documents: Int[Tensor, "B S"],
    *,
    causal: bool,
) -> Float[Tensor, "B L H Q"]:
    """Attend with each query to the keys of its own document, to none of them later if causal.

    Scores are scaled by 1/sqrt(P); softmax statistics are float32 or wider; returns the dtype of
    `queries`. On a GPU it is a Triton kernel, whose tiles skip other documents.

    Args:
        queries: those of the last L of the S tokens.
        keys: one for each token; G divides H, and query head h reads key head h // (H / G).
        values: one for each token.
        documents: document of each token; those of one stand together.
        causal: whether later tokens are hidden. Otherwise all tokens must be queries.

    Raises:
        ValueError: there are fewer keys than queries, or fewer queries although none are hidden.
    """
    L, S = queries.shape[1], keys.shape[1]
    if S < L or (S > L and not causal):
        raise ValueError(
            f"{L} queries on {S} keys; give at least as many keys as queries, and as many where "
            "attention is not causal"
        )
    if causal and L <= FEW:
        return window_attention(queries, keys, values, S, documents)
    if uses_triton(queries):
        seen = neighbours(documents, L, S - 1, 0 if causal else S - 1)
        return interval_attention(queries, keys, values, seen)
    return _by_document(queries, keys, values, documents, causal)


def packed_attention_reference(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B S G P"],
    values: Float[Tensor, "B S G Q"],
    documents: Int[Tensor, "B S"],
    *,
    causal: bool,
) -> Float[Tensor, "B L H Q"]:
    """Compute `packed_attention` with a dense mask."""
    L, S = queries.shape[1], keys.shape[1]
    seen = documents[:, S - L :, None] == documents[:, None, :]
    if causal:
        place = torch.arange(S, device=seen.device)
        seen = seen & (place <= place[S - L :, None])
    mixed = F.scaled_dot_product_attention(
        *(x.transpose(1, 2).to(queries.dtype) for x in (queries, keys, values)),
        attn_mask=seen[:, None],
        enable_gqa=keys.shape[2] != queries.shape[2],
    )
    return mixed.transpose(1, 2)


def _by_document(
    queries: Tensor, keys: Tensor, values: Tensor, documents: Tensor, causal: bool
) -> Float[Tensor, "B L H Q"]:
    (B, L), S = queries.shape[:2], keys.shape[1]
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    ends = [*torch.nonzero(begins.flatten())[:, 0].tolist(), B * S]
    # The queries that stand before each end: in a row those of its last L tokens.
    asked = [end // S * L + max(0, end % S - (S - L)) for end in ends]
    n_keys, n_queries = ([b - a for a, b in pairwise(x)] for x in (ends, asked))
    parts = zip(
        queries.flatten(0, 1).split(n_queries),
        keys.to(queries.dtype).flatten(0, 1).split(n_keys),
        values.to(queries.dtype).flatten(0, 1).split(n_keys),
        strict=True,
    )
    mixed = [_one_document(*part, causal) for part in parts if len(part[0])]
    return torch.cat(mixed).unflatten(0, (B, L))


def _one_document(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Float[Tensor, "n H Q"]:
    """Queries that are the last ones of a document; a mask would be kept for the backward pass."""
    if causal and len(q) < len(k):
        return window_attention(q[None], k[None], v[None], len(k))[0]
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(
        *heads,  # pyright: ignore[reportArgumentType]
        is_causal=causal,
        enable_gqa=k.shape[1] != q.shape[1],
    )
    return mixed[0].transpose(0, 1)
