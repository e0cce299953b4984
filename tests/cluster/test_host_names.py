"""The lines in the file of hosts: own ones go, those of the killed too, all others stay."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster import host_names


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "hosts"
    file.write_text("127.0.0.1 localhost\n10.0.0.1 other # crossladder\n")
    monkeypatch.setattr(host_names, "HOSTS", file)
    return file


def test_names_are_added_and_taken_away(hosts: Path) -> None:
    before = hosts.read_text()
    host_names.add_names(("localhost",))
    assert hosts.read_text() != before
    host_names.remove_names()
    assert hosts.read_text() == before


def test_a_line_of_a_killed_process_is_taken_away_by_the_next(hosts: Path) -> None:
    before = hosts.read_text()
    ended = subprocess.Popen(["true"])
    ended.wait()
    alive = f"127.0.0.1 b # {host_names.MARK} {os.getppid()}\n"
    dead = f"127.0.0.1 a # {host_names.MARK} {ended.pid}\n"
    hosts.write_text(before + dead + alive)
    host_names.add_names(("localhost",))
    host_names.remove_names()
    assert hosts.read_text() == before + alive


def test_a_name_of_another_machine_is_an_error(hosts: Path) -> None:
    with pytest.raises(RuntimeError, match=r"should be this machine"):
        host_names.add_names(("no-such-node.invalid",))
