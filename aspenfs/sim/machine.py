"""One simulated machine: what outlives a process, and how a process begins and ends on it.

Belongs here: disk, state, clock, faults that wait for their moment, starting and going down. Not here: what
a process does (`process.py`), who kills whom (`faults.py`).
"""

from typing import TYPE_CHECKING

from aspenfs.cluster.types import Configuration
from aspenfs.errors import Corrupt, NoSpace, StorageError
from aspenfs.runtime.wal_recovery import SPARE
from aspenfs.sim.clock import DRIFT_PPM_MAX, SimClock
from aspenfs.sim.disk import SimDisk, SimulatedCrash
from aspenfs.sim.invariants import Violation
from aspenfs.sim.process import Process
from aspenfs.sim.scheduler import SECOND, Streams
from aspenfs.sim.state import SimState, meta_of
from aspenfs.sim.threads import SyncThread

if TYPE_CHECKING:
    from aspenfs.sim.cluster import Cluster


class Machine:
    """What outlives a process: disk, state, clock, and how often a process began here."""

    def __init__(self, cluster: "Cluster", node: int, streams: Streams, genesis: Configuration) -> None:
        self.cluster, self.node = cluster, node
        self.rng = streams.stream("machine")
        self.clock = SimClock(cluster.scheduler, boot_ns=self.rng.randrange(1_000 * SECOND),
                              wall_offset_ns=self.rng.randrange(-2 * SECOND, 2 * SECOND))  # fmt: skip
        self.clock.set_drift(self.rng.randint(-DRIFT_PPM_MAX, DRIFT_PPM_MAX))
        self.disk = SimDisk(self.rng.getrandbits(32))
        self.disk.gate = self._gate
        self.state = SimState()
        self.state.apply([], 0, meta_of(0, genesis))
        self.state.sync()
        self.incarnation = 0
        self.reset_at: int | None = None  # a snapshot has taken the state's place, the log must follow
        self.thread = SyncThread()
        self.process: Process | None = None
        # Faults that wait for their moment:
        self.crash_in: int | None = None  # effects until the process is torn out of one
        self.power = True  # whether it takes the power with it
        self.stall_until_ns = 0  # syncs end after it
        self.flipped = False  # a bit of its disk is not what was written
        self.gone = ""  # why it never comes back

    def _gate(self, name: str) -> None:
        if name != SPARE:  # the log prepares its next segment inside a lock: that takes no time here
            self.thread.gate()

    @property
    def up(self) -> bool:
        return self.process is not None

    def start(self) -> None:
        """A process begins, unless one is there or the machine is gone."""
        if self.process is not None or self.gone:
            return
        self.disk.restart()
        self.incarnation += 1
        try:
            process = Process(self)
        except SimulatedCrash:
            self._cannot_start(self.power, "it went down again")
        except Corrupt as error:
            if not self.flipped:
                raise Violation("start", f"node {self.node} does not start: {error}") from error
            self.lose(f"refuses a damaged disk: {error}")
        except (StorageError, NoSpace) as error:
            self._cannot_start(power=False, why=str(error))
        else:
            self.process = process
            self.cluster.trace(f"node {self.node} starts, life {self.incarnation}, {process.described()}")
            process.begin()

    def _cannot_start(self, power: bool, why: str) -> None:
        self.cluster.trace(f"node {self.node} cannot start: {why}")
        self._went_down(power)
        self.cluster.went_down(self)

    def down(self, power: bool) -> None:
        """The process ends in the middle of whatever it does; `power`: the machine with it."""
        process, self.process = self.process, None
        if process is not None:
            self.cluster.trace(f"node {self.node} goes down, power={power}, {process.described()}")
            process.alive = False
        self._went_down(power)
        if process is not None:
            process.over()
            self.cluster.went_down(self)

    def _went_down(self, power: bool) -> None:
        if power:
            self.disk.crash()
            self.state.lose_power(self.rng)
            self.cluster.invariants.state_synced(self.node, self.state.durable_index)
        else:
            self.disk.kill()
        while self.thread.busy:  # its disk call fails now
            self.thread.go_on()
        self.crash_in = None
        self.disk.heal()

    def lose(self, why: str) -> None:
        """The machine and its disk never come back."""
        if self.process is not None:
            self.down(power=True)
        self.gone = why
        self.cluster.trace(f"node {self.node} is gone: {why}")

    def close(self) -> None:
        if self.process is not None:
            self.down(power=False)
        self.thread.close()
