"""Softmax attention over the last few tokens, with work and memory linear in the length.

Source: Beltagy et al. 2020, "Longformer", section 3.1. A window of W is exactly W keys, the query's
own included: key j is seen by query i if 0 <= i - j <= W - 1.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def window_attention(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B S G P"],
    values: Float[Tensor, "B S G Q"],
    window: int,
    documents: Int[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B L H Q"]:
    """Attend with each query to the last `window` keys of its document, its own included.

    Scores are scaled by 1/sqrt(P) and normalised in float32.

    Args:
        queries: those of the last L of the S tokens.
        keys: one for each token; G divides H, and query head h reads key head h // (H / G).
        values: one for each token.
        window: keys that a query sees at most.
        documents: document of each of the S tokens; one document if not given.

    Raises:
        ValueError: there are fewer keys than queries, or the window is empty.
    """
    if window < 1 or keys.shape[1] < queries.shape[1]:
        raise ValueError(
            f"window {window} with {queries.shape[1]} queries on {keys.shape[1]} keys; take a "
            "window of 1 or more, and at least as many keys as queries"
        )
    return window_attention_reference(queries, keys, values, window, documents)


def window_attention_reference(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B S G P"],
    values: Float[Tensor, "B S G Q"],
    window: int,
    documents: Int[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B L H Q"]:
    """Compute `window_attention` with a dense mask."""
    mixed = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2).to(queries.dtype),
        values.transpose(1, 2).to(queries.dtype),
        attn_mask=_visible(queries.shape[1], keys.shape[1], window, documents, queries.device),
        enable_gqa=keys.shape[2] != queries.shape[2],
    )
    return mixed.transpose(1, 2)


def _visible(
    L: int, S: int, window: int, documents: Tensor | None, device: torch.device
) -> Bool[Tensor, "..."]:
    place = torch.arange(S, device=device)
    behind = place[S - L :, None] - place[None, :]
    near = (behind >= 0) & (behind < window)
    if documents is None:
        return near
    return (near & (documents[:, S - L :, None] == documents[:, None, :]))[:, None]
