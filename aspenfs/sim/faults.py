"""What goes wrong, how often and for how long: chosen by a seed, and each fault can be left out.

Belongs here: the kinds of fault, when each happens, bringing back what went down, changes of the
membership, and the end of all trouble (`heal`). Not here: how a fault works inside (`machine.py`,
`network.py`, `disk.py`).

Swarm testing (Groce et al., 2012): each seed switches each kind on or off, so that some runs have much of a
few. Fault n draws from a stream of its own, and when it happens does not depend on whether others do: so a
failing run can be shrunk by leaving out faults.

The promises hold while a majority of the voters have their disks: no fault here destroys more than a
minority.
"""

import errno
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from aspenfs import errors
from aspenfs.cluster.membership import Change, ChangeKind, ConfigurationChange, Transition
from aspenfs.cluster.types import Configuration
from aspenfs.runtime.wal_recovery import recover
from aspenfs.sim import network
from aspenfs.sim.clock import DRIFT_PPM_MAX
from aspenfs.sim.cluster import Cluster
from aspenfs.sim.disk import Operation
from aspenfs.sim.invariants import majority
from aspenfs.sim.machine import Machine
from aspenfs.sim.process import CLUSTER_ID, Process
from aspenfs.sim.scheduler import MS, SECOND, Streams, log_uniform

KINDS: Final = (
    "crash", "crash_in_effect", "crash_in_disk", "blackout", "pause", "partition", "slow", "lossy", "reset",
    "drift", "leap", "set_wall", "sync_error", "write_error", "full", "stall", "flip", "wipe", "transfer",
    "add", "promote", "demote", "remove", "replace",
)  # fmt: skip
_MACHINES_MAX: Final = 12  # ever made in a run


@dataclass(frozen=True, slots=True)
class Swarm:
    """Which kinds of fault a run has, and their mean distance in ns of virtual time."""

    kinds: tuple[str, ...] = ()
    gap_ns: int = SECOND


class Faults:
    """Lets things go wrong until `heal`. `done` tells what was done: (number of the fault, words)."""

    def __init__(
        self, cluster: Cluster, streams: Streams, swarm: Swarm, left_out: frozenset[int] = frozenset()
    ) -> None:
        self.cluster, self.swarm, self._left_out = cluster, swarm, left_out
        self._streams = streams.fork("faults")
        self._restarts = streams.stream("restarts")
        self._number = 0
        self._at_ns = 0
        self._healed = False
        self.done: list[tuple[int, str]] = []
        cluster.went_down = self._bring_back

    def start(self) -> None:
        for machine in list(self.cluster.machines.values()):
            machine.start()
        if self.swarm.kinds:
            self._plan()

    def _plan(self) -> None:
        self._number += 1
        number = self._number
        rng = self._streams.stream(str(number))
        self._at_ns += int(rng.expovariate(1.0) * self.swarm.gap_ns)
        kind = rng.choice(self.swarm.kinds)
        self.cluster.scheduler.at(self._at_ns, lambda: self._happen(number, kind, rng), "fault")

    def _happen(self, number: int, kind: str, rng: random.Random) -> None:
        if self._healed:
            return
        if number not in self._left_out:
            act: Callable[[random.Random], str] = getattr(self, f"_{kind}")
            words = act(rng)
            if words:
                self.done.append((number, f"{kind}: {words}"))
                self.cluster.trace(f"fault {number} {kind}: {words}")
        self._plan()

    def heal(self) -> None:
        """Nothing goes wrong any more; everything that has not been destroyed comes back."""
        self._healed = True
        cluster = self.cluster
        cluster.trace("all faults end")
        cluster.network.heal()
        cluster.network.quality = replace(cluster.settings.quality, drop=0.0, duplicate=0.0, hold=0.0)
        for machine in list(cluster.machines.values()):
            machine.disk.heal()
            machine.disk.capacity_bytes = 1 << 40
            machine.stall_until_ns = 0
            machine.crash_in = None
            if machine.process is not None:
                machine.process.end_stall()
                machine.process.resume()
            machine.start()

    # --- whom ---

    def _bring_back(self, machine: Machine) -> None:
        """The supervisor of a machine: what goes down is started again."""
        if machine.gone:
            return
        delay = 10 * MS if self._healed else int(log_uniform(self._restarts, 20 * MS, 5 * SECOND))
        self.cluster.scheduler.after(delay, machine.start, "restart")

    def _some_process(self, rng: random.Random) -> Process | None:
        """Any that runs, the leader more often than others."""
        leader = self.cluster.leader()
        if leader is not None and rng.random() < 0.4:
            return leader
        up = self.cluster.processes()
        return rng.choice(up) if up else None

    def _bearable(self, configuration: Configuration, without: Iterable[int] = ()) -> bool:
        """Whether a majority of the voters would still have their disks."""
        machines = self.cluster.machines.items()
        there = {node for node, machine in machines if not machine.gone and not machine.flipped}
        return majority(configuration, there - set(without))

    def _may_lose(self, node: int) -> bool:
        """A change of the configuration that is under way may count on that disk: not now."""
        leader = self.cluster.leader()
        if leader is None or leader.raft.change_pending or not self._settled():
            return False
        return self._bearable(self.cluster.newest_configuration(), [node])

    def _settled(self) -> bool:
        """Whether a majority of the newest configuration knows, for good, that it is that. Before, who was
        removed may be needed for one more election: the others may not know that they can do without it."""
        invariants = self.cluster.invariants
        newest = max(invariants.configurations)
        know = [node for node, record in invariants.nodes.items() if record.state_durable >= newest]
        return majority(self.cluster.newest_configuration(), know)

    def _later(self, rng: random.Random, low_ns: int, high_ns: int, act: Callable[[], object]) -> int:
        """`act` after a while, its length in ms."""
        delay = int(log_uniform(rng, low_ns, high_ns))
        self.cluster.scheduler.after(delay, act, "fault ends")
        return delay // MS

    # --- processes and machines ---

    def _crash(self, rng: random.Random) -> str:
        process, power = self._some_process(rng), rng.random() < 0.5
        if process is None:
            return ""
        process.machine.down(power)
        return f"node {process.node} power={power}"

    def _crash_in_effect(self, rng: random.Random) -> str:
        process, power, effects = self._some_process(rng), rng.random() < 0.5, rng.randint(1, 40)
        if process is None:
            return ""
        process.machine.crash_in, process.machine.power = effects, power
        return f"node {process.node} in effect {effects} power={power}"

    def _crash_in_disk(self, rng: random.Random) -> str:
        process, power, operation = self._some_process(rng), rng.random() < 0.7, rng.randint(1, 30)
        if process is None:
            return ""
        machine = process.machine
        machine.power = power
        (machine.disk.crash_at if power else machine.disk.kill_at)(machine.disk.operations + operation)
        return f"node {process.node} in disk operation {operation} power={power}"

    def _blackout(self, rng: random.Random) -> str:
        for process in self.cluster.processes():
            process.machine.down(power=True)
        return "the power fails everywhere"

    def _pause(self, rng: random.Random) -> str:
        process = self._some_process(rng)
        if process is None or process.paused:
            return ""
        process.pause()
        return f"node {process.node} for {self._later(rng, 20 * MS, 5 * SECOND, process.resume)} ms"

    # --- network ---

    def _partition(self, rng: random.Random) -> str:
        nodes = list(self.cluster.machines)
        if len(nodes) < 2:
            return ""
        rng.shuffle(nodes)
        process = self._some_process(rng)
        one = process.node if process is not None else nodes[0]
        shapes: dict[str, Sequence[network.Link]] = {
            "halves": network.halves(nodes, nodes[: rng.randint(1, len(nodes) - 1)]),
            "isolated": network.halves(nodes, [one]),
            "deaf": network.one_way(nodes, one),
            "dumb": [(to, sender) for sender, to in network.one_way(nodes, one)],
            "bridge": network.bridge(nodes, one),
            "ring": network.ring(nodes),
            "pair": network.between(nodes[:1], nodes[1:2]),
        }
        shape = rng.choice(sorted(shapes))
        links = shapes[shape]
        self.cluster.network.block(links)
        lasts = self._later(rng, 100 * MS, 8 * SECOND, lambda: self.cluster.network.unblock(links))
        return f"{shape} of {nodes} around {one} for {lasts} ms"

    def _slow(self, rng: random.Random) -> str:
        nodes = list(self.cluster.machines)
        one = rng.choice(nodes)
        delay = int(log_uniform(rng, 10 * MS, SECOND))
        quality = replace(self.cluster.network.quality, delay_mean_ns=delay)
        self.cluster.network.slow(network.halves(nodes, [one]), quality)
        lasts = self._later(rng, 100 * MS, 8 * SECOND, self.cluster.network.restore)
        return f"node {one} by {delay // MS} ms for {lasts} ms"

    def _lossy(self, rng: random.Random) -> str:
        before = self.cluster.network.quality
        worse = replace(before, drop=rng.random() / 2, duplicate=rng.random() / 4, hold=rng.random() / 20,
                        ordered=rng.random() < 0.5)  # fmt: skip
        self.cluster.network.quality = worse

        def better() -> None:
            if self.cluster.network.quality is worse:
                self.cluster.network.quality = before

        return f"drop={worse.drop:.2f} for {self._later(rng, 100 * MS, 8 * SECOND, better)} ms"

    def _reset(self, rng: random.Random) -> str:
        nodes = list(self.cluster.machines)
        if len(nodes) < 2:
            return ""
        one, other = rng.sample(nodes, 2)
        self.cluster.network.reset(one, other)
        for node, peer in ((one, other), (other, one)):
            process = self.cluster.machines[node].process
            if process is not None:
                process.do(process.raft.report_unreachable, peer)
        return f"the connection of {one} and {other} breaks"

    # --- clocks ---

    def _drift(self, rng: random.Random) -> str:
        machine = self.cluster.machines[rng.choice(list(self.cluster.machines))]
        machine.clock.set_drift(rng.randint(-DRIFT_PPM_MAX, DRIFT_PPM_MAX))
        return f"node {machine.node} by {machine.clock.drift_ppm} ppm"

    def _leap(self, rng: random.Random) -> str:
        machine = self.cluster.machines[rng.choice(list(self.cluster.machines))]
        by_ns = int(log_uniform(rng, MS, 20 * SECOND))
        machine.clock.leap(by_ns)
        return f"node {machine.node} by {by_ns // MS} ms"

    def _set_wall(self, rng: random.Random) -> str:
        machine = self.cluster.machines[rng.choice(list(self.cluster.machines))]
        by_ns = rng.randint(-60 * SECOND, 60 * SECOND)
        machine.clock.set_wall(by_ns)
        return f"node {machine.node} by {by_ns // MS} ms"

    # --- disks ---

    def _sync_error(self, rng: random.Random) -> str:
        return self._disk_error(rng, "datasync")

    def _write_error(self, rng: random.Random) -> str:
        return self._disk_error(rng, "pwrite")

    def _disk_error(self, rng: random.Random, operation: Operation) -> str:
        """The next few such operations of a disk go well, then one does not."""
        process = self._some_process(rng)
        if process is None:
            return ""
        disk = process.machine.disk
        disk.fail(operation, errno.EIO, at=disk.operations + rng.randint(1, 20))
        return f"node {process.node}"

    def _full(self, rng: random.Random) -> str:
        process = self._some_process(rng)
        if process is None:
            return ""
        disk = process.machine.disk
        disk.capacity_bytes = disk.used_bytes + rng.randrange(self.cluster.settings.segment_bytes)

        def room() -> None:
            disk.capacity_bytes = 1 << 40

        return f"node {process.node} for {self._later(rng, 100 * MS, 8 * SECOND, room)} ms"

    def _stall(self, rng: random.Random) -> str:
        process = self._some_process(rng)
        if process is None:
            return ""
        lasts = int(log_uniform(rng, 50 * MS, 10 * SECOND))
        process.machine.stall_until_ns = self.cluster.scheduler.now_ns + lasts
        return f"node {process.node} for {lasts // MS} ms"

    def _flip(self, rng: random.Random) -> str:
        """A bit of a log at rest. Whatever of it was promised must be there, or the node must not start."""
        process = self._some_process(rng)
        if process is None or not self._may_lose(process.node):
            return ""
        machine = process.machine
        machine.down(power=False)
        machine.disk.restart()
        # Behind the last place that the log itself calls durable, damage looks like a torn tail (wal.md).
        found = recover(machine.disk, "wal", CLUSTER_ID)
        found.close()
        number, offset = found.synced
        ends = [(one.name, offset if one.number == number else one.end)
                for one in found.segments if one.number <= number]  # fmt: skip
        if ends:
            name, end = rng.choice(ends)
            at, bit = rng.randrange(end), rng.randrange(8)
            machine.disk.flip(f"wal/{name}", at, bit)
            machine.flipped = True
            words = f"node {machine.node} {name} at {at} bit {bit}"
        else:
            words = f"node {machine.node}, which has no log yet"
        machine.disk.kill()
        return words

    def _wipe(self, rng: random.Random) -> str:
        """A disk is lost. A node without it must not come back under its id: a new one joins."""
        process = self._some_process(rng)
        if process is None or not self._may_lose(process.node):
            return ""
        process.machine.lose("its disk is lost")
        return f"node {process.node}"

    # --- membership ---

    def _transfer(self, rng: random.Random) -> str:
        leader = self.cluster.leader()
        if leader is None:
            return ""
        to = rng.choice(leader.raft.configuration.voters)
        leader.do(self._try, leader, lambda: leader.replica.transfer_leader(to))
        return f"from {leader.node} to {to}"

    def _try(self, process: Process, ask: Callable[[], object]) -> None:
        try:
            ask()
        except (errors.NotLeader, errors.Busy, errors.InvalidArgument) as error:
            self.cluster.trace(f"node {process.node} refuses: {error}")
        process.replica.pump()

    def _change(self, leader: Process, *changes: Change, transition: int = Transition.AUTO) -> str:
        change = ConfigurationChange(changes, transition)
        leader.do(self._try, leader, lambda: leader.replica.change_configuration(change))
        return ", ".join(f"{ChangeKind(kind).name} {node}" for kind, node in changes)

    def _settled_leader(self) -> Process | None:
        """A leader with no change under way, as an operator sees one."""
        leader = self.cluster.leader()
        if leader is None or leader.raft.configuration != self.cluster.newest_configuration():
            return None
        configuration = leader.raft.configuration
        if configuration.outgoing and not configuration.auto_leave:
            leader.do(self._try, leader, lambda: leader.replica.change_configuration(ConfigurationChange()))
            return None
        return None if leader.raft.change_pending else leader

    def _bearable_after(self, leader: Process, *changes: Change) -> bool:
        """Whether the voters that would be left have a majority of disks, and those of both halves too."""
        voters = set(leader.raft.configuration.voters)
        for kind, node in changes:
            (voters.add if kind == ChangeKind.ADD_VOTER else voters.discard)(node)
        after = Configuration(tuple(sorted(voters)), leader.raft.configuration.voters)
        return bool(voters) and self._bearable(after)

    def _add(self, rng: random.Random) -> str:
        leader = self._settled_leader()
        if leader is None or len(self.cluster.machines) >= _MACHINES_MAX:
            return ""
        machine = self.cluster.add_machine()
        machine.start()
        return self._change(leader, Change(ChangeKind.ADD_LEARNER, machine.node))

    def _caught_up(self, leader: Process) -> list[int]:
        """Learners that a host would promote."""
        progress, last = leader.raft.progress(), leader.raft.last_index
        return [
            node for node in leader.raft.configuration.learners
            if last - progress[node].match < 50 and self.cluster.machines[node].up
        ]  # fmt: skip

    def _promote(self, rng: random.Random) -> str:
        leader = self._settled_leader()
        ready = self._caught_up(leader) if leader is not None else []
        if leader is None or not ready:
            return ""
        change = Change(ChangeKind.ADD_VOTER, rng.choice(ready))
        return self._change(leader, change) if self._bearable_after(leader, change) else ""

    def _demote(self, rng: random.Random) -> str:
        leader = self._settled_leader()
        if leader is None:
            return ""
        change = Change(ChangeKind.ADD_LEARNER, rng.choice(leader.raft.configuration.voters))
        return self._change(leader, change) if self._bearable_after(leader, change) else ""

    def _remove(self, rng: random.Random) -> str:
        """One that is gone rather than one that lives. Later it is switched off."""
        leader = self._settled_leader()
        if leader is None:
            return ""
        members = [*leader.raft.configuration.voters, *leader.raft.configuration.learners]
        gone = [node for node in members if self.cluster.machines[node].gone]
        node = rng.choice(gone or members)
        change = Change(ChangeKind.REMOVE, node)
        if not self._bearable_after(leader, change):
            return ""

        def off() -> None:
            if node in {one for part in self.cluster.newest_configuration()[:4] for one in part}:
                return
            if self._settled():
                self.cluster.machines[node].lose("it was removed")
            else:
                self.cluster.scheduler.after(SECOND, off, "fault ends")

        words = self._change(leader, change)
        return f"{words}, off after {self._later(rng, 100 * MS, 5 * SECOND, off)} ms"

    def _replace(self, rng: random.Random) -> str:
        """Several changes at once, through a joint configuration."""
        leader = self._settled_leader()
        if leader is None:
            return ""
        configuration = leader.raft.configuration
        ready = self._caught_up(leader)
        changes = [Change(ChangeKind.ADD_VOTER, node) for node in ready[: rng.randint(0, 2)]]
        leaving = rng.sample(configuration.voters, rng.randint(0, min(2, len(configuration.voters))))
        changes += [Change(rng.choice((ChangeKind.REMOVE, ChangeKind.ADD_LEARNER)), node) for node in leaving]
        if not changes or not self._bearable_after(leader, *changes):
            return ""
        transition = rng.choice((Transition.AUTO, Transition.JOINT_IMPLICIT, Transition.JOINT_EXPLICIT))
        return self._change(leader, *changes, transition=transition)
