"""A Slurm of one node on the loopback, with all its files in one folder. Needs root, and Debian's slurm-wlm and munge."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=5
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 Gres=gpu:1
PartitionName=main Nodes=localhost Default=YES
"""
GPU = "NodeName=localhost Name=gpu File=/dev/zero\n"
"""What stands for a GPU: Slurm hands it out and does not look at it."""


def can_run() -> bool:
    """Say whether this machine has what a Slurm needs."""
    return os.getuid() == 0 and all(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in PROGRAMS)


@contextmanager
def one_node(folder: Path, controller: int, node: int) -> Iterator[None]:
    """Run it; whoever is to use it needs ``SLURM_CONF``."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, controller=controller, node=node))
    (folder / "gres.conf").write_text(GPU)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
    munge = [f"--{option}={folder / name}" for option, name in {**files, "seed-file": "munge.seed"}.items()]
    commands = (["munged", "--force", "--foreground", *munge], ["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"])
    running: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "output").open("wb") as output:
            for command in commands:
                running.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
                time.sleep(1)
        yield
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(timeout=60)
