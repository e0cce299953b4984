"""Online long convolution: the decoding state of `long_conv`, and its extension by new tokens.

Source: Oncescu et al. 2024, "Flash Inference", section 3; Agarwal et al. 2024, "FutureFill".
Changed: chunks of any length, several documents.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.convolution.long_conv import DIRECT, fast_size, long_conv
from kernels.precision import without_autocast

Taps = Callable[[int], Tensor]
"""Maps a count to the first taps of a filter, (E, K); fewer if the filter is shorter."""


class InputBlock(NamedTuple):
    """Consecutive inputs, and their precomputed contribution to the outputs after them.

    Attributes:
        ahead: the contribution to the next A outputs, in float32 or wider.
    """

    values: Float[Tensor, "B U E"]
    ahead: Float[Tensor, "B A E"]


def extend_blocks(
    values: Float[Tensor, "B L E"],
    taps: Taps,
    blocks: list[InputBlock],
    documents: Int[Tensor, "B L"] | None = None,
    longest: int | None = None,
) -> tuple[Float[Tensor, "B L E"], list[InputBlock]]:
    """Convolve the inputs that follow the blocks; return the outputs and the new blocks.

    The relaxed tiling of "Flash Inference", section 3. A block is merged with all later inputs once
    as many have followed as it holds. So each token enters at most log2 T blocks, each by one FFT
    of twice the block's length: O(log^2 T) work and memory traffic per token. Tensors are never
    modified, so several continuations may start from the same blocks.

    Args:
        values: the next inputs.
        taps: the filter.
        blocks: blocks of earlier inputs, the oldest first.
        documents: documents of the next inputs; 0 continues that of the last earlier input.
        longest: tokens so far of the longest document that is still open; older inputs are dropped.
            None keeps all.
    """
    L = values.shape[1]
    blocks = _cover(blocks, L, taps)
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    outputs = long_conv(wide, taps(L), documents)
    carried = torch.zeros_like(outputs)
    for block, age in zip(blocks, _ages(blocks), strict=True):
        carried = carried + block.ahead[:, age : age + L]
    if documents is not None:
        # Earlier inputs reach only the document that goes on, and of the new ones only those of the
        # last document can reach later tokens.
        carried = carried.masked_fill((documents != 0)[:, :, None], 0.0)
        values = values.masked_fill((documents != documents[:, -1:])[:, :, None], 0.0)
        blocks = _forget(blocks, documents[:, -1] != 0)
    blocks = _drop([*blocks, InputBlock(values, outputs[:, :0])], longest)
    return (outputs + carried).to(values.dtype), _cover(blocks, 1, taps)


def following(
    values: Float[Tensor, "B U E"], filter: Float[Tensor, "E K"], count: int
) -> Float[Tensor, "B A E"]:
    """The contribution of inputs to the `count` outputs after them, in float32 or wider.

    As in "FutureFill", a circular FFT of U + count points suffices: what wraps around falls on the
    first U outputs, which are not used.
    """
    U = values.shape[1]
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    if wide.dtype is torch.float64 or U + count <= DIRECT:
        return long_conv(F.pad(wide, (0, 0, 0, count)), filter)[:, U:]
    with without_autocast(values):
        n = fast_size(U + count)
        spectrum = torch.fft.rfft(wide.transpose(1, 2), n=n)
        spectrum = spectrum * torch.fft.rfft(filter[:, : U + count].float(), n=n)
        return torch.fft.irfft(spectrum, n=n)[..., U : U + count].transpose(1, 2)


def _cover(blocks: list[InputBlock], count: int, taps: Taps) -> list[InputBlock]:
    """Merge blocks, if necessary, so that all cover their contribution to the next outputs."""
    for i, (block, age) in enumerate(zip(blocks, _ages(blocks), strict=True)):
        if block.ahead.shape[1] < age + count:
            joined = torch.cat([later.values for later in blocks[i:]], dim=1)
            U = joined.shape[1]
            # As far ahead as the block is long: it is merged again only once as many inputs have
            # followed.
            known = max(U, count)
            return [*blocks[:i], InputBlock(joined, following(joined, taps(U + known), known))]
    return blocks


def _drop(blocks: list[InputBlock], longest: int | None) -> list[InputBlock]:
    """Drop inputs before the longest open document."""
    if longest is None:
        return blocks
    blocks = [b for b, age in zip(blocks, _ages(blocks), strict=True) if age < longest]
    last = blocks[-1].values
    # A copy: a view would keep the whole chunk alive.
    newest = last[:, max(0, last.shape[1] - longest) :].clone()
    return [*blocks[:-1], blocks[-1]._replace(values=newest)]


def _forget(blocks: list[InputBlock], changed: Bool[Tensor, "B"]) -> list[InputBlock]:
    """Zero the rows in which a new document has begun."""
    if not bool(changed.any()):
        return blocks
    row_changed = changed[:, None, None]
    return [
        InputBlock(b.values.masked_fill(row_changed, 0.0), b.ahead.masked_fill(row_changed, 0.0))
        for b in blocks
    ]


def _ages(blocks: list[InputBlock]) -> list[int]:
    """Number of inputs after each block."""
    sizes = [block.values.shape[1] for block in blocks]
    return [sum(sizes[i + 1 :]) for i in range(len(sizes))]
