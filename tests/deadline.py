"""A plugin for pytest, by which no test begins after a time: pytest -p tests.deadline --until T."""

import math
import time
from collections import Counter

import pytest

NOT_REACHED = pytest.StashKey[Counter]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--until", type=float, default=math.inf, help="seconds since 1970")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOT_REACHED] = Counter()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if time.time() < item.config.getoption("--until"):
        return None
    item.config.stash[NOT_REACHED][item.location[0]] += 1
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Where only slow tests were asked for, there is nothing to begin.
    if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for file, count in terminalreporter.config.stash[NOT_REACHED].items():
        terminalreporter.write_line(f"not reached: {count} tests of {file}")
