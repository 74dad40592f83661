"""Majorities: what a set of voters, or two that must both agree, has committed and voted.

etcd's `quorum`. Pure arithmetic; an empty half agrees to everything, so a plain configuration is a
joint one with an empty second half.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import Final

INFINITY: Final = (1 << 64) - 1  # what nobody has committed


class VoteResult(IntEnum):
    PENDING = 1
    LOST = 2
    WON = 3


def majority_committed(indices: Iterable[int]) -> int:
    """The highest index that a majority has, given each voter's (0 if it is not known)."""
    ordered = sorted(indices)
    count = len(ordered)
    return ordered[count - (count // 2 + 1)] if count else INFINITY


def joint_committed(incoming: Iterable[int], outgoing: Iterable[int]) -> int:
    return min(majority_committed(incoming), majority_committed(outgoing))


def majority_vote(votes: Iterable[bool | None]) -> VoteResult:
    """What each voter's yes, no or silence (None) comes to."""
    count = yes = silent = 0
    for vote in votes:
        count += 1
        if vote:
            yes += 1
        elif vote is None:
            silent += 1
    quorum = count // 2 + 1
    if not count or yes >= quorum:
        return VoteResult.WON
    return VoteResult.PENDING if yes + silent >= quorum else VoteResult.LOST


def joint_vote(incoming: Iterable[bool | None], outgoing: Iterable[bool | None]) -> VoteResult:
    first, second = majority_vote(incoming), majority_vote(outgoing)
    if first is second:
        return first
    if VoteResult.LOST in (first, second):
        return VoteResult.LOST
    return VoteResult.PENDING
