"""The softmax side of CAB's set as dense matrices, from named weights and one document alone.

Float64, in torch so that gradients follow; each function gives the mixing matrix (H, T, S) of a
document (T, D), and what stands in its rows is written out token by token.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def heads(w: Weights, x: Tensor, source: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of x, keys and values of a source, (T, H, P) each."""
    q, k, v = w["heads.qkv.weight"].chunk(3)
    P = q.shape[0] // n
    q, k, v = x @ q.T, source @ k.T, source @ v.T
    q, k, v = (y.reshape(-1, n, P) for y in (q, k, v))
    if "heads.q_norm.weight" in w:
        q, k = normed(q, w["heads.q_norm.weight"]), normed(k, w["heads.k_norm.weight"])
    return q, k, v


def output(w: Weights, matrix: Tensor, values: Tensor) -> Tensor:
    """What a mixer returns: the matrix by the values, heads mixed."""
    return torch.einsum("hts,shp->thp", matrix, values).flatten(1) @ w["heads.out.weight"].T


def softmax_attention(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(P)) of each head."""
    return (torch.einsum("thp,shp->hts", q, k) / math.sqrt(q.shape[-1])).softmax(dim=-1)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square norm with epsilon 1e-5."""
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-5) * weight


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotate channel p of token t with channel p + P/2 by t theta ** (-2 p / P)."""
    T, _, P = x.shape
    half = torch.arange(P // 2, dtype=torch.float64)
    # The angles are defined in float32, whatever the tokens are in.
    frequencies = torch.exp((2 * half).float() * (-math.log(theta) / P))
    angles = (torch.arange(T).float()[:, None] * frequencies).double()[:, None]
    a, b = x[..., : P // 2], x[..., P // 2 :]
    cos, sin = angles.float().cos().double(), angles.float().sin().double()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def segment_means(x: Tensor, count: int) -> Tensor:
    """Means of segments [floor(c n / k), floor((c + 1) n / k)), k the smaller of count and n."""
    n = x.shape[0]
    k = min(count, n)
    return torch.stack([x[c * n // k : (c + 1) * n // k].mean(dim=0) for c in range(k)])


def nystrom(q: Tensor, k: Tensor, landmarks: int, iterations: int | None) -> Tensor:
    """F Z B (Xiong et al. 2021, equations 8 and 11); Z the pseudoinverse without `iterations`."""
    q_means, k_means = segment_means(q, landmarks), segment_means(k, landmarks)
    F, A, B = (
        softmax_attention(*pair) for pair in ((q, k_means), (q_means, k_means), (q_means, k))
    )
    if iterations is None:
        return F @ torch.linalg.pinv(A) @ B
    inverses = []
    for a in A:
        one = torch.eye(a.shape[0], dtype=a.dtype)
        z = a.T / (a.abs().sum(dim=0).max() * a.abs().sum(dim=1).max())
        for _ in range(iterations):
            az = a @ z
            z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
        inverses.append(z)
    return F @ torch.stack(inverses) @ B


def convolution(taps: Tensor, n: int) -> Tensor:
    """The banded matrix of a centred convolution: tap j sees the token j - (width - 1) / 2 on."""
    width = taps.shape[1]
    matrix = torch.zeros(taps.shape[0], n, n, dtype=taps.dtype)
    for t in range(n):
        for j in range(width):
            s = t + j - width // 2
            if 0 <= s < n:
                matrix[:, t, s] = taps[:, j]
    return matrix


def probsparse(q: Tensor, k: Tensor, factor: int) -> Tensor:
    """Rows of the most telling queries (Zhou et al. 2021, equation 4), 1 / n in all others."""
    n, H, P = q.shape
    chosen = min(n, factor * math.ceil(math.log(n)))
    matrix, full = torch.full((H, n, n), 1 / n, dtype=q.dtype), softmax_attention(q, k)
    for h in range(H):
        measure = []
        for t in range(n):
            sample = [sampled_key(t, i, n, chosen) for i in range(chosen)]
            scores = [(q[t, h] @ k[s, h]).item() / math.sqrt(P) for s in sample]
            measure.append(max(scores) - sum(scores) / len(scores) if scores else 0.0)
        for t in sorted(range(n), key=lambda t: -measure[t])[:chosen]:
            matrix[h, t] = full[h, t]
    return matrix


def sampled_key(query: int, number: int, n: int, count: int) -> int:
    """floor(n frac(j phi)) for the j-th of all samples, phi = (sqrt(5) - 1) / 2 in 32 bits."""
    j = query * count + number + 1
    return (j * 2654435769 % 2**32) * n // 2**32


def abc(q: Tensor, k: Tensor, logits: Tensor, causal: bool) -> Tensor:
    """Attention to slots (Peng et al. 2022, equations 3-5) that hold the tokens seen so far."""
    T, S = q.shape[0], k.shape[0]
    rows = []
    for t in range(T):
        seen = t + 1 if causal else S
        shares = logits[:seen].softmax(dim=0)  # (S, H, C)
        slots = torch.einsum("shc,shp->hcp", shares, k[:seen])
        read = torch.einsum("hp,hcp->hc", q[t], slots) / math.sqrt(q.shape[-1])
        row = torch.einsum("hc,shc->hs", read.softmax(dim=-1), shares)
        rows.append(torch.nn.functional.pad(row, (0, S - seen)))
    return torch.stack(rows, dim=1)


def long_short(
    w: Weights, q: Tensor, k: Tensor, logits: Tensor, sizes: tuple[int, int, float], causal: bool
) -> Tensor:
    """One softmax over a window and averages (Zhu et al. 2021, section 3.4), keys normalised.

    Args:
        sizes: window, chunk and rotary base.
    """
    (window, chunk, theta), T, P = sizes, q.shape[0], q.shape[-1]
    near_q = turned(q, theta)
    near_k = turned(normed(k, w["near_norm.weight"]), theta)
    back, ahead = (window - 1, 0) if causal else (window // 2, (window - 1) // 2)
    rows = []
    for t in range(T):
        pieces = [(s, s + chunk) for s in range(0, t // chunk * chunk, chunk)]
        averaged = []
        for begin, end in pieces if causal else [(0, T)]:
            shares = torch.zeros(T, *logits.shape[1:], dtype=q.dtype)
            shares[begin:end] = logits[begin:end].softmax(dim=0)
            averaged.extend(shares.unbind(dim=2))  # (T, H) each
        keys = [near_k[s] for s in range(max(t - back, 0), min(t + ahead, T - 1) + 1)]
        units = [unit(s, T, q) for s in range(max(t - back, 0), min(t + ahead, T - 1) + 1)]
        scores = [(near_q[t] * key).sum(dim=-1) for key in keys]
        for share in averaged:
            key = normed(torch.einsum("sh,shp->hp", share, k), w["far_norm.weight"])
            scores.append((q[t] * key).sum(dim=-1))
            units.append(share.T)
        weights = (torch.stack(scores) / math.sqrt(P)).softmax(dim=0)  # (entries, H)
        rows.append(torch.einsum("eh,ehs->hs", weights, torch.stack(units)))
    return torch.stack(rows, dim=1)


def unit(s: int, T: int, like: Tensor) -> Tensor:
    """The unit vector of a token, for each head."""
    row = torch.zeros(like.shape[1], T, dtype=like.dtype)
    row[:, s] = 1
    return row


def counted_slots(tokens: int, slots: int, width: int) -> tuple[int, int]:
    """Work of one head's running slots of keys and values: products, and pointwise operations."""
    products = pointwise = 0
    for _ in range(tokens):
        for _ in range(slots):
            pointwise += 6  # log-sum: larger, difference, its size, exponential, logarithm, sum
            pointwise += 4  # difference and exponential, of the share and of the decay
            for _ in range(width):
                pointwise += 2  # decay of the key's and the value's average
                products += 4  # share by key and by value, added
                products += 4  # query by key, weight by value, added
    return products, pointwise


def counted_long_short(sizes: tuple[int, int, int, int], causal: bool, width: int) -> int:
    """Products of one head: two for each visible pair and for each token in an average.

    Args:
        sizes: tokens, window, chunk, rank.
    """
    (n, window, chunk, rank), products = sizes, 0
    for t in range(n):
        for s in range(n):
            back, ahead = (window - 1, 0) if causal else (window // 2, (window - 1) // 2)
            products += 4 * width * (t - back <= s <= t + ahead)
        products += 4 * width * rank * (t // chunk if causal else 1)
        products += 4 * width * rank
    return products
