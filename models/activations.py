"""Activation memory of training, predicted for the Makefile's `large` target (tests/benchmarks).

Blocks run on torch's fake tensors, which have shapes but no data, and the storages that autograd
saves are counted, each once: the prediction follows the code that will run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models.backbone import BackboneConfig, Stack
from models.sequences.whole import WholeSequence

ADAM_BYTES = 16
"""Float32 weight, gradient and two moments of each parameter."""


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch keeps for the backward pass.

    Attributes:
        layers: bytes of each layer, its input included.
        inputs: bytes of one layer's input, which is all that recomputation keeps.
        head: bytes of the final norm and the loss.
    """

    layers: tuple[int, ...]
    inputs: int
    head: int

    def kept(self, *, recompute: bool) -> int:
        """Bytes after the forward pass."""
        layers = len(self.layers) * self.inputs if recompute else sum(self.layers)
        return layers + self.head

    def peak(self, *, recompute: bool) -> int:
        """Peak bytes in the backward pass; with recomputation it holds one whole layer besides."""
        return self.kept(recompute=recompute) + (max(self.layers) if recompute else 0)


class Kept:
    """Counts what autograd saves while it is the current hook."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        self.bytes = 0
        # Hold the tensors: the address of a freed storage could be reused.
        self._seen = {_key(tensor): tensor for tensor in known}

    def save(self, tensor: Tensor) -> Tensor:
        """Count a storage at its first occurrence."""
        if _key(tensor) not in self._seen:
            self._seen[_key(tensor)] = tensor
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


@contextmanager
def counting(known: Iterator[Tensor]) -> Iterator[Kept]:
    """Count the bytes that autograd saves within, leaving `known` tensors out."""
    kept = Kept(known)
    with torch.autograd.graph.saved_tensors_hooks(kept.save, lambda tensor: tensor):
        yield kept


def activations(config: BackboneConfig, rows: int, seq_len: int) -> Activations:
    """Count what a micro-batch of whole sequences keeps, in float32.

    Args:
        config: a backbone; an encoder's layers are not counted.
        rows: sequences.
        seq_len: tokens of each.
    """
    documents = torch.zeros(rows, seq_len, dtype=torch.int32)
    sequence = WholeSequence(documents)
    names = config.pattern.split()
    layers = [names[i % len(names)] for i in range(config.n_layers)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        counted = {
            name: _layer_bytes(config, name, rows, seq_len, sequence) for name in set(layers)
        }
        inputs = torch.empty(rows, seq_len, config.d_model).untyped_storage().nbytes()
    # The norm keeps its input and its output for the head; the loss its log-softmax.
    logits = rows * seq_len * config.vocab_size * 4
    return Activations(tuple(counted[name] for name in layers), inputs, 2 * inputs + logits)


def _layer_bytes(
    config: BackboneConfig, name: str, rows: int, seq_len: int, sequence: WholeSequence
) -> int:
    stack = Stack([config.blocks[name]], config, config.form)
    x = torch.empty(rows, seq_len, config.d_model, requires_grad=True)
    # Tables that all layers share are made in a first call, so that they are not counted.
    stack.layers[0](x, sequence)
    with counting(stack.parameters()) as kept:
        stack.layers[0](x, sequence)
    return kept.bytes


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
