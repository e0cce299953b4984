"""How the CPU library is built, found and survived: kills, two builders, damage, no compiler."""

import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from kernels import dispatch, extension_cache, native_library
from kernels.dispatch import Path, path_of
from kernels.scans.selective_scan import selective_scan, selective_scan_reference

needs_compiler = pytest.mark.skipif(
    bool(native_library.missing_tools()), reason="no C++ compiler and ninja"
)

# A process with an environment of its own, whose library is one small file.
LOADER = """
import ctypes, pathlib, sys
sys.prefix = sys.argv[1]
from kernels import native_library as module
module.SOURCES = pathlib.Path(sys.argv[1]) / "sources"
library = module.native_library()
assert ctypes.CDLL(str(library)).crossladder_probe() == 7
print(library)
"""

# A compiler that notes each compilation, and first waits as long as the file beside it says.
COMPILER = """#!/bin/sh
case "$*" in
  *" -c "*) echo $$ >> {folder}/compilations; sleep $(cat {folder}/seconds) ;;
esac
exec {compiler} "$@"
"""


class Environment:
    """A prefix with sources, a noting compiler, and processes that load the library from it."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "sources").mkdir()
        probe = 'extern "C" int crossladder_probe() { return 7; }\n'
        (folder / "sources" / "probe.cpp").write_text(probe)
        self.compiler = folder / "noting-c++"
        compiler = native_library._compiler()
        self.compiler.write_text(COMPILER.format(folder=folder, compiler=compiler))
        self.compiler.chmod(0o755)
        self.let_compilations_last(0)

    def let_compilations_last(self, seconds):
        (self.folder / "seconds").write_text(str(seconds))

    def start(self):
        return subprocess.Popen(
            [sys.executable, "-c", LOADER, str(self.folder)],
            env={**os.environ, "CXX": str(self.compiler)},
            cwd=pathlib.Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def load(self):
        """Load in a fresh process and return the library."""
        return self.finish(self.start())

    def finish(self, process):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        return pathlib.Path(output.strip().splitlines()[-1])

    def compilations(self):
        notes = self.folder / "compilations"
        return len(notes.read_text().split()) if notes.exists() else 0


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path)


@needs_compiler
@pytest.mark.slow
def test_leftovers_of_a_killed_build_do_not_stop_the_next(environment):
    environment.let_compilations_last(600)
    victim = environment.start()
    deadline = time.monotonic() + 60
    while environment.compilations() == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.communicate()
    cache = next((environment.folder / "crossladder_cache").iterdir())
    assert list(cache.glob("build-*/lock"))
    environment.let_compilations_last(0)
    assert environment.load().is_file()
    assert not list(cache.glob("build-*"))


@needs_compiler
@pytest.mark.slow
def test_two_processes_at_once_build_once(environment):
    environment.let_compilations_last(1)
    processes = [environment.start() for _ in range(2)]
    libraries = {environment.finish(process) for process in processes}
    assert len(libraries) == 1
    assert environment.compilations() == 1


@needs_compiler
def test_a_damaged_library_is_built_again(environment):
    library = environment.load()
    library.write_bytes(library.read_bytes()[:1000])
    assert environment.load() == library
    assert native_library.is_published(library)
    assert environment.compilations() == 2


@needs_compiler
def test_a_changed_source_is_built_again(environment):
    before = environment.load()
    (environment.folder / "sources" / "more.cpp").write_text("int crossladder_more() { return 1; }")
    assert environment.load() != before


@needs_compiler
def test_provenance_names_the_compiler_and_its_flags():
    facts = dispatch.describe()
    assert facts["cpu"] == "native"
    assert facts["compiler"]
    assert "-march=native" in facts["flags"]


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(native_library.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(native_library.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(dispatch, "_native", None)


def test_without_a_compiler_one_warning_is_seen_and_the_reference_runs(bare_machine):
    x = torch.randn(1, 3, 2)
    A, B = -torch.rand(2, 4), torch.randn(1, 3, 4)
    with pytest.warns(RuntimeWarning, match="C\\+\\+ compiler and ninja"):
        result = selective_scan(x, x.abs(), A, B, B)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert path_of(x) is Path.REFERENCE
    assert torch.equal(result.outputs, selective_scan_reference(x, x.abs(), A, B, B).outputs)


def test_meta_is_native_without_a_compiler(bare_machine):
    assert path_of(torch.empty(1, device="meta")) is Path.NATIVE


def test_float64_is_served_by_the_reference():
    assert path_of(torch.zeros(1, dtype=torch.float64)) is Path.REFERENCE


@pytest.fixture
def abandoned_lock(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    return lock


def test_an_abandoned_lock_of_another_builder_is_removed(abandoned_lock):
    extension_cache.use_extension_cache()
    assert not abandoned_lock.exists()


def test_a_lock_is_kept_while_another_process_may_build(abandoned_lock):
    with (abandoned_lock.parents[1] / "users.flock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        extension_cache.use_extension_cache()
        assert abandoned_lock.exists()


def test_extensions_of_other_packages_go_to_the_cache_of_this_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "restored when the test ends")
    del os.environ["TORCH_EXTENSIONS_DIR"]
    monkeypatch.setattr(native_library.sys, "prefix", str(tmp_path))
    extension_cache.use_extension_cache()
    folder = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert folder.is_dir()
    assert folder.is_relative_to(tmp_path / "crossladder_cache")
