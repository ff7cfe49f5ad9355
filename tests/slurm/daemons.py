"""A real SLURM on this machine: munge, accounting, a controller, and nodes in namespaces of their own.

A node has its own process ids, host name and an /etc/hosts with all nodes; killing its outermost process
simulates a crash of the machine. All files are in one folder; `stop` ends all processes.
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

import psutil

PROGRAMS = ("munged", "mungekey", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacct", "unshare")
PACKAGES = "slurmctld slurmd slurm-client slurmdbd mariadb-server-core munge"
PATIENCE_S = 120.0

# KillWait, between SIGTERM and SIGKILL: a job's script writes meanwhile why it ends, on a busy machine too.
CONTROLLER = """\
ClusterName=tests
FirstJobId={first_job}
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
KillWait=15
MessageTimeout=100
SlurmdTimeout=120
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=graced Nodes=ALL MaxTime=INFINITE State=UP GraceTime=600
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
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
    """Returns why SLURM cannot be started here, in one line; None if it can."""
    if os.geteuid() != 0:
        return "starting SLURM needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if absent:
        return f"no {absent[0]}: apt-get install --no-install-recommends {PACKAGES}"
    if subprocess.run(
        ["unshare", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True
    ).returncode:
        return "unshare is not permitted here; nodes need namespaces"
    return None


class Daemons:
    """The processes of one SLURM cluster. `environment` is what a client needs in addition to its own."""

    def __init__(self, folder: Path, nodes: Sequence[str]) -> None:
        self.folder, self.nodes = folder, tuple(nodes)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """
        Raises:
            TimeoutError: a daemon did not start; its log is in the folder.
        """
        ports = _free_ports(3 + len(self.nodes))
        self._write_settings(ports)
        path = os.environ["PATH"] + ":/usr/sbin:/sbin"
        self._environment = {**os.environ, **self.environment, "PATH": path}
        subprocess.run(
            ["mungekey", "--create", f"--keyfile={self.folder}/munge.key"], check=True, env=self._environment
        )
        self._spawn(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key", "--num-threads=2"),
            *(f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid"),
            *(f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed"),
        )
        self.wait_for(lambda: (self.folder / "munge.socket").exists(), "munged")
        # A database that lives for some minutes needs no access control.
        self._spawn(
            "mariadbd",
            *("mariadbd", "--no-defaults", "--user=root", "--skip-grant-tables", "--bind-address=127.0.0.1"),
            *(f"--datadir={self.folder}/database", f"--socket={self.folder}/mariadb.socket"),
            *(f"--port={ports[2]}", f"--pid-file={self.folder}/mariadb.pid"),
            *("--innodb-buffer-pool-size=32M", "--innodb-log-file-size=8M", "--innodb-lock-wait-timeout=900"),
        )
        self.wait_for(lambda: (self.folder / "mariadb.socket").exists(), "mariadbd")
        self._spawn("slurmdbd", "slurmdbd", "-D")
        self.wait_for(lambda: _accepts_connections(ports[1]), "slurmdbd")
        self._controller_port = ports[0]
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        self.wait_for(self.all_idle, "the nodes")

    def start_controller(self) -> None:
        """Starts the controller, for the first time or with the jobs that it had."""
        self._spawn("slurmctld", "slurmctld", "-D", "-i", "-f", f"{self.folder}/slurm.conf")
        self.wait_for(lambda: _accepts_connections(self._controller_port), "slurmctld")

    def stop_controller(self) -> None:
        process = self._processes.pop("slurmctld")
        process.terminate()
        process.wait()

    def start_node(self, name: str) -> None:
        """Starts a node for the first time or after a kill."""
        inside = f"hostname {name} && mount --bind {self.folder}/hosts /etc/hosts && exec slurmd -D -N {name}"
        namespaces = ("--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._spawn(name, "unshare", *namespaces, "bash", "-c", inside)

    def kill_node(self, name: str) -> None:
        """Kills all processes of a node and reports it as down, which spares the wait for SlurmdTimeout."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()
        self.client("scontrol", "update", f"nodename={name}", "state=down", "reason=crashed")

    def hang_node(self, name: str) -> None:
        """Halts all processes of a node, which is then reported as down."""
        for process in self._tree(name):
            with suppress(psutil.NoSuchProcess):  # some end meanwhile
                process.suspend()
        self.client("scontrol", "update", f"nodename={name}", "state=down", "reason=hangs")

    def wake_node(self, name: str) -> None:
        for process in self._tree(name):
            with suppress(psutil.NoSuchProcess):
                process.resume()
        self._return_node(name)

    def _tree(self, name: str) -> list[psutil.Process]:
        return psutil.Process(self._processes[name].pid).children(recursive=True)

    def revive_node(self, name: str) -> None:
        self.start_node(name)
        self._return_node(name)
        self.wait_for(self.all_idle, name)

    def _return_node(self, name: str) -> None:
        with suppress(subprocess.CalledProcessError):  # it may have returned by itself
            self.client("scontrol", "update", f"nodename={name}", "state=resume")

    def all_idle(self) -> bool:
        states = self.client("sinfo", "--noheader", "--partition=main", "--Node", "--format=%T").split()
        return states == ["idle"] * len(self.nodes)

    def client(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Runs a client command; returns its output.

        Raises:
            CalledProcessError: it failed; holds its output.
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
        """Command lines of the processes in a node other than its slurmd."""
        pid = self._processes[name].pid
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
        infrastructure = ("slurmd", "ps -eo", "bash -c hostname")
        lines = inside.stdout.splitlines()
        return [line for line in lines if not line.startswith(infrastructure) and "<defunct>" not in line]

    def wait_for(self, condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
        give_up, pause = time.monotonic() + patience_s, 0.1
        while not condition():
            gone = [name for name, process in self._processes.items() if process.poll() is not None]
            if gone or time.monotonic() > give_up:
                reason = f"{gone[0]} ended" if gone else f"{what}: not within {patience_s:.0f} s"
                raise TimeoutError(f"{reason}; the logs are in {self.folder}")
            time.sleep(pause)
            pause = min(0.3, 1.1 * pause)  # polling clients take CPU time from the job

    def stop(self) -> None:
        for name, process in reversed(self._processes.items()):
            process.send_signal(signal.SIGKILL if name in self.nodes else signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _spawn(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                command, env=self._environment, stdout=output, stderr=output, start_new_session=True
            )

    def _write_settings(self, ports: Sequence[int]) -> None:
        for name in ("state", "database", *(f"spool_{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        # Jobs derive their rendezvous port from their id; several clusters may run on one machine.
        first_job = random.randrange(1, 50_000)
        values = {"first_job": first_job, "folder": self.folder, "ports": ports, "host": socket.gethostname()}
        nodes = [NODE.format(name=node, port=port) for node, port in zip(self.nodes, ports[3:], strict=True)]
        (self.folder / "slurm.conf").write_text(CONTROLLER.format_map(values) + "".join(nodes))
        accounting = self.folder / "slurmdbd.conf"
        accounting.write_text(ACCOUNTING.format_map(values))
        accounting.chmod(0o600)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {' '.join(self.nodes)}\n")


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has, below those that the kernel would give to somebody else in the meantime."""
    ports: list[int] = []
    for port in random.sample(range(30000, 32768), 200):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise TimeoutError(f"no {count} free ports from 30000 on")


def _accepts_connections(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _only_child(pid: int) -> int:
    return psutil.Process(pid).children()[0].pid
