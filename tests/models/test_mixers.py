"""Properties that every registered mixer has."""

import pytest
import torch

from models.mixer import Pattern
from models.sequence import ContinuedSequence, WholeSequence
from tests.models.conftest import build, inputs, packed, whole

LENGTH = 37


@pytest.mark.parametrize("amplitude", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("place", [1, 17, LENGTH - 1])
def test_causal_mixers_do_not_see_the_future(kind: str, amplitude: float, place: int) -> None:
    mixer = build(kind)
    if Pattern.CAUSAL_SELF not in mixer.patterns:
        pytest.skip("not causal")
    x = inputs(LENGTH)
    changed = x.clone()
    changed[:, place:] += amplitude * inputs(LENGTH - place, seed=9)
    before, after = mixer(x, whole(LENGTH)), mixer(changed, whole(LENGTH))
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place:], after[:, place:])


def test_gradients_do_not_come_from_the_future(kind: str) -> None:
    mixer, x = build(kind), inputs(LENGTH).requires_grad_()
    mixer(x, whole(LENGTH))[:, 11].sum().backward()
    assert x.grad is not None
    assert torch.count_nonzero(x.grad[:, 12:]) == 0
    assert torch.count_nonzero(x.grad[:, :12]) > 0


def test_mixing_is_linear_in_the_values_and_equals_its_matrix(kind: str) -> None:
    mixer, x = build(kind), inputs(LENGTH)
    sequence = WholeSequence(packed((5, 20, 12)))
    values, coefficients = mixer.project(x, sequence)
    matrix = mixer.materialize(x, sequence)
    generator = torch.Generator().manual_seed(3)
    other = torch.randn(values.shape, generator=generator)
    mixed = mixer.mix(other, coefficients, sequence)
    heads = other.repeat_interleave(mixed.shape[2] // other.shape[2], dim=2)
    by_matrix = torch.einsum("bhls,bshp->blhp", matrix.double(), heads.double())
    error = (mixed.double() - by_matrix).norm() / by_matrix.norm()
    assert error < 1e-5


@pytest.mark.parametrize("pieces", [(1, 36), (36, 1), (3, 1, 1, 20, 12), (1,) * LENGTH])
def test_any_split_equals_the_whole(kind: str, pieces: tuple[int, ...]) -> None:
    mixer, x = build(kind), inputs(LENGTH)
    documents = packed((9, 1, 18, 9))
    expected = mixer(x, WholeSequence(documents))
    state, outputs, begin = None, [], 0
    for n in pieces:
        ids = documents[:, begin : begin + n]
        before = documents[:, begin - 1 : begin] if begin else torch.zeros_like(ids[:, :1])
        sequence = ContinuedSequence(ids - before, state)
        sequence.enter_layer()
        outputs.append(mixer(x[:, begin : begin + n], sequence))
        sequence.leave_layer()
        state, begin = sequence.state(), begin + n
    error = (torch.cat(outputs, dim=1) - expected).norm() / expected.norm()
    assert error < 2e-6


def test_packed_documents_equal_separate_ones(kind: str) -> None:
    mixer, x = build(kind), inputs(LENGTH)
    lengths = (9, 1, 18, 9)
    together = mixer(x, WholeSequence(packed(lengths)))
    begin = 0
    for n in lengths:
        alone = mixer(x[:, begin : begin + n], whole(n))
        error = (together[:, begin : begin + n] - alone).norm() / alone.norm()
        assert error < 2e-6
        begin += n


def test_a_document_does_not_feel_huge_values_in_another(kind: str) -> None:
    mixer, x = build(kind), inputs(LENGTH)
    documents = packed((18, LENGTH - 18))
    loud = x.clone()
    loud[:, :18] = 1e4 * inputs(18, seed=5)
    quiet, beside = mixer(x, WholeSequence(documents)), mixer(loud, WholeSequence(documents))
    assert torch.equal(quiet[:, 18:], beside[:, 18:])


def test_gradients_of_packed_documents_equal_those_of_separate_ones(kind: str) -> None:
    lengths, x = (9, 1, 18, 9), inputs(LENGTH)
    mixer = build(kind)
    mixer(x, WholeSequence(packed(lengths))).square().sum().backward()
    together = {name: p.grad.clone() for name, p in mixer.named_parameters() if p.grad is not None}
    mixer.zero_grad()
    begin = 0
    for n in lengths:
        mixer(x[:, begin : begin + n], whole(n)).square().sum().backward()
        begin += n
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None
        error = (together[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
        assert error < 1e-4, name


def test_ten_steps_lower_the_loss(kind: str) -> None:
    mixer, x = build(kind), inputs(LENGTH)
    target = torch.roll(x, 1, dims=1)
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=3e-2)
    losses = []
    for _ in range(10):
        loss = (mixer(x, whole(LENGTH)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_undecayed_names_are_parameters(kind: str) -> None:
    mixer = build(kind)
    assert mixer.no_decay <= {name for name, _ in mixer.named_parameters()}
