"""The structured family against float64 matrices, and what their two forms may depend on."""

import numpy as np
import pytest
import torch

from models.bases.structured_matrix import StructuredConfig
from models.mixer import Mixer, Pattern, Slot, mixer_class, mixer_kinds
from models.sequences.continued import ContinuedSequence
from models.sequences.whole import WholeSequence
from tests.conformance import causality, numerics, packing, streaming, training
from tests.conformance.case import Case
from tests.conformance.property import Property
from tests.models.conftest import D_MODEL, build, drawn, inputs, packed, small_config, whole
from tests.oracles.structured import Block

LENGTHS = (1, 7, 2, 13)
MAX_LEN = 17
SIZES = {"n_heads": 2, "d_qk": 3, "max_len": MAX_LEN}
ALIGNED = ("cauchy", "low_rank", "quasiseparable", "semiseparable", "toeplitz", "vandermonde")
UNALIGNED = ("butterfly", "dense", "monarch_structured")
FORMS = [
    (kind, pattern, aligned)
    for kind in (*ALIGNED, *UNALIGNED)
    for pattern in sorted(mixer_class(kind).patterns, key=lambda p: p.value)
    for aligned in ((True, False) if kind in ALIGNED else (False,))
]
LEARNED = [(kind, pattern) for kind, pattern, aligned in FORMS if not aligned]
PROPERTIES: tuple[Property, ...] = (
    numerics.float64,
    numerics.bfloat16,
    numerics.lengths,
    numerics.matrix,
    numerics.derivatives,
    causality.future_outputs,
    causality.triangle,
    causality.documents_apart,
    streaming.any_split,
    packing.packed_outputs,
    packing.packed_gradients,
    packing.loud_documents,
    packing.padded_outputs,
    packing.nan_padding,
    training.every_parameter,
    training.meta_device,
    training.refusals,
)


def sized(kind: str, **fields: object) -> dict[str, object]:
    known = {*small_fields(kind), *fields}
    return {name: value for name, value in {**SIZES, **fields}.items() if name in known}


def small_fields(kind: str) -> set[str]:
    return set(mixer_kinds()[kind].__dataclass_fields__)


def made(kind: str, pattern: Pattern, aligned: bool, **fields: object) -> Mixer:
    mixer = build(kind, pattern=pattern, **sized(kind, sequence_aligned=aligned, **fields))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            # Initial values that are all alike, or next to nothing, would hide mistakes.
            noise = torch.randn(parameter.shape, generator=generator)
            if name.split(".")[0] in ("A_log", "D", "delta", "dt", "dt_bias", "log_c", "BC"):
                parameter.add_(0.3 * noise)
            if name.split(".")[0] in ("q", "k", "weight", "taps"):
                parameter.add_(noise)
    return mixer


def oracle_of(mixer: Mixer, kind: str, aligned: bool) -> Block:
    return Block(
        kind,
        {name: p.detach().numpy() for name, p in mixer.named_parameters()},
        heads=2,
        causal=mixer.slot.causal,
        aligned=aligned,
        max_len=MAX_LEN,
    )


def relative(found: torch.Tensor, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.detach().double().numpy() - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(("kind", "pattern", "aligned"), FORMS)
def test_outputs_and_matrix_equal_those_of_the_definition(
    kind: str, pattern: Pattern, aligned: bool
) -> None:
    mixer, x, documents = made(kind, pattern, aligned), inputs(23), packed(LENGTHS)
    documents[1, 21:] = -1
    oracle, sequence = oracle_of(mixer, kind, aligned), WholeSequence(documents)
    outputs, matrix = mixer(x, sequence), mixer.materialize(x, sequence)
    x = sequence.without_padding(x)
    for row in range(2):
        real = documents[row] >= 0
        n, ids = int(real.sum()), documents[row].numpy()
        wanted = oracle.matrices(x[row].numpy(), ids)[:, :n, :n]
        assert relative(matrix[row][:, :n, :n], wanted) < 2e-6
        wanted = oracle.outputs(x[row].numpy(), ids)[:n]
        assert relative(outputs[row, :n], wanted) < 4e-6


@pytest.mark.parametrize(("kind", "pattern", "aligned"), FORMS)
def test_the_matrix_mixes_tokens_before_any_training(
    kind: str, pattern: Pattern, aligned: bool
) -> None:
    mixer, x = build(kind, pattern=pattern, **sized(kind, sequence_aligned=aligned)), inputs(11)
    matrix = mixer.materialize(x, whole(11))
    apart = matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))
    assert (apart.abs().amax(dim=(2, 3)) > 1e-5).all()


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.name)
@pytest.mark.parametrize(("kind", "pattern"), [case for case in LEARNED if case[0] in ALIGNED])
def test_forms_that_are_learned_for_each_place_hold_the_properties_of_all_mixers(
    kind: str, pattern: Pattern, prop: Property
) -> None:
    case = Case(kind, pattern, small_config(kind, sequence_aligned=False))
    if prop.excuse(case) is None:
        prop.check(case)


@pytest.mark.parametrize(("kind", "pattern"), LEARNED)
def test_a_learned_matrix_does_not_depend_on_the_tokens(kind: str, pattern: Pattern) -> None:
    mixer = made(kind, pattern, aligned=False)
    first, second = (mixer.materialize(inputs(11, seed=s), whole(11)) for s in (1, 2))
    assert torch.equal(first, second)
    assert torch.allclose(first[0], first[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ALIGNED)
def test_an_aligned_matrix_depends_on_the_tokens_and_knows_no_longest_document(kind: str) -> None:
    mixer = build(kind)
    unlimited = build(kind, max_len=None)
    assert torch.equal(mixer(inputs(11), whole(11)), unlimited(inputs(11), whole(11)))
    assert unlimited(inputs(70), whole(70)).isfinite().all()
    first, second = (mixer.materialize(inputs(11, seed=s), whole(11)) for s in (1, 2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("pattern", [Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF])
def test_learned_frequencies_have_gradients_from_the_start(pattern: Pattern) -> None:
    mixer = build("vandermonde", pattern=pattern, sequence_aligned=False, max_len=12)
    mixer(inputs(12), whole(12)).square().sum().backward()
    for table in (mixer.rows, mixer.columns):
        gradient = table.values.grad.abs().amax(dim=(1, 2))
        # Place 0 has a say only in entries whose cosine is 1 whatever its frequency in one of them.
        assert (gradient[2:-1] > 1e-6).all()


@pytest.mark.parametrize(("kind", "pattern"), LEARNED)
def test_a_short_document_has_the_leading_part_of_the_longest_ones_matrix(
    kind: str, pattern: Pattern
) -> None:
    mixer = made(kind, pattern, aligned=False).double()
    n, eye = 6, torch.eye(6, dtype=torch.float64)
    longest = mixer.materialize(inputs(MAX_LEN).double(), whole(MAX_LEN))[:, :, :n, :n]
    short = mixer.materialize(inputs(n).double(), whole(n))
    scaled = mixer.gain is not None and not mixer.slot.causal
    factor = (n / MAX_LEN) ** 0.5 if scaled else 1.0
    residual = eye if mixer.residual else 0 * eye
    assert torch.allclose(longest - residual, factor * (short - residual), atol=1e-12)


@pytest.mark.parametrize(("kind", "pattern"), LEARNED)
def test_a_document_beyond_max_len_is_refused_wherever_it_begins(
    kind: str, pattern: Pattern
) -> None:
    mixer = made(kind, pattern, aligned=False)
    long_row = packed((5, MAX_LEN, 9))
    assert mixer(inputs(31), WholeSequence(long_row)).isfinite().all()
    long_row[:, 5 + MAX_LEN] = 1
    with pytest.raises(ValueError, match=r"document of 18 tokens.* max_len is 17"):
        mixer(inputs(31), WholeSequence(long_row))


def test_padding_may_be_longer_than_max_len() -> None:
    mixer, documents = made("dense", Pattern.NONCAUSAL_SELF, aligned=False), packed((5, 30))
    documents[:, 5:] = -1
    outputs = mixer(inputs(35), WholeSequence(documents))[:, :5]
    alone = mixer(inputs(35)[:, :5], whole(5))
    assert (outputs - alone).norm() / alone.norm() < 2e-6


def test_decoding_stops_at_max_len() -> None:
    mixer = made("toeplitz", Pattern.CAUSAL_SELF, aligned=False)
    state = None
    for n in (MAX_LEN - 1, 1, 1):
        sequence = ContinuedSequence(torch.zeros(2, n, dtype=torch.int32), state)
        sequence.enter_layer()
        if state is not None and state.documents.shape[1] == MAX_LEN:
            with pytest.raises(ValueError, match="document of 18 tokens"):
                mixer(inputs(n), sequence)
            return
        mixer(inputs(n), sequence)
        sequence.leave_layer()
        state = sequence.state()
    pytest.fail("a document longer than max_len was decoded")


@pytest.mark.parametrize("kind", UNALIGNED)
def test_a_matrix_without_an_aligned_form_is_refused_with_those_that_have_one(kind: str) -> None:
    with pytest.raises(ValueError, match=kind) as refusal:
        small_config(kind, sequence_aligned=True)
    assert all(other in str(refusal.value) for other in ALIGNED)
    assert not any(other in str(refusal.value) for other in set(UNALIGNED) - {kind})


@pytest.mark.parametrize("kind", ALIGNED)
def test_a_learned_form_without_a_longest_document_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"max_len is not given; set"):
        small_config(kind, sequence_aligned=False, max_len=None)


def test_heads_that_do_not_fit_and_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"n_heads 3 does not divide an inner width of 32"):
        build("low_rank", n_heads=3)
    with pytest.raises(ValueError, match="d_qk 0 is not positive"):
        small_config("cauchy", d_qk=0)
    assert issubclass(mixer_kinds()["toeplitz"], StructuredConfig)
    with pytest.raises(TypeError, match="max_len"):
        mixer_kinds()["dense"](n_heads=2)


def test_an_extreme_token_leaves_finite_gradients_of_a_cauchy_matrix() -> None:
    mixer, x = drawn(small_config("cauchy").build(Slot(D_MODEL)), 0), inputs(9)
    x[:, 4] *= 1e4
    mixer(x, whole(9)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())
