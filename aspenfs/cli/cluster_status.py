"""What a node tells of the cluster: for `cluster/`, `aspen status`, `aspen join` and Prometheus.

Belongs here: choosing from what is known, and wording it. Not here: the facts themselves
(`runtime/cluster_view.py`, `runtime/lags.py`), figures of this node alone (`telemetry.py`).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from aspenfs.cli.member import for_readers
from aspenfs.cli.output import utc
from aspenfs.cluster.clock_rates import ClockRates, Rate
from aspenfs.runtime import cluster_view
from aspenfs.runtime.cluster_view import Problem
from aspenfs.runtime.consensus import Consensus
from aspenfs.runtime.control_cluster import Peering
from aspenfs.runtime.divergence import Verdict
from aspenfs.runtime.lags import Lags
from aspenfs.runtime.members import Members
from aspenfs.runtime.quarantine import Quarantine
from aspenfs.runtime.snapshots.client import Progress


class BlobFacts(NamedTuple):
    """Chunks that files of the cluster name."""

    missing: int = 0  # here; they are being fetched
    unavailable: int = 0  # of these no node that is reached has one
    waiting_for_room: int = 0  # these are on others, and do not fit on the disk here


class StateFacts(NamedTuple):
    """What comparing the states of the members has brought to light."""

    verdict: Verdict | None  # the last one
    quarantine: Quarantine | None  # of this node


class ClusterFacts(NamedTuple):
    """Where it is all known. The calls give what holds now."""

    node: int  # this one
    members: Members
    lags: Lags
    consensus: Consensus
    peering: Peering
    blobs: Callable[[], BlobFacts]
    snapshot: Callable[[], Progress | None]  # that this node is fetching
    states: Callable[[], StateFacts]
    clocks: ClockRates


class Told(NamedTuple):
    fields: Mapping[str, Any]  # of the status
    problems: list[Problem]
    figures: Mapping[str, int | float]


def describe_cluster(facts: ClusterFacts, now_ns: int) -> Told:
    members, consensus, peering = facts.members, facts.consensus, facts.peering
    raft = consensus.replica.raft
    rows = cluster_view.member_rows(members, facts.lags, peering.network, facts.node)
    problems = cluster_view.problems(rows, raft.configuration, raft.leader, facts.node, now_ns)
    verdict, quarantine = facts.states()
    name = partial(cluster_view.name_of, members)
    problems = cluster_view.state_problems(verdict, quarantine, facts.node, name) + problems
    network, keeper, blobs = peering.network, peering.keeper, facts.blobs()
    if keeper is not None and (problem := cluster_view.certificate_problem(keeper.expires_ns, now_ns)):
        problems.append(problem)
    if (problem := cluster_view.clock_problem(facts.clocks.doubts, name)) is not None:
        problems.append(problem)
    if blobs.unavailable:
        problems.append(_unavailable(blobs.unavailable))
    if blobs.waiting_for_room:
        problems.append(_waiting_for_room(blobs.waiting_for_room))
    shown = [for_readers(row) for row in rows if row["state"] != "removed"]
    fields: dict[str, Any] = {
        "node": facts.node,
        "leader": cluster_view.name_of(members, raft.leader) if raft.leader else None,
        "term": raft.term,
        "members": shown,
        "listen": peering.settings.listen if network is not None and peering.settings is not None else None,
        "certificate_expires": utc(keeper.expires_ns) if keeper is not None else None,
    }
    rates = facts.clocks.rates
    if rates:
        fields["clocks"] = [{"name": name(node), "gains_ppm": [rate.low_ppm, rate.high_ppm]}
                            for node, rate in rates.items()]  # fmt: skip
    if verdict is not None:
        result = "no majority" if not verdict.digest else "differ" if verdict.differing else "equal"
        fields["states_compared"] = {"result": result, "entry": verdict.index, "at": utc(verdict.time_ns)}
    progress = facts.snapshot()
    if progress is not None:
        fields["snapshot"] = {"from": cluster_view.name_of(members, progress.source), "bytes": progress.bytes,
                              "bytes_total": progress.bytes_total}  # fmt: skip
    figures = {
        "leads": int(consensus.leading),
        "term": raft.term,
        "members": len(shown),
        "members_unreachable": sum(row["state"] == "unreachable" for row in shown),
        "blobs_missing": blobs.missing,
        "blobs_unavailable": blobs.unavailable,
        "quarantine": int(quarantine is not None),
        **_state_figures(verdict),
        **_clock_figures(facts.clocks),
    }
    lag = facts.lags.of(facts.node)
    return Told(fields, problems, figures if lag is None else {**figures, "lag": lag})


def _state_figures(verdict: Verdict | None) -> dict[str, int]:
    """`states_disagree`: they differ, and no majority has the same one."""
    if verdict is None:
        return {"members_diverged": 0, "states_disagree": 0, "states_compared_entry": 0}
    diverged = {*verdict.differing, *verdict.quarantined} if verdict.digest else ()
    disagree = not verdict.digest and verdict.differing != ()
    return {"members_diverged": len(diverged), "states_disagree": int(disagree),
            "states_compared_entry": verdict.index}  # fmt: skip


def _clock_figures(clocks: ClockRates) -> dict[str, int]:
    """`clock_gain_ppm`: what the voter's clock that is least like this one gains on it, in the middle of the
    bounds that are certain; it may be off by `clock_uncertainty_ppm`, either way."""
    figures = {"read_leases_off": int(not clocks.leases_allowed()), "clocks_doubted": len(clocks.doubts)}
    worst = max(clocks.rates.values(), key=lambda rate: abs(_middle(rate)), default=None)
    if worst is None:
        return figures
    return {**figures, "clock_gain_ppm": _middle(worst), "clock_uncertainty_ppm": (worst.width_ppm + 1) // 2}


def _middle(rate: Rate) -> int:
    return (rate.low_ppm + rate.high_ppm) // 2


def _unavailable(count: int) -> Problem:
    return Problem(
        f"{count} chunks of files are on no node that is reached: reading those files gives EIO",
        "start the nodes that are down: one of them has the chunks",
    )


def _waiting_for_room(count: int) -> Problem:
    """The count changes all the time; the cause is the same as long as it lasts."""
    return Problem(
        "this node's disk is full: chunks of files are to be fetched when there is room",
        f"make room on it: {count} are waiting; meanwhile those files are read from the other nodes",
    )
