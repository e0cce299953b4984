"""Cluster-robust variance and its degrees of freedom, from dense matrices as papers write it."""

import numpy as np
from scipy.linalg import fractional_matrix_power


def cr2(design, errors, clusters, direction):
    """Variance of direction @ estimate with CR2 residuals (Bell and McCaffrey 2002)."""
    bread = np.linalg.inv(design.T @ design)
    hat = design @ bread @ design.T
    total = np.zeros((design.shape[1], design.shape[1]))
    for cluster in np.unique(clusters):
        mine = np.flatnonzero(clusters == cluster)
        rest = np.eye(len(mine)) - hat[np.ix_(mine, mine)]
        adjusted = np.real(fractional_matrix_power(rest, -0.5)) @ errors[mine]
        score = design[mine].T @ adjusted
        total += np.outer(score, score)
    return float(direction @ bread @ total @ bread @ direction)


def freedom(design, clusters, direction, shared, own):
    """Satterthwaite's degrees of freedom of that variance (Imbens and Kolesar 2016, eq. 5)."""
    bread = np.linalg.inv(design.T @ design)
    annihilator = np.eye(len(design)) - design @ bread @ design.T
    columns = []
    for cluster in np.unique(clusters):
        mine = np.flatnonzero(clusters == cluster)
        root = np.real(fractional_matrix_power(annihilator[np.ix_(mine, mine)], -0.5))
        columns.append(annihilator[:, mine] @ root @ design[mine] @ bread @ direction)
    matrix = np.stack(columns, axis=1)
    together = np.equal.outer(clusters, clusters)
    square = matrix.T @ (own * np.eye(len(design)) + shared * together) @ matrix
    return float(np.trace(square) ** 2 / (square**2).sum())
