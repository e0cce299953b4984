"""Stop signals, heartbeats and exit codes, with real signals to real processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from trainer import heartbeat
from trainer.exit_codes import ExitCode
from trainer.heartbeat import Heartbeat
from trainer.preemption import STOP_SIGNALS, StopSignal

PATIENCE_SECONDS = 60.0
"""How long an end may take on a busy machine before it counts as a hang."""
PREAMBLE = """
import ctypes, os, sys, time
from pathlib import Path
from trainer.preemption import StopSignal
folder, grace = Path(sys.argv[1]), float(sys.argv[2])
stop = StopSignal(grace, folder / "stacks.txt", (folder / "forced.txt").write_text)
def say(text):
    print(text, flush=True)
"""
# A mutex locked twice: a call that no signal ends, as a collective without its peer is.
STUCK = (
    PREAMBLE
    + """
def waits_for_a_peer():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    say("ready")
    libc.pthread_mutex_lock(mutex)
with stop:
    waits_for_a_peer()
"""
)
LOOPING = (
    PREAMBLE
    + """
with stop:
    say("ready")
    while not stop.requested:
        time.sleep(0.005)
say(stop.name)
time.sleep(2 * grace)
"""
)
WITH_CHILD = (
    PREAMBLE
    + """
with stop:
    child = os.fork()
    if child == 0:
        say("ready")
        time.sleep(20)
    say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    time.sleep(0.2)
    say(stop.requested)
"""
)


@pytest.fixture
def start(tmp_path):
    """Starts a script and waits until it says that it is ready."""
    processes = []

    def start_script(script, grace):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(grace)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start_script
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def stop(tmp_path):
    with StopSignal(60.0, tmp_path / "stacks.txt", lambda _message: None) as entered:
        yield entered


def wait_until(fact, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not fact() and time.monotonic() < deadline:
        time.sleep(0.005)
    return fact()


def test_nothing_is_requested_without_a_signal(stop):
    assert not stop.requested
    assert stop.name == ""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_stop_signal_requests_a_stop_and_is_named(stop, number):
    os.kill(os.getpid(), number)
    assert wait_until(lambda: stop.requested)
    assert stop.name == signal.Signals(number).name


def test_the_first_signal_gives_the_name(stop):
    for number in (signal.SIGUSR2, signal.SIGTERM):
        os.kill(os.getpid(), number)
        wait_until(lambda: stop.requested)
    assert stop.name == "SIGUSR2"


def test_the_handlers_of_before_are_back_after_the_block(tmp_path):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignal(60.0, tmp_path / "stacks.txt", lambda _message: None):
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_two_blocks_in_turn_are_independent(tmp_path):
    for _ in range(2):
        with StopSignal(60.0, tmp_path / "stacks.txt", lambda _message: None) as stop:
            assert not stop.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert wait_until(lambda: stop.requested)


def test_a_loop_that_stops_in_time_is_not_forced(start, tmp_path):
    process = start(LOOPING, 0.3)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(PATIENCE_SECONDS) == 0
    assert process.stdout.read() == "SIGUSR2\n"
    assert not (tmp_path / "forced.txt").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_call_that_never_returns_is_ended_when_the_grace_has_passed(start, number):
    process = start(STUCK, 0.4)
    begun = time.monotonic()
    process.send_signal(number)
    assert process.wait(PATIENCE_SECONDS) == ExitCode.REQUEUE
    assert 0.4 <= time.monotonic() - begun < 3.0


def test_more_signals_do_not_lengthen_the_grace(start):
    process = start(STUCK, 0.6)
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < 5.0:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.wait(1) == ExitCode.REQUEUE
    assert time.monotonic() - begun < 3.0


def test_a_forced_end_leaves_the_stacks_and_says_why(start, tmp_path):
    process = start(STUCK, 0.2)
    process.send_signal(signal.SIGUSR2)
    process.wait(PATIENCE_SECONDS)
    assert "waits_for_a_peer" in (tmp_path / "stacks.txt").read_text()
    assert (tmp_path / "forced.txt").read_text().startswith("SIGUSR2 was received 0.2 s ago")


def test_a_forced_end_comes_even_if_the_stacks_cannot_be_written(start, tmp_path):
    process = start(STUCK, 0.2)
    (tmp_path / "stacks.txt").mkdir()
    process.send_signal(signal.SIGUSR2)
    assert process.wait(PATIENCE_SECONDS) == ExitCode.REQUEUE


def test_one_interrupt_waits_and_a_second_ends_at_once(start):
    process = start(STUCK, 60)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(2) == ExitCode.INTERRUPTED


def test_an_interrupt_of_the_whole_group_counts_once_for_the_parent(start):
    process = start(WITH_CHILD, 60)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE_SECONDS) == 0
    assert process.stdout.read().splitlines()[-1] == "True"


def test_a_signal_to_a_forked_child_stops_the_child_and_not_the_run(start):
    process = start(WITH_CHILD, 60)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    os.kill(int(children.stdout), signal.SIGTERM)
    assert process.wait(PATIENCE_SECONDS) == 0
    assert process.stdout.read().splitlines() == [str(-signal.SIGTERM), "False"]


def read_beat(folder, rank=0):
    file = folder / f"heartbeat-{rank}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def test_a_heartbeat_shows_rank_step_and_phase(tmp_path):
    with Heartbeat(tmp_path, 3, {"init": 60.0, "step": 60.0}, print) as heart:
        assert wait_until(lambda: read_beat(tmp_path, 3).get("phase") == "init")
        heart.beat(7, "step")
        assert wait_until(lambda: read_beat(tmp_path, 3).get("step") == 7)
    beat = read_beat(tmp_path, 3)
    assert (beat["rank"], beat["phase"]) == (3, "step")
    assert 0 <= time.monotonic() - beat["monotonic"] < 10


def test_the_last_beat_is_in_the_file_when_the_block_is_left(tmp_path):
    with Heartbeat(tmp_path, 0, {"step": 60.0}, print) as heart:
        for step in range(1000):
            heart.beat(step, "step")
    assert read_beat(tmp_path)["step"] == 999


def test_the_file_is_written_at_most_once_an_interval(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.1)
    shown = []
    monkeypatch.setattr(Heartbeat, "_show", lambda _heart, beat: shown.append(beat))
    begun = time.monotonic()
    with Heartbeat(tmp_path, 0, {"step": 0.04}, lambda _message: None) as heart:
        for step in range(150):
            heart.beat(step, "step")
            time.sleep(0.004)
    intervals = (time.monotonic() - begun) / 0.1
    # One more at the start, one more when the block is left.
    assert 2 < len(shown) <= intervals + 2


def stay_too_long(seconds):
    time.sleep(seconds)


def test_a_stall_is_reported_once_with_the_stacks(tmp_path):
    told = []
    with Heartbeat(tmp_path, 1, {"step": 60.0, "save": 0.1}, told.append) as heart:
        heart.beat(12, "save")
        stay_too_long(0.6)
    (message,) = told
    assert message.startswith("rank 1 (")
    assert "phase 'save' of step 12" in message
    assert "stay_too_long" in (tmp_path / "stall-1.txt").read_text()


def test_after_another_beat_a_stall_is_reported_again(tmp_path):
    told = []
    with Heartbeat(tmp_path, 0, {"step": 0.1}, told.append) as heart:
        for step in (1, 2):
            heart.beat(step, "step")
            assert wait_until(lambda: any(f"step {step} " in text for text in told))  # noqa: B023
    assert len(told) == 2


def test_beats_in_time_are_no_stall(tmp_path):
    told = []
    with Heartbeat(tmp_path, 0, {"step": 1.0}, told.append) as heart:
        for step in range(30):
            heart.beat(step, "step")
            time.sleep(0.05)
    assert told == []
    assert not (tmp_path / "stall-0.txt").exists()


def test_each_phase_has_its_own_deadline(tmp_path):
    told = []
    with Heartbeat(tmp_path, 0, {"save": 60.0, "step": 0.05}, told.append) as heart:
        heart.beat(1, "save")
        time.sleep(0.3)
        assert told == []
        heart.beat(1, "step")
        assert wait_until(lambda: told)


def test_a_phase_without_a_deadline_is_refused(tmp_path):
    heart = Heartbeat(tmp_path, 0, {"step": 60.0}, print)
    with pytest.raises(AssertionError, match="'sav'"):
        heart.beat(1, "sav")


def test_a_heartbeat_that_cannot_be_written_is_reported_and_does_not_end_the_watch(tmp_path):
    told = []
    with Heartbeat(tmp_path / "gone", 0, {"step": 0.1}, told.append):
        assert wait_until(lambda: any("phase 'step'" in text for text in told))
    assert any("cannot be written" in text for text in told)


def test_exit_codes_keep_their_numbers():
    assert {code.name: int(code) for code in ExitCode} == {
        "DONE": 0,
        "FAILED": 1,
        "BAD_CONFIG": 64,
        "BAD_DATA": 65,
        "BAD_CHECKPOINT": 66,
        "NUMERIC_HALT": 70,
        "DISK": 71,
        "REQUEUE": 75,
        "HANG": 76,
        "INTERRUPTED": 130,
    }
