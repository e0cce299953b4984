"""Causal attention without a softmax: a running sum of products of keys and values.

Source: Katharopoulos et al. 2020, "Transformers are RNNs", section 3.3, in chunks as in Hua et al.
2022, "Transformer Quality in Linear Time", section 3.3. Changed: initial and final states that
carry gradients, and resets at document boundaries. Normalisation is the caller's.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kernels.precision import without_autocast

# Tokens per chunk: a longer chunk takes more work inside and stores fewer states between chunks.
CHUNK = 64


class Scan(NamedTuple):
    """The outputs, and the state after the last token."""

    outputs: Float[Tensor, "B L H P"]
    final: Float[Tensor, "B H N P"]


def linear_attention(
    queries: Float[Tensor, "B L H N"],
    keys: Float[Tensor, "B L H N"],
    values: Float[Tensor, "B L H P"],
    initial: Float[Tensor, "B H N P"] | None = None,
    documents: Int[Tensor, "B L"] | None = None,
) -> Scan:
    """Compute S[t] = S[t-1] + keys[t] (x) values[t] and outputs[t] = queries[t] S[t].

    Accumulates in float32 and returns outputs in the dtype of `values`, the final state in float32
    (float64 in, float64 out).

    Args:
        queries: a token's output is its query times the state.
        keys: a token adds the outer product of its key and value to the state.
        values: the inputs.
        initial: S[-1], zero if not given.
        documents: document of each token, nondecreasing along the length except for padding at the
            end. Document 0 continues the initial state; where the id changes, the state is reset to
            zero before the token.

    Raises:
        ValueError: the shapes differ, or the length is 0.
    """
    _check_shapes(queries, keys, values, documents)
    L, wide = values.shape[1], torch.promote_types(values.dtype, torch.float32)
    q, k, v = (_chunked(x.to(wide)) for x in (queries, keys, values))
    ids = None if documents is None else chunked_documents(documents, CHUNK)
    with without_autocast(values):
        # Within a chunk: causal attention without a softmax. Across chunks: queries read the state.
        scores = (q @ k.transpose(-1, -2)).tril()
        if ids is not None:
            # Masked scores are 0, so values of other documents contribute nothing.
            scores = scores.masked_fill(~_same(ids), 0.0)
        before, final = _states(k, v, initial, ids)
        carried = q @ before
        if ids is not None:
            carried = carried.masked_fill(~continuing(ids)[:, :, None, :, None], 0.0)
        outputs = scores @ v + carried
    outputs = outputs.transpose(2, 3).flatten(1, 2)[:, :L]
    return Scan(outputs.to(values.dtype), final)


def linear_attention_reference(
    queries: Float[Tensor, "B L H N"],
    keys: Float[Tensor, "B L H N"],
    values: Float[Tensor, "B L H P"],
    initial: Float[Tensor, "B H N P"] | None = None,
    documents: Int[Tensor, "B L"] | None = None,
) -> Scan:
    """Compute `linear_attention` token by token, in float32 or wider."""
    wide = torch.promote_types(values.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (queries, keys, values))
    state = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1]) if initial is None else initial
    outputs = []
    for t in range(v.shape[1]):
        if documents is not None:
            before = documents[:, t - 1] if t else torch.zeros_like(documents[:, 0])
            state = torch.where((documents[:, t] == before)[:, None, None, None], state, 0.0)
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(-2))
    return Scan(torch.stack(outputs, dim=1).to(values.dtype), state)


def chunked_documents(documents: Int[Tensor, "B L"], chunk: int) -> Int[Tensor, "B C T"]:
    """Document ids in chunks; the last chunk is padded with the last id."""
    L = documents.shape[1]
    filled = documents[:, -1:].expand(-1, -L % chunk)
    return torch.cat([documents, filled], dim=1).unflatten(1, (-1, chunk))


def continuing(ids: Int[Tensor, "B C T"]) -> Tensor:
    """Mark tokens in the document of the last token before their chunk."""
    before = F.pad(ids[:, :-1, -1], (1, 0), value=0)
    return ids == before[:, :, None]


def _same(ids: Int[Tensor, "B C T"]) -> Tensor:
    return (ids[:, :, :, None] == ids[:, :, None, :])[:, :, None]


def _chunked(x: Float[Tensor, "B L H N"]) -> Float[Tensor, "B C H T N"]:
    # A key of zeros adds nothing to the state, so padding leaves the final one as it is.
    filled = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % CHUNK))
    return filled.unflatten(1, (-1, CHUNK)).transpose(2, 3)


def _states(
    keys: Float[Tensor, "B C H T N"],
    values: Float[Tensor, "B C H T P"],
    initial: Float[Tensor, "B H N P"] | None,
    ids: Int[Tensor, "B C T"] | None,
) -> tuple[Float[Tensor, "B C H N P"], Float[Tensor, "B H N P"]]:
    """The state before each chunk, and the state after the last."""
    if ids is None:
        added = (keys.transpose(-1, -2) @ values).unbind(dim=1)
        kept = [None] * len(added)
    else:
        # Only tokens in a chunk's last document contribute to the state after it.
        ending = (ids == ids[:, :, -1:])[:, :, None, :, None]
        added = (keys.masked_fill(~ending, 0.0).transpose(-1, -2) @ values).unbind(dim=1)
        kept = continuing(ids)[:, :, -1, None, None, None].unbind(dim=1)
    state = torch.zeros_like(added[0]) if initial is None else initial.to(added[0].dtype)
    before = []
    for more, goes_on in zip(added, kept, strict=True):
        before.append(state)
        # Reset if the chunk's last token is in another document than the token before the chunk.
        state = (state if goes_on is None else state.masked_fill(~goes_on, 0.0)) + more
    return torch.stack(before, dim=1), state


def _check_shapes(queries: Tensor, keys: Tensor, values: Tensor, documents: Tensor | None) -> None:
    if values.shape[1] == 0:
        raise ValueError("linear_attention was given no tokens; the length must be at least 1")
    places = values.shape[:3]
    for name, shape in (("queries", queries.shape), ("keys", keys.shape)):
        if shape != (*places, keys.shape[-1]):
            raise ValueError(
                f"linear_attention {name} have shape {tuple(shape)}, but values of shape "
                f"{tuple(values.shape)} and keys need {(*places, keys.shape[-1])}"
            )
    if documents is not None and documents.shape != places[:2]:
        raise ValueError(
            f"linear_attention documents have shape {tuple(documents.shape)}; "
            f"they need {tuple(places[:2])}"
        )
