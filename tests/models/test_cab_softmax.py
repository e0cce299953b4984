"""Nystrom, ProbSparse, ABC and Long-Short attention against dense matrices in float64."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.mixer import Mixer, Pattern
from models.mixers.softmax.probsparse import sampled_keys
from models.sequences.continued import Memory
from models.sequences.whole import WholeSequence
from tests.models.conftest import D_MODEL, build, inputs
from tests.oracles import cab as oracle

NS, CS = Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF
NC, CC = Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS
HEADS, P = 2, D_MODEL // 2
LENGTHS, SOURCES = (1, 13, 30), (5, 1, 11)
CASES = {
    "nystrom": (NS, {"n_landmarks": 4}),
    "nystrom with a convolution": (NS, {"n_landmarks": 4, "d_conv": 3}),
    "nystrom with norms": (NS, {"n_landmarks": 4, "qk_norm": True}),
    "probsparse": (NS, {"factor": 2}),
    "abc": (NS, {"n_slots": 3}),
    "abc, causal": (CS, {"n_slots": 3}),
    "abc, cross": (NC, {"n_slots": 3}),
    "abc, causal cross": (CC, {"n_slots": 3}),
    "long_short": (NS, {"rank": 3, "window": 6}),
    "long_short, causal": (CS, {"chunk_rank": 2, "chunk": 4, "window": 3}),
}


def made(name: str) -> Mixer:
    pattern, fields = CASES[name]
    kind = name.replace(",", " ").split()[0]
    return build(kind, pattern=pattern, **fields).double()


def batch(cross: bool) -> tuple[torch.Tensor, WholeSequence, Memory | None]:
    """Two rows of documents, then padding; the memory's are of other lengths."""
    x, ids = inputs(47).double(), documents(LENGTHS, 47)
    if not cross:
        return x, WholeSequence(ids), None
    source = inputs(20, seed=2).double()
    return x, WholeSequence(ids), Memory(source, WholeSequence(documents(SOURCES, 20)))


def documents(lengths: tuple[int, ...], total: int) -> torch.Tensor:
    ids = torch.full((2, total), -1, dtype=torch.int32)
    ids[:, : sum(lengths)] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return ids


def wanted(name: str, w: oracle.Weights, x: torch.Tensor, source: torch.Tensor) -> tuple:
    """The matrix and the outputs of one document by itself."""
    (pattern, fields), T = CASES[name], x.shape[0]
    q, k, v = oracle.heads(w, x, source, HEADS)
    if name.startswith("nystrom"):
        matrix = oracle.nystrom(q, k, 4, 6)
        if "taps" in w:
            matrix = matrix + oracle.convolution(w["taps"], T)
    elif name == "probsparse":
        matrix = oracle.probsparse(oracle.turned(q, 1e4), oracle.turned(k, 1e4), 2)
    else:
        logits = (source @ w["control.weight"].T).unflatten(1, (HEADS, -1))
        if name.startswith("abc"):
            matrix = oracle.abc(q, k, logits, causal=pattern is CS)
        else:
            sizes = (fields["window"], 4, 1e4)
            matrix = oracle.long_short(w, q, k, logits, sizes, causal=pattern is CS)
    return matrix, oracle.output(w, matrix, v)


def each_document(sequence: WholeSequence, memory: Memory | None):
    """Row, and the tokens of each document on both sides."""
    for row in range(2):
        for number in range(len(LENGTHS)):
            own = sequence.documents[row] == number
            yield row, own, own if memory is None else memory.sequence.documents[row] == number


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", CASES)
def test_matrix_and_outputs_equal_the_dense_definition(name: str) -> None:
    mixer = made(name)
    x, sequence, memory = batch("cross" in name)
    w = {key: p.detach() for key, p in mixer.named_parameters()}
    outputs, matrix = mixer(x, sequence, memory), mixer.materialize(x, sequence, memory)
    source = x if memory is None else memory.x
    for row, own, other in each_document(sequence, memory):
        dense, expected = wanted(name, w, x[row][own], source[row][other])
        assert off(matrix[row][:, own][:, :, other], dense) < 1e-11
        assert off(outputs[row][own], expected) < 1e-11


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_the_dense_definition(name: str) -> None:
    mixer = made(name)
    x, sequence, memory = batch("cross" in name)
    x.requires_grad_()
    source = x if memory is None else memory.x.requires_grad_()
    leaves = {"x": x, "source": source, **dict(mixer.named_parameters())}
    outputs = mixer(x, sequence, memory)
    real = sequence.documents != -1
    got = torch.autograd.grad(outputs[real].square().sum(), list(leaves.values()))
    loss = torch.zeros((), dtype=torch.float64)
    for row, own, other in each_document(sequence, memory):
        loss = loss + wanted(name, leaves, x[row][own], source[row][other])[1].square().sum()
    expected = torch.autograd.grad(loss, list(leaves.values()))
    for key, mine, theirs in zip(leaves, got, expected, strict=True):
        assert off(mine, theirs) < 1e-9, key


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("nystrom")])
def test_rows_sum_to_one(name: str) -> None:
    x, sequence, memory = batch("cross" in name)
    matrix = made(name).materialize(x, sequence, memory)
    sums = matrix.sum(dim=-1).transpose(1, 2)[sequence.documents != -1]
    assert (sums - 1).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "bound"), [("nystrom", 4), ("probsparse", 9), ("abc", 3), ("abc, cross", 3)]
)
def test_rank_is_at_most_the_number_of_slots(name: str, bound: int) -> None:
    x, sequence, memory = batch("cross" in name)
    matrix = made(name).materialize(x, sequence, memory)
    for row, own, other in each_document(sequence, memory):
        sizes = torch.linalg.svdvals(matrix[row][:, own][:, :, other])
        assert (sizes[:, bound:] < 1e-12 * sizes[:, :1]).all()
        if own.sum() > bound and other.sum() > bound and name != "probsparse":
            assert (sizes[:, bound - 1] > 1e-9 * sizes[:, 0]).all()


def test_landmarks_of_short_documents_and_many_iterations_give_softmax_attention() -> None:
    mixer = build("nystrom", pattern=NS, n_landmarks=8, iterations=40).double()
    x = inputs(7).double()
    matrix = mixer.materialize(x, WholeSequence(documents((7,), 7)))
    q, k, _ = oracle.heads(dict(mixer.named_parameters()), x[0], x[0], HEADS)
    assert off(matrix[0], oracle.softmax_attention(q, k)) < 1e-6


def test_iterations_approach_the_pseudoinverse() -> None:
    x, sequence, errors = inputs(30).double(), WholeSequence(documents((30,), 30)), []
    for iterations in (0, 4, 8, 40):
        mixer = build("nystrom", pattern=NS, n_landmarks=4, iterations=iterations).double()
        q, k, _ = oracle.heads(dict(mixer.named_parameters()), x[0], x[0], HEADS)
        exact = oracle.nystrom(q, k, 4, None)
        errors.append(off(mixer.materialize(x, sequence)[0], exact))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


def test_probsparse_rows_are_full_attention_or_uniform() -> None:
    mixer, x = build("probsparse", pattern=NS, factor=2).double(), inputs(30).double()
    matrix = mixer.materialize(x, WholeSequence(documents((30,), 30)))
    uniform = (matrix - 1 / 30).abs().amax(dim=-1) < 1e-15
    assert (uniform.sum(dim=-1) == 30 - 2 * 4).all()
    assert not torch.equal(uniform[:, 0], uniform[:, 1])


def test_samples_of_keys_are_spread_evenly_and_take_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    lengths, quotas = torch.tensor([200, 77]), torch.tensor([30, 25])
    drawn = [sampled_keys(lengths, 200, quotas, j) for j in range(30)]
    assert torch.equal(torch.get_rng_state(), before)
    counts = torch.stack(drawn)[:, 0].flatten().bincount(minlength=200)
    assert counts.min() >= 28
    assert counts.max() <= 32
    short = torch.stack(drawn)[:25, 1, :77]
    assert short.max() < 77
    expected = [[oracle.sampled_key(t, j, 77, 25) for t in range(77)] for j in range(25)]
    assert torch.equal(short, torch.tensor(expected))


def test_the_last_row_of_running_slots_is_that_of_slots_of_the_whole() -> None:
    x, sequence = inputs(40).double(), WholeSequence(documents((40,), 40))
    causal, whole = (build("abc", pattern=pattern).double() for pattern in (CS, NS))
    rows = [mixer.materialize(x, sequence)[:, :, -1] for mixer in (causal, whole)]
    assert off(*rows) < 1e-12
    assert (rows[0] > 0).all()


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_running_slots_stay_exact_at_huge_logits(size: float) -> None:
    mixer, x = build("abc", pattern=CS, n_slots=3), inputs(40)
    with torch.no_grad():
        mixer.control.weight.mul_(size)
    outputs = mixer(x, WholeSequence(documents((40,), 40)))
    w = {key: p.detach().double() for key, p in mixer.named_parameters()}
    q, k, v = oracle.heads(w, x[0].double(), x[0].double(), HEADS)
    logits = (x[0] @ mixer.control.weight.T).double().unflatten(1, (HEADS, 3))
    expected = oracle.output(w, oracle.abc(q, k, logits, causal=True), v)
    assert off(outputs[0].double(), expected) < 1e-3 * size / 1e4 + 1e-5


def test_far_tokens_enter_a_causal_row_by_complete_chunks_alone() -> None:
    mixer = build("long_short", pattern=CS, chunk=4, window=3, chunk_rank=2).double()
    matrix = mixer.materialize(inputs(23).double(), WholeSequence(documents((23,), 23)))
    for t in range(23):
        seen = {s for s in range(23) if (matrix[:, :, t, s] != 0).any()}
        assert seen == set(range(t // 4 * 4)) | set(range(max(t - 2, 0), t + 1))


def test_far_rows_have_the_rank_of_the_averages() -> None:
    mixer = build("long_short", pattern=NS, rank=3, window=5).double()
    matrix = mixer.materialize(inputs(40).double(), WholeSequence(documents((40,), 40)))
    corner = torch.linalg.svdvals(matrix[:, :, :18, 21:])
    assert (corner[..., 3:] < 1e-12 * corner[..., :1]).all()
    assert (corner[..., 2] > 1e-9 * corner[..., 0]).all()


@pytest.mark.parametrize("kind", ["nystrom", "probsparse", "abc", "long_short"])
def test_products_equal_those_that_torch_counts(kind: str) -> None:
    length = 128
    fields = {"d_conv": 5} if kind == "nystrom" else {}
    mixer = build(kind, pattern=NS, **fields, **({"window": 32} if kind == "long_short" else {}))
    x, ids = (torch.zeros(1, length, *rest, device="meta") for rest in ((D_MODEL,), ()))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        mixer.to("meta")(x, WholeSequence(ids.int()))
    maps = sum(m.token_flops() for m in mixer.modules() if hasattr(m, "token_flops")) * length
    flops = mixer.mix_flops(length, length)
    # The measure's products are of single rows, which the counter does not see.
    measure = HEADS * 2 * P * length * 25 if kind == "probsparse" else 0
    assert counter.get_total_flops() - maps == flops.full_square - measure
    assert flops.needed == flops.full_square or kind == "long_short"


def test_running_slots_are_counted_as_a_loop_counts_them() -> None:
    flops = build("abc", pattern=CS, n_slots=5).mix_flops(11, 30)
    products, pointwise = oracle.counted_slots(11, 5, P)
    assert flops.needed == HEADS * products
    assert flops.elementwise == HEADS * pointwise


@pytest.mark.parametrize("pattern", [NS, CS])
def test_windows_and_averages_are_counted_as_a_loop_counts_them(pattern: Pattern) -> None:
    mixer = build("long_short", pattern=pattern, window=6, chunk=4, rank=3, chunk_rank=2)
    products = oracle.counted_long_short((29, 6, 4, mixer.rank), pattern is CS, P)
    assert mixer.mix_flops(29, 29).needed == HEADS * products
