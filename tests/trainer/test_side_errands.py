"""What only accompanies a run may fail: there is a warning, and the run is the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trainer.machine
import trainer.tracker
from kernels.native_library import cache_folder
from tests.trainer.study import build_tiny, make, read_exact, run
from trainer.machine import UNKNOWN, provenance
from trainer.record import read_run

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TRAIN = """
import sys
from pathlib import Path
from tests.trainer.study import make, run
print(run(make(Path(sys.argv[1])), Path(sys.argv[2])).state)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(make(root), folder)
    return read_exact(folder)


@pytest.mark.parametrize("moment", ["__init__", "log", "close"])
def test_a_tracker_that_fails_leaves_the_run_as_it_is(
    root: Path, tmp_path: Path, whole: tuple, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            self._maybe("__init__")

        def log(self, _: object) -> None:
            self._maybe("log")

        def close(self) -> None:
            self._maybe("close")

        def _maybe(self, at: str) -> None:
            if at == moment:
                raise ConnectionError("no network")

    monkeypatch.setattr(trainer.tracker, "Tracker", Broken)
    assert run(make(root, tracker="wandb"), tmp_path / "run").state == "done"
    assert read_exact(tmp_path / "run") == whole
    (line,) = (tmp_path / "run" / "warnings.txt").read_text().splitlines()
    assert "wandb has failed (ConnectionError: no network)" in line


def test_a_tracker_that_cannot_finish_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    class Endless:
        def finish(self) -> None:
            threading.Event().wait(5)

    monkeypatch.setattr(trainer.tracker, "FINISH_SECONDS", 0.01)
    tracker = object.__new__(trainer.tracker.Tracker)
    monkeypatch.setattr(tracker, "_run", Endless(), raising=False)
    with pytest.raises(TimeoutError, match="wandb sync"):
        tracker.close()


GITS = {"absent": None, "failing": "exit 128", "hanging": "exec sleep 5", "no program": ""}


@pytest.mark.parametrize("script", GITS.values(), ids=list(GITS))
def test_without_a_working_git_the_commit_is_unknown(
    tmp_path: Path, script: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / "git").write_text(f"#!/bin/sh\n{script}\n" if script else "\0")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setattr(trainer.machine, "GIT_SECONDS", 0.2)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if script else str(tmp_path))
    assert provenance()["commit"] == UNKNOWN
    assert provenance()["uncommitted"] == UNKNOWN


def test_a_package_that_is_not_installed_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.machine, "PACKAGES", ("torch", "not-there-at-all"))
    packages = provenance()["packages"]
    assert isinstance(packages, dict)
    assert packages["not-there-at-all"] == UNKNOWN
    assert packages["torch"] != UNKNOWN


@pytest.mark.parametrize("home", ["/dev/null/none", "/proc/none", ""])
def test_compiled_files_go_to_a_private_folder_where_no_other_can_be_written(
    tmp_path: Path, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kernels.native_library as library

    monkeypatch.setattr(sys, "prefix", "/proc/none")
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(library.os, "access", lambda place, _: "/proc" not in str(place))
    monkeypatch.setattr(library.tempfile, "gettempdir", lambda: str(tmp_path))
    library._own_temporary.cache_clear()
    if not home:
        (tmp_path / f"crossladder-{os.getuid()}").mkdir(mode=0o777)
        (tmp_path / f"crossladder-{os.getuid()}").chmod(0o777)
        monkeypatch.setenv("HOME", "/dev/null/none")
        monkeypatch.setattr(library.tempfile, "mkdtemp", lambda **_: str(tmp_path / "fresh"))
        assert cache_folder().is_relative_to(tmp_path / "fresh")
    else:
        assert cache_folder().is_relative_to(tmp_path / f"crossladder-{os.getuid()}")
    library._own_temporary.cache_clear()


def test_a_run_needs_neither_a_home_nor_programs_on_the_path(
    root: Path, tmp_path: Path, whole: tuple
) -> None:
    kept = {key: value for key, value in os.environ.items() if key in ("PYTHONPATH", "TMPDIR")}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAIN, str(root), str(tmp_path / "run")],
        env={**kept, "HOME": "/dev/null/none", "PATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[-1] == "done"
    assert read_exact(tmp_path / "run") == whole
    assert read_run(tmp_path / "run").provenance["commit"] == UNKNOWN
