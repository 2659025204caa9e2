"""A Ray cluster whose every host can lose power: its head, too.

Real `ray start` processes on this machine, each in a session of its own, so that a host can be
killed with all that it runs and nothing else. Nobody in this process connects to it: what runs
there is found in /proc by what Ray calls it.

    ray::Manager                        the manager actor of a root
    ray::export step-30 hf-fp32         a task that carries out an action
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.servers.ports import free_ports
from tests.waiting import PATIENCE_S, wait_for

_RAY = str(Path(sys.executable).parent / "ray")
_SETTINGS = {
    # a node that is gone is noticed within seconds, also on a busy machine
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    # a worker that has nothing to do for a moment is kept: a new one costs a second of a core
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}
_START_MANAGER = (
    "import ray, sys; from ray_ckpt.cluster.connect import start_manager;"
    "ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR');"
    "ray.get(start_manager(sys.argv[2], interval_s=0.3).status.remote())"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """Something that runs on a host."""

    pid: int
    title: str
    """What Ray calls it: `ray::Manager`, `ray::verify step-10`."""

    def send(self, number: signal.Signals) -> bool:
        """Whether it was there to get the signal."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One `ray start`, and all that came of it."""

    process: "subprocess.Popen[bytes]"

    def processes(self) -> list[Process]:
        """Everything of it that runs now and that Ray has given a title."""
        return [p for p in _session(self.process.pid) if p.title.startswith("ray::")]

    def kill(self) -> None:
        """It has lost power: every process of it is gone, and nobody was told."""
        while left := _session(self.process.pid):
            for process in left:
                process.send(signal.SIGKILL)
            self.process.poll()
        self.process.wait()


class Hosts:
    """A head and some nodes, or nothing at all; started with `environment`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        # Ray's sockets lie below it, and their paths may have about a hundred characters
        self._folder = Path(tempfile.mkdtemp(prefix="rh-", dir="/tmp"))
        self._environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            **_SETTINGS,
            **environment,
            "RAY_AUTH_MODE": "disabled",
        }
        self._num_starts = 0
        self.address = ""
        self.head: Host | None = None
        self.nodes: list[Host] = []

    def start(self, *, num_nodes: int) -> None:
        """A new cluster is up; it knows nothing of any earlier one."""
        port = free_ports(1)[0]
        self.address = f"127.0.0.1:{port}"
        self._num_starts += 1
        self.head = self._start(
            *("--head", "--port", str(port), "--include-dashboard=false"),
            *("--ray-client-server-port", str(free_ports(1)[0])),
        )
        wait_for(lambda: _answers(port))
        for _ in range(num_nodes):
            self.add_node()

    def add_node(self) -> Host:
        """One more host, with one slot for tasks after a save."""
        node = self._start("--address", self.address, "--resources", json.dumps({"ckpt_io": 1}))
        self.nodes.append(node)
        return node

    def kill_node(self, node: Host) -> None:
        """The host is gone, and the cluster goes on without it."""
        node.kill()
        self.nodes.remove(node)

    def kill_all(self) -> None:
        """Every host is gone at once, the head with them."""
        for host in [*([self.head] if self.head else []), *self.nodes]:
            host.kill()
        self.head, self.nodes = None, []

    def start_manager(self, root: str) -> None:
        """The root has a manager on this cluster, started by a driver that has ended."""
        command = [sys.executable, "-c", _START_MANAGER, self.address, root]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0, done.stderr

    def processes(self, title: str) -> list[Process]:
        """Everything on any host whose title begins so, after `ray::`."""
        hosts = [*([self.head] if self.head else []), *self.nodes]
        found = [process for host in hosts for process in host.processes()]
        return [process for process in found if process.title.startswith(f"ray::{title}")]

    def close(self) -> None:
        """Nothing of it is left."""
        self.kill_all()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, *options: str) -> Host:
        # every start of a head gets a folder of its own: an old one's leftovers would be found
        folder = self._folder / str(self._num_starts)
        command = [
            *(_RAY, "start", "--block", "--disable-usage-stats", "--num-cpus", "2"),
            *("--node-ip-address", "127.0.0.1", "--object-store-memory", "100000000"),
            *("--dashboard-agent-listen-port", "0"),
            *options,
        ]
        environment = {**self._environment, "RAY_TMPDIR": str(folder)}
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return Host(process=process)


@contextlib.contextmanager
def hosts(environment: Mapping[str, str], *, num_nodes: int) -> Iterator[Hosts]:
    """A cluster inside the block."""
    cluster = Hosts(environment)
    try:
        cluster.start(num_nodes=num_nodes)
        yield cluster
    finally:
        cluster.close()


def running() -> Iterator[tuple[int, Process]]:
    """Every process of this machine with the leader of its session; zombies left out."""
    for path in Path("/proc").iterdir():
        if not path.name.isdecimal():
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # after the name in brackets: state, parent, group, session
            state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            title = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            if state != "Z":
                yield int(session), Process(pid=int(path.name), title=title)


def _session(leader: int) -> list[Process]:
    return [process for session, process in running() if session == leader]


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
