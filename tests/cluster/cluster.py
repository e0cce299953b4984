"""A private SLURM on this machine: controller, accounting, two nodes, and nothing of the system's.

Key, database, state, logs and ports are its own, and clients find it by SLURM_CONF alone, so a
SLURM that runs on the machine already is neither asked nor touched. Only the names of the two
nodes are added to /etc/hosts, and taken away again.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.cluster import configuration
from tests.cluster.configuration import NODES, Ports
from tests.cluster.host_names import add_names, remove_names

OF_SLURM = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "srun", "squeue", "sacct", "scontrol")
PROGRAMS = (*OF_SLURM, "sacctmgr", "munged", "mariadbd", "mariadb-install-db", "setpriv")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurmdbd", "munge", "mariadb-server")
ADMINISTRATORS = "/usr/local/sbin:/usr/sbin:/sbin"
POLICY = Path("/usr/sbin/policy-rc.d")
START_SECONDS = 60.0
END_SECONDS = 15.0


def missing() -> str:
    """What keeps a cluster from being started here, and what to do; empty if nothing does."""
    if os.geteuid() != 0:
        return "a SLURM of one's own needs to be root here; run it in a container as root"
    absent = [name for name in PROGRAMS if _find(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}; apt-get install {' '.join(PACKAGES)}"
    return ""


def install() -> None:
    """Install the packages, without starting any service of theirs.

    Raises:
        RuntimeError: this is no Debian, a part of SLURM is here already, or apt-get failed.
    """
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise RuntimeError(f"{missing()}; installing needs root and apt-get")
    there = [name for name in OF_SLURM if _find(name) is not None]
    if there:
        raise RuntimeError(f"{missing()}; {', '.join(there)} is here already and left alone")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    mine = not POLICY.exists()
    if mine:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        _check(["apt-get", "-qq", "update"], quiet)
        _check(["apt-get", "-qq", "-y", "install", "--no-install-recommends", *PACKAGES], quiet)
    finally:
        if mine:
            POLICY.unlink()


class Cluster:
    """Two nodes of two CPUs, within a `with` block.

    Attributes:
        folder: everything it writes; removed at the end.
        environment: what a process needs to be a client of this cluster.
        killed: names of the processes that had to be killed at the end.

    Raises:
        RuntimeError: a daemon did not come up.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="crossladder-slurm-"))
        # munge refuses a socket in a folder that others cannot enter.
        self.folder.chmod(0o755)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM")},
            "PATH": f"{os.environ['PATH']}:{ADMINISTRATORS}",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self.killed: list[str] = []
        self._daemons: list[tuple[str, subprocess.Popen]] = []

    def __enter__(self) -> "Cluster":
        try:
            add_names(NODES)
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()

    def ask(self, *words: str) -> str:
        """What a client command answers.

        Raises:
            RuntimeError: the command failed.
        """
        return _check(list(words), self.environment)

    def jobs(self) -> list[str]:
        """Ids of the jobs that wait or run."""
        return self.ask("squeue", "--noheader", "--format=%A").split()

    def processes(self) -> list[psutil.Process]:
        """Live processes that belong to this cluster, its daemons left out."""
        daemons = {process.pid for _, process in self._daemons}
        every = [p for p in psutil.process_iter() if p.pid not in daemons | {os.getpid()}]
        return [p for p in every if _belongs(p, daemons, str(self.folder))]

    def empty(self, seconds: float) -> list[psutil.Process]:
        """Cancel all jobs and wait; the processes that are left after that time."""
        self.ask("scancel", "--user=root")
        deadline = time.monotonic() + seconds
        while (self.jobs() or self.processes()) and time.monotonic() < deadline:
            time.sleep(0.3)
        return self.processes()

    def _start(self) -> None:
        ports = Ports.free()
        password = secrets.token_hex(16)
        configuration.write(self.folder, ports, password)
        database = self.folder / "database"
        own = ("--no-defaults", "--user=root", f"--datadir={database}")
        _check(["mariadb-install-db", *own, "--skip-test-db"], self.environment)
        self._spawn(
            "munged",
            *("munged", "--foreground", f"--socket={self.folder}/munge.socket"),
            *(f"--key-file={self.folder}/munge.key", f"--pid-file={self.folder}/munged.pid"),
            *(f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed"),
        )
        self._spawn(
            "mariadbd",
            *("mariadbd", *own, f"--socket={self.folder}/mariadb.socket"),
            *("--bind-address=127.0.0.1", f"--port={ports.database}", "--skip-name-resolve"),
            *(f"--init-file={self.folder}/accounts.sql", f"--pid-file={self.folder}/mariadbd.pid"),
        )
        self._wait("munged", (self.folder / "munge.socket").exists)
        self._wait("mariadbd", lambda: _listens(ports.database))
        self._spawn("slurmdbd", "slurmdbd", "-D")
        name = configuration.CLUSTER
        self._wait("slurmdbd", lambda: self._succeeds("sacctmgr", "-i", "add", "cluster", name))
        self._spawn("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self._spawn(f"slurmd {node}", "slurmd", "-D", "-N", node)
        self._wait("slurmctld", self._is_idle)

    def _is_idle(self) -> bool:
        words = ("sinfo", "--noheader", "--Node", "--format=%N %t")
        asked = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        return sorted(asked.stdout.splitlines()) == [f"{node} idle" for node in NODES]

    def _succeeds(self, *words: str) -> bool:
        return subprocess.run(words, env=self.environment, capture_output=True).returncode == 0

    def _spawn(self, name: str, *words: str) -> None:
        log = (self.folder / f"{name}.out").open("w")
        # A daemon must not outlive whoever started it.
        tied = ("setpriv", "--pdeathsig", "TERM", "--", *words)
        process = subprocess.Popen(
            tied, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        log.close()
        self._daemons.append((name, process))

    def _wait(self, waited_for: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            ended = [name for name, process in self._daemons if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                name = ended[0] if ended else waited_for
                wrote = (self.folder / f"{name}.out").read_text()[-2000:]
                what = "ended" if ended else f"is not ready after {START_SECONDS:g} s"
                raise RuntimeError(f"{name} {what}; it wrote:\n{wrote}")
            time.sleep(0.1)

    def _stop(self) -> None:
        """End jobs, then daemons in the order opposite to their start, then remove the folder."""
        try:
            if len(self._daemons) >= 4:
                self.empty(END_SECONDS)
        finally:
            for _, process in reversed(self._daemons):
                _end(process)
            for left in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    name = left.name()
                    left.kill()
                    self.killed.append(name)
            remove_names()
            shutil.rmtree(self.folder)


def _belongs(process: psutil.Process, daemons: set[int], folder: str) -> bool:
    """Whether a live process that no daemon started itself belongs to the cluster in a folder.

    A job's process has the cluster in its environment; the daemon above it has overwritten its
    own and is known by the log it writes. A process may end at any moment while it is looked at.
    """
    try:
        if process.status() == psutil.STATUS_ZOMBIE or process.ppid() in daemons:
            return False
        conf = process.environ().get("SLURM_CONF", "")
        files = [file.path for file in process.open_files()]
        return any(text.startswith(folder) for text in (conf, *files))
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:{ADMINISTRATORS}")


def _check(words: list[str], environment: dict[str, str]) -> str:
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        wrote = (ended.stderr or ended.stdout).strip()[-2000:]
        raise RuntimeError(f"{' '.join(words)} ended with {ended.returncode}: {wrote}")
    return ended.stdout


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
