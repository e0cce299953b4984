"""Performer, cosFormer and LARA against dense matrices in float64."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.mixer import Mixer, Pattern
from models.mixers.kernelized.performer import orthogonal_features
from models.sequences.continued import Memory
from models.sequences.whole import WholeSequence
from tests.models.conftest import D_MODEL, build, inputs
from tests.oracles import cab, kernelized

NS, CS = Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF
NC, CC = Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS
HEADS, P = 2, D_MODEL // 2
LENGTHS, SOURCES = (1, 13, 30), (5, 1, 11)
SIZES = {"performer": {"n_features": 12}, "cosformer": {"max_len": 40}, "lara": {"n_landmarks": 4}}
CASES = [("lara", NS), *((kind, p) for kind in ("performer", "cosformer") for p in Pattern)]
cases = pytest.mark.parametrize(("kind", "pattern"), CASES)


def made(kind: str, pattern: Pattern, **fields: object) -> Mixer:
    return build(kind, pattern=pattern, **{**SIZES[kind], **fields}).double()


def batch(pattern: Pattern) -> tuple[torch.Tensor, WholeSequence, Memory | None]:
    """Two rows of documents, then padding; the memory's are of other lengths."""
    x, ids = inputs(47).double(), documents(LENGTHS, 47)
    if pattern in (NS, CS):
        return x, WholeSequence(ids), None
    source = inputs(20, seed=2).double()
    return x, WholeSequence(ids), Memory(source, WholeSequence(documents(SOURCES, 20)))


def documents(lengths: tuple[int, ...], total: int) -> torch.Tensor:
    ids = torch.full((2, total), -1, dtype=torch.int32)
    ids[:, : sum(lengths)] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return ids


def wanted(
    kind: str, pattern: Pattern, w: cab.Weights, x: torch.Tensor, source: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix and the outputs of one document by itself."""
    q, k, v = cab.heads(w, x, source, HEADS)
    if kind == "performer":
        if pattern in (NS, CS):
            q, k = cab.turned(q, 1e4), cab.turned(k, 1e4)
        features = torch.from_numpy(orthogonal_features(HEADS, 12, P, 0))
        matrix = kernelized.performer(q, k, features, pattern is CS)
    elif kind == "cosformer":
        matrix = kernelized.cosformer(q, k, 40, pattern is CS)
    else:
        matrix = kernelized.lara(q, k, 4)
    return matrix, cab.output(w, matrix, v)


def each_document(sequence: WholeSequence, memory: Memory | None):
    """Row, and the tokens of each document on both sides."""
    for row in range(2):
        for number in range(len(LENGTHS)):
            own = sequence.documents[row] == number
            yield row, own, own if memory is None else memory.sequence.documents[row] == number


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@cases
def test_matrix_and_outputs_equal_the_dense_definition(kind: str, pattern: Pattern) -> None:
    mixer = made(kind, pattern)
    x, sequence, memory = batch(pattern)
    w = {name: p.detach() for name, p in mixer.named_parameters()}
    outputs, matrix = mixer(x, sequence, memory), mixer.materialize(x, sequence, memory)
    source = x if memory is None else memory.x
    for row, own, other in each_document(sequence, memory):
        dense, expected = wanted(kind, pattern, w, x[row][own], source[row][other])
        assert off(matrix[row][:, own][:, :, other], dense) < 1e-12
        assert off(outputs[row][own], expected) < 1e-12


@cases
def test_gradients_equal_those_of_the_dense_definition(kind: str, pattern: Pattern) -> None:
    mixer = made(kind, pattern)
    x, sequence, memory = batch(pattern)
    x.requires_grad_()
    source = x if memory is None else memory.x.requires_grad_()
    leaves = {"x": x, "source": source, **dict(mixer.named_parameters())}
    outputs = mixer(x, sequence, memory)
    real = sequence.documents != -1
    got = torch.autograd.grad(outputs[real].square().sum(), list(leaves.values()))
    loss = torch.zeros((), dtype=torch.float64)
    for row, own, other in each_document(sequence, memory):
        found = wanted(kind, pattern, leaves, x[row][own], source[row][other])
        loss = loss + found[1].square().sum()
    expected = torch.autograd.grad(loss, list(leaves.values()))
    for name, mine, theirs in zip(leaves, got, expected, strict=True):
        assert off(mine, theirs) < 1e-10, name


@cases
def test_rows_sum_to_one_and_entries_are_at_least_zero(kind: str, pattern: Pattern) -> None:
    x, sequence, memory = batch(pattern)
    matrix = made(kind, pattern).materialize(x, sequence, memory)
    sums = matrix.sum(dim=-1).transpose(1, 2)[sequence.documents != -1]
    empty = sums == 0
    assert (sums - 1).masked_fill(empty, 0).abs().max() < 1e-12
    assert matrix.min() >= 0
    assert empty.sum() <= (len(sums) // 10 if kind == "cosformer" else 0)


@pytest.mark.parametrize(
    ("kind", "pattern", "bound"),
    [("performer", NS, 12), ("performer", CC, 12), ("cosformer", NS, 2 * P), ("lara", NS, 4)],
)
def test_rank_is_at_most_the_number_of_slots(kind: str, pattern: Pattern, bound: int) -> None:
    x, sequence, memory = batch(pattern)
    matrix = made(kind, pattern).materialize(x, sequence, memory)
    for row, own, other in each_document(sequence, memory):
        sizes = torch.linalg.svdvals(matrix[row][:, own][:, :, other])
        assert (sizes[:, bound:] < 1e-13 * sizes[:, :1]).all()


@pytest.mark.parametrize("kind", ["performer", "cosformer"])
@pytest.mark.parametrize("pattern", [NC, CC])
def test_rows_of_a_cross_pattern_do_not_know_of_later_queries(kind: str, pattern: Pattern) -> None:
    mixer, x = made(kind, pattern), inputs(31).double()
    source = inputs(20, seed=2).double()
    rows = []
    for length in (7, 31):
        memory = Memory(source, WholeSequence(documents((20,), 20)))
        sequence = WholeSequence(documents((length,), length))
        rows.append(mixer.materialize(x[:, :length], sequence, memory)[:, :, :7])
    assert off(*rows) < 1e-14


def test_features_are_orthogonal_with_the_lengths_of_normal_vectors() -> None:
    features = orthogonal_features(64, 24, 16, 0)
    blocks = features[:, :16] @ features[:, :16].swapaxes(1, 2)
    lengths = np.sqrt(np.diagonal(blocks, axis1=1, axis2=2))
    cosines = blocks / lengths[:, :, None] / lengths[:, None]
    assert np.abs(cosines - np.eye(16)).max() < 1e-12
    squares = lengths**2  # chi-squared with 16 degrees of freedom: mean 16, variance 32
    assert squares.mean() == pytest.approx(16, abs=4 * np.sqrt(32 / squares.size))
    assert squares.var() == pytest.approx(32, rel=0.2)
    entries = features.ravel()
    assert entries.mean() == pytest.approx(0, abs=4 / np.sqrt(entries.size))
    assert (entries**4).mean() == pytest.approx(3, rel=0.1)
    rest = features[:, 16:] @ features[:, 16:].swapaxes(1, 2)
    assert np.abs(rest - rest * np.eye(8)).max() < 1e-12


def test_features_estimate_the_exponential_kernel_without_bias() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 8)) / 2
    features = orthogonal_features(4000, 8, 8, 3)

    def phi(z: np.ndarray) -> np.ndarray:
        return np.exp(features @ z - z @ z / 2)

    estimates = (phi(x) * phi(y)).mean(axis=1)
    error = estimates.std() / np.sqrt(len(estimates))
    assert abs(estimates.mean() - np.exp(x @ y)) < 4 * error
    independent = np.exp(generator.normal(size=(4000, 8, 8)) @ (x + y) - x @ x / 2 - y @ y / 2)
    assert estimates.var() < 0.9 * independent.mean(axis=1).var()


def test_features_depend_on_their_sizes_and_seed_alone_and_differ_between_heads() -> None:
    one, same, other = (orthogonal_features(2, 8, 8, seed) for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.isclose(one, other).any()
    assert not np.isclose(one[0], one[1]).any()
    assert not any("feature" in name for name in made("performer", NS).state_dict())
    x, sequence, _ = batch(NS)
    outputs = [made("performer", NS, feature_seed=seed)(x, sequence) for seed in (0, 0, 1)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_more_features_come_closer_to_softmax_attention() -> None:
    x, sequence, errors = inputs(30).double() / 4, WholeSequence(documents((30,), 30)), []
    for count in (16, 256, 4096):
        mixer = made("performer", NS, n_features=count)
        q, k, _ = cab.heads(dict(mixer.named_parameters()), x[0], x[0], HEADS)
        exact = cab.softmax_attention(cab.turned(q, 1e4), cab.turned(k, 1e4))
        errors.append(off(mixer.materialize(x, sequence)[0], exact))
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2
    assert errors[2] < 0.02


@pytest.mark.parametrize("pattern", [NS, CS])
def test_performer_is_exact_where_single_features_overflow(pattern: Pattern) -> None:
    mixer, x = build("performer", pattern=pattern, n_features=12), 40 * inputs(20)
    outputs = mixer(x, WholeSequence(documents((20,), 20)))
    exact = made("performer", pattern)(x.double(), WholeSequence(documents((20,), 20)))
    assert off(outputs.double(), exact) < 1e-2
    assert outputs.isfinite().all()


def test_features_asked_for_first_by_evaluation_serve_training() -> None:
    mixer, x = made("performer", CS, feature_seed=17), inputs(9).double()
    with torch.inference_mode():
        evaluated = mixer(x, WholeSequence(documents((9,), 9)))
    trained = mixer(x, WholeSequence(documents((9,), 9)))
    trained.sum().backward()
    # Torch may round products differently with autograd than without: here by 6.7e-16.
    assert off(trained, evaluated) < 1e-14
    assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters())


def test_cosformer_refuses_documents_longer_than_max_len() -> None:
    x, mixer = inputs(47).double(), made("cosformer", CS, max_len=13)
    with pytest.raises(ValueError, match=r"30 tokens is longer than mixer.max_len 13; take"):
        mixer(x, WholeSequence(documents(LENGTHS, 47)))
    assert mixer(x[:, :14], WholeSequence(documents((1, 13), 14))).isfinite().all()


def test_a_cosformer_row_without_a_key_is_zero_with_finite_gradients() -> None:
    mixer, x = made("cosformer", CS), inputs(5).double()
    q, k, _ = mixer.heads.qkv.weight.chunk(3)
    with torch.no_grad():
        k.copy_(-q)
    matrix = mixer.materialize(x, WholeSequence(documents((5,), 5)))
    assert not matrix[:, :, 0].any()
    mixer(x, WholeSequence(documents((5,), 5))).square().sum().backward()
    assert mixer.heads.qkv.weight.grad.isfinite().all()


@pytest.mark.parametrize("pattern", [NS, CS])
def test_cosformer_rows_do_not_depend_on_the_size_of_queries(pattern: Pattern) -> None:
    mixer, (x, sequence, _) = made("cosformer", pattern), batch(pattern)
    before = mixer.materialize(x, sequence)
    with torch.no_grad():
        mixer.heads.qkv.weight[:D_MODEL] *= 1e-9
    assert off(mixer.materialize(x, sequence), before) < 1e-12


@pytest.mark.parametrize("kind", ["performer", "cosformer", "lara"])
def test_products_equal_those_that_torch_counts(kind: str) -> None:
    length, mixer = 40, made(kind, NS).to("meta")
    x = torch.zeros(1, length, D_MODEL, device="meta", dtype=torch.float64)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        mixer(x, WholeSequence(torch.zeros(1, length, device="meta").int()))
    maps = sum(m.token_flops() for m in mixer.modules() if hasattr(m, "token_flops")) * length
    flops = mixer.mix_flops(length, length)
    assert counter.get_total_flops() - maps == flops.needed == flops.full_square


@cases
def test_work_is_counted_as_a_loop_counts_it(kind: str, pattern: Pattern) -> None:
    flops = made(kind, pattern).mix_flops(11, 30)
    filled = 11 if pattern is CS else 30
    if kind == "performer":
        counted = kernelized.counted_performer(11, filled, 12, P, pattern is CS)
    elif kind == "cosformer":
        counted = kernelized.counted_cosformer(11, filled, P)
    else:
        flops, counted = made(kind, pattern).mix_flops(30, 30), kernelized.counted_lara(30, 4, P)
    assert (flops.needed, flops.elementwise) == (HEADS * counted[0], HEADS * counted[1])
