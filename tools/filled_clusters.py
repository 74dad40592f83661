"""Clusters of three real nodes on this machine that hold many files, for `tools/bench_growth`.

Belongs here: making them as a person does (`aspen init`, `aspen ticket`, `aspen join`), what is known of them
from outside, and their end, whatever happens. Not here: what is measured.
"""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from rich.progress import track

from aspenfs.cli.client import Client
from aspenfs.fuse import mounts
from tests.mount.mounting import wait_for

ROOT: Final = Path(__file__).resolve().parents[1]
ASPEN: Final = ROOT / ".venv" / "bin" / "aspen"
PER_DIRECTORY: Final = 1000  # files
WRITTEN: Final = 4  # every so many-th file has a content, KIB
KIB: Final = b"x" * 1024
CREATE: Final = os.O_CREAT | os.O_WRONLY | os.O_EXCL
COMMAND_S, STEP_S, END_S = 600.0, 60.0, 30.0  # a join of all; until all are in step; the end of a daemon
QUIET_CPUS, QUIET_S = 0.3, 0.05  # what daemons of a cluster at rest may use, over this time


class Trouble(Exception):
    """What keeps the run from going on, in words."""


class Node:
    """A daemon with its state and mountpoint below `base`."""

    def __init__(self, base: Path, number: int, port: int) -> None:
        self.base, self.number, self.port = base, number, port
        self.mountpoint, self.state = base / "m", base / "s"
        self.client = Client(str(self.state / "ctl.sock"))

    def aspen(self, *arguments: str) -> str:
        """Runs `aspen`; what it printed. Trouble if it fails. Interrupted, it has ended when this returns."""
        command = [str(ASPEN), "--state-dir", str(self.state), *arguments]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            start_new_session=True,  # so that Ctrl-C does not reach it by itself
        )
        try:
            out, err = process.communicate(timeout=COMMAND_S)
        except BaseException:
            process.send_signal(signal.SIGINT)  # it ends a daemon that it has begun to start
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=END_S)
            process.kill()
            raise
        if process.returncode:
            raise Trouble(f"aspen {arguments[0]} at {self.base}: {err.strip() or out.strip()}")
        return out

    def place(self) -> list[str]:
        self.mountpoint.mkdir(parents=True)
        return [str(self.mountpoint), "--listen", f"127.0.0.1:{self.port}", "--name", f"n{self.number}",
                "--state-dir", str(self.state)]  # fmt: skip

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.client.call("status").result
        return status

    @property
    def pid(self) -> int:
        """Of the daemon, if there is one and it is this node's; else 0."""
        try:
            pid = int((self.state / "daemon.pid").read_text())
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except (OSError, ValueError):
            return 0
        return pid if json.dumps(str(self.state)).encode() in environ else 0

    def cpu_ns(self) -> int:
        """CPU time of all threads that the daemon has had: clock_getcpuclockid(3) of its process."""
        return time.clock_gettime_ns((~self.pid << 3) | 2)

    def memory(self) -> dict[str, int]:
        """RssAnon and RssFile, MiB."""
        lines = (line.split() for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        return {words[0][:-1]: int(words[1]) >> 10 for words in lines if words and words[0][:3] == "Rss"}

    def unmount(self) -> None:
        if mounts.find_mount(self.mountpoint) is not None:
            process = subprocess.Popen(["umount", str(self.mountpoint)], stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)  # fmt: skip
            wait_for(lambda: process.poll() is not None, END_S)

    def end(self) -> None:
        """No process and no mount is left. A daemon that waits for the others, which are gone, is killed."""
        pid = self.pid
        if pid and not wait_for(lambda: not self.pid, END_S):
            os.kill(pid, signal.SIGKILL)
            mounted = mounts.find_mount(self.mountpoint)
            if mounted is not None:
                with suppress(OSError):
                    mounts.abort(mounted.minor)
            wait_for(lambda: not self.pid, END_S)
        while mounts.find_mount(self.mountpoint) is not None:
            subprocess.run(["umount", "-l", str(self.mountpoint)], check=True)


class Cluster:
    """Three nodes that hold `size` files. Close it, whatever happens."""

    def __init__(self, base: Path, size: int, port: int) -> None:
        """The nodes use the three ports of loopback that follow `port`."""
        self.base, self.size = base, size
        self.nodes = [Node(base / str(number), number, port + number) for number in (1, 2, 3)]
        self.told: dict[str, Any] = {"files": size}  # how it was made
        self._made = False

    def make(self) -> None:
        """Trouble, also if `base` is there already."""
        try:
            self.base.mkdir()
        except FileExistsError:
            raise Trouble(f"{self.base} is there already: name a directory without it") from None
        self._made = True
        first, *others = self.nodes
        first.aspen("init", "growth", *first.place())
        begun = time.monotonic()
        Files(first, self.size).make()
        first.aspen("sync")
        self.told["fill_s"] = round(time.monotonic() - begun, 1)
        drop_names()  # a million inodes that the kernel knows are no part of what is measured
        self.settle(STEP_S)
        self.told["join_s"] = [round(self._join(node), 1) for node in others]
        self.told["snapshots"] = (first.state / "daemon.log").read_text().count("snapshot begins to=")
        self.told["state_mib"] = (first.state / "state" / "data.mdb").stat().st_blocks >> 11
        if not wait_for(self._in_step, STEP_S):
            members = first.aspen("member", "list")
            raise Trouble(f"{self.base}: not all nodes are voters and in step:\n{members}")

    def _join(self, node: Node) -> float:
        """Seconds until it is a voter: `aspen join` returns then."""
        begun = time.monotonic()
        ticket = json.loads(self.nodes[0].aspen("ticket", "create", "--json"))["ticket"]
        node.aspen("join", ticket, *node.place())
        return time.monotonic() - begun

    def _in_step(self) -> bool:
        for node in self.nodes:
            status = node.status()
            roles = [row["role"] for row in status["members"]]
            if status["problems"] or sorted(roles) != ["leader", "voter", "voter"]:
                return False
            if any(row["lag"] != 0 for row in status["members"]):
                return False
        return True

    def mount(self, role: str) -> "Files":
        """The files as seen from the leader's mount, or from that of the first of the others."""
        found: list[Node] = []

        def elected() -> bool:
            leads = [bool(node.status()["figures"]["leads"]) for node in self.nodes]
            wanted = role == "leader"
            found[:] = [node for node, lead in zip(self.nodes, leads, strict=True) if lead is wanted]
            return sum(leads) == 1

        if not wait_for(elected, STEP_S):
            raise Trouble(f"{self.base}: no leader")
        return Files(found[0], self.size, self)

    def cpu_ns(self) -> int:
        return sum(node.cpu_ns() for node in self.nodes)

    def settle(self, seconds: float = 5.0) -> None:
        """Returns when the daemons have done what they had to do behind answers, or this time has passed."""
        nodes = [node for node in self.nodes if node.pid]

        def rests() -> bool:
            before = sum(node.cpu_ns() for node in nodes)
            time.sleep(QUIET_S)
            return sum(node.cpu_ns() for node in nodes) - before < QUIET_CPUS * QUIET_S * 1e9

        wait_for(rests, seconds)

    def close(self) -> None:
        with ExitStack() as stack:  # what fails at one node does not spare the others
            stack.callback(self._remove)
            for node in self.nodes:
                stack.callback(node.client.close)
                stack.callback(node.end)
            for node in reversed(self.nodes):
                stack.callback(node.unmount)

    def _remove(self) -> None:
        if self._made:
            subprocess.run(["rm", "-rf", "--one-file-system", str(self.base)], check=True)


def drop_names() -> None:
    """The kernel forgets dentries and inodes that nobody uses, of all file systems."""
    Path("/proc/sys/vm/drop_caches").write_text("2")


class Files:
    """`size` files in directories of PER_DIRECTORY, as seen from one node's mount. A number is a name."""

    def __init__(self, node: Node, size: int, cluster: Cluster | None = None) -> None:
        self.node, self.size, self.cluster = node, size, cluster
        self.root = f"{node.mountpoint}/files/set"

    def directory(self, number: int) -> str:
        return f"{self.root}/d{number // PER_DIRECTORY:04}"

    def path(self, number: int) -> str:
        return f"{self.directory(number)}/f{number % PER_DIRECTORY:03}"

    def paths(self, numbers: Sequence[int]) -> list[str]:
        return [self.path(number) for number in numbers]

    def make(self) -> None:
        os.mkdir(self.root)
        quiet = not sys.stdout.isatty()
        for number in track(range(self.size), f"making {self.size:,} files", transient=True, disable=quiet):
            if number % PER_DIRECTORY == 0:
                os.mkdir(self.directory(number))
            if number % WRITTEN == 0:
                create(self.path(number))
            else:
                os.mknod(self.path(number), stat.S_IFREG | 0o644)

    def warm(self, numbers: Sequence[int]) -> None:
        """The kernel knows their directories: for a second, until it asks again."""
        for path in {self.directory(number) for number in numbers}:
            os.stat(path)

    def cool(self) -> None:
        """The kernel knows nothing of the files."""
        drop_names()
        if self.cluster is not None:
            self.cluster.settle()

    def mend(self, numbers: Sequence[int]) -> None:
        """After an operation that failed: what it has taken away is there again."""
        for path in self.paths(numbers):
            with suppress(OSError):
                os.rename(f"{path}~", path)
            with suppress(OSError):
                os.rmdir(f"{path}-d")
            with suppress(OSError):
                create(path)


def create(path: str, sync: bool = False) -> None:
    descriptor = os.open(path, CREATE, 0o644)
    try:
        os.write(descriptor, KIB)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)  # one that an interruption left open would keep the mount


def read(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.read(descriptor, len(KIB))
    finally:
        os.close(descriptor)
