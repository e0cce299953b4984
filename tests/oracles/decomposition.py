"""Sums of squares by explicit dummy regression with a column per cell, from the definition."""

import numpy as np


def shares(cell, corpus, architecture, seed_group, y):
    """Shares of corpus, architecture, interaction, scale and seed, Shapley over orders."""
    cells = _columns(cell)
    a, b = _columns(corpus), _columns(architecture)
    both = np.array(
        [[x * z for x in row_a for z in row_b] for row_a, row_b in zip(a, b, strict=True)]
    )
    total = _rss(cells, y)
    with_a, with_b = _rss(np.hstack([cells, a]), y), _rss(np.hstack([cells, b]), y)
    with_ab = _rss(np.hstack([cells, a, b]), y)
    with_all = _rss(np.hstack([cells, a, b, both]), y)
    seed = _rss(_columns(seed_group), y)
    parts = [
        0.5 * ((total - with_a) + (with_b - with_ab)),
        0.5 * ((total - with_b) + (with_a - with_ab)),
        with_ab - with_all,
        with_all - seed,
        seed,
    ]
    return np.array(parts) / total


def _columns(labels):
    levels = sorted(set(labels))
    return np.array([[float(label == level) for level in levels] for label in labels])


def _rss(design, y):
    fitted = design @ (np.linalg.pinv(design) @ y)
    return float(((y - fitted) ** 2).sum())
