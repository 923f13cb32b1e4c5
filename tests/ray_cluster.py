"""A Ray cluster of two nodes on this machine, started as a user starts it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.subprocesses import free_port, running

__all__ = ["QUIET", "Cluster", "kill_node", "on_cluster", "ray_cluster"]

BIN = Path(sys.executable).parent

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Else Ray's processes stand back behind everything else on this machine.
    "RAY_worker_niceness": "0",
    # A token that an earlier local cluster left in the home would be asked of all nodes.
    "RAY_AUTH_MODE": "disabled",
    "OMP_NUM_THREADS": "1",
}
"""Environment of all processes of a cluster, and of those that use it."""


class Cluster:
    """Two nodes of one processor each.

    Arguments:
        folder: For logs and sockets.
        environment: Of the nodes.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.folder = folder
        self.environment = environment

    @contextlib.contextmanager
    def node(self, name: str, *options: str) -> Iterator[int]:
        command = (str(BIN / "ray"), "start", *options, "--num-cpus", "1", "--num-gpus", "0")
        more = ("--node-ip-address", "127.0.0.1", "--block", "--disable-usage-stats")
        log = self.folder / f"{name}.log"
        with running([*command, *more], log=log, environment=self.environment) as process:
            yield process.pid

    def head(self) -> contextlib.AbstractContextManager[int]:
        port = self.address.rpartition(":")[2]
        options = ("--head", "--port", port, "--include-dashboard", "false")
        return self.node("head", *options, "--temp-dir", str(self.folder / "ray"))

    def second(self) -> contextlib.AbstractContextManager[int]:
        return self.node("second", "--address", self.address)

    def wait_for(self, nodes: int) -> None:
        """Wait until so many nodes answer."""
        deadline = time.monotonic() + 180
        while True:
            code = (
                "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level=50); "
                "print('alive', sum(n['Alive'] for n in ray.nodes()))"
            )
            asked = subprocess.run(
                [sys.executable, "-c", code, self.address],
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=120,
            )
            if f"alive {nodes}" in asked.stdout:
                return
            assert time.monotonic() < deadline, asked.stderr
            time.sleep(1)


@contextlib.contextmanager
def ray_cluster(environment: dict[str, str]) -> Iterator[Cluster]:
    """Start a cluster's head; its second node is started by whoever needs it."""
    # Ray's sockets have paths of at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="dr-", dir="/tmp"))
    try:
        made = Cluster(folder, environment)
        with made.head():
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def kill_node(pid: int) -> None:
    """Kill the node that `ray start` of this number runs, as a machine is lost."""
    raylets = [child for child, name in _descendants(pid) if name == "raylet"]
    assert len(raylets) == 1
    os.kill(raylets[0], signal.SIGKILL)


def on_cluster(cluster: Cluster, *more: str) -> list[str]:
    """Return the options with which a command works on a cluster, in processors alone."""
    overrides = (
        "runner.kind=ray",
        f"runner.address={cluster.address}",
        "runner.gpus_per_shard=0",
        *more,
    )
    return [part for override in overrides for part in ("--set", override)]


def _descendants(pid: int) -> Iterator[tuple[int, str]]:
    """Process numbers and names of all that a process has started."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child, Path(f"/proc/{child}/comm").read_text().strip()
            yield from _descendants(child)
