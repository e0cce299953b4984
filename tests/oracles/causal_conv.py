"""The causal depthwise convolution and its adjoint, tap by tap in float64."""

import numpy as np


def convolve(inputs, documents):
    """Outputs (B, L, E): each token's sum over the inputs of its own document within the taps."""
    values, weight, bias = inputs["values"], inputs["weight"], inputs["bias"]
    outputs = np.broadcast_to(bias, values.shape).copy()
    for row, t, tap, source in _connections(values, weight, documents):
        outputs[row, t] += weight[:, tap] * _read(inputs, row, source)
    return outputs


def gradients(inputs, documents, d_outputs):
    """Gradients by name of <d_outputs, outputs>."""
    values, weight = inputs["values"], inputs["weight"]
    result = {name: np.zeros_like(x) for name, x in inputs.items()}
    result["bias"] = d_outputs.sum((0, 1))
    for row, t, tap, source in _connections(values, weight, documents):
        result["weight"][:, tap] += d_outputs[row, t] * _read(inputs, row, source)
        target = result["values"][row] if source >= 0 else result["initial"][row]
        target[source] += d_outputs[row, t] * weight[:, tap]
    return result


def _connections(values, weight, documents):
    """Every (row, output token, tap, input position) that is connected; carried ones are < 0."""
    batch, length, _ = values.shape
    width = weight.shape[1]
    for row in range(batch):
        for t in range(length):
            for tap in range(width):
                source = t - (width - 1) + tap
                document = 0 if source < 0 else documents[row, source]
                if document == documents[row, t]:
                    yield row, t, tap, source


def _read(inputs, row, source):
    # Position -1 is the last carried input: the same index from the end.
    return inputs["values"][row, source] if source >= 0 else inputs["initial"][row, source]
