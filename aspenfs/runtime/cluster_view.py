"""The cluster as one node sees it, in plain values: its members, and what is wrong with them.

Belongs here: what `aspen status`, `aspen member list` and `cluster/` tell alike. Not here: rows and changes
(`members.py`), figures of this node alone (`store_status.py`), words on a terminal (`cli/`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, Final, NamedTuple

from aspenfs.cluster.clock_rates import Rate
from aspenfs.cluster.types import Configuration
from aspenfs.runtime.divergence import Verdict
from aspenfs.runtime.lags import Lags
from aspenfs.runtime.members import Member, Members
from aspenfs.runtime.peers.network import COPIED, OLD_COPY, REMOVED, PeerNetwork
from aspenfs.runtime.quarantine import Quarantine

_NS_PER_S: Final = 1_000_000_000
_DAY_S: Final = 86_400
_EXPIRY_WARNING_S: Final = 30 * _DAY_S  # a certificate is renewed when 120 days are left: something is wrong

_REFUSED: Final = (
    "to start it again does not help: it may have forgotten what it had promised. If its own directory is "
    "still there, put that back and start only that; else remove the old member (aspen member remove, on "
    "another node), empty the directory, and join again with a new ticket (aspen join)"
)
_NO_QUORUM: Final = (
    "start them again, or mend the network: until then writes fail after a while, and only mounts with "
    "-o consistency=stale can read; if they are lost for good, see aspen recover --help"
)
_NO_LEADER: Final = (
    "an election takes a second or two; if it stays so, the voters do not reach each other: look at "
    "aspen status on each of them"
)
_LOST: Final = "start it again, or mend the network; if it is lost for good"
_LEARNER_NS: Final = 10 * _NS_PER_S  # one that joins is admitted before it listens
_GETTING_WELL: Final = "that is done by itself; aspen status there tells how far it is"
_NOT_WELL: Final = "if that does not come: are they connected, and what does daemon.log say?"
_NOBODY_KNOWS: Final = (
    "nothing was touched. Find out which node is right (aspen check on each, your backups), aspen member "
    "remove the others, empty their state directories, and let them join again"
)
_CLOCKS: Final = (
    "reads here ask a majority each time, slower and still right, until the clocks have run alike for a "
    "minute; on both hosts see whether the time service corrects the clock (chronyc tracking, timedatectl "
    "timesync-status) and what is in /sys/devices/system/clocksource/clocksource0/current_clocksource; if "
    "several hosts complain of one, that one is wrong"
)
_RENEWAL: Final = "it is renewed by itself while a voter is connected: daemon.log says why it was not"

Row = Mapping[str, Any]


class Problem(NamedTuple):
    cause: str
    advice: str


WAS_REMOVED: Final = Problem(
    "this node was removed from the cluster",
    "unmount it and empty its state directory; aspen join makes it a new member",
)


def name_of(members: Members, node: int) -> str:
    return _name(members.table().get(node), node)


def _name(member: Member | None, node: int) -> str:
    return member.name if member is not None else f"node {node}"


def member_rows(members: Members, lags: Lags, network: PeerNetwork | None, own: int) -> list[dict[str, Any]]:
    """Who belongs to the cluster, as this node knows it, as plain values.

    `role`: leader, voter, learner, none. `state`: here, connected, unreachable (then `since_ns` and `cause`
    say more), joining or removed. `lag`: entries behind the leader, None if nobody knows.
    """
    table = members.table()
    configuration = members.configuration
    nodes = {node for part in configuration[:4] for node in part} | set(table)
    connected = network.connected() if network is not None else frozenset()
    rows = []
    for node in sorted(nodes):
        member = table.get(node)
        row: dict[str, Any] = {
            "id": node, "name": _name(member, node), "role": members.role(node), "state": "unreachable",
            "lag": lags.of(node), "topology": member.topology if member is not None else 0,
            "addresses": list(member.addresses if member is not None else ()),
            "since_ns": None, "cause": "",
        }  # fmt: skip
        if network is not None and node != own:
            row["topology"], addresses = network.found_at(node)
            row["addresses"] = list(addresses)
        if node == own:
            row["state"] = "removed" if _was_removed(member, row["role"], network, nodes) else "here"
        elif member is not None and member.state == "removed":
            row["state"] = "removed"
        elif node in connected:
            row["state"] = "connected"
        elif network is not None and (error := network.peer_error(node)) is not None:
            row["since_ns"], row["cause"] = error.since_ns, error.cause
        rows.append(row)
    return rows


def _was_removed(
    own: Member | None, role: str, network: PeerNetwork | None, others: Iterable[int]
) -> bool:
    """Whether this node was: it may have been cut off before it got to know that itself."""
    if own is None:
        return False
    if own.state != "joining" and role == "none":
        return True
    causes = (network.peer_error(node) for node in others) if network is not None else ()
    return any(error is not None and REMOVED in error.cause for error in causes)


def _refusal(rows: Sequence[Row], own: int) -> str:
    """What another member says of this node, if that is why it is not let in; empty if none does."""
    for row in rows:
        cause = str(row.get("cause", ""))
        if f"node {own} " in cause and _is_copy(row):
            return cause
    return ""


def _is_copy(row: Row) -> bool:
    """Whether that member is not connected because it, or this node, was started from a copy."""
    cause = str(row.get("cause", ""))
    return OLD_COPY in cause or COPIED in cause


class Quorum(NamedTuple):
    """Whether writes can go on, as far as this node sees."""

    voters: int
    lost: tuple[int, ...]  # voters that this node does not reach
    held: bool  # a majority of each half of the configuration is reached


def quorum(configuration: Configuration, reached: Set[int]) -> Quorum:
    """`reached` includes this node itself."""
    voters = set(configuration.voters) | set(configuration.outgoing)
    halves = [half for half in (configuration.voters, configuration.outgoing) if half]
    held = all(2 * len(reached & set(half)) > len(half) for half in halves)
    return Quorum(len(voters), tuple(sorted(voters - reached)), held)


def problems(rows: Sequence[Row], configuration: Configuration, leader: int, own: int,
             now_ns: int) -> list[Problem]:  # fmt: skip
    """What is wrong with the members, the worst first. Empty for a node alone."""
    by_node = {row["id"]: row for row in rows}
    own_row = by_node.get(own, {})
    if own_row.get("state") == "removed":
        return [WAS_REMOVED]
    if refusal := _refusal(rows, own):
        return [Problem(f"this node is refused: {refusal}", _REFUSED)]
    reached = {row["id"] for row in rows if row["state"] in ("here", "connected")}
    found = quorum(configuration, reached)
    names = [str(by_node[node]["name"]) if node in by_node else f"node {node}" for node in found.lost]
    lost = f"{len(names)} of {found.voters} voters unreachable: {', '.join(names)}"
    if not found.held:
        return [Problem(f"no quorum: {lost}", _NO_QUORUM)]
    told = []
    if not leader:
        told.append(Problem("no leader", _NO_LEADER))
    if names:
        advice = f"{_LOST}: aspen member remove {names[0]}, then join another one"
        if copies := [by_node[node] for node in found.lost if _is_copy(by_node.get(node, {}))]:
            name = str(copies[0]["name"])
            advice = (f"{name} is refused: {copies[0]['cause']}. Start it from its own directory; if that is "
                      f"lost: aspen member remove {name}, then join another one")  # fmt: skip
        told.append(Problem(f"{lost}; writes go on", advice))
    learners = {*configuration.learners, *configuration.learners_next}
    told += [_lost_learner(row) for row in rows
             if row["id"] in learners and row["state"] == "unreachable"
             and row["since_ns"] is not None and now_ns - row["since_ns"] > _LEARNER_NS]  # fmt: skip
    return told


def _lost_learner(row: Row) -> Problem:
    name, where = row["name"], " ".join(row["addresses"])
    return Problem(
        f"the learner {name} is unreachable at {where}: it gets nothing, and is not promoted",
        "start it, or mend the network; if it is found elsewhere, mount it with -o advertise=HOST:PORT; if "
        f"it is lost for good: aspen member remove {name}",
    )


def state_problems(verdict: Verdict | None, marker: Quarantine | None, own: int,
                   name: Callable[[int], str]) -> list[Problem]:  # fmt: skip
    """What is known to be wrong with the states of members. `verdict` is the last one, `marker` that of this
    node, `own`; `name` tells what a node is called."""
    if marker is not None:
        cause = f"this node's state differs from the majority's (entry {marker.index}): it serves nothing"
        sources = ", ".join(map(name, marker.sources))
        return [Problem(cause, f"it is fetching the state of {sources}, and then serves again; {_NOT_WELL}")]
    if verdict is None:
        return []
    if verdict.digest:
        # This node itself has got well since: see above.
        bad = ", ".join(name(node) for node in (*verdict.differing, *verdict.quarantined) if node != own)
        found = f"the state of {bad} was found to differ from the majority's (entry {verdict.index})"
        cause = f"{found}: it serves nothing until it has fetched another"
        return [Problem(cause, _GETTING_WELL)] if bad else []
    if not verdict.differing:
        return []
    told = [f"{name(node)} {digest.hex()[:8] or 'unreadable'}" for node, digest in verdict.told.items()]
    found = f"the states of the members differ at entry {verdict.index}, and no majority agrees"
    return [Problem(f"{found}: {', '.join(told)}", _NOBODY_KNOWS)]


def clock_problem(doubts: Mapping[int, Rate], name: Callable[[int], str]) -> Problem | None:
    """`doubts`: of this node, as `ClockRates.doubts`. The cause has no figures: it is the same as long as it
    lasts."""
    if not doubts:
        return None
    ways = [f"{name(node)}'s is {'fast' if rate.low_ppm > 0 else 'slow'}" for node, rate in doubts.items()]
    return Problem(f"clocks run apart: beside this node's {', '.join(ways)}", _CLOCKS)


def certificate_problem(expires_ns: int, now_ns: int) -> Problem | None:
    """`expires_ns`: of this node's certificate."""
    left_s = (expires_ns - now_ns) / _NS_PER_S
    if left_s > _EXPIRY_WARNING_S:
        return None
    when = f"expires in {max(1, round(left_s / _DAY_S))} days" if left_s > 0 else "has expired"
    return Problem(f"the certificate of this node {when}", _RENEWAL)
