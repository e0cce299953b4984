"""The configuration files of the private cluster."""

import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

CLUSTER = "crossladder"
NODES = ("n1", "n2")
NODE_CPUS = 2
NODE_MEGABYTES = 2000
"""Stated, not held to: memory is no consumable resource here."""

SLURM = """
ClusterName={cluster}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire bounds how long a job waits after it was put back into the queue.
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmctldPort={controller}
StateSaveLocation={folder}/controller
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=3,sched_interval=5
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
JobRequeue=1
KillWait=10
SlurmdTimeout=20
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
# For accounting it is this key that names the socket of munge.
AccountingStoragePass={folder}/munge.socket
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""
NODE = (
    "NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
    "CPUs={cpus} RealMemory={megabytes}\n"
)
SLURMDBD = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={accounting}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageLoc=slurm_acct_db
StorageUser=slurm
StoragePass={password}
"""
ACCOUNTS = """
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
"""


@dataclass(frozen=True)
class Ports:
    """Where the daemons listen; none is another program's."""

    controller: int
    accounting: int
    database: int
    nodes: tuple[int, ...]

    @classmethod
    def free(cls) -> "Ports":
        """Ports that nobody listens on now."""
        sockets = [socket.socket() for _ in range(3 + len(NODES))]
        try:
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            first, second, third, *rest = (each.getsockname()[1] for each in sockets)
        finally:
            for each in sockets:
                each.close()
        return cls(first, second, third, tuple(rest))


def write(folder: Path, ports: Ports, password: str) -> None:
    """Write every file that the daemons read, and the folders they expect."""
    host = socket.gethostname().split(".")[0]
    facts = {"cluster": CLUSTER, "host": host, "folder": folder, "password": password}
    facts |= {name: getattr(ports, name) for name in ("controller", "accounting", "database")}
    nodes = "".join(
        NODE.format(node=node, host=host, port=port, cpus=NODE_CPUS, megabytes=NODE_MEGABYTES)
        for node, port in zip(NODES, ports.nodes, strict=True)
    )
    # A partition of ALL nodes has to stand below them.
    partition = SLURM.index("PartitionName")
    slurm = SLURM[:partition].format(**facts) + nodes + SLURM[partition:]
    _write(folder / "slurm.conf", slurm.encode(), 0o644)
    _write(folder / "slurmdbd.conf", SLURMDBD.format(**facts).encode(), 0o600)
    _write(folder / "accounts.sql", ACCOUNTS.format(**facts).encode(), 0o600)
    _write(folder / "munge.key", secrets.token_bytes(128), 0o400)
    for node in NODES:
        (folder / f"spool.{node}").mkdir()
    (folder / "controller").mkdir()
    (folder / "database").mkdir()


def _write(file: Path, content: bytes, mode: int) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
        opened.write(content)
