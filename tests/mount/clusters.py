"""A cluster of real nodes for tests: each a daemon with its own state, its own mount and place in a network.

Belongs here: making it the way a person does (`aspen init`, `aspen ticket`, `aspen join`), ending and
starting nodes in every way, looking at it. Not here: where they meet, how ways are cut (`networks.py`).

Nothing that touches a mount runs in the test's own process without need: a process that waits for a daemon
that is stopped cannot be ended. `Node.run` has a deadline, and leaves such a process to `Cluster.close`,
which ends the daemons first.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from aspenfs import errors
from aspenfs.cli.client import Client
from aspenfs.cli.lock import is_dying
from aspenfs.fuse import mounts
from tests.mount.mounting import BIN, Mount, alive, wait_for
from tests.mount.networks import Network, usable_network

NAME: Final = "demo"
COMMAND_S: Final = 60.0  # for the programs of ours: two cores may start many at once
DYING_S: Final = 2.0  # for the threads of a killed daemon to end
ANSWER_S: Final = 5.0  # of a daemon that is well, on its control socket
# What a change of members or leaders may have to wait for, most of all on a busy machine.
_NOT_NOW: Final = re.compile(
    "has not caught up yet|is still fetching|did not take over|no leader now|not the leader"
    "|leadership (changed|moves)"
)


class Ended(AssertionError):
    """A command did not end in time, or not as it should."""


class Node(Mount):
    """One node; `number` from 1 is its place in the network."""

    def __init__(self, number: int, network: Network, options: str = "", *, deadline_s: float) -> None:
        super().__init__(options, deadline_s=deadline_s)
        self.number, self.network = number, network
        self.paused = False
        self.said = ""  # at its last start, on stderr
        self.left: list[subprocess.Popen[bytes]] = []  # commands that did not end in time
        self.extra: dict[str, str] = {}  # environment of the daemon
        self.releases: list[Callable[[], object]] = []  # called when it has ended for good

    def __repr__(self) -> str:
        return f"node {self.number}"

    # --- commands at its place ---

    def run(self, *command: str, timeout_s: float = COMMAND_S, check: bool = True,
            stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":  # fmt: skip
        """Runs a command; Ended if it takes longer than `timeout_s`, or fails and `check` is set."""
        process = subprocess.Popen(
            [*self.network.place(self.number), *command],
            env={**os.environ, **self.environment, **self.extra},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
        )
        self.network.started(self.number, process.pid)
        try:
            out, err = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            self.left.append(process)
            raise Ended(f"{self}: {' '.join(command)}: not ended after {timeout_s:g} s") from None
        if check and process.returncode:
            raise Ended(f"{self}: {' '.join(command)}: exit {process.returncode}: {(out + err).decode()}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def sh(self, script: str, *, timeout_s: float = COMMAND_S, check: bool = True) -> str:
        """Runs a script in the mount; what it printed."""
        text = f"cd {self.mountpoint} || exit 99\n{script}"
        return self.run("bash", "-eu", "-c", text, timeout_s=timeout_s, check=check).stdout.decode()

    def aspen(self, *arguments: str, stdin: bytes = b"", check: bool = True) -> bytes:
        return self.run(str(BIN / "aspen"), *arguments, stdin=stdin, check=check).stdout

    def refused(self, *arguments: str) -> str:
        """Runs `aspen`, which must refuse; what it said."""
        done = self.run(str(BIN / "aspen"), *arguments, check=False)
        assert done.returncode not in (0, 2), (arguments, done)
        return done.stderr.decode()

    def insist(self, *arguments: str) -> str:
        """Runs `aspen`, again while it says that another thing must happen first; what it printed."""
        said: list[str] = []

        def is_done() -> bool:
            done = self.run(str(BIN / "aspen"), *arguments, check=False)
            said.append((done.stderr if done.returncode else done.stdout).decode())
            assert not done.returncode or _NOT_NOW.search(said[-1]), said
            return not done.returncode

        assert wait_for(is_done, COMMAND_S), said
        return said[-1]

    def call(self, method: str, *, timeout_s: float = ANSWER_S, **params: Any) -> Any:
        """A request on the control socket; its result. An AspenError if the daemon is not well."""
        with Client(str(self.state / "ctl.sock"), timeout_s=timeout_s) as client:
            return client.call(method, **params).result

    def status(self) -> dict[str, Any] | None:
        """What it tells of itself; None if it does not answer."""
        if not self.lives:
            return None
        try:
            found: dict[str, Any] = self.call("status")
        except errors.AspenError:
            return None
        return found

    # --- life ---

    @property
    def lives(self) -> bool:
        return bool(self.pid) and alive(self.pid) and not is_dying(self.pid) and not self.paused

    @property
    def addresses(self) -> list[str]:
        listen, advertise = self.network.listen(self.number), self.network.advertise(self.number)
        return ["--listen", listen, "--advertise", advertise, "--name", f"n{self.number}"]

    def init(self) -> None:
        options = ["-o", self.options] if self.options else []
        self.aspen("init", NAME, str(self.mountpoint), *self.addresses, *options)
        self._started()

    def join(self, ticket: str, *more: str) -> None:
        options = ["-o", self.options] if self.options else []
        self.aspen("join", "-", str(self.mountpoint), *self.addresses, *options, *more, stdin=ticket.encode())
        self._started()

    def start(self, options: str | None = None, spec: str = NAME) -> "Node":
        """Mounts again what init or join has made; returns when the mount answers."""
        chosen = self.options if options is None else options
        wanted = ",".join(filter(None, [f"state_dir={self.state}", chosen]))
        command = [sys.executable, "-m", "aspenfs.cli.mount", spec, str(self.mountpoint), "-o", wanted]
        self.said = self.run(*command).stderr.decode()
        self._started()
        return self

    def start_refused(self) -> str:
        """Mounts again, which must fail; what was said."""
        wanted = f"state_dir={self.state}"
        command = [sys.executable, "-m", "aspenfs.cli.mount", NAME, str(self.mountpoint), "-o", wanted]
        done = self.run(*command, check=False)
        assert done.returncode, done
        return done.stderr.decode()

    def _started(self) -> None:
        self.pid = int((self.state / "daemon.pid").read_text())
        self.network.started(self.number, self.pid)
        self.extend()

    def kill(self) -> None:
        """SIGKILL, also of one that is stopped; the mount stays behind, dead, or waiting for `start` to free
        it. A thread that waits for a slow disk has time to end."""
        self.paused = False
        if self.pid and alive(self.pid):
            os.kill(self.pid, signal.SIGKILL)
            wait_for(lambda: not alive(self.pid), DYING_S)

    def pause(self) -> None:
        """SIGSTOP: who calls into the mount waits."""
        os.kill(self.pid, signal.SIGSTOP)
        self.paused = True

    def resume(self) -> None:
        if self.paused and alive(self.pid):
            os.kill(self.pid, signal.SIGCONT)
        self.paused = False

    def _unexpected(self) -> int:
        """The daemon of a start that should have been refused, if there is one; else 0."""
        try:
            pid = int((self.state / "daemon.pid").read_text())
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except (OSError, ValueError):
            return 0
        return pid if os.fsencode(f"ASPEN_STATE_DIR={self.state}") in environ.split(b"\0") else 0

    def close(self) -> None:
        if not self.pid:
            self.pid = self._unexpected()
        self.kill()  # umount would wait for a majority, which may have gone before
        if self.pid and alive(self.pid):
            number = self.connection()
            if number is not None:
                mounts.abort(number)
            assert wait_for(lambda: not alive(self.pid), COMMAND_S), f"{self} does not end"
        for release in self.releases:
            release()
        super().close()
        for process in self.left:
            process.communicate(timeout=COMMAND_S)


class Cluster:
    """Nodes by number, from 1. Close it, whatever happens: `with Cluster(3) as cluster`."""

    def __init__(self, nodes: int = 3, *, network: Network | None = None, options: str = "",
                 deadline_s: float = 110.0) -> None:  # fmt: skip
        self.network = network or usable_network(nodes)
        numbers = range(1, nodes + 1)
        self.nodes = {
            number: Node(number, self.network, options, deadline_s=deadline_s) for number in numbers
        }

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, number: int) -> Node:
        return self.nodes[number]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def __len__(self) -> int:
        return len(self.nodes)

    def start(self) -> "Cluster":
        """The first node makes the cluster, the others join it; healthy when it returns."""
        first, *others = self
        first.init()
        for node in others:
            node.join(self.ticket())
        self.wait_healthy()
        return self

    def ticket(self, *arguments: str) -> str:
        """A join ticket, made at a node that lives."""
        node = next(node for node in self if node.lives)
        return node.aspen("ticket", "create", "--quiet", *arguments).decode().strip()

    def close(self) -> None:
        """Ends all, then takes all away. What fails at one node does not spare the others."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.network.close)
            for node in self:
                stack.callback(node.close)
            for node in self:
                node.resume()
            with contextlib.suppress(subprocess.SubprocessError):  # the network may be gone already
                self.network.mend()

    def rest(self) -> None:
        """Nobody uses it for now: no deadline."""
        for node in self:
            node.rest()

    def extend(self) -> None:
        for node in self:
            node.extend()

    # --- faults ---

    def isolate(self, node: Node) -> None:
        """Its own messages are lost first, all at once."""
        others = [other.number for other in self if other is not node]
        self.network.cut(node.number, *others)
        for other in others:
            self.network.cut(other, node.number)

    def part(self, one: Node, other: Node) -> None:
        self.network.cut(one.number, other.number)
        self.network.cut(other.number, one.number)

    def mend(self) -> None:
        """The network, and nodes that were stopped; those that were killed are started by `revive`."""
        self.network.mend()
        for node in self:
            node.resume()

    def revive(self) -> None:
        self.mend()
        dead = [node for node in self if not node.lives]
        with ThreadPoolExecutor(len(self)) as pool:  # one alone would wait for a majority
            list(pool.map(Node.start, dead))

    # --- looking ---

    @property
    def living(self) -> list[Node]:
        return [node for node in self if node.lives]

    def leader(self) -> Node | None:
        """The node that says that it leads, of several the one of the highest term."""
        leaders = []
        for node in self.living:
            status = node.status()
            if status is not None and status["figures"]["leads"]:
                leaders.append((status["term"], node))
        return max(leaders, key=lambda found: found[0])[1] if leaders else None

    def wait_leader(self, seconds: float = 20.0, *, but: Node | None = None) -> Node:
        """Waits for a leader that is not `but`."""
        found: list[Node] = []

        def elected() -> bool:
            leader = self.leader()
            if leader is None or leader is but:
                return False
            found[:] = [leader]
            return True

        assert wait_for(elected, seconds), self.describe()
        return found[0]

    def wait_healthy(self, seconds: float = 30.0) -> None:
        """Every node is there, complains about nothing, sees every member and has what the leader has."""
        assert wait_for(lambda: all(map(self._is_healthy, self)), seconds), self.describe()

    def _is_healthy(self, node: Node) -> bool:
        status = node.status()
        if status is None or status["problems"] or status["leader"] is None:
            return False
        members = status["members"]
        return len(members) >= len(self) and all(member["lag"] == 0 for member in members)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        assert wait_for(condition, seconds), self.describe()

    def wait_usable(self, seconds: float) -> float:
        """Waits until a file can be made at every mount and is seen at every other one; the time it took."""
        begun = time.monotonic()
        for node in self:
            left = seconds - (time.monotonic() - begun)
            name = f"files/.usable-{node.number}"
            # Not by a redirection of the shell, which does not look at what close(2) returns.
            write = f"echo {begun} | dd of={name} conv=fsync status=none"
            node.sh(f"until {write}; do sleep 0.1; done 2>/dev/null", timeout_s=max(left, 0.1))
            for other in self:
                left = seconds - (time.monotonic() - begun)
                seen = other.sh(f"cat {name}", timeout_s=max(left, 0.1))
                assert seen.strip() == str(begun), f"{other} sees {seen!r} of {node}"
        return time.monotonic() - begun

    def digests(self, seconds: float = 30.0) -> dict[int, str]:
        """The digest of each living node's state, all at the same applied index. They should be one."""
        end = time.monotonic() + seconds
        while True:
            living = self.living
            with ThreadPoolExecutor(len(self)) as pool:  # the log grows now and then, so all at once
                answers = pool.map(lambda node: node.call("state.digest", timeout_s=30), living)
                told = {node.number: answer for node, answer in zip(living, answers, strict=True)}
            if len({one["index"] for one in told.values()}) == 1:
                return {number: one["digest"] for number, one in told.items()}
            assert time.monotonic() < end, f"no common index: {told}"
            time.sleep(0.1)

    def describe(self) -> str:
        """For whoever has to find out why something did not happen."""
        lines = []
        for node in self:
            status = node.status()
            told = None if status is None else {
                name: status[name] for name in ("leader", "term", "members", "problems", "revision")
            }  # fmt: skip
            lines.append(f"{node} pid={node.pid} paused={node.paused}: {json.dumps(told)}")
            log = node.state / "daemon.log"
            if log.exists():
                lines += [f"    {line}" for line in log.read_text(errors="replace").splitlines()[-12:]]
        return "\n".join(lines)
