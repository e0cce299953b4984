"""Softmax attention over packed documents, without a mask of all pairs of tokens.

Source: Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination" (attention
within documents). Changed: no mask; `window_attention` is used with a window as long as the row,
and its kernels stop at document boundaries.
"""

import sys

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kernels.attention.window_attention import centred_window_attention, window_attention
from kernels.dispatch import Path, path_of

# Longest document, in keys, for which the compiled kernel is faster than torch's attention.
MOST_KEYS = sys.maxsize if torch.backends.cpu.get_cpu_capability() == "AVX512" else 512


# Not traced: the compiler would specialise on, and recompile for, the number of documents.
@torch.compiler.disable
def packed_attention(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B S G P"],
    values: Float[Tensor, "B S G Q"],
    documents: Int[Tensor, "B S"],
    *,
    causal: bool,
) -> Float[Tensor, "B L H Q"]:
    """Attend with each query to the keys of its document, only to earlier ones if causal.

    Scores are scaled by 1/sqrt(P); softmax statistics are float32 or wider; returns the dtype of
    `queries`. The compiled kernels skip other documents.

    Args:
        queries: those of the last L of the S tokens.
        keys: one for each token; G divides H, and query head h reads key head h // (H / G).
        values: one for each token.
        documents: document of each token; each document is contiguous.
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
    if causal:
        return window_attention(queries, keys, values, S, documents)
    return centred_window_attention(queries, keys, values, S, documents)


def serves_one_document(queries: Float[Tensor, "B L H P"], keys: Float[Tensor, "B S G P"]) -> bool:
    """Whether `window_attention` is faster than torch's attention for a single causal document.

    In float32 on a CPU with AVX-512 it took 0.68, 0.55, 0.66, 0.80 and 0.83 of the time of torch's
    fused attention, forward and backward, at 256, 512, 1,024, 2,048 and 4,096 tokens of 8 heads of
    64; limited to AVX2 on the same CPU 0.97, 0.86, 1.10, 1.29 and 1.42 (`python
    tests/benchmarks/kernels/bench_attention.py`). Its backward pass is parallel over rows and key
    heads, torch's over rows and query heads, so with too few key heads torch's is used.
    """
    if queries.device.type != "cpu" or keys.shape[1] > MOST_KEYS:
        return False
    shared, wanted = (len(x) * x.shape[2] for x in (keys, queries))
    if shared < min(wanted, torch.get_num_threads()):
        return False
    return keys.dtype is torch.float32 and path_of(queries) is Path.NATIVE


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
