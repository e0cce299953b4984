"""Running sums and running averages of tokens, as loops in float64 over one token at a time."""

import numpy as np

Array = np.ndarray


def linear_attention(
    queries: Array, keys: Array, values: Array, initial: Array, documents: Array
) -> tuple[Array, Array]:
    """Outputs (B, L, H, P), and the state (B, H, N, P) after the last token."""
    B, L, H, P = values.shape
    outputs, final = np.zeros((B, L, H, P)), np.array(initial, dtype=np.float64)
    for b in range(B):
        for h in range(H):
            state, before = final[b, h], 0
            for t in range(L):
                if documents[b, t] != before:
                    state, before = np.zeros_like(state), documents[b, t]
                state = state + np.outer(keys[b, t, h], values[b, t, h])
                outputs[b, t, h] = queries[b, t, h] @ state
            final[b, h] = state
    return outputs, final


def slots(logits: Array, x: Array, earlier: Array, documents: Array) -> tuple[Array, Array]:
    """Averages (B, L, H, C, P) and log-sums (B, L, H, C) of the document's tokens so far.

    Args:
        logits: (B, L, H, C).
        x: (B, L, H, P).
        earlier: tokens (B, E, H, C + P) of document 0, logits and features, that come before.
        documents: ids; 0 goes on with what comes before.
    """
    (B, L, H, C), P = logits.shape, x.shape[-1]
    averages, sums = np.zeros((B, L, H, C, P)), np.zeros((B, L, H, C))
    for b in range(B):
        for t in range(L):
            for h in range(H):
                own = [s for s in range(t + 1) if documents[b, s] == documents[b, t]]
                a, features = logits[b, own, h], x[b, own, h]
                if documents[b, t] == 0:
                    a = np.concatenate([earlier[b, :, h, :C], a])
                    features = np.concatenate([earlier[b, :, h, C:], features])
                largest = a.max(axis=0)
                weights = np.exp(a - largest)  # (S, C)
                averages[b, t, h] = weights.T @ features / weights.sum(axis=0)[:, None]
                sums[b, t, h] = largest + np.log(weights.sum(axis=0))
    return averages, sums
