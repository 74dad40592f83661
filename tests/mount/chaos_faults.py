"""Faults of a chaos run: what goes wrong with nodes, their disks and the ways between them.

Each one begins, lasts a while, and leaves the cluster as it is: `Cluster.revive` heals it. Belongs here: the
faults, and which comes when. Not here: the load, what must hold afterwards (`chaos.py`).
"""

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from aspenfs import errors
from tests.mount.clusters import Cluster, Node
from tests.mount.tearing import environment, tear

# Of the node that has a disk of its own, sparse. A node that is started again within two minutes collects no
# chunk (docs/design/blobs.md), so under these faults all that the load replaces stays: some 1 MiB/s.
DISK_BYTES: Final = 8 << 30
_SLOW_ON_S, _SLOW_OFF_S = 0.08, 0.15


class SmallDisk:
    """A file system of a node's own for its state, on a loop device, that can be filled to the last block."""

    def __init__(self, node: Node, size: int = DISK_BYTES) -> None:
        """Before the node has any state."""
        self._image, self._path = node.base / "image", node.base / "disk"
        self._filler = self._path / "filler"
        self._path.mkdir()
        with self._image.open("wb") as file:
            file.truncate(size)
        # No blocks are kept back for root, who runs the daemon.
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(self._image)], check=True, timeout=60)
        subprocess.run(["mount", "-o", "loop", str(self._image), str(self._path)], check=True, timeout=30)
        node.releases.append(self.release)
        node.state = self._path / "state"
        node.environment["ASPEN_STATE_DIR"] = str(node.state)

    def fill(self) -> None:
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            free = os.statvfs(self._path)
            os.posix_fallocate(file.fileno(), 0, free.f_bfree * free.f_frsize * 998 // 1000)
        piece = bytes(1 << 20)
        with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as file:
            while True:
                file.write(piece)

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)

    def release(self) -> None:
        subprocess.run(["umount", str(self._path)], check=True, timeout=60)


class Fault(NamedTuple):
    """What happened, for the table: its kind, whom it hit."""

    kind: str
    nodes: tuple[int, ...]
    seconds: float
    torn_bytes: int = 0


class Nemesis:
    """Picks faults by a seed. One node has a disk of its own that may be full."""

    def __init__(self, cluster: Cluster, rng: random.Random, *, hurry: float = 1.0) -> None:
        """`hurry`: how much shorter than usual faults last. Before the nodes have any state."""
        self.cluster, self.rng, self.hurry = cluster, rng, hurry
        for node in cluster:
            self._trace(node)
        self.small = list(cluster)[-1]
        self.disk = SmallDisk(self.small)
        self.kinds: dict[str, Callable[[], Fault]] = {
            "kill": self._kill,
            "pause": self._pause,
            "isolate": self._isolate,
            "one-way": self._one_way,
            "torn tail": self._torn_tail,
            "disk full": self._disk_full,
            "slow": self._slow,
            "bridge": self._bridge,
            "kill all": self._kill_all,
            "blackout": self._blackout,
            "shatter": self._shatter,
            "transfer": self._transfer,
        }

    def _trace(self, node: Node) -> None:
        node.extra = environment(node.base / "trace")

    def strike(self, kind: str) -> Fault:
        """The fault, which is over when it returns, but not healed."""
        begun = time.monotonic()
        fault = self.kinds[kind]()
        return fault._replace(seconds=round(time.monotonic() - begun, 1))

    def heal(self) -> None:
        self.disk.empty()
        self.cluster.revive()

    # --- choosing ---

    def _victim(self) -> Node:
        """The leader more often than chance would have it."""
        leader = self.cluster.leader()
        if leader is not None and self.rng.random() < 0.5:
            return leader
        return self.rng.choice(list(self.cluster))

    def _last(self, shortest_s: float, longest_s: float) -> None:
        time.sleep(self.rng.uniform(shortest_s, longest_s) / self.hurry)

    # --- the faults ---

    def _kill(self) -> Fault:
        victim = self._victim()
        victim.kill()
        self._last(0.2, 5)
        return Fault("kill", (victim.number,), 0)

    def _kill_all(self) -> Fault:
        for node in self.rng.sample(list(self.cluster), len(self.cluster)):
            node.kill()
            time.sleep(self.rng.uniform(0, 0.3))
        return Fault("kill all", tuple(self.cluster.nodes), 0)

    def _pause(self) -> Fault:
        victim = self._victim()
        victim.pause()
        self._last(1.5, 6)
        return Fault("pause", (victim.number,), 0)

    def _isolate(self) -> Fault:
        victim = self._victim()
        self.cluster.isolate(victim)
        self._last(1.5, 8)
        return Fault("isolate", (victim.number,), 0)

    def _one_way(self) -> Fault:
        """One node hears nobody, or is heard by nobody, or is not heard by one other."""
        victim = self._victim()
        others = [node for node in self.cluster if node is not victim]
        draw = self.rng.random()
        for other in others if draw < 0.7 else self.rng.sample(others, 1):
            ways = (victim, other) if draw < 0.35 else (other, victim)
            self.cluster.network.cut(ways[0].number, ways[1].number)
        self._last(1.5, 8)
        return Fault("one-way", (victim.number,), 0)

    def _bridge(self) -> Fault:
        """Two nodes do not see each other; the others see both."""
        one, other = self.rng.sample(list(self.cluster), 2)
        self.cluster.part(one, other)
        self._last(1.5, 8)
        return Fault("bridge", (one.number, other.number), 0)

    def _shatter(self) -> Fault:
        """Nobody sees anybody."""
        for node in self.cluster:
            self.cluster.isolate(node)
        self._last(2, 12)
        return Fault("shatter", tuple(self.cluster.nodes), 0)

    def _torn_tail(self) -> Fault:
        """A loss of power at one node: what was not synced is lost or garbage."""
        victim = self._victim()
        victim.kill()
        spoiled = tear(victim.state / "wal", victim.base / "trace", self.rng)
        self._last(0, 2)
        return Fault("torn tail", (victim.number,), 0, spoiled)

    def _blackout(self) -> Fault:
        """A loss of power everywhere at once: what a majority had not synced is nowhere."""
        for node in self.cluster:
            node.kill()
        spoiled = [tear(node.state / "wal", node.base / "trace", self.rng) for node in self.cluster]
        return Fault("blackout", tuple(self.cluster.nodes), 0, sum(spoiled))

    def _disk_full(self) -> Fault:
        self.disk.fill()
        self._last(2, 8)
        return Fault("disk full", (self.small.number,), 0)

    def _slow(self) -> Fault:
        """A node that is scheduled now and then: its disk and its answers are late."""
        victim = self._victim()
        end = time.monotonic() + self.rng.uniform(2, 6) / self.hurry
        while time.monotonic() < end:
            victim.pause()
            time.sleep(_SLOW_OFF_S * self.rng.uniform(0.5, 2))
            victim.resume()
            time.sleep(_SLOW_ON_S * self.rng.uniform(0.5, 2))
        return Fault("slow", (victim.number,), 0)

    def _transfer(self) -> Fault:
        """Leadership goes around."""
        node = self.rng.choice(list(self.cluster))
        for _ in range(3):
            with contextlib.suppress(errors.AspenError):
                node.call("leader.transfer", member="", timeout_s=15)
        return Fault("transfer", (node.number,), 0)
