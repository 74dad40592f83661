"""ClockRates: whether the clocks of the voters run alike, which a leader's lease rests upon.

Belongs here: bounds on the rate of a peer's clock, leaps of the own one, and what follows for leases on
this node. Not here: asking the peers (`runtime/clock_watch.py`), the lease itself (`replica.py`). Pure:
clocks come in as callables.

*Which pairs.* A lease lasts LEASE by the leader's clock; a follower keeps its promise for an election
timeout by its own. With rates l and f nobody else is elected while the lease runs if f / l does not exceed
their quotient. So nothing counts but how much of a voter's time goes by in the leader's: that one figure is
too high if the follower runs fast, and likewise if the leader runs slow, and it is the leader itself that
measures it. The rates of two followers to each other are of no consequence, and whoever does not lead reads
by the leader's word. So each node judges the pairs (itself, a voter), and if one is out of bounds it uses no
lease when it leads: that suffices, because a lease is nothing but the leader's decision not to ask. One
such voter is enough: it may be the one that a majority needs for another leader. A voter that runs slow does
no harm now; but then one of two clocks is not what is supposed here, nobody knows which, and it need not
stay slow.

*What is certain.* Between `sent_ns` and `received_ns` of the own clock the peer's showed `peer_ns`, at what
moment is not known. Two such readings bound the mean rate in between; a long round trip, a process that
was stopped or a busy machine widen the bounds and never shift them. A clock is doubted only if both bounds
are on the wrong side. If rates keep to the bound, that never happens.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from aspenfs.limits import (
    CLOCK_CLEAN_S,
    CLOCK_DOUBT_PPM,
    CLOCK_LEAP_MS,
    CLOCK_MINUTES_MAX,
    CLOCK_SAMPLES_MAX,
)

_MILLION: Final = 1_000_000
_LEAP_NS: Final = CLOCK_LEAP_MS * _MILLION
_CLEAN_NS: Final = CLOCK_CLEAN_S * 1_000 * _MILLION


class Reading(NamedTuple):
    """Boot times (CLOCK_BOOTTIME), ns: the own one before asking, the peer's, the own one at the answer."""

    sent_ns: int
    peer_ns: int
    received_ns: int

    @property
    def round_trip_ns(self) -> int:
        return self.received_ns - self.sent_ns


class Rate(NamedTuple):
    """What a peer's clock gains on the own one, in ppm (ns in a ms; negative: it loses), lies between the
    bounds, on the mean over at least `over_ns`."""

    low_ppm: int
    high_ppm: int
    over_ns: int

    @property
    def width_ppm(self) -> int:
        return self.high_ppm - self.low_ppm

    @property
    def is_bad(self) -> bool:
        """For certain."""
        return self.low_ppm > CLOCK_DOUBT_PPM or self.high_ppm < -CLOCK_DOUBT_PPM

    @property
    def is_good(self) -> bool:
        """For certain, and for long enough to rely upon again."""
        within = self.low_ppm >= -CLOCK_DOUBT_PPM and self.high_ppm <= CLOCK_DOUBT_PPM
        return within and self.over_ns >= _CLEAN_NS


def rate_between(first: Reading, second: Reading) -> Rate | None:
    """None if the two overlap: then nothing is certain."""
    shortest, longest = second.sent_ns - first.received_ns, second.received_ns - first.sent_ns
    if shortest <= 0:
        return None
    gone = max(0, second.peer_ns - first.peer_ns)  # a clock that went back stands still, to say the least
    low, high = gone * _MILLION // longest, -(-gone * _MILLION // shortest)  # rounded outward
    return Rate(low - _MILLION, high - _MILLION, shortest)


class _Peer:
    """What is known of one clock."""

    __slots__ = ("doubt", "life", "minutes", "rate", "recent")

    def __init__(self) -> None:
        self.life = 0
        self.recent: deque[Reading] = deque(maxlen=CLOCK_SAMPLES_MAX)  # of about a minute
        self.minutes: deque[Reading] = deque(maxlen=CLOCK_MINUTES_MAX)  # the best one of each minute before
        self.rate: Rate | None = None  # the narrowest bounds that the last reading gave
        self.doubt: Rate | None = None  # the bounds that gave rise to it; None: there is none

    def forget(self) -> None:
        """What was read before is not to be compared with what comes."""
        self.recent.clear()
        self.minutes.clear()
        self.rate = None

    def take(self, reading: Reading) -> None:
        found = [rate for one in (*self.minutes, *self.recent) if (rate := rate_between(one, reading))]
        rate = min(found, key=_width, default=None)
        bad = min((one for one in found if one.is_bad), key=_width, default=None)
        if bad is not None:
            # From here anew: what it will have done meanwhile must be clean by itself.
            self.forget()
            self.doubt, rate = bad, bad
        elif any(one.is_good for one in found) or len(self.minutes) == CLOCK_MINUTES_MAX:
            self.doubt = None  # if round trips are too long for certainty: nothing was found for so long
        if len(self.recent) == CLOCK_SAMPLES_MAX:
            self.minutes.append(min(self.recent, key=_round_trip))
            self.recent.clear()
        self.recent.append(reading)
        self.rate = rate


class ClockRates:
    """Fed with readings by its owner; `leases_allowed` is for `Replica.leases_allowed`."""

    def __init__(self, boot_ns: Callable[[], int], awake_ns: Callable[[], int]) -> None:
        """`boot_ns` counts suspend (CLOCK_BOOTTIME), as the lease does; `awake_ns` is the same without it
        (CLOCK_MONOTONIC)."""
        self._boot_ns, self._awake_ns = boot_ns, awake_ns
        self._peers: dict[int, _Peer] = {}
        self._asleep_ns = self._asleep_at_most()
        self._leapt_ns: int | None = None  # when the own clock was last seen to have leapt, if lately
        self._since_ns = 0  # readings that began before are void
        self.leap_ns = 0  # by how much it did; 0: not lately
        self._doubted = False

    def leases_allowed(self) -> bool:
        """Whether a leader here may count on its lease at this moment.

        Asked at each use of the lease, for a machine that wakes up: how long it slept the kernel may know in
        seconds only, so that the boot time may be behind. Both are right again before long, but the lease
        would have been used.
        """
        return not self._doubted and self._boot_ns() - self._awake_ns() - self._asleep_ns <= _LEAP_NS

    def look(self) -> None:
        """At the own clocks; now and then, and before what was read elsewhere is believed."""
        # Read in this order the difference is at most what the machine has slept, however late the second is.
        leap_ns = self._boot_ns() - self._awake_ns() - self._asleep_ns
        now = self._boot_ns()
        if leap_ns > _LEAP_NS:
            self._leapt_ns = self._since_ns = now
            self.leap_ns = leap_ns
            self._asleep_ns = self._asleep_at_most()
            for peer in self._peers.values():
                peer.forget()  # it is the own clock that leapt
        else:
            self._asleep_ns = min(self._asleep_ns, self._asleep_at_most())
            if self._leapt_ns is not None and now - self._leapt_ns >= _CLEAN_NS:
                self._leapt_ns, self.leap_ns = None, 0
        self._judge()

    def _asleep_at_most(self) -> int:
        awake_ns = self._awake_ns()
        return self._boot_ns() - awake_ns

    def keep(self, voters: Iterable[int]) -> None:
        """These are the other voters, of both halves of a joint configuration. All else is forgotten."""
        wanted = set(voters)
        self._peers = {node: self._peers.get(node) or _Peer() for node in sorted(wanted)}
        self._judge()

    def sampled(self, node: int, life: int, readings: Sequence[Reading]) -> None:
        """`readings` one after the other, of which that with the shortest round trip is taken. `life` is
        another one after each start of the peer, for its boot time may count from another instant then."""
        self.look()
        peer = self._peers.get(node)
        valid = [one for one in readings if one.sent_ns >= self._since_ns]
        if peer is None or not valid:
            return
        if life != peer.life:
            peer.forget()
            peer.life = life
        peer.take(min(valid, key=_round_trip))
        self._judge()

    def _judge(self) -> None:
        self._doubted = self._leapt_ns is not None or any(
            peer.doubt is not None for peer in self._peers.values()
        )

    # --- for people ---

    @property
    def doubts(self) -> Mapping[int, Rate]:
        """The voters whose clock is known not to run as this one, and how it ran then."""
        return {node: peer.doubt for node, peer in self._peers.items() if peer.doubt is not None}

    @property
    def rates(self) -> Mapping[int, Rate]:
        """What is known of each voter's clock at the last look."""
        return {node: peer.rate for node, peer in self._peers.items() if peer.rate is not None}


def _width(rate: Rate) -> int:
    return rate.width_ppm


def _round_trip(reading: Reading) -> int:
    return reading.round_trip_ns
