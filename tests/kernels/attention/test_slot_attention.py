"""Running slots against a float64 loop, and their gradients against finite differences."""

import numpy as np
import pytest
import torch

from kernels.attention.slot_attention import (
    Slots,
    mix_slots,
    read_slots,
    slot_averages,
    slot_log_sums,
)
from tests.kernels.agreement import assert_agrees, ragged_documents
from tests.oracles import linear_attention as oracle

LENGTHS = (1, 15, 16, 17, 50)
B, H, C, P, EARLIER = 2, 2, 3, 5, 4


def make(length, size=1.0, ragged=True, dtype=torch.float64):
    """Inputs, documents, what earlier tokens left, and the loop's averages and log-sums."""
    generator = np.random.default_rng(length)
    logits = size * generator.normal(size=(B, length, H, C))
    x, queries = generator.normal(size=(2, B, length, H, P))
    weights = generator.normal(size=(B, length, H, C))
    earlier = generator.normal(size=(B, EARLIER, H, C + P))
    documents = np.zeros((B, length), dtype=np.int32)
    if ragged:
        documents = ragged_documents(B, length, generator)
    inputs = (logits, x, queries, weights)
    inputs = tuple(torch.tensor(each, dtype=dtype) for each in inputs)
    exact = [each.double().numpy() for each in inputs]
    expected = oracle.slots(exact[0], exact[1], earlier, documents)
    none = np.zeros((B, EARLIER), dtype=np.int32)
    before = oracle.slots(earlier[..., :C], earlier[..., C:], earlier[:, :0], none)
    wide = torch.promote_types(dtype, torch.float32)
    left = tuple(torch.tensor(each[:, -1], dtype=wide) for each in before)
    return inputs, torch.from_numpy(documents), left, expected


def formed(logits, initial, documents):
    return Slots(logits, slot_log_sums(logits, initial, documents), initial, documents)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_averages_and_what_reads_them_match_the_loop(length, ragged, dtype):
    (logits, x, queries, weights), documents, (averages, sums), expected = make(
        length, ragged=ragged, dtype=dtype
    )
    slots = formed(logits, sums, documents)
    assert_agrees(slots.log_sums, expected[1], "outputs", dtype)
    found, final = slot_averages(x, slots, averages)
    assert_agrees(found, expected[0], "outputs", dtype)
    read, _ = read_slots(queries, x, slots, averages)
    products = np.einsum("blhp,blhcp->blhc", queries.double().numpy(), expected[0])
    assert_agrees(read, products, "outputs", dtype)
    mixed, last = mix_slots(weights, x, slots, averages)
    summed = np.einsum("blhc,blhcp->blhp", weights.double().numpy(), expected[0])
    assert_agrees(mixed, summed, "outputs", dtype)
    assert_agrees(final, expected[0][:, -1], "outputs", dtype)
    assert torch.equal(final, last)


@pytest.mark.parametrize("size", [30.0, 1e3, 1e5])
def test_huge_logits_neither_overflow_nor_vanish(size):
    (logits, x, _, _), documents, (averages, sums), expected = make(50, size=size)
    found, _ = slot_averages(x, formed(logits, sums, documents), averages)
    assert_agrees(found, expected[0], "outputs", torch.float64)


@pytest.mark.parametrize("ragged", [False, True])
def test_gradients_match_finite_differences(ragged):
    inputs, documents, left, _ = make(19, ragged=ragged)
    leaves = [each[:, :, :1].requires_grad_() for each in inputs]
    leaves += [each[:, :1].requires_grad_() for each in left]

    def everything(logits, x, queries, weights, averages, sums):
        slots = formed(logits, sums, documents)
        return (
            slots.log_sums,
            *read_slots(queries, x, slots, averages),
            *mix_slots(weights, x, slots, averages),
            slot_averages(x, slots, averages)[0],
        )

    assert torch.autograd.gradcheck(everything, leaves, fast_mode=True)


@pytest.mark.parametrize("size", [1e2, 1e5])
def test_gradients_are_finite_at_huge_logits(size):
    (logits, x, queries, weights), documents, (averages, sums), _ = make(50, size=size)
    logits.requires_grad_()
    slots = formed(logits, sums, documents)
    scores, _ = read_slots(queries, x, slots, averages)
    mixed, _ = mix_slots(weights, x, slots, averages)
    (scores.sum() + mixed.sum()).backward()
    assert logits.grad.isfinite().all()


def test_later_tokens_and_other_documents_enter_nothing_however_large():
    (logits, x, _, weights), _, _, _ = make(50, dtype=torch.float32)
    documents = torch.tensor([[0] * 25 + [1] * 25] * B).int()

    def mixed(logits, x):
        return mix_slots(weights, x, formed(logits, None, documents))[0]

    before = mixed(logits, x)
    for place, kept in ((slice(38, None), slice(0, 38)), (slice(0, 25), slice(25, None))):
        for size in (1e4, -1e4):
            louder, loud = logits.clone(), x.clone()
            louder[:, place] += size
            loud[:, place] *= 1e4
            assert torch.equal(before[:, kept], mixed(louder, loud)[:, kept])


def test_autocast_lowers_nothing():
    (logits, x, _, weights), documents, (averages, sums), _ = make(50, dtype=torch.float32)
    expected, _ = mix_slots(weights, x, formed(logits, sums, documents), averages)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = mix_slots(weights, x, formed(logits, sums, documents), averages)
    assert torch.equal(found, expected)
