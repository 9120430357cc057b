"""A real Slurm of one node, on this machine: three daemons in a folder, ended by their pid files.

Debian's packages `slurm-wlm` and `munge` are enough; nothing below /etc is read or written.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
# Accounting is off. A job that was queued again starts once the credential of its start before has
# expired: after 5 seconds, the least, not after two minutes.
CONF = """
ClusterName=tests
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0
ReturnToService=2
KillWait=10
NodeName=localhost CPUs={cpus} RealMemory={megabytes} State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """The reason that there cannot be one here, None if there can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "Slurm's daemons are started as root"


@contextlib.contextmanager
def one_node_slurm(folder: pathlib.Path):
    """Runs Slurm while inside; yields the changes of the environment that its commands need."""
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf, key = folder / "slurm.conf", folder / "munge.key"
    conf.write_text(
        CONF.format(
            folder=folder,
            ports=_free_ports(2),
            cpus=os.cpu_count(),
            megabytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**21,
        )
    )
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {"SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}

    def run(*command):
        return subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
        )

    munge = [f"--{what}={folder}/munge.{what}" for what in ("socket",)]
    munge += [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
    try:
        for command in (
            ["munged", "--force", *munge],
            ["slurmctld", "-c", "-f", str(conf)],
            ["slurmd", "-f", str(conf), "-N", "localhost"],
        ):
            done = run(*command)
            assert done.returncode == 0, f"{command[0]}: {done.stderr}{_logs(folder)}"
        deadline = time.monotonic() + 60
        while run("sinfo", "--noheader", "--format=%T").stdout.strip() != "idle":
            assert time.monotonic() < deadline, f"the node is not idle: {_logs(folder)}"
            time.sleep(0.2)
        yield environment
    finally:
        run("scancel", "--user=root", "--full", "--signal=KILL")
        run("scancel", "--user=root")
        for name in ("slurmd", "slurmctld", "munge"):
            _end(folder / f"{name}.pid")


def _end(pid_file: pathlib.Path) -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def _logs(folder: pathlib.Path) -> str:
    return "".join(
        f"\n{path.name}: {path.read_text()[-1500:]}" for path in sorted(folder.glob("*.log"))
    )
