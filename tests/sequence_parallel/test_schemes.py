"""The schemes of `models.ranks.schemes`: what they send, and where the choice changes."""

import functools
import itertools
import math
from collections.abc import Callable

import pytest

from models.ranks.schemes import ASSUMED, Link, Payload, Scheme, choose, rounds, seconds
from tests.oracles import prefix_messages as oracle

RANKS = (1, 2, 3, 4, 5, 8, 13, 16, 64)
STATES = tuple(int(64 * 1.3**i) // 64 * 64 for i in range(9, 60))
SHARES = (0, 1 / 128, 1 / 16, 1)
"""Bytes of decays to one of state: none, those of Mamba-2, of Mamba, and of a gated recurrence."""
LINKS = (ASSUMED, Link(2e-6, 400e9), Link(50e-6, 1e9))


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("scheme", ["ring", "doubling"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8, 13, 64])
def test_simulated_messages_tell_each_rank_of_all_before_it_once(
    ranks: int, scheme: str, back: bool
) -> None:
    messages = oracle.messages(scheme, ranks, oracle.Sizes(8, 4, 2), back=back)
    before = [list(range(r)) for r in range(ranks)]
    after = [list(range(ranks - 1, r, -1)) for r in range(ranks)]
    for way in (0, 1):
        expected = before if (way == 1) == back else after
        assert oracle.learnt(messages, ranks, way=way, back=back) == expected


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("ranks", [*RANKS, 1024])
def test_the_time_of_a_scheme_is_that_of_its_simulated_messages(
    ranks: int, scheme: Scheme, ways: int
) -> None:
    sizes, link = (1_048_576, 8192, ways), ASSUMED
    there, back = (
        oracle.messages(scheme, ranks, oracle.Sizes(*sizes), back=back) for back in (False, True)
    )
    expected = oracle.seconds(there + back, *link)
    assert seconds(scheme, ranks, Payload(*sizes), link) == pytest.approx(expected, rel=1e-12)
    assert rounds(scheme, ranks) == len(there) == len(back)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("share", SHARES)
def test_the_choice_is_the_fastest_of_the_simulated_schemes(
    share: float, ways: int, link: Link
) -> None:
    for ranks in RANKS:
        lines = _lines(ranks, share, ways, link)
        for state in STATES:
            times = {scheme: line(state) for scheme, line in lines.items()}
            chosen = choose(ranks, _payload(state, share, ways), link)
            assert times[chosen] <= min(times.values()) * (1 + 1e-12)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("share", SHARES)
def test_the_choice_changes_where_simulated_times_cross(
    share: float, ways: int, link: Link
) -> None:
    changes = 0
    for ranks in RANKS:
        lines = _lines(ranks, share, ways, link)
        for small, large in itertools.pairwise(STATES):
            before, after = (choose(ranks, _payload(s, share, ways), link) for s in (small, large))
            if before is after:
                continue
            low, high = small // 128, large // 128
            while high - low > 1:
                middle = (low + high) // 2
                same = choose(ranks, _payload(128 * middle, share, ways), link) is before
                low, high = (middle, high) if same else (low, middle)
            after = choose(ranks, _payload(128 * high, share, ways), link)
            crossing = _crossing(lines[before], lines[after])
            assert 128 * low * (1 - 1e-9) <= crossing <= 128 * high * (1 + 1e-9)
            changes += 1
    assert changes > 0


def test_one_rank_sends_nothing() -> None:
    assert all(seconds(scheme, 1, Payload(64, 8), ASSUMED) == 0.0 for scheme in Scheme)


def test_small_states_are_gathered_and_large_ones_doubled_or_passed_along() -> None:
    assert choose(64, Payload(1024, 8), ASSUMED) is Scheme.GATHER
    assert choose(64, Payload(1 << 24, 1 << 17), ASSUMED) is Scheme.DOUBLING
    assert choose(4, Payload(1 << 26, 1 << 19, directions=2), ASSUMED) is Scheme.RING


def _payload(state: int, share: float, ways: int) -> Payload:
    return Payload(state, int(state * share), ways)


def _lines(
    ranks: int, share: float, ways: int, link: Link
) -> dict[Scheme, Callable[[float], float]]:
    """The simulated time of each scheme, which is a straight line in the state's bytes."""
    return {scheme: _line(scheme, ranks, share, ways, link) for scheme in Scheme}


@functools.cache
def _line(
    scheme: Scheme, ranks: int, share: float, ways: int, link: Link
) -> Callable[[float], float]:
    state, times = 1 << 20, []
    for size in (0, state):
        sizes = oracle.Sizes(*_payload(size, share, ways))
        there, back = (oracle.messages(scheme, ranks, sizes, back=b) for b in (False, True))
        times.append(oracle.seconds(there + back, *link))
    return lambda size: times[0] + (times[1] - times[0]) / state * size


def _crossing(one: Callable[[float], float], other: Callable[[float], float]) -> float:
    fixed = one(0.0) - other(0.0)
    slope = (other(1e6) - other(0.0)) - (one(1e6) - one(0.0))
    return math.inf if slope == 0 else 1e6 * fixed / slope
