"""A Slurm cluster of two nodes on this machine: the real daemons on the loopback, in their own directory."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from qwen_cl.launch.local import terminate_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
MpiDefault=none
KillWait=10
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=1 RealMemory=2000 State=UNKNOWN
PartitionName=cpus Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Return the reason why the cluster cannot run here, or None."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"no Slurm: {', '.join(missing)} not found (Debian: apt-get install slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "no Slurm: its daemons run as root here"


@contextmanager
def slurm_cluster(directory: Path) -> Iterator[Path]:
    """Yield its configuration file for ``SLURM_CONF``; all its processes end with it, and with this process."""
    conf = _configure(directory)
    munge = {
        "--key-file": directory / "munge.key",
        "--socket": directory / "munge.socket",
        "--pid-file": directory / "munged.pid",
        "--log-file": directory / "munged.log",
        "--seed-file": directory / "munge.seed",
    }
    with ExitStack() as stack:
        stack.enter_context(
            _daemon("munged", "--foreground", "--force", *(f"{key}={path}" for key, path in munge.items()))
        )
        _wait_for((directory / "munge.socket").exists, directory)
        stack.enter_context(_daemon("slurmctld", "-D", "-f", str(conf)))
        for node in ("n1", "n2"):
            stack.enter_context(_daemon("slurmd", "-D", "-f", str(conf), "-N", node))
        _wait_for(lambda: _idle_nodes(conf) == "2", directory)
        yield conf
        subprocess.run(["scancel", "--user=root"], env={**os.environ, "SLURM_CONF": str(conf)}, check=False)
        _wait_for(lambda: _idle_nodes(conf) == "2", directory)


def _configure(directory: Path) -> Path:
    (directory / "state").mkdir(parents=True)
    for node in ("n1", "n2"):
        (directory / f"spool.{node}").mkdir()
    key = directory / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    conf = directory / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    conf.write_text(CONF.format(directory=directory, host=host, ports=_free_ports()))
    return conf


def _free_ports() -> tuple[int, int, int]:
    """Return free ports, of which the last two are adjacent."""
    for _ in range(100):
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
            ports = one.getsockname()[1], other.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", ports[1] + 1)):
                    return (*ports, ports[1] + 1)
            except (OSError, OverflowError):
                continue
    raise AssertionError("no free ports")


@contextmanager
def _daemon(name: str, *arguments: str) -> Iterator[None]:
    process = subprocess.Popen(
        [name, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
        preexec_fn=partial(terminate_with_parent, os.getpid()),
    )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _idle_nodes(conf: Path) -> str:
    done = subprocess.run(
        ["sinfo", "--noheader", "--states=idle", "--format=%D"],
        env={**os.environ, "SLURM_CONF": str(conf)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def _wait_for(holds: Callable[[], bool], directory: Path) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        logs = {path.name: path.read_text()[-2000:] for path in directory.glob("*.log")}
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)
