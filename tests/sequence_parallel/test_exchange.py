"""The exchanges by themselves, on four real processes."""

import functools
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.ranks.carry import Carry, Summary
from models.ranks.communicator import Communicator, PendingGather
from models.ranks.exchange import Spans, fetch, swap, swap_back
from models.ranks.schemes import Scheme
from models.sequences.recurrence import LinearScan
from models.sequences.sharded import ShardedSequence
from tests.oracles.carry import states_before
from tests.sequence_parallel.world import on_ranks

pytestmark = pytest.mark.distributed
RANKS = 4
FORMS = ("plain", "rates", "complex", "nothing decays")
WAYS = {"from the first": 0, "from the last": 2, "one row each way": 1}
"""How many of the two rows run from the last rank to the first."""
KEEP = [[True, True], [False, True], [True, True], [True, False]]
LENGTHS = (3, 1, 4, 2)


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """The largest errors, found in processes that are started once."""
    return on_ranks(RANKS, _errors)


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_carried_states_and_their_gradients_are_those_of_a_plain_loop(
    scheme: Scheme, form: str, way: str, errors: dict[str, float]
) -> None:
    assert errors[f"{form} {way} {scheme}"] < 1e-14


def test_what_is_fetched_is_what_one_process_cuts_out(errors: dict[str, float]) -> None:
    assert errors["fetch"] == 0.0


def test_channels_swapped_and_swapped_back_are_what_they_were(errors: dict[str, float]) -> None:
    assert errors["swap"] == 0.0


@pytest.mark.parametrize("scheme", Scheme)
def test_states_that_are_taken_in_another_order_than_told_are_not_mixed_up(
    scheme: Scheme, errors: dict[str, float]
) -> None:
    assert errors[f"crossing {scheme}"] == 0.0


@pytest.mark.parametrize("scheme", Scheme)
def test_a_carried_state_is_freed_with_its_graph(scheme: Scheme) -> None:
    assert on_ranks(2, functools.partial(_is_freed, scheme))


def test_outputs_from_zero_run_while_states_are_under_way() -> None:
    assert on_ranks(2, _events) == [
        *("state sent", "outputs", "waited"),
        *("state gradient sent", "outputs back", "waited"),
    ]


def test_without_gradients_outputs_are_the_same() -> None:
    assert on_ranks(2, _differs_without_gradients) == 0.0


def _errors(group: dist.ProcessGroup) -> dict[str, float]:
    carried = {
        f"{form} {way} {scheme}": _carry_error(form, WAYS[way], scheme, group)
        for form in FORMS
        for way in WAYS
        for scheme in Scheme
    }
    carried |= {f"crossing {scheme}": _crossing_error(scheme, group) for scheme in Scheme}
    return carried | {"fetch": _fetch_error(group), "swap": _swap_error(group)}


def _carry_error(form: str, turned: int, scheme: Scheme, group: dist.ProcessGroup) -> float:
    """The largest error of this rank's state and gradients; the loss weighs all states."""
    inputs, weights, rank = _summaries(form), _random(11, form, 2, 3, 5), dist.get_rank(group)
    every = [[x.requires_grad_() for x in parts] for parts in inputs]
    logs = [_log(parts) for parts in every]
    states = [parts[0] for parts in every]
    both = [states_before(logs, KEEP, states, turned=each) for each in (False, True)]
    expected = [torch.cat([a[: 2 - turned], b[2 - turned :]]) for a, b in zip(*both, strict=True)]
    loss = (weights * torch.stack(expected)).real.sum()
    wanted = _gradients(loss, every[rank])

    mine = [x.detach().requires_grad_() for x in inputs[rank]]
    carry = Carry(torch.tensor(KEEP), turned, Communicator(group), scheme)
    before = carry.before(carry.publish(Summary(*mine)))
    found = _gradients((weights[rank] * before).real.sum(), mine)
    pairs = [(before, expected[rank]), *zip(found, wanted, strict=True)]
    error = torch.tensor(max((a - b).abs().max().item() for a, b in pairs))
    dist.all_reduce(error, dist.ReduceOp.MAX, group=group)
    return error.item()


def _crossing_error(scheme: Scheme, group: dist.ProcessGroup) -> float:
    """What two states lose by being taken in the other order than they were told in."""
    rank, ranks = dist.get_rank(group), Communicator(group)
    states = [_random(seed, "plain", 2, 3)[rank] for seed in (20, 21)]
    carries = [Carry(torch.tensor(KEEP), 1, ranks, scheme) for _ in range(4)]
    alone = [c.before(c.publish(Summary(x))) for c, x in zip(carries[:2], states, strict=True)]
    tokens = [c.publish(Summary(x)) for c, x in zip(carries[2:], states, strict=True)]
    last, first = carries[3].before(tokens[1]), carries[2].before(tokens[0])
    return _largest(max(_off(first, alone[0]), _off(last, alone[1])), group)


def _gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def _summaries(form: str) -> list[list[Tensor]]:
    """State, sums and rates of each rank."""
    states = _random(3, form, 2, 3, 5)
    if form == "nothing decays":
        return [[x] for x in states]
    if form == "plain":
        sums = -torch.rand(RANKS, 2, 3, 1, generator=_generator(4), dtype=torch.float64)
        return [[x, s] for x, s in zip(states, sums, strict=True)]
    sums = torch.rand(RANKS, 2, 3, 1, generator=_generator(4), dtype=torch.float64)
    rates = _random(5, form, 3, 5)[0]
    rates = torch.complex(-rates.real.abs(), rates.imag) if form == "complex" else -rates.abs()
    return [[x, s, rates.clone()] for x, s in zip(states, sums, strict=True)]


def _log(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return torch.zeros((), dtype=torch.float64)
    return parts[1] if len(parts) == 2 else parts[1] * parts[2]


def _fetch_error(group: dist.ProcessGroup) -> float:
    """Stretches of all kinds, empty and as long as several shares; gradients are the adjoint."""
    spans, ranks, total = Spans(LENGTHS), Communicator(group), sum(LENGTHS)
    x = torch.randn(2, total, 3, generator=_generator(7), dtype=torch.float64)
    begin, end = spans.each[ranks.rank]
    worst = 0.0
    for wanted in (spans.before(5), spans.before(2), spans.up_to(), spans.widened(2, 6)):
        mine = x[:, begin:end].clone().requires_grad_()
        got = fetch(mine, spans, wanted, ranks, "test")
        a, b = wanted[ranks.rank]
        worst = max(worst, _off(got, x[:, a:b]))
        (got * (ranks.rank + 1)).sum().backward()
        sums = [sum(r + 1 for r, (a, b) in enumerate(wanted) if a <= t < b) for t in range(total)]
        expected = torch.tensor(sums, dtype=torch.float64)[begin:end, None].expand(2, -1, 3)
        assert mine.grad is not None
        worst = max(worst, _off(mine.grad, expected))
    return _largest(worst, group)


def _swap_error(group: dist.ProcessGroup) -> float:
    spans, ranks = Spans(LENGTHS), Communicator(group)
    x = torch.randn(2, sum(LENGTHS), 7, generator=_generator(8), dtype=torch.float64)
    begin, end = spans.each[ranks.rank]
    rows = swap(x[:, begin:end], spans, ranks, "test")
    first = 7 * ranks.rank // RANKS
    off = _off(rows, x[:, :, first : first + rows.shape[2]])
    back = swap_back(rows, 7, spans, ranks, "test")
    return _largest(max(off, _off(back, x[:, begin:end])), group)


class _Watched(LinearScan):
    """A scan that tells when its outputs from zero run, either way."""

    events: list[str]

    def from_zero(self) -> Tensor:
        self.events.append("outputs")
        outputs = super().from_zero()
        assert outputs.grad_fn is not None
        outputs.grad_fn.register_hook(lambda *_: self.events.append("outputs back"))
        return outputs


def _events(group: dist.ProcessGroup) -> list[str]:
    """What happens in which order on one rank."""
    documents = torch.zeros(1, 4, dtype=torch.int32)
    sequence = ShardedSequence(documents, group, Scheme.GATHER)
    scan = _Watched(-torch.rand(1, 4, 3), torch.randn(1, 4, 3, requires_grad=True), None)
    events = scan.events = []
    gather, wait = Communicator.gather, PendingGather.wait

    def sent(self: Communicator, x: Tensor, what: str) -> PendingGather:
        events.append(f"{what} sent")
        return gather(self, x, what)

    def waited(self: PendingGather) -> list[Tensor]:
        events.append("waited")
        return wait(self)

    # This process ends with the test.
    Communicator.gather, PendingGather.wait = sent, waited
    sequence.recur(scan).sum().backward()
    return events


def _differs_without_gradients(group: dist.ProcessGroup) -> float:
    documents = torch.zeros(2, 6, dtype=torch.int32)
    scan = LinearScan(-torch.rand(2, 6, 3), torch.randn(2, 6, 3, requires_grad=True), None)
    outputs = ShardedSequence(documents, group).recur(scan)
    with torch.inference_mode():
        alike = ShardedSequence(documents, group).recur(scan)
    return _largest(_off(alike, outputs), group)


def _is_freed(scheme: Scheme, group: dist.ProcessGroup) -> bool:
    """Whether no cycle keeps a state, once outputs and loss are gone."""
    gc.disable()
    state = torch.randn(2, 3, requires_grad=True)
    carry = Carry(torch.ones(2, 2, dtype=torch.bool), 0, Communicator(group), scheme)
    summary = Summary(state, -torch.rand(2, 3))
    before = carry.before(carry.publish(summary))
    before.sum().backward()
    seen = weakref.ref(carry)
    del carry, before, summary
    return seen() is None


def _random(seed: int, form: str, *shape: int) -> Tensor:
    dtype = torch.complex128 if form == "complex" else torch.float64
    return torch.randn(RANKS, *shape, generator=_generator(seed), dtype=dtype)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _off(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return (found - expected).abs().max().item() if found.numel() else 0.0


def _largest(error: float, group: dist.ProcessGroup) -> float:
    worst = torch.tensor(error, dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=group)
    return worst.item()
