"""Witten-Bell n-grams from dictionaries of counts, one token at a time."""

import math
from collections import Counter, defaultdict


def total_nats(train: list[list[int]], test: list[list[int]], order: int, vocab_size: int) -> float:
    """Documents to the summed cross-entropy of every token but the first of each document."""
    counts: dict[tuple[int, ...], Counter] = defaultdict(Counter)
    for document in train:
        for i in range(1, len(document)):
            for length in range(min(order - 1, i) + 1):
                counts[tuple(document[i - length : i])][document[i]] += 1

    def chance(token: int, context: tuple[int, ...]) -> float:
        lower = chance(token, context[1:]) if context else 1.0 / vocab_size
        followers = counts.get(context)
        if not followers:
            return lower
        total, different = sum(followers.values()), len(followers)
        return (followers[token] + different * lower) / (total + different)

    nats = 0.0
    for document in test:
        for i in range(1, len(document)):
            context = tuple(document[max(0, i - order + 1) : i])
            nats -= math.log(chance(document[i], context))
    return nats
