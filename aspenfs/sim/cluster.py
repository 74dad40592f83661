"""Several simulated machines, the network between them, and the record of all that is true of them.

Belongs here: making and finding machines, what they share, the transcript. Not here: what goes wrong and when
(`faults.py`), who asks for what (`workload.py`), how long it all goes on (`simulation.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from aspenfs.cluster.messages import Message
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.replica import Replica
from aspenfs.cluster.types import Configuration, Entry, Role
from aspenfs.kv.types import Event
from aspenfs.limits import KIB
from aspenfs.sim.invariants import Invariants
from aspenfs.sim.machine import Machine
from aspenfs.sim.network import Network, Quality
from aspenfs.sim.process import Process
from aspenfs.sim.revisions import Change
from aspenfs.sim.scheduler import MS, Scheduler, Streams

Sink = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Settings:
    """How the machines are, from the seed. Times are means of exponential distributions, in ns."""

    segment_bytes: int = 16 * KIB  # small, so that the log rolls over and is trimmed
    keep_entries: int = 50  # in memory behind the durable state; a follower that lags more gets a snapshot
    sync_ns: int = 2 * MS
    flush_ns: int = 200 * MS
    transfer_ns: int = 100 * MS  # of a snapshot
    proposal_timeout_ms: int = 3_000
    quality: Quality = field(default_factory=Quality)
    make_raft: Callable[..., Raft] = Raft
    make_replica: Callable[..., Replica] = Replica
    ignored_checks: frozenset[str] = frozenset()


class Cluster:
    """Machines 1..n that begin with one configuration of which the first `voters` are the voters."""

    def __init__(self, streams: Streams, settings: Settings, voters: int, sink: Sink | None = None) -> None:
        self.settings = settings
        self.scheduler = Scheduler()
        self.invariants = Invariants(settings.ignored_checks)
        self.network = Network(self.scheduler, streams, self._deliver, settings.quality)
        self.machines: dict[int, Machine] = {}
        self.genesis = Configuration(tuple(range(1, voters + 1)))
        self.invariants.configurations[0] = self.genesis
        self.log: dict[int, Change] = {}  # by revision: what was evaluated first
        self.went_down: Callable[[Machine], object] = lambda machine: None
        self.write_of: dict[bytes, object] = {}  # command -> the client's write that it is
        self._streams = streams
        self._rng = streams.stream("durations")
        self._questions = streams.stream("questions")
        self._hash = blake2b(digest_size=16)
        self._sink = sink
        for _ in range(voters):
            self.add_machine()

    def add_machine(self) -> Machine:
        """A new one, with an id that was never used."""
        node = len(self.machines) + 1
        machine = Machine(self, node, self._streams.fork(f"node {node}"), self.genesis)
        self.machines[node] = machine
        return machine

    # --- who there is ---

    def processes(self) -> list[Process]:
        """Those that run, the stopped ones among them."""
        return [machine.process for machine in self.machines.values() if machine.process is not None]

    def newest_configuration(self) -> Configuration:
        """The newest one that anybody has applied."""
        configurations = self.invariants.configurations
        return configurations[max(configurations)]

    def members(self) -> list[Process]:
        """The processes of its members, as far as they run."""
        members = {node for part in self.newest_configuration()[:4] for node in part}
        return [one for one in self.processes() if one.node in members]

    def leader(self) -> Process | None:
        """Who leads in the highest term, as far as anybody does."""
        leading = [one for one in self.processes() if one.raft.role is Role.LEADER and not one.paused]
        return max(leading, key=lambda one: one.raft.term, default=None)

    def source(self, node: int, to: int) -> Process | None:
        """The process at `node`, if `to` could exchange requests with it now."""
        machine = self.machines.get(node)
        process = machine.process if machine is not None else None
        if process is None or process.paused:
            return None
        return process if self.network.reachable(node, to) and self.network.reachable(to, node) else None

    def elected(self, leader: Process) -> None:
        """No lease of another leader may outlive an election (Raft §6.4.1)."""
        for other in self.processes():
            if other.raft.term < leader.raft.term and other.replica._has_lease():
                self.invariants.conflict(other.node, other.raft.term, leader.node, leader.raft.term)
        self.trace(f"node {leader.node} leads in term {leader.raft.term}")

    def _deliver(self, to: int, sender: int, message: Message) -> None:
        machine = self.machines.get(to)
        if machine is not None and machine.process is not None:
            if self._sink is not None:
                self._sink(self._stamped(f"{sender} -> {to} {shown(message)}"))
            machine.process.deliver(sender, message)

    def first_applied(self, entry: Entry, events: Sequence[Event]) -> None:
        """What an entry did, seen for the first time."""
        write = None
        if events:
            data = entry.data[16:] if entry.kind == 3 else entry.data
            write = self.write_of.get(data)
        changes = [(event.key, event.record.value if event.record else None) for event in events]
        self.log[entry.index] = Change(entry.index, changes, write)

    # --- durations ---

    def sync_ns(self) -> int:
        return self._drawn(self.settings.sync_ns)

    def flush_ns(self) -> int:
        return self._drawn(self.settings.flush_ns)

    def transfer_ns(self) -> int:
        return self._drawn(self.settings.transfer_ns)

    def question_ns(self) -> int:
        """One way of a request between nodes that takes no time itself."""
        quality = self.network.quality
        return quality.delay_min_ns + int(self._questions.expovariate(1.0) * quality.delay_mean_ns)

    def _drawn(self, mean_ns: int) -> int:
        return 1 + int(self._rng.expovariate(1.0) * mean_ns)

    # --- the transcript ---

    def trace(self, line: str) -> None:
        text = self._stamped(line)
        self._hash.update(text.encode() + b"\n")
        if self._sink is not None:
            self._sink(text)

    def _stamped(self, line: str) -> str:
        return f"{self.scheduler.now_ns / MS:12.3f} {line}"

    def transcript_hash(self) -> str:
        """Equal for equal courses of events: of all lines but those of single messages, and the totals."""
        network, operations = self.network, [machine.disk.operations for machine in self.machines.values()]
        self.trace(f"events={self.scheduler.events} sent={network.sent} delivered={network.delivered} "
                   f"disk={operations} committed={self.invariants.commit}")  # fmt: skip
        return self._hash.hexdigest()

    def close(self) -> None:
        for machine in self.machines.values():
            machine.close()


def shown(message: Message) -> str:
    """One line for people: what is not zero."""
    fields: dict[str, Any] = message._asdict()
    parts = [f"{message.type.name} term={message.term}"]
    numbers = ("log_term", "index", "commit", "reject", "reject_hint")
    parts += [f"{name}={int(fields[name])}" for name in numbers if fields[name]]
    if message.entries:
        parts.append("entries=" + ",".join(f"{one.index}@{one.term}" for one in message.entries))
    if message.context:
        parts.append(f"context={message.context.hex()}")
    if message.snapshot is not None:
        parts.append(f"snapshot={message.snapshot.index}@{message.snapshot.term}")
    return " ".join(parts)
