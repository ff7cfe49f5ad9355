"""A real SLURM on this machine: munge, accounting, one controller, and nodes in namespaces of their own.

A node has its own process ids, its own host name and an /etc/hosts that knows all nodes; killing its
outermost process is what a crash of the whole machine is. All of it lives in one folder and ends with `stop`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "mungekey", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacct", "unshare")
PACKAGES = "slurmctld slurmd slurm-client slurmdbd mariadb-server-core munge"
PATIENCE_S = 120.0

CONTROLLER = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[1]}
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
JobRequeue=1
KillWait=5
MessageTimeout=100
SlurmdTimeout=120
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN\n"
ACCOUNTING = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={ports[1]}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[2]}
StorageUser=slurm
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""


def missing() -> str | None:
    """Why no SLURM can be started here, in a line; None if one can."""
    if os.geteuid() != 0:
        return "a SLURM for tests is started as root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if absent:
        return f"no {absent[0]}: apt-get install --no-install-recommends {PACKAGES}"
    if subprocess.run(
        ["unshare", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True
    ).returncode:
        return "unshare is not allowed here, nodes need namespaces"
    return None


class Daemons:
    """The processes of one SLURM. `environment` is what a client needs besides its own."""

    def __init__(self, folder: Path, nodes: Sequence[str]) -> None:
        self.folder, self.nodes = folder, tuple(nodes)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """
        Raises:
            TimeoutError: a part did not come up; its log is in the folder.
        """
        ports = _free_ports(3 + len(self.nodes))
        self._write_settings(ports)
        path = os.environ["PATH"] + ":/usr/sbin:/sbin"
        self._environment = {**os.environ, **self.environment, "PATH": path}
        subprocess.run(
            ["mungekey", "--create", f"--keyfile={self.folder}/munge.key"], check=True, env=self._environment
        )
        self._begin(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key", "--num-threads=2"),
            *(f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid"),
            *(f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed"),
        )
        self.wait_for(lambda: (self.folder / "munge.socket").exists(), "munged")
        # Accounts of its own are of no use to a database that lives for some minutes.
        self._begin(
            "mariadbd",
            *("mariadbd", "--no-defaults", "--user=root", "--skip-grant-tables", "--bind-address=127.0.0.1"),
            *(f"--datadir={self.folder}/database", f"--socket={self.folder}/mariadb.socket"),
            *(f"--port={ports[2]}", f"--pid-file={self.folder}/mariadb.pid"),
            *("--innodb-buffer-pool-size=32M", "--innodb-log-file-size=8M", "--innodb-lock-wait-timeout=900"),
        )
        self.wait_for(lambda: (self.folder / "mariadb.socket").exists(), "mariadbd")
        self._begin("slurmdbd", "slurmdbd", "-D")
        self.wait_for(lambda: _answers(ports[1]), "slurmdbd")
        self._begin("slurmctld", "slurmctld", "-D", "-i", "-f", f"{self.folder}/slurm.conf")
        self.wait_for(lambda: _answers(ports[0]), "slurmctld")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for(self.all_idle, "the nodes")

    def start_node(self, name: str) -> None:
        """Starts a node, also one that was killed."""
        inside = f"hostname {name} && mount --bind {self.folder}/hosts /etc/hosts && exec slurmd -D -N {name}"
        own = ("--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._begin(name, "unshare", *own, "bash", "-c", inside)

    def kill_node(self, name: str) -> None:
        """Ends all processes of a node at once, and has the controller believe so at once."""
        process = self._running.pop(name)
        process.kill()
        process.wait()
        self.client("scontrol", "update", f"nodename={name}", "state=down", "reason=crashed")

    def revive_node(self, name: str) -> None:
        self.start_node(name)
        with suppress(subprocess.CalledProcessError):  # it may be back by itself
            self.client("scontrol", "update", f"nodename={name}", "state=resume")
        self.wait_for(self.all_idle, name)

    def all_idle(self) -> bool:
        states = self.client("sinfo", "--noheader", "--Node", "--format=%T").split()
        return states == ["idle"] * len(self.nodes)

    def client(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """What a client command prints.

        Raises:
            CalledProcessError: it failed; with what it said.
        """
        done = subprocess.run(
            command,
            env={**self._environment, **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def processes_of(self, name: str) -> list[str]:
        """Command lines of what runs in a node besides its slurmd."""
        pid = self._running[name].pid
        inside = subprocess.run(
            [
                "nsenter",
                f"--target={_only_child(pid)}",
                "--pid",
                "--mount",
                "ps",
                "-eo",
                "args",
                "--no-headers",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        own = ("slurmd", "ps -eo", "bash -c hostname")
        lines = inside.stdout.splitlines()
        return [line for line in lines if not line.startswith(own) and "<defunct>" not in line]

    def wait_for(self, moment: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
        give_up, pause = time.monotonic() + patience_s, 0.1
        while not moment():
            gone = [name for name, process in self._running.items() if process.poll() is not None]
            if gone or time.monotonic() > give_up:
                told = f"{gone[0]} ended" if gone else f"{what}: nothing after {patience_s:.0f} s"
                raise TimeoutError(f"{told}; the logs are in {self.folder}")
            time.sleep(pause)
            pause = min(0.5, 1.1 * pause)  # a client of SLURM that asks takes time from what is waited for

    def stop(self) -> None:
        for name, process in reversed(self._running.items()):
            process.send_signal(signal.SIGKILL if name in self.nodes else signal.SIGTERM)
        for process in self._running.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _begin(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as said:
            self._running[name] = subprocess.Popen(
                command, env=self._environment, stdout=said, stderr=said, start_new_session=True
            )

    def _write_settings(self, ports: Sequence[int]) -> None:
        for made in ("state", "database", *(f"spool_{node}" for node in self.nodes)):
            (self.folder / made).mkdir(parents=True)
        known = {"folder": self.folder, "ports": ports, "host": socket.gethostname()}
        nodes = [NODE.format(name=node, port=port) for node, port in zip(self.nodes, ports[3:], strict=True)]
        (self.folder / "slurm.conf").write_text(CONTROLLER.format_map(known) + "".join(nodes))
        accounting = self.folder / "slurmdbd.conf"
        accounting.write_text(ACCOUNTING.format_map(known))
        accounting.chmod(0o600)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {' '.join(self.nodes)}\n")


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has, below those that the kernel would give to somebody else in the meantime."""
    found: list[int] = []
    for port in random.sample(range(30000, 32768), 200):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise TimeoutError(f"no {count} free ports from 30000 on")


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _only_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
