"""Times of several things taken in turn, so that a busy machine slows all of them alike."""

import statistics
import time

ROUNDS = 40
WARM_UP = 3


def interleave(contenders, rounds=ROUNDS):
    """Milliseconds of every round, by contender."""
    milliseconds = {name: [] for name in contenders}
    for round_ in range(rounds + WARM_UP):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if round_ >= WARM_UP:
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    return milliseconds


def median(milliseconds):
    return statistics.median(milliseconds)


def ratio(milliseconds, floor):
    """Median and quartiles, over the rounds, of one contender's time relative to another's."""
    shares = [x / y for x, y in zip(milliseconds, floor, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"
