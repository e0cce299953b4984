"""Decoding: pieces one after the other give what the whole gives, and what they must keep."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from models.mixer import Mixer, Pattern
from models.sequences.continued import ContinuedSequence, DecodingState
from models.sequences.positions import PADDING
from tests.conformance.case import (
    CAUSAL,
    LENGTH,
    LONG_LENGTH,
    Batch,
    Case,
    Rows,
    assert_close,
    refusal,
    run,
)
from tests.conformance.property import states

SPLITS: dict[str, tuple[int, ...]] = {
    "pieces of 1": (1,) * LENGTH,
    "a first token": (1, LENGTH - 1),
    "a last token": (LENGTH - 1, 1),
    "pieces shorter than a convolution": (2, 1, 2, 3, 2, 1) * 3 + (4,),
    "pieces longer than a window": (13, 11, 13),
    "uneven pieces": (3, 1, 1, 20, 12),
}
LONG_SPLITS: dict[str, tuple[int, ...]] = {
    "many single tokens": (1,) * LONG_LENGTH,
    "a long piece and single tokens": (128, 1, 1, 1, 1, 18),
    "uneven long pieces": (3, 64, 1, 82),
}
APART: Rows = ((LENGTH,), (9, 1, 18, 9))
UNEVEN: Rows = ((20, 11, 6), (9, 2))


@states(CAUSAL, exact=True)
def any_split(case: Case) -> None:
    """Any split into pieces gives the outputs of the whole, documents changing within pieces."""
    for (tried, rows), splits in zip(case.sizes(APART), (SPLITS, LONG_SPLITS), strict=True):
        batch = tried.batch(rows)
        expected = run(tried.mixer, batch)
        for name, pieces in splits.items():
            outputs, _ = stream(tried.mixer, batch, pieces)
            assert_close(outputs, expected, 2e-6, f"{name} of {rows[0]}")


@states(CAUSAL, exact=True)
def padded_pieces(case: Case) -> None:
    """A last piece may be padded; from a padded piece nothing goes on, whoever asks."""
    batch = case.batch(UNEVEN)
    expected = run(case.mixer, batch)[batch.real]
    for pieces in ((1, 10, LENGTH - 11), (LENGTH,)):
        outputs, state = stream(case.mixer, batch, pieces)
        assert_close(outputs[batch.real], expected, 2e-6, f"real tokens of pieces of {pieces}")
        for ids in (torch.zeros(2, 1), torch.tensor([[0], [PADDING]])):
            _assert_refused(lambda: ContinuedSequence(ids.to(batch.documents), state))  # noqa: B023
    for pieces in ((LENGTH - 1, 1), (20, 1, LENGTH - 21), (12, LENGTH - 12)):
        _assert_refused(lambda: stream(case.mixer, batch, pieces))  # noqa: B023


def _assert_refused(attempt: Callable[[], object]) -> None:
    message = refusal(attempt)
    assert "rows [1] of the state end in padding" in message, f"after padding it says {message!r}"


@states(frozenset({Pattern.CAUSAL_SELF}))
def state_bytes(case: Case) -> None:
    """The state has as many bytes at any length if it is said to, else grows at most linearly."""
    held = {n: _bytes_after(case, n) for n in (16, 32, 48, 64)}
    if case.mixer.constant_state or case.family == "recurrent":
        assert len(set(held.values())) == 1, f"bytes by tokens are {held}, not constant"
    for n, count in held.items():
        assert count <= 1.25 * held[16] * n / 16, f"bytes by tokens are {held}: above linear"


@torch.no_grad()
def stream(
    mixer: Mixer, batch: Batch, pieces: tuple[int, ...]
) -> tuple[Tensor, DecodingState | None]:
    """Outputs of a batch given in pieces, and the state left behind."""
    state, outputs = None, []
    for span, ids in cut(batch.documents, pieces):
        sequence = ContinuedSequence(ids, state)
        sequence.enter_layer()
        outputs.append(mixer(batch.x[:, span], sequence, batch.memory()))
        sequence.leave_layer()
        state = sequence.state()
    return torch.cat(outputs, dim=1), state


def cut(documents: Tensor, pieces: tuple[int, ...]) -> Iterator[tuple[slice, Tensor]]:
    """Where each piece lies, and its ids, among which 0 goes on with the document before."""
    assert sum(pieces) == documents.shape[1]
    before, begin = torch.zeros_like(documents[:, :1]), 0
    for n in pieces:
        span = slice(begin, begin + n)
        ids = documents[:, span]
        yield span, torch.where(ids == PADDING, PADDING, ids - before)
        before, begin = documents[:, begin + n - 1 : begin + n], begin + n


def _bytes_after(case: Case, tokens: int) -> int:
    _, state = stream(case.mixer, case.batch(((tokens,),)), (8,) * (tokens // 8))
    assert state is not None
    return state.bytes()
