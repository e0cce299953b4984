"""What each structured class promises: ranks, alignment with the tokens, and how much it works."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels.scans.ssd import CHUNK
from models.bases.ssm import scan_flops
from models.mixer import Mixer, Pattern, mixer_class
from models.sequences.whole import WholeSequence
from tests.models.conftest import build, inputs, whole
from tests.oracles import structured as oracle

NONCAUSAL, CAUSAL = Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF
LENGTH = 16
H, D_QK = 2, 2
ALIGNMENT = {
    ("low_rank", NONCAUSAL): "principal",
    ("low_rank", CAUSAL): "principal",
    ("vandermonde", NONCAUSAL): "principal",
    ("vandermonde", CAUSAL): "principal",
    ("cauchy", NONCAUSAL): "principal",
    ("cauchy", CAUSAL): "principal",
    ("semiseparable", CAUSAL): "principal",
    ("quasiseparable", NONCAUSAL): "principal",
    # Tap k comes from token k, which the block of rows and columns i ... j needs though k < i.
    ("toeplitz", NONCAUSAL): "leading",
    ("toeplitz", CAUSAL): "leading",
}
"""Which submatrices use only what is known of their own tokens (Hydra paper, definition 2.2)."""
SCALED = ("low_rank", "vandermonde", "cauchy", "toeplitz")


def made(kind: str, pattern: Pattern, **fields: object) -> Mixer:
    """A float64 mixer whose matrix at a token is decided by that token alone, if by any."""
    if kind not in ("toeplitz", "dense", "butterfly", "monarch_structured"):
        fields["d_qk"] = D_QK
    mixer = build(kind, pattern=pattern, n_heads=H, max_len=LENGTH, **fields).double()
    with torch.no_grad():
        mixer.conv.weight.zero_()
        mixer.conv.bias.zero_()
        width = mixer.conv.weight.shape[1]
        mixer.conv.weight[:, width - 1 if pattern is CAUSAL else width // 2] = 1.0
        mixer.in_proj.weight.mul_(3)
    return mixer


def own_matrix(mixer: Mixer, x: Tensor) -> Tensor:
    """The kind's matrix without the identity beside it, (H, L, L)."""
    matrix = mixer.materialize(x.double(), whole(x.shape[1], rows=x.shape[0]))[0].detach()
    residual = torch.eye(x.shape[1], dtype=torch.float64) if mixer.residual else 0.0
    return matrix - residual


def rank(block: Tensor) -> int:
    return int(torch.linalg.matrix_rank(block, rtol=1e-10))


def forms(kind: str) -> list[tuple[Pattern, bool]]:
    aligned = (True, False) if any(kind == known for known, _ in ALIGNMENT) else (False,)
    return [(pattern, form) for pattern in mixer_class(kind).patterns for form in aligned]


@pytest.mark.parametrize(("kind", "pattern"), ALIGNMENT)
def test_aligned_blocks_use_what_is_known_of_their_own_tokens_alone(
    kind: str, pattern: Pattern
) -> None:
    mixer, x, other = made(kind, pattern), inputs(LENGTH, rows=1), inputs(LENGTH, 5, rows=1)
    matrix = own_matrix(mixer, x)
    for i, j in ((0, 4), (0, 9), (3, 7), (6, 15), (11, 11)):
        changed = other.clone()
        changed[:, i : j + 1] = x[:, i : j + 1]
        own = slice(i, j + 1)
        apart = (own_matrix(mixer, changed) - matrix)[:, own, own].abs().max()
        holds = apart < 1e-12 * matrix.abs().max()
        assert holds == (i == 0 or ALIGNMENT[kind, pattern] == "principal"), f"{i} ... {j}"


@pytest.mark.parametrize(("kind", "pattern"), ALIGNMENT)
def test_every_token_decides_something(kind: str, pattern: Pattern) -> None:
    mixer, x = made(kind, pattern), inputs(LENGTH, rows=1)
    matrix = own_matrix(mixer, x)
    for t in range(LENGTH):
        changed = x.clone()
        changed[:, t] = inputs(LENGTH, 5, rows=1)[:, t]
        assert (own_matrix(mixer, changed) - matrix).abs().max() > 1e-6, f"token {t}"


@pytest.mark.parametrize(("kind", "pattern"), ALIGNMENT)
def test_a_longer_document_extends_the_matrix_and_only_rescales_what_was(
    kind: str, pattern: Pattern
) -> None:
    mixer, x = made(kind, pattern), inputs(LENGTH, rows=1)
    longer, shorter = own_matrix(mixer, x)[:, :9, :9], own_matrix(mixer, x[:, :9])
    scaled = kind in SCALED and pattern is NONCAUSAL
    factor = (9 / LENGTH) ** 0.5 if scaled else 1.0
    assert torch.allclose(longer, factor * shorter, atol=1e-12)


@pytest.mark.parametrize(("pattern", "aligned"), forms("low_rank"))
def test_low_rank_has_rank_d_qk_or_its_triangle_has(pattern: Pattern, aligned: bool) -> None:
    matrix = own_matrix(made("low_rank", pattern, sequence_aligned=aligned), inputs(LENGTH, rows=1))
    for head in matrix:
        if pattern is NONCAUSAL:
            assert rank(head) == D_QK
        else:
            assert {rank(head[i:, : i + 1]) for i in range(2, LENGTH - 2)} == {D_QK}


@pytest.mark.parametrize("aligned", [True, False])
def test_blocks_on_or_below_a_semiseparable_diagonal_have_the_states_rank(aligned: bool) -> None:
    matrix = own_matrix(
        made("semiseparable", CAUSAL, sequence_aligned=aligned), inputs(LENGTH, rows=1)
    )
    N = H * D_QK
    for head in matrix:
        assert {rank(head[i:, : i + 1]) for i in range(N, LENGTH - N)} == {N}
        assert not torch.triu(head, 1).any()


@pytest.mark.parametrize("aligned", [True, False])
def test_blocks_off_a_quasiseparable_diagonal_have_the_states_rank(aligned: bool) -> None:
    mixer = made("quasiseparable", NONCAUSAL, sequence_aligned=aligned)
    matrix, N = own_matrix(mixer, inputs(LENGTH, rows=1)), H * D_QK
    for head in matrix:
        assert {rank(head[i:, :i]) for i in range(N, LENGTH - N)} == {N}
        assert {rank(head[:i, i:]) for i in range(N, LENGTH - N)} == {N}
        assert rank(head[4:, :5]) == N + 1, "the diagonal is not free"


@pytest.mark.parametrize(("pattern", "aligned"), forms("toeplitz"))
def test_toeplitz_has_one_number_on_each_diagonal(pattern: Pattern, aligned: bool) -> None:
    mixer = made("toeplitz", pattern, sequence_aligned=aligned)
    matrix = own_matrix(mixer, inputs(LENGTH, rows=1))
    if pattern is CAUSAL:
        matrix = matrix * torch.arange(1.0, LENGTH + 1).double().sqrt()[:, None]
    for head in matrix:
        for lag in range(-LENGTH + 1, LENGTH):
            diagonal = head.diagonal(lag)
            assert (diagonal - diagonal[0]).abs().max() < 1e-12
        seen = head[:, 0] if pattern is CAUSAL else torch.cat([head[0], head[1:, 0]])
        assert len(set(seen.tolist())) == len(seen), "distances share a tap"


@pytest.mark.parametrize(("pattern", "aligned"), forms("cauchy"))
def test_reciprocals_of_a_cauchy_matrix_are_sums_of_a_row_and_a_column(
    pattern: Pattern, aligned: bool
) -> None:
    mixer = build("cauchy", pattern=pattern, d_qk=1, sequence_aligned=aligned).double()
    matrix = own_matrix(mixer, inputs(LENGTH, rows=1))
    if pattern is CAUSAL:
        matrix = matrix[:, 8:, :9] * torch.arange(9.0, LENGTH + 1).double().sqrt()[:, None]
    assert (matrix > 0).all()
    crossed = 1 / matrix[:, 1:, 1:] + 1 / matrix[:, :1, :1]
    straight = 1 / matrix[:, 1:, :1] + 1 / matrix[:, :1, 1:]
    assert torch.allclose(crossed, straight, rtol=1e-10)


@pytest.mark.parametrize("aligned", [True, False])
def test_rows_of_a_vandermonde_matrix_are_chebyshevs_but_for_the_columns_part(
    aligned: bool,
) -> None:
    mixer = build("vandermonde", pattern=NONCAUSAL, d_qk=1, sequence_aligned=aligned).double()
    with torch.no_grad():
        if aligned:
            mixer.in_proj.weight[-2:].zero_()
            mixer.conv.bias[-2:].zero_()
        else:
            mixer.columns.values.zero_()
    # What is left is cos(a j) - 1 in each row, up to the scale.
    cosines = own_matrix(mixer, inputs(LENGTH, rows=1)) * (2 * LENGTH) ** 0.5 + 1
    doubled = 2 * cosines[..., 1:2] * cosines[..., 1:-1]
    assert torch.allclose(cosines[..., 2:] + cosines[..., :-2], doubled, atol=1e-10)
    assert (cosines[:, 1:, 1] - 1).abs().max() > 1e-6


def test_monarch_slices_of_a_fixed_pair_of_blocks_have_rank_one() -> None:
    matrix = own_matrix(made("monarch_structured", NONCAUSAL), inputs(LENGTH, rows=1))
    slices = matrix.unflatten(1, (4, 4)).unflatten(3, (4, 4))  # (head, s, l, k, p)
    for head in slices:
        assert {rank(part) for column in head.unbind(1) for part in column.unbind(1)} == {1}
        assert rank(head.flatten(0, 1).flatten(1)) > 4


def test_the_halves_of_butterfly_rows_that_form_a_pair_are_parallel() -> None:
    matrix = own_matrix(made("butterfly", NONCAUSAL), inputs(LENGTH, rows=1))
    size = LENGTH
    while size > 1:
        half = size // 2
        corner = matrix[:, :size, :size]
        for columns in (slice(0, half), slice(half, size)):
            pairs = torch.stack([corner[:, :half, columns], corner[:, half:, columns]], dim=2)
            assert {rank(pair) for head in pairs for pair in head} == {1}
        size = half
    assert rank(matrix[0]) == LENGTH


def test_a_butterfly_starts_orthogonal() -> None:
    matrix = own_matrix(made("butterfly", NONCAUSAL), inputs(LENGTH, rows=1))
    eye = torch.eye(LENGTH, dtype=torch.float64).expand_as(matrix)
    assert torch.allclose(matrix @ matrix.mT, eye, atol=1e-6)


def test_convolutions_look_around_or_back_by_default() -> None:
    widths = {p: build("cauchy", pattern=p).conv.weight.shape[1] for p in (NONCAUSAL, CAUSAL)}
    assert widths == {NONCAUSAL: 7, CAUSAL: 4}
    assert build("cauchy", pattern=NONCAUSAL, d_conv=3).conv.weight.shape[1] == 3


def test_initial_values_are_those_of_the_release() -> None:
    L, heads, N = 64, 2, 16
    cube = build("dense").weight
    assert cube.std().item() == pytest.approx((2 / (L * L + heads * L)) ** 0.5, rel=0.05)
    factors = build("low_rank", sequence_aligned=False).q.values
    assert factors.std().item() == pytest.approx((2 / (N * (L + heads))) ** 0.5, rel=0.1)
    taps = build("toeplitz", pattern=NONCAUSAL, sequence_aligned=False).taps
    bound = (6 / (heads + 2 * L - 1)) ** 0.5
    assert 0.95 * bound < taps.abs().max() <= bound
    hydra = build("quasiseparable")
    steps = torch.nn.functional.softplus(hydra.dt_bias)
    assert ((steps >= 0.99e-3) & (steps <= 0.101)).all()
    assert torch.equal(hydra.A_log, torch.zeros(heads))
    assert torch.equal(hydra.D, torch.ones(heads))
    assert build("cauchy").log_c.item() == 0.0


def test_step_sizes_start_alike_at_all_places_and_they_and_frequencies_do_not_decay() -> None:
    separable = build("quasiseparable", sequence_aligned=False)
    assert torch.equal(separable.dt.values, separable.dt.values[:1, :1].expand(64, 2, 2))
    frequencies = build("vandermonde", sequence_aligned=False)
    kept = (separable.dt, separable.delta, frequencies.rows, frequencies.columns)
    assert all(table.no_decay == {"values"} for table in kept)
    assert separable.BC.no_decay == frozenset()


def counted(mixer: Mixer, length: int) -> int:
    """Products that torch's profiler sees in one `mix` of one row."""
    sequence = WholeSequence(torch.zeros(1, length, dtype=torch.int32))
    values, coefficients = mixer.project(inputs(length, rows=1), sequence)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer.mix(values, coefficients, sequence)
    return counter.get_total_flops()


@pytest.mark.parametrize("length", [CHUNK, 49])
@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("dense", NONCAUSAL),
        ("dense", CAUSAL),
        ("low_rank", NONCAUSAL),
        ("vandermonde", NONCAUSAL),
        ("vandermonde", CAUSAL),
        ("cauchy", NONCAUSAL),
        ("cauchy", CAUSAL),
        ("toeplitz", CAUSAL),
    ],
)
def test_products_are_those_that_a_profiler_counts(
    kind: str, pattern: Pattern, length: int
) -> None:
    mixer = build(kind, pattern=pattern)
    work = mixer.mix_flops(length, length)
    assert counted(mixer, length) == pytest.approx(work.full_square, rel=0.02)


def test_products_of_a_causal_sum_are_those_of_whole_chunks() -> None:
    mixer = build("low_rank", pattern=CAUSAL)
    assert counted(mixer, 40) == counted(mixer, CHUNK) == mixer.mix_flops(CHUNK, CHUNK).full_square


@pytest.mark.parametrize("length", [16, 13, 5])
def test_products_of_monarch_factors_are_those_that_a_profiler_counts(length: int) -> None:
    mixer = build("monarch_structured", max_len=16)
    assert counted(mixer, length) == mixer.mix_flops(length, length).full_square


@pytest.mark.parametrize("kind", ["dense", "cauchy", "toeplitz"])
def test_a_causal_matrix_needs_the_pairs_that_are_seen(kind: str) -> None:
    mixer = build(kind, pattern=CAUSAL)
    for queries, keys in ((9, 9), (1, 9), (4, 9)):
        pairs = oracle.counted_pairs(queries, keys, causal=True)
        work = mixer.mix_flops(queries, keys)
        assert work.needed == 2 * 32 * pairs
        assert work.full_square == 2 * 32 * queries * keys


def test_reciprocals_are_counted_one_by_one() -> None:
    mixer, count = build("cauchy", pattern=NONCAUSAL, d_qk=3), 0
    for _ in range(oracle.counted_pairs(5, 5, causal=False)):
        count += 2 * 3 * 3  # heads, d_qk; a sum, a division and the sum over d_qk
    count += 2 * 5 * 32  # the scale and the identity
    assert mixer.mix_flops(5, 5).elementwise == count


def test_cosines_are_counted_on_their_grids() -> None:
    mixer, count = build("vandermonde", pattern=NONCAUSAL, d_qk=3), 0
    for _ in range(2 * 11 * 2 * 3):  # rows and columns, tokens, heads, d_qk
        count += 5 * (3 + 4)  # three steps of four places hold 11
    count += 2 * 11 * 11  # the difference of both matrices
    count += 2 * 11 * 32  # the scale and the identity
    assert mixer.mix_flops(11, 11).elementwise == count


@pytest.mark.parametrize("length", [1, 2, 13, 16])
def test_transforms_are_counted_as_a_radix_two_fft(length: int) -> None:
    mixer = build("toeplitz", pattern=NONCAUSAL)
    n = 1
    while n < 2 * length - 1:
        n *= 2
    transforms = (2 * 32 + 2) * oracle.counted_fft_flops(n)
    products = 32 * 6 * (n // 2 + 1)
    assert mixer.mix_flops(length, length).needed == transforms + products


@pytest.mark.parametrize("length", [1, 2, 13, 16])
def test_butterfly_factors_are_counted_one_by_one(length: int) -> None:
    mixer = build("butterfly", max_len=16)
    blocks, pointwise = oracle.counted_butterfly_flops(length, 4, 2, 32)
    work = mixer.mix_flops(length, length)
    assert work.needed == blocks
    assert work.elementwise == pointwise + 32 * length


def test_scans_are_counted_for_each_chunk_and_direction() -> None:
    one, two = build("semiseparable"), build("quasiseparable")
    tokens, N, E = CHUNK + 3, 32, 32
    pairs = oracle.counted_pairs(CHUNK, CHUNK, causal=True)
    pairs += oracle.counted_pairs(3, 3, causal=True)
    work = one.mix_flops(tokens, tokens)
    assert work.needed == tokens * 4 * N * E + pairs * (2 * N + 2 * E)
    assert two.mix_flops(tokens, tokens).needed == 2 * work.needed
    scan = scan_flops(tokens, 2, 16, 1, N)
    assert work.full_square == scan.full_square
    assert work.elementwise == scan.elementwise + tokens * E, "not as Mamba-2's scan is counted"
