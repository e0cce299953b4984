"""What comes later changes nothing that came before: outputs, gradients and the matrix."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from models.mixer import Mixer, Pattern
from models.sequences.whole import WholeSequence
from tests.conformance.case import (
    CAUSAL,
    EVERY,
    MIXED,
    Batch,
    Case,
    assert_close,
    dtype_of,
    run,
)
from tests.conformance.property import states

CAUSAL_SELF = frozenset({Pattern.CAUSAL_SELF})
AMPLITUDES = (1.0, 1e2, 1e4)
FFT_ROUNDING = 4 * torch.finfo(torch.float32).eps
"""What an FFT in float32 may carry back, relative to amplitude times 1-norm of the filter."""


@states(CAUSAL)
def future_outputs(case: Case) -> None:
    """Later tokens, however large, do not change an output: exactly, or by an FFT's rounding."""
    for mixer, batch in _tried(case):
        noise = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(9))
        before = run(mixer, batch).detach()
        for place in (1, 17, batch.x.shape[1] - 1):
            for amplitude in AMPLITUDES:
                x = batch.x.clone()
                x[:, place:] += amplitude * noise[:, place:]
                change = (run(mixer, batch.replace(x=x)).detach() - before).abs()
                response = largest(change[:, place:])
                allowed = rounding(mixer) * max(response, amplitude)
                what = f"outputs before token {place} at amplitude {amplitude:g}"
                assert_small(change[:, :place], allowed, mixer, what)
                assert response > 0, f"token {place} does not see itself"


@states(CAUSAL_SELF)
def future_mixing(case: Case) -> None:
    """Later values, however large, do not enter a mixed value: exactly, or by an FFT's rounding."""
    for mixer, batch in _tried(case):
        values, coefficients, sequence = projected(mixer, batch)
        noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(9))
        before = mixer.mix(values, coefficients, sequence)
        for amplitude in AMPLITUDES:
            loud = values.clone()
            loud[:, 17:] += amplitude * noise[:, 17:]
            change = mixer.mix(loud, coefficients, sequence) - before
            allowed = rounding(mixer) * largest(loud)
            assert_small(change[:, :17], allowed, mixer, f"mixed values at {amplitude:g}")


@states(CAUSAL)
def future_gradients(case: Case) -> None:
    """An output's gradient reaches no later token: exactly, or by an FFT's rounding."""
    for mixer, batch in _tried(case):
        followed = batch.to(dtype_of(mixer)).following()
        outputs = run(mixer, followed)
        for place in (0, 11, batch.x.shape[1] - 2):
            total = outputs[:, place].sum()
            (gradient,) = torch.autograd.grad(total, followed.x, retain_graph=True)
            reached = largest(gradient[:, : place + 1])
            assert reached > 0, f"output {place} has no gradient"
            later = gradient[:, place + 1 :]
            assert_small(later, rounding(mixer) * reached, mixer, f"gradient of output {place}")


@states(CAUSAL, exact=True)
def prefix(case: Case) -> None:
    """Appended tokens, or queries of a memory, leave the outputs before them as they were."""
    for tried, rows in case.sizes(MIXED):
        batch = tried.batch(rows)
        whole = run(tried.mixer, batch)
        for n in (1, 2, 17, batch.x.shape[1] - 1):
            short = batch.replace(x=batch.x[:, :n], documents=batch.documents[:, :n])
            assert_close(whole[:, :n], run(tried.mixer, short), 1e-6, f"the first {n} outputs")


@states(CAUSAL_SELF)
def triangle(case: Case) -> None:
    """The matrix has zeros above its diagonal, exactly, or by an FFT's rounding in float32."""
    batch = case.batch(MIXED)
    for mixer in (case.mixer, case.wide):
        above = torch.triu(materialized(mixer, batch), diagonal=1)
        assert_small(above, rounding(mixer), mixer, "the matrix above its diagonal")


@states(EVERY)
def documents_apart(case: Case) -> None:
    """The matrix has zeros between documents, exactly."""
    batch = case.batch()
    keys = batch.documents if batch.source_documents is None else batch.source_documents
    other = batch.documents[:, None, :, None] != keys[:, None, None, :]
    for mixer in (case.mixer, case.wide):
        between = materialized(mixer, batch) * other
        assert_small(between, 0.0, mixer, "the matrix between documents")


def rounding(mixer: Mixer) -> float:
    """What may come back for each unit of amplitude: nothing, but for FFTs in float32."""
    if not mixer.uses_fft or dtype_of(mixer) == torch.float64:
        return 0.0
    norms = [m.filter_norm() for m in mixer.modules() if isinstance(m, _Filtered)]
    assert norms, "uses_fft is set, but there is no filter_norm() to hold its rounding against"
    return FFT_ROUNDING * max(float(norm) for norm in norms)


def projected(mixer: Mixer, batch: Batch) -> tuple[Tensor, object, WholeSequence]:
    """Values and coefficients of a batch, without gradients, and its sequence."""
    batch, sequence = batch.to(dtype_of(mixer)), WholeSequence(batch.documents)
    with torch.no_grad():
        values, coefficients = mixer.project(
            sequence.without_padding(batch.x), sequence, batch.memory()
        )
    return values, coefficients, sequence


def materialized(mixer: Mixer, batch: Batch) -> Tensor:
    """The matrix of a batch."""
    batch = batch.to(dtype_of(mixer))
    with torch.no_grad():
        return mixer.materialize(batch.x, WholeSequence(batch.documents), batch.memory())


def largest(x: Tensor) -> float:
    """The largest magnitude; 0 of nothing."""
    return x.detach().abs().max().item() if x.numel() else 0.0


def assert_small(x: Tensor, allowed: float, mixer: Mixer, what: str) -> None:
    """Hold the largest magnitude against what is allowed."""
    found = largest(x)
    assert found <= allowed, f"{what}: {found:.2e}, at most {allowed:.2e} ({dtype_of(mixer)})"


def _tried(case: Case) -> Iterator[tuple[Mixer, Batch]]:
    """Mixers in float32 and float64, on short and on long rows."""
    for tried, rows in case.sizes(MIXED):
        for mixer in (tried.mixer, tried.wide):
            yield mixer, tried.batch(rows)


@runtime_checkable
class _Filtered(Protocol):
    def filter_norm(self) -> float: ...
