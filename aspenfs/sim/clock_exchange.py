"""One process that looks at the clocks of the other voters, as `runtime/clock_watch.py` does.

What follows from it is decided by the real `ClockRates`. A question that gets lost, either way, is not asked
again before the next look.
"""

from typing import TYPE_CHECKING

from aspenfs.cluster.clock_rates import ClockRates, Reading
from aspenfs.limits import CLOCK_READINGS, CLOCK_SAMPLE_S
from aspenfs.sim.scheduler import SECOND

if TYPE_CHECKING:
    from aspenfs.sim.process import Process


class ClockExchange:
    def __init__(self, process: "Process") -> None:
        self._process = process
        self._clock = process.machine.clock
        self.rates = ClockRates(self._clock.monotonic_ns, self._clock.awake_ns)

    def begin(self) -> None:
        self._process.scheduler.after(self._clock.virtual_ns(CLOCK_SAMPLE_S * SECOND), self._due, "clocks")

    def _due(self) -> None:
        if self._process.alive:
            if not self._process.paused:
                self._process.do(self._look)
            self.begin()

    def _look(self) -> None:
        configuration = self._process.raft.configuration
        voters = {*configuration.voters, *configuration.outgoing} - {self._process.node}
        self.rates.look()
        self.rates.keep(voters)
        for node in sorted(voters):
            self._ask(node, 0, ())

    def _ask(self, node: int, life: int, readings: tuple[Reading, ...]) -> None:
        sent_ns = self._clock.monotonic_ns()
        process = self._process

        def arrives() -> None:
            peer = process.cluster.source(node, process.node)
            if peer is None:
                return
            of_life, peer_ns = peer.machine.incarnation, peer.machine.clock.monotonic_ns()
            after_ns = process.cluster.question_ns()
            process.scheduler.after(after_ns, lambda: process.do(answered, of_life, peer_ns), "clocks")

        def answered(of_life: int, peer_ns: int) -> None:
            reading = Reading(sent_ns, peer_ns, self._clock.monotonic_ns())
            self._answered(node, of_life, (*(readings if of_life == life else ()), reading))

        process.scheduler.after(process.cluster.question_ns(), arrives, "clocks")

    def _answered(self, node: int, life: int, readings: tuple[Reading, ...]) -> None:
        if len(readings) < CLOCK_READINGS:
            self._ask(node, life, readings)
        else:
            self.rates.sampled(node, life, readings)
