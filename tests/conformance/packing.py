"""Documents of a row, rows of a batch and padding do not know of each other."""

import math

import torch

from tests.conformance.case import (
    CROSS,
    EVERY,
    ROWS,
    Batch,
    Case,
    Rows,
    assert_close,
    assert_close_gradients,
    gradients,
    run,
)
from tests.conformance.property import states

SHORT: Rows = ((9, 1, 7), (11,))
PADDED_LENGTH = 41
FULL: Rows = ((64, 31, 3), (2, 64, 1, 31))
LOUD = 1e4


@states(EVERY)
def packed_outputs(case: Case) -> None:
    """Packed documents have the outputs that each has by itself."""
    for tried, rows in (*case.sizes(ROWS), (case, FULL)):
        batch = tried.batch(rows)
        together = run(tried.mixer, batch)
        for row, number in batch.places():
            alone = run(tried.mixer, batch.document(row, number))[0]
            own = together[row][batch.documents[row] == number]
            assert_close(own, alone, 2e-6, f"document {number} of {rows[row]}")


@states(EVERY)
def packed_gradients(case: Case) -> None:
    """The gradients of packed documents are the sums of those that each has by itself."""
    for tried, rows in case.sizes(ROWS):
        batch = tried.batch(rows)
        assert_close_gradients(
            gradients(tried.mixer, batch), _gradients_alone(tried, batch), f"packed as {rows}"
        )


@states(EVERY)
def loud_documents(case: Case) -> None:
    """Values of 1e4 in another document change nothing: exactly, or 1e-6 through an FFT."""
    for tried, rows in case.sizes(ROWS):
        batch, other = tried.batch(rows), tried.batch(rows, seed=5)
        quiet = run(tried.mixer, batch)
        for number in (0, 1, 2, 3):
            loud = _replaced_document(batch, number, LOUD * other.x, LOUD)
            beside = batch.documents != number
            found, expected = run(tried.mixer, loud)[beside], quiet[beside]
            what = f"outputs beside a loud document {number} of {rows}"
            assert_close(found, expected, 1e-6 if case.mixer.uses_fft else 0.0, what)


@states(EVERY)
def nan_elsewhere(case: Case) -> None:
    """A NaN reaches no other row, and no other document where scan or convolution can stop it."""
    batch = case.batch()
    clean = run(case.mixer, batch)
    poisoned = batch.replace(x=batch.x.clone())
    poisoned.x[0] = math.nan
    assert torch.equal(run(case.mixer, poisoned)[1], clean[1]), "another row is changed"
    if not (case.mixer.stops_nan or case.family in ("recurrent", "convolution")):
        return
    for number in (0, 1, 2):
        poisoned = _replaced_document(batch, number, torch.full_like(batch.x, math.nan), math.nan)
        others = batch.documents != number
        found = run(case.mixer, poisoned)[others]
        assert found.isfinite().all(), f"a NaN comes out of document {number}"
        assert_close(found, clean[others], 1e-6, f"outputs beside a NaN in document {number}")


@states(EVERY)
def padded_outputs(case: Case) -> None:
    """A row that is filled up has the outputs of the row that is not."""
    batch = case.batch(SHORT, length=PADDED_LENGTH)
    padded = run(case.mixer, batch)
    for row in range(len(SHORT)):
        alone = run(case.mixer, batch.row(row))[0]
        assert_close(padded[row][batch.real[row]], alone, 2e-6, f"row {SHORT[row]}")


@states(EVERY)
def nan_padding(case: Case) -> None:
    """What stands in padding, NaN too, reaches no output and no gradient."""
    batch = case.batch(SHORT, length=PADDED_LENGTH)
    clean, poisoned = _with_padding(batch, 0.0), _with_padding(batch, math.nan)
    outputs = run(case.mixer, poisoned)[batch.real]
    assert outputs.isfinite().all(), "outputs of real tokens are not finite"
    assert torch.equal(outputs, run(case.mixer, clean)[batch.real]), "outputs are changed"
    for name, gradient in gradients(case.mixer, poisoned).items():
        assert gradient.isfinite().all(), f"the gradient of {name} is not finite"


@states(CROSS)
def memory_padding(case: Case) -> None:
    """Padding in a memory is as good as no token there, whatever stands in it."""
    batch = case.batch(SHORT)
    assert batch.source is not None
    assert batch.source_documents is not None
    longer = torch.nn.functional.pad(batch.source, (0, 0, 0, 9), value=math.nan)
    ids = torch.nn.functional.pad(batch.source_documents, (0, 9), value=-1)
    padded = run(case.mixer, batch.replace(source=longer, source_documents=ids))
    for row in range(len(SHORT)):
        alone = run(case.mixer, batch.row(row))[0]
        assert_close(padded[row][batch.real[row]], alone, 2e-6, f"row {SHORT[row]}")


@states(CROSS)
def memory_order(case: Case) -> None:
    """The order of a memory's tokens matters if, and only if, the mixer says so."""
    batch = case.batch(((13,), (13,)))
    assert batch.source is not None
    order = torch.randperm(batch.source.shape[1], generator=torch.Generator().manual_seed(2))
    shuffled = batch.replace(source=batch.source[:, order])
    before, after = run(case.wide, batch), run(case.wide, shuffled)
    apart = ((after - before).norm() / before.norm()).item()
    declared = case.mixer.ordered_memory
    assert (apart > 1e-9) == declared, f"{apart:.1e} apart, but ordered_memory is {declared}"


@states(CROSS)
def memory_reached(case: Case) -> None:
    """The gradient of the outputs reaches most of a memory, and none of its padding."""
    batch = case.batch(SHORT, length=PADDED_LENGTH)
    found = gradients(case.wide, batch)["source"].abs().amax(dim=2)
    real = batch.source_documents != -1
    assert (found[real] > 0).float().mean() > 0.5, "most of the memory is out of reach"
    assert (found[~real] == 0).all(), "padding of the memory has a gradient"


def _gradients_alone(case: Case, batch: Batch) -> dict[str, torch.Tensor]:
    """Gradients by the name of what they are of, every document by itself."""
    leaves = batch.leaves() | dict(case.mixer.named_parameters())
    alone = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for row, number in batch.places():
        found = gradients(case.mixer, batch.document(row, number))
        for name in alone.keys() - batch.leaves().keys():
            alone[name] += found[name]
        alone["x"][row, batch.documents[row] == number] = found["x"][0]
        if batch.source_documents is not None:
            alone["source"][row, batch.source_documents[row] == number] = found["source"][0]
    return alone


def _replaced_document(batch: Batch, number: int, x: torch.Tensor, factor: float) -> Batch:
    """The batch with other features in one document of each row, on both sides of a memory."""
    own = (batch.documents == number)[:, :, None]
    changed = batch.replace(x=torch.where(own, x, batch.x))
    if batch.source is None or batch.source_documents is None:
        return changed
    other = (batch.source_documents == number)[:, :, None]
    return changed.replace(source=torch.where(other, factor * batch.source, batch.source))


def _with_padding(batch: Batch, value: float) -> Batch:
    filled = batch.replace(x=batch.x.masked_fill(~batch.real[:, :, None], value))
    if batch.source is None or batch.source_documents is None:
        return filled
    padding = (batch.source_documents == -1)[:, :, None]
    return filled.replace(source=batch.source.masked_fill(padding, value))
