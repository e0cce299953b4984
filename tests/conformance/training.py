"""Parameters: how they start, that they learn, are stored, and are refused where they must be."""

import copy
import itertools
from collections.abc import Callable

import torch

from models.mixer import Pattern
from models.parts.layers import Drawn
from models.sequences.whole import WholeSequence
from tests.conformance.case import CAUSAL, EVERY, ONE, Case, gradients, refusal, run
from tests.conformance.property import states
from tests.conformance.streaming import stream
from tests.models.conftest import drawn

STEPS = 10


@states(EVERY)
def overfit(case: Case) -> None:
    """Ten steps lower the loss of one batch below 0.9 of its start."""
    mixer, batch = copy.deepcopy(case.mixer), case.batch(ONE)
    target = torch.roll(batch.x, 1, dims=1)
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=3e-2)
    losses = []
    for _ in range(STEPS + 1):
        loss = (run(mixer, batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], f"the loss goes from {losses[0]:.3f} to {losses[-1]:.3f}"


@states(EVERY)
def every_parameter(case: Case) -> None:
    """Packed documents give every parameter a finite gradient that is not all zero."""
    found = gradients(case.mixer, case.batch())
    for name in dict(case.mixer.named_parameters()):
        assert found[name].isfinite().all(), f"the gradient of {name} is not finite"
        assert found[name].count_nonzero() > 0, f"{name} has no gradient"


@states(EVERY)
def initial_values(case: Case) -> None:
    """Every parameter is drawn by its module: finite, and from the given generator alone."""
    torch.manual_seed(1)
    first, before = case.fresh(seed=3), torch.get_rng_state()
    drawn(first, 3)
    assert torch.equal(torch.get_rng_state(), before), "drawing takes from the global generator"
    torch.manual_seed(2)
    second = dict(case.fresh(seed=3).named_parameters())
    for name, parameter in first.named_parameters():
        assert parameter.isfinite().all(), f"{name} starts with values that are not finite"
        assert torch.equal(parameter, second[name]), f"{name} depends on the global generator"
    for path, module in first.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            assert isinstance(module, Drawn), f"{path} does not say how it starts"


@states(EVERY)
def meta_device(case: Case) -> None:
    """Built without memory it has the right shapes, and given memory it is the same mixer."""
    batch = case.batch(ONE)
    with torch.device("meta"):
        mixer = case.construct(case.pattern)
    there = batch.moved("meta")
    outputs = mixer(there.x, WholeSequence(there.documents), there.memory())
    assert outputs.shape == batch.x.shape
    mixer.to_empty(device="cpu")
    for buffer in mixer.buffers():
        buffer.fill_(torch.nan if buffer.is_floating_point() else -1)
    assert torch.equal(run(drawn(mixer, 0), batch), run(case.mixer, batch)), "another mixer"


@states(EVERY)
def stored_weights(case: Case) -> None:
    """The state dictionary, loaded strictly, gives the same outputs bit for bit."""
    other, batch = case.fresh(seed=8), case.batch()
    expected = run(case.mixer, batch)
    assert not torch.equal(run(other, batch), expected), "weights of another seed are no others"
    other.load_state_dict(case.mixer.state_dict(), strict=True)
    assert torch.equal(run(other, batch), expected)


@states(EVERY)
def no_decay(case: Case) -> None:
    """The names that weight decay must not touch are names of parameters."""
    for path, module in case.mixer.named_modules():
        unknown = set(getattr(module, "no_decay", ())) - dict(module.named_parameters()).keys()
        assert not unknown, f"{path or 'the mixer'} has no {', '.join(sorted(unknown))}"


@states(EVERY)
def refusals(case: Case) -> None:
    """Undeclared patterns and documents over `max_len`, in pieces too, are a clear ValueError."""
    for pattern in set(Pattern) - case.mixer.patterns:
        message = refusal(lambda asked=pattern: case.construct(asked))
        assert pattern.value in message, f"asked for {pattern.value} it says {message!r}"
    longest = case.max_len
    if longest is None:
        return
    batch = case.batch(((longest + 1,),))
    attempts: list[Callable[[], object]] = [lambda: run(case.mixer, batch)]
    if case.pattern in CAUSAL:
        attempts.append(lambda: stream(case.mixer, batch, (longest, 1)))
    for attempt in attempts:
        message = refusal(attempt)
        assert "max_len" in message, f"asked for too long a document it says {message!r}"


@states(EVERY)
def counted_flops(case: Case) -> None:
    """FLOPs are finite, no less for more tokens, and needed ones within the full square."""
    counts = [case.mixer.mix_flops(n, n) for n in (16, 32, 64)]
    for flops in counts:
        assert 0 <= flops.needed <= flops.full_square < float("inf"), flops
        assert 0 <= flops.elementwise < float("inf"), flops
    for less, more in itertools.pairwise(counts):
        assert less.needed <= more.needed, f"{less} for fewer tokens than {more}"
        assert less.elementwise <= more.elementwise, f"{less} for fewer tokens than {more}"
