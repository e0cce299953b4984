"""Long convolutions in one direction or two, and their adjoint, term by term in float64."""

import numpy as np


def convolve(inputs, documents):
    """Outputs (B, L, E): each token's sum over the inputs of its own document."""
    values = inputs["values"]
    outputs = np.zeros(values.shape)
    for row, t, s, name, lag in _terms(inputs, documents):
        outputs[row, t] += inputs[name][:, lag] * values[row, s]
    return outputs


def gradients(inputs, documents, d_outputs):
    """Gradients by name of <d_outputs, outputs>."""
    values = inputs["values"]
    result = {name: np.zeros(x.shape) for name, x in inputs.items()}
    for row, t, s, name, lag in _terms(inputs, documents):
        result["values"][row, s] += inputs[name][:, lag] * d_outputs[row, t]
        result[name][:, lag] += values[row, s] * d_outputs[row, t]
    return result


def toeplitz(taps, reverse, length):
    """The matrix (E, L, L): taps[t - s] where s <= t, reverse[s - t - 1] where s > t."""
    matrix = np.zeros((taps.shape[0], length, length))
    for t in range(length):
        for s in range(length):
            if s <= t and t - s < taps.shape[1]:
                matrix[:, t, s] = taps[:, t - s]
            elif s > t and s - t - 1 < reverse.shape[1]:
                matrix[:, t, s] = reverse[:, s - t - 1]
    return matrix


def _terms(inputs, documents):
    """Every (row, output token, input token, filter, place in it) that is connected."""
    taps = inputs["filter"].shape[1]
    reverse = inputs["reverse_filter"].shape[1] if "reverse_filter" in inputs else 0
    batch, length, _ = inputs["values"].shape
    for row in range(batch):
        for t in range(length):
            for s in range(length):
                if documents[row, s] != documents[row, t]:
                    continue
                if s <= t and t - s < taps:
                    yield row, t, s, "filter", t - s
                elif s > t and s - t - 1 < reverse:
                    yield row, t, s, "reverse_filter", s - t - 1
