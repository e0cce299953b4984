"""The kernelised side of CAB's set as dense matrices, from one document's queries and keys alone.

Float64, in torch so that gradients follow; each function gives the mixing matrix (H, T, S).
"""

import math

import torch
from torch import Tensor

from tests.oracles.cab import segment_means


def performer(q: Tensor, k: Tensor, features: Tensor, causal: bool) -> Tensor:
    """D^-1 phi(q) phi(k)^T (Choromanski et al. 2021, equations 4 and 5), features (H, F, P)."""
    scale = q.shape[-1] ** -0.25

    def phi(x: Tensor) -> Tensor:
        x = x * scale
        products = torch.einsum("thp,hfp->htf", x, features)
        square = (x * x).sum(dim=-1).T[:, :, None]
        return torch.exp(products - square / 2) / math.sqrt(features.shape[1])

    return normalised(phi(q) @ phi(k).transpose(1, 2), causal)


def cosformer(q: Tensor, k: Tensor, max_len: int, causal: bool) -> Tensor:
    """relu(q) relu(k)^T cos(pi (t - s) / (2 max_len)) over its row sums (Qin et al. 2022)."""
    products = torch.einsum("thp,shp->hts", q.clamp(min=0), k.clamp(min=0))
    distance = torch.arange(q.shape[0])[:, None] - torch.arange(k.shape[0])[None, :]
    return normalised(products * torch.cos(math.pi * distance.double() / (2 * max_len)), causal)


def lara(q: Tensor, k: Tensor, landmarks: int) -> Tensor:
    """Self-normalised importance sampling with one proposal a landmark (Zheng et al. 2022)."""
    T, H, P = q.shape
    q, k = q * P**-0.25, k * P**-0.25
    mu = segment_means(q, landmarks) + segment_means(k, landmarks)
    matrix = torch.zeros(H, T, T, dtype=q.dtype)

    def xi(x: Tensor, sample: Tensor) -> Tensor:
        return torch.exp((x * sample).sum(dim=-1) - (x * x).sum(dim=-1) / 2)

    for c in range(mu.shape[0]):
        sample = mu[c]  # (H, P)
        prior = torch.exp(-(sample * sample).sum(dim=-1) / 2)
        proposal = torch.exp(-((sample - mu[c]) ** 2).sum(dim=-1) / 2)
        alpha = torch.exp((q * mu[c]).sum(dim=-1))  # (T, H)
        weight = alpha * (prior / proposal) * xi(q, sample)
        matrix = matrix + torch.einsum("th,sh->hts", weight, xi(k, sample))
    return matrix / matrix.sum(dim=-1, keepdim=True)


def normalised(weights: Tensor, causal: bool) -> Tensor:
    """Rows over their sums, a row of zeros as it is."""
    if causal:
        weights = weights.tril()
    sums = weights.sum(dim=-1, keepdim=True)
    return weights / torch.where(sums == 0, 1.0, sums)


def counted_performer(
    queries: int, keys: int, features: int, width: int, causal: bool
) -> tuple[int, int]:
    """Work of one head: products, and pointwise operations."""
    products = pointwise = 0
    for _ in range(keys):
        pointwise += width  # scale
        pointwise += 2 * width + 1  # square, sum, half
        for _ in range(features):
            products += 2 * width  # feature
            products += 2 * width  # share by value, added
            pointwise += 1  # less the half square
            if causal:
                pointwise += 6 + 2 + 2  # log-sum, share, decay
                pointwise += width  # decay of the average
            else:
                pointwise += 5  # largest, difference, exponential, sum, division
    for _ in range(0 if causal else features):
        pointwise += 2  # logarithm of the sum, the largest added
    for _ in range(queries):
        pointwise += width  # scale
        for _ in range(features):
            products += 2 * width  # feature
            products += 2 * width  # weight by average, added
            pointwise += 1 + 5  # the log-sum added, and the softmax
    return products, pointwise


def counted_cosformer(queries: int, keys: int, width: int) -> tuple[int, int]:
    """Work of one head: products, and pointwise operations."""
    products = pointwise = 0
    for _ in range(keys):
        for _ in range(width):
            pointwise += 1  # relu
            for _ in ("cosine", "sine"):
                pointwise += 1 + 1  # by the place's factor; added to the sum
                products += 2 * width  # by each value, added
    for _ in range(queries):
        for _ in range(width):
            pointwise += 1  # relu
            for _ in ("cosine", "sine"):
                pointwise += 1 + 1  # by the place's factor; over the row's sum
                products += 2  # by the keys' sum, added
                products += 2 * width  # by each sum of values, added
    return products, pointwise


def counted_lara(tokens: int, landmarks: int, width: int) -> tuple[int, int]:
    """Work of one head: products, and pointwise operations."""
    products = pointwise = 0
    for _ in range(tokens):
        pointwise += 2 * width  # scales of query and key
        pointwise += 2 * width  # into their segment's sums
        pointwise += 2 * width + 1  # the key's half square
    for _ in range(landmarks):
        pointwise += 2 * width + width  # both means, their sum
        pointwise += 2 * width + 1  # half square
        pointwise += 2 + 1  # logarithm of the sum, the largest added; less the half square
    for _ in range(landmarks):
        for _ in range(tokens):
            products += 2 * 2 * width  # query and key by the sample
            products += 2 * 2 * width  # share by value, weight by average
            pointwise += 2 + 5  # twice the product, the ratio added, softmax
            pointwise += 1 + 5  # less the half square, softmax
    return products, pointwise
