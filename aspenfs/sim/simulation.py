"""A whole simulated life of a cluster from one seed: trouble, then peace, then the checks of the end.

Belongs here: choosing a run from a seed, running it, judging it, shrinking one that failed. `tools/simulate`
is its command line. Equal seeds and equal options give equal transcripts, in any interpreter.
"""

import functools
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from aspenfs.cluster.raft import Raft
from aspenfs.cluster.replica import Replica
from aspenfs.kv import types
from aspenfs.limits import ELECTION_TICKS, KIB, TICK_MS
from aspenfs.sim import serving
from aspenfs.sim.cluster import Cluster, Settings, Sink
from aspenfs.sim.disk import SimulatedCrash
from aspenfs.sim.faults import KINDS, Faults, Swarm
from aspenfs.sim.invariants import Violation
from aspenfs.sim.network import Quality
from aspenfs.sim.process import Process
from aspenfs.sim.scheduler import MS, SECOND, Streams, log_uniform
from aspenfs.sim.workload import Mix, Workload

LEADER_WITHIN_NS: Final = 10 * ELECTION_TICKS * TICK_MS * MS
ANSWERED_WITHIN_NS: Final = 90 * SECOND  # all that clients have begun, retries included
_EVENTS_MAX: Final = 2_000_000  # of the peace at the end: more is a cluster that never comes to rest


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about a run but chance itself."""

    seed: int
    steps: int  # events until all faults end
    nodes: int
    settings: Settings
    swarm: Swarm
    mix: Mix
    left_out: frozenset[int] = frozenset()  # numbers of faults


@dataclass(slots=True)
class Result:
    seed: int
    check: str = ""  # which check failed; empty: none
    message: str = ""
    faults: list[tuple[int, str]] = field(default_factory=list)
    events: int = 0
    committed: int = 0
    operations: int = 0
    terms: int = 0
    virtual_ns: int = 0
    transcript: str = ""  # its hash

    @property
    def failed(self) -> bool:
        return bool(self.check)


def plan(seed: int, steps: int, nodes: int = 0) -> Plan:
    """The run of a seed. `nodes` 0: as many as the seed says."""
    rng = Streams(seed).stream("swarm")
    chosen = rng.choice((1, 3, 3, 3, 5))
    kinds = tuple(kind for kind in KINDS if rng.random() < 0.4)
    swarm = Swarm(kinds, int(log_uniform(rng, 80 * MS, 3 * SECOND)))
    return Plan(seed, steps, nodes or chosen, _settings(rng), swarm, _mix(rng))


def _settings(rng: random.Random) -> Settings:
    segment_bytes = rng.choice((32, 64, 256)) * KIB
    # In proportion to the segments, as the real bounds are: what is written at once fits into one.
    raft = functools.partial(
        Raft, max_append_bytes=segment_bytes // 16, max_inflight_messages=rng.choice((1, 4, 256)),
        max_inflight_bytes=segment_bytes // 4, max_uncommitted_bytes=segment_bytes // 4)  # fmt: skip
    quality = Quality(
        delay_mean_ns=int(log_uniform(rng, MS // 10, 30 * MS)), drop=rng.choice((0.0, 0.0, 0.01, 0.1)),
        duplicate=rng.choice((0.0, 0.0, 0.05)), hold=rng.choice((0.0, 0.0, 0.01)),
        ordered=rng.random() < 0.7)  # fmt: skip
    return Settings(
        segment_bytes, keep_entries=rng.choice((0, 10, 100, 1_000)),
        sync_ns=int(log_uniform(rng, MS // 5, 30 * MS)), flush_ns=int(log_uniform(rng, 20 * MS, SECOND)),
        transfer_ns=int(log_uniform(rng, 10 * MS, SECOND)),
        proposal_timeout_ms=rng.choice((500, 3_000, 10_000)), quality=quality, make_raft=raft,
        make_replica=functools.partial(Replica, batch_bytes=segment_bytes // 16))  # fmt: skip


def _mix(rng: random.Random) -> Mix:
    return Mix(clients=rng.choice((2, 4, 8)), registers=rng.choice((1, 3)), names=rng.choice((2, 4)),
               think_ns=int(log_uniform(rng, MS, 50 * MS)), dedup=rng.choice((0.0, 0.5, 1.0)))  # fmt: skip


def run(plan: Plan, sink: Sink | None = None, watch: Callable[[Cluster], object] | None = None) -> Result:
    """Carries out a plan. `sink` gets the transcript line by line; `watch` the cluster now and then."""
    simulation = Simulation(plan, sink)
    result = Result(plan.seed)
    try:
        simulation.trouble(watch)
        simulation.peace()
    except Violation as violation:
        result.check, result.message = violation.check, str(violation)
    except AssertionError:
        # The core's own: it found out itself, and its node would have stopped.
        result.check, result.message = "assertion", traceback.format_exc(limit=-8)
    except (Exception, SimulatedCrash):
        result.check, result.message = "exception", traceback.format_exc(limit=-12)
    finally:
        simulation.report(result)
        simulation.cluster.close()
    return result


class Simulation:
    """One run under way, for tests that look inside as well."""

    def __init__(self, plan: Plan, sink: Sink | None = None) -> None:
        self.plan = plan
        streams = Streams(plan.seed)
        self.cluster = Cluster(streams, plan.settings, plan.nodes, sink)
        self.faults = Faults(self.cluster, streams, plan.swarm, plan.left_out)
        self.workload = Workload(self.cluster, streams, plan.mix)
        self.cluster.trace(f"seed {plan.seed} nodes {plan.nodes} faults {','.join(plan.swarm.kinds)} "
                           f"every {plan.swarm.gap_ns // MS} ms")  # fmt: skip

    def trouble(self, watch: Callable[[Cluster], object] | None = None) -> None:
        self.faults.start()
        self.workload.start()
        scheduler = self.cluster.scheduler
        while scheduler.events < self.plan.steps:
            if scheduler.step() is None:
                return
            if watch is not None and scheduler.events % 1_000 == 0:
                watch(self.cluster)

    def peace(self) -> None:
        """All faults end: there must be a leader soon, and an answer for everybody; then all must be true."""
        self.faults.heal()
        self._until("leader", LEADER_WITHIN_NS, self._has_leader)
        self.workload.stop()
        self._until("answers", ANSWERED_WITHIN_NS, lambda: not self.workload.busy)
        self._probe()
        self._until("convergence", ANSWERED_WITHIN_NS, self._converged)
        self.workload.check()

    def _until(self, what: str, within_ns: int, holds: Callable[[], bool]) -> None:
        scheduler = self.cluster.scheduler
        deadline = scheduler.now_ns + within_ns
        for _ in range(_EVENTS_MAX):
            if holds():
                return
            if scheduler.now_ns > deadline or scheduler.step() is None:
                break
        states = [f"node {one.node}: {one.described()}" for one in self.cluster.processes()]
        raise Violation(f"liveness-{what}", f"not within {within_ns // SECOND} s after all faults ended; "
                                            + "; ".join(states))  # fmt: skip

    def _has_leader(self) -> bool:
        leader = self.cluster.leader()
        return leader is not None and leader.raft.committed_in_term

    def _probe(self) -> None:
        """From each member a write and a read get through."""
        waiting: set[str] = set()
        for process in self.cluster.members():
            self._probe_write(process, waiting)
            self._probe_read(process, waiting)

        def answered() -> bool:
            """A change of the configuration may have been on its way: who was removed gets no answer."""
            members = {str(one.node) for one in self.cluster.members()}
            return not any(mark.split()[1] in members for mark in waiting)

        self._until("probe", ANSWERED_WITHIN_NS, answered)

    def _probe_write(self, process: Process, waiting: set[str]) -> None:
        mark = f"write {process.node}"
        waiting.add(mark)

        def ended(result: object) -> None:
            if isinstance(result, Exception):  # a short time limit on a slow network: again
                self._probe_write(process, waiting)
            else:
                waiting.discard(mark)

        command, _ = process.engine.txn_command([], [types.put(b"probe/%d" % process.node, b"")])
        process.do(serving.submit, process, command, ended)

    def _probe_read(self, process: Process, waiting: set[str]) -> None:
        mark = f"read {process.node}"
        waiting.add(mark)
        process.do(serving.read, process, lambda engine: None, lambda seen, revision: waiting.discard(mark),
                   lambda: self._probe_read(process, waiting))  # fmt: skip

    def _converged(self) -> bool:
        """Every member has applied everything."""
        commit = self.cluster.invariants.commit
        members = self.cluster.members()
        return all(one.engine.revision == commit == one.machine.state.applied_index for one in members)

    def report(self, result: Result) -> None:
        cluster = self.cluster
        result.faults = self.faults.done
        result.events, result.virtual_ns = cluster.scheduler.events, cluster.scheduler.now_ns
        result.committed, result.operations = cluster.invariants.commit, self.workload.operations()
        result.terms = len(cluster.invariants.leaders)
        result.transcript = cluster.transcript_hash()


def shrink(failing: Plan, progress: Callable[[int, int], object] | None = None,
           runner: Callable[[Plan], Result] = run) -> tuple[Plan, Result]:
    """Leaves out faults, ever smaller groups of them, as long as the same check fails (ddmin).

    `progress` gets how many faults are left and how many runs it took.
    """
    best = runner(failing)
    assert best.failed, "only a run that fails can be shrunk"
    left_out = failing.left_out
    kept = [number for number, _ in best.faults]
    runs, size = 1, len(kept)
    while size >= 1:
        at = 0
        while at < len(kept):
            trial = replace(failing, left_out=left_out | frozenset(kept[at : at + size]))
            result = runner(trial)
            runs += 1
            if result.check == best.check and len(result.faults) < len(best.faults):
                best, left_out = result, trial.left_out
                kept = [number for number, _ in result.faults]
            else:
                at += size
            if progress is not None:
                progress(len(kept), runs)
        size = size // 2 if size > 1 else 0
    return replace(failing, left_out=left_out), best


def describe(plan: Plan) -> list[tuple[str, Any]]:
    """What the seed chose, for people."""
    settings, mix = plan.settings, plan.mix
    return [
        ("nodes", plan.nodes), ("kinds of fault", ", ".join(plan.swarm.kinds) or "none"),
        ("a fault every", f"{plan.swarm.gap_ns // MS} ms"), ("clients", mix.clients),
        ("sync takes", f"{settings.sync_ns / MS:.1f} ms"),
        ("message takes", f"{settings.quality.delay_mean_ns / MS:.1f} ms"),
        ("dropped", f"{settings.quality.drop:.0%}"), ("log kept", settings.keep_entries),
    ]  # fmt: skip
