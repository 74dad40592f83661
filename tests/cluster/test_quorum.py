"""Majorities: etcd's case files, and the identities that its own harness checks in each of them."""

import pytest

from aspenfs.cluster.quorum import (
    INFINITY,
    VoteResult,
    joint_committed,
    joint_vote,
    majority_committed,
    majority_vote,
)
from tests.cluster.datadriven import VECTORS, Case, read_cases

FILES = {"joint_commit.txt": 50, "joint_vote.txt": 39, "majority_commit.txt": 16, "majority_vote.txt": 22}


@pytest.mark.parametrize(("name", "count"), FILES.items())
def test_etcds_cases(name: str, count: int) -> None:
    cases = read_cases(VECTORS / "quorum" / name)
    assert len(cases) == count
    for case in cases:
        run = {"committed": run_committed, "vote": run_vote}[case.command]
        assert run(case) == case.expected, f"{name}:{case.line}"


def test_there_is_no_other_file() -> None:
    assert {path.name for path in (VECTORS / "quorum").iterdir()} == FILES.keys()


class Voters:
    """The voters of a case, in its order, and the value of each."""

    def __init__(self, case: Case, values: list[str]) -> None:
        arguments = case.arguments
        self.incoming = [int(each) for each in arguments.get("cfg", [])]
        self.is_joint = "cfgj" in arguments
        outgoing = arguments.get("cfgj", [])
        self.outgoing = [] if outgoing == ["zero"] else [int(each) for each in outgoing]
        order = list(dict.fromkeys(self.incoming + self.outgoing))
        assert len(values) == len(order)
        self.values = dict(zip(order, values, strict=True))


def run_committed(case: Case) -> str:
    voters = Voters(case, case.arguments.get("idx", []))
    known = {node: int(value) for node, value in voters.values.items() if value != "_"}
    assert 0 not in known.values()

    def indices(half: list[int]) -> list[int]:
        return [known.get(node, 0) for node in half]

    incoming, outgoing = indices(voters.incoming), indices(voters.outgoing)
    if voters.is_joint:
        index = joint_committed(incoming, outgoing)
        assert joint_committed(outgoing, incoming) == index
    else:
        index = majority_committed(incoming)
        check_majority(voters.incoming, known, index)
    return chart(list(voters.values), known) + ("∞" if index == INFINITY else str(index))


def check_majority(voters: list[int], known: dict[int, int], index: int) -> None:
    """Identities of etcd's `datadriven_test.go`."""
    indices = [known.get(node, 0) for node in voters]
    assert committed_by_counting(voters, known) == index
    assert joint_committed(indices, []) == index
    assert joint_committed(indices, indices) == index
    for node, value in known.items():
        if value < index:  # what lags behind the result has no part in it
            for lower in (value - 1, 0):
                changed = {**known, node: lower}
                assert majority_committed([changed.get(each, 0) for each in voters]) == index


def committed_by_counting(voters: list[int], known: dict[int, int]) -> int:
    if not voters:
        return INFINITY
    best = 0
    for candidate in known.values():
        if sum(known.get(node, 0) >= candidate for node in voters) > len(voters) // 2:
            best = max(best, candidate)
    return best


def chart(voters: list[int], known: dict[int, int]) -> str:
    if not voters:
        return "<empty majority quorum>"
    width = len(voters)
    lines = [" " * width + "    idx"]
    for node in sorted(voters):
        value = known.get(node, 0)
        behind = sum(known.get(other, 0) < value for other in voters)
        bar = "x" * behind + ">" + " " * (width - behind) if node in known else "?" + " " * width
        lines.append(f"{bar} {value:5}    (id={node:x})")
    return "\n".join(lines) + "\n"


def run_vote(case: Case) -> str:
    voters = Voters(case, case.arguments.get("votes", []))
    votes = {node: {"y": True, "n": False, "_": None}[value] for node, value in voters.values.items()}
    incoming = [votes[node] for node in voters.incoming]
    outgoing = [votes[node] for node in voters.outgoing]
    if voters.is_joint:
        result = joint_vote(incoming, outgoing)
        assert joint_vote(outgoing, incoming) is result
    else:
        result = majority_vote(incoming)
        assert joint_vote(incoming, []) is result
    return {VoteResult.WON: "VoteWon", VoteResult.LOST: "VoteLost", VoteResult.PENDING: "VotePending"}[result]
