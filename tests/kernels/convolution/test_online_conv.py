"""The long convolution piece by piece: equal to the whole, and no dearer than it claims."""

import math

import numpy as np
import pytest
import torch

from kernels.convolution import online_conv as module
from kernels.convolution.long_conv import long_conv
from kernels.convolution.online_conv import extend_blocks, following
from tests.oracles import long_conv as oracle

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def make(length, taps=None, rows=2, channels=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    values = torch.randn(rows, length, channels, generator=generator, dtype=dtype)
    return values, torch.randn(channels, taps or length, generator=generator, dtype=dtype)


def in_pieces(values, filter, pieces, documents=None):
    """Outputs, and the blocks in the end; documents are ids of the whole."""
    blocks, outputs, begin = [], [], 0
    for n in pieces:
        part = values[:, begin : begin + n]
        ids, longest = None, None
        if documents is not None:
            before = (
                documents[:, begin - 1 : begin] if begin else torch.zeros_like(documents[:, :1])
            )
            ids = documents[:, begin : begin + n] - before
            open_now = documents[:, : begin + n] == documents[:, begin + n - 1 : begin + n]
            longest = int(open_now.sum(dim=1).max())
        out, blocks = extend_blocks(part, lambda count: filter[:, :count], blocks, ids, longest)
        outputs.append(out)
        begin += n
    return torch.cat(outputs, dim=1), blocks


def splits(length):
    generator = np.random.default_rng(length)
    yield (1,) * length
    yield (length,)
    if length > 2:
        yield (1, length - 1)
        yield (length - 1, 1)
        yield (length // 2,) + (1,) * (length - length // 2)
        cuts = np.unique(generator.integers(1, length, size=length // 4 + 1))
        yield tuple(np.diff([0, *cuts, length]).tolist())


def assert_close(actual, expected):
    error = (actual - expected).norm() / expected.norm()
    assert error < TOLERANCE[actual.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 7, 16, 100, 256])
def test_any_split_equals_the_whole(length, dtype):
    for taps in {1, length // 3 + 1, length, length + 5} if length < 200 else {length}:
        values, filter = make(length, taps, dtype=dtype)
        expected = long_conv(values, filter)
        for pieces in splits(length):
            assert_close(in_pieces(values, filter, pieces)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [7, 100, 256])
def test_any_split_equals_the_whole_with_other_documents_in_each_row(length, dtype):
    values, filter = make(length, rows=4, dtype=dtype)
    starts = torch.rand(4, length, generator=torch.Generator().manual_seed(1))
    starts = starts < torch.tensor([0.0, 0.02, 0.1, 0.5])[:, None]
    documents = starts.int().cumsum(dim=1).int()
    expected = long_conv(values, filter, documents)
    for pieces in splits(length):
        assert_close(in_pieces(values, filter, pieces, documents)[0], expected)


def test_the_definition_is_met_token_by_token():
    values, filter = make(50, dtype=torch.float64)
    inputs = {"values": values.numpy(), "filter": filter.numpy()}
    wanted = oracle.convolve(inputs, np.zeros((2, 50), dtype=np.int32))
    got, _ = in_pieces(values, filter, (1,) * 50)
    assert np.abs(got.numpy() - wanted).max() < 1e-12


@pytest.mark.parametrize("length", [64, 100, 1000, 1024])
def test_fft_points_stay_below_1_2_t_log_t(length, monkeypatch):
    counted = []

    def counting(values, filter, count):
        counted.append(values.shape[1] + count)
        return following(values, filter, count)

    monkeypatch.setattr(module, "following", counting)
    values, filter = make(length, rows=1, channels=1)
    in_pieces(values, filter, (1,) * length)
    # The last block is joined for outputs after the last.
    assert sum(counted[:-1]) <= 1.2 * length * math.log2(length)
    assert sum(counted) <= 1.2 * (length + 1) * math.log2(2 * length)


@pytest.mark.parametrize("piece", [2, 3, 7, 64])
def test_pieces_cost_no_more_than_twice_what_tokens_do(piece, monkeypatch):
    counted = []

    def counting(values, filter, count):
        counted.append(values.shape[1] + count)
        return following(values, filter, count)

    monkeypatch.setattr(module, "following", counting)
    length = 64 * piece
    values, filter = make(length, rows=1, channels=1)
    in_pieces(values, filter, (piece,) * 64)
    assert sum(counted) <= 2.4 * length * math.log2(length)


def test_a_prompt_fills_the_future_as_the_definition_says():
    values, filter = make(50, 80, dtype=torch.float64)
    silence = torch.zeros(2, 30, 3, dtype=torch.float64)
    wanted = long_conv(torch.cat([values, silence], dim=1), filter)[:, 50:]
    assert (following(values, filter, 30) - wanted).abs().max() < 1e-12
    single = following(values.float(), filter.float(), 30)
    assert (single - wanted).norm() / wanted.norm() < 1e-6


@pytest.mark.parametrize(("before", "after"), [(65, 65), (33, 95), (100, 28), (1, 129)])
def test_nothing_wraps_around_into_the_future(before, after):
    values, filter = make(before, before + after, dtype=torch.float64)
    silence = torch.zeros(2, after, 3, dtype=torch.float64)
    wanted = long_conv(torch.cat([values, silence], dim=1), filter)[:, before:]
    found = following(values.float(), filter.float(), after)
    assert (found - wanted).norm() / wanted.norm() < 1e-6


def test_what_is_kept_is_twice_the_open_documents():
    values, filter = make(200, rows=2)
    documents = torch.zeros(2, 200, dtype=torch.int32)
    documents[:, 90:] = 1
    for row, pieces in ((slice(0, 2), (1,) * 200), (slice(0, 1), (60, 60, 30, 50))):
        _, blocks = in_pieces(values[row], filter, pieces, documents[row])
        assert sum(block.values.shape[1] for block in blocks) == 110
        assert sum(block.ahead.shape[1] for block in blocks) <= 2 * 110


def test_two_continuations_of_the_same_blocks_do_not_meet():
    values, filter = make(40)
    other = values.clone()
    other[:, 23:] = -3.0
    _, blocks = in_pieces(values[:, :23], filter, (20, 1, 1, 1))
    kept = [(block.values.clone(), block.ahead.clone()) for block in blocks]
    for whole in (values, other):
        now, outputs = blocks, []
        for t in range(23, 40):
            out, now = extend_blocks(whole[:, t : t + 1], lambda n: filter[:, :n], now)
            outputs.append(out)
        assert_close(torch.cat(outputs, dim=1), long_conv(whole, filter)[:, 23:])
    for block, (before, ahead) in zip(blocks, kept, strict=True):
        assert torch.equal(block.values, before)
        assert torch.equal(block.ahead, ahead)


def test_an_earlier_document_leaves_nothing_behind_not_even_nan():
    values, filter = make(100, rows=1)
    documents = torch.zeros(1, 100, dtype=torch.int32)
    documents[:, 37:] = 1
    dirty = values.clone()
    dirty[:, :37] = float("nan")
    for pieces in ((1,) * 100, (30, 20, 50)):
        clean_outputs, _ = in_pieces(values, filter, pieces, documents)
        outputs, _ = in_pieces(dirty, filter, pieces, documents)
        assert torch.equal(outputs[:, 37:], clean_outputs[:, 37:])


def test_gradients_reach_back_through_the_blocks():
    values, filter = make(90)
    values.requires_grad_()
    filter.requires_grad_()
    weights = torch.randn(2, 90, 3, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad((long_conv(values, filter) * weights).sum(), (values, filter))
    outputs, _ = in_pieces(values, filter, (70, 1, 1, 10, 8))
    found = torch.autograd.grad((outputs * weights).sum(), (values, filter))
    for got, expected in zip(found, wanted, strict=True):
        assert_close(got, expected)


def test_bfloat16_inputs_are_kept_as_they_are_and_summed_in_float32():
    values, filter = make(60)
    values = values.bfloat16()
    outputs, blocks = in_pieces(values, filter, (20,) + (1,) * 40)
    exact = long_conv(values.float(), filter)
    assert outputs.dtype is torch.bfloat16
    assert {block.values.dtype for block in blocks} == {torch.bfloat16}
    assert {block.ahead.dtype for block in blocks} == {torch.float32}
    assert (outputs - exact).norm() / exact.norm() < 3e-3
