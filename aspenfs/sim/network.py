"""A network that delays, loses, repeats, reorders and withholds, one direction of one link at a time.

Belongs here: when and whether what one node sends reaches another. What is sent is handed on as it is:
messages are immutable values. Who is up is not known here: what reaches a dead node is its owner's to drop.

Reset breaks a connection: what is on its way is lost. A held message stays somewhere for seconds and
arrives when its term may be long over.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aspenfs.sim.scheduler import MS, SECOND, Scheduler, Streams

Link = tuple[int, int]  # from, to
_HELD_NS_MAX: Final = 20 * SECOND


@dataclass(frozen=True, slots=True)
class Quality:
    """How a link behaves. Probabilities are per message."""

    delay_min_ns: int = MS // 4
    delay_mean_ns: int = 1 * MS  # beyond the least, exponentially distributed
    drop: float = 0.0
    duplicate: float = 0.0
    hold: float = 0.0  # a copy arrives again within _HELD_NS_MAX
    ordered: bool = True  # as over one connection


class Network:
    """All links between nodes. `deliver(to, sender, message)` is called when something arrives."""

    def __init__(self, scheduler: Scheduler, streams: Streams, deliver: Callable[[int, int, Any], object],
                 quality: Quality | None = None) -> None:  # fmt: skip
        self._scheduler, self._deliver = scheduler, deliver
        self._rng = streams.stream("network")
        self.quality = quality or Quality()
        self._own: dict[Link, Quality] = {}  # links that are unlike the others
        self._blocked: set[Link] = set()
        self._connection: dict[Link, int] = {}  # counts resets
        self._last_arrival: dict[Link, int] = {}
        self.sent = self.delivered = 0

    # --- sending ---

    def send(self, sender: int, to: int, message: Any) -> None:
        link = (sender, to)
        quality = self._own.get(link, self.quality)
        self.sent += 1
        rng = self._rng
        if link in self._blocked or (quality.drop and rng.random() < quality.drop):
            return
        arrival = self._scheduler.now_ns + self._delay(quality)
        if quality.ordered:
            arrival = max(arrival, self._last_arrival.get(link, 0))
            self._last_arrival[link] = arrival
        self._plan(link, arrival, message, self._connection.get(link, 0))
        if quality.duplicate and rng.random() < quality.duplicate:
            self._plan(link, arrival + self._delay(quality), message, None)
        if quality.hold and rng.random() < quality.hold:
            self._plan(link, arrival + rng.randrange(_HELD_NS_MAX), message, None)

    def _delay(self, quality: Quality) -> int:
        return quality.delay_min_ns + int(self._rng.expovariate(1.0) * quality.delay_mean_ns)

    def _plan(self, link: Link, arrival: int, message: Any, connection: int | None) -> None:
        self._scheduler.at(arrival, lambda: self._arrive(link, message, connection), "message")

    def _arrive(self, link: Link, message: Any, connection: int | None) -> None:
        if link in self._blocked or (connection is not None and connection != self._connection.get(link, 0)):
            return
        self.delivered += 1
        self._deliver(link[1], link[0], message)

    def reachable(self, sender: int, to: int) -> bool:
        """Whether something sent now could arrive."""
        return (sender, to) not in self._blocked

    # --- faults ---

    def block(self, links: Iterable[Link]) -> None:
        """Nothing arrives over these any more, neither what is on its way."""
        self._blocked.update(links)

    def unblock(self, links: Iterable[Link]) -> None:
        self._blocked.difference_update(links)

    def reset(self, sender: int, to: int) -> None:
        """The connection breaks: what is on its way, both ways, is lost."""
        for link in ((sender, to), (to, sender)):
            self._connection[link] = self._connection.get(link, 0) + 1
            self._last_arrival.pop(link, None)

    def slow(self, links: Iterable[Link], quality: Quality) -> None:
        for link in links:
            self._own[link] = quality

    def restore(self) -> None:
        """No link is slower than others."""
        self._own.clear()

    def heal(self) -> None:
        """All links are as they were meant to be."""
        self._blocked.clear()
        self._own.clear()


# --- shapes of partitions: the links that are cut ---


def between(some: Iterable[int], others: Iterable[int]) -> list[Link]:
    """Both directions."""
    others = list(others)
    return [link for a in some for b in others if a != b for link in ((a, b), (b, a))]


def halves(nodes: Sequence[int], first: Iterable[int]) -> list[Link]:
    """`first` against the rest."""
    first = list(first)
    return between(first, [node for node in nodes if node not in first])


def one_way(nodes: Sequence[int], deaf: int) -> list[Link]:
    """`deaf` hears nobody and is heard."""
    return [(node, deaf) for node in nodes if node != deaf]


def bridge(nodes: Sequence[int], middle: int) -> list[Link]:
    """Two halves that only `middle` connects."""
    rest = [node for node in nodes if node != middle]
    half = len(rest) // 2
    return between(rest[:half], rest[half:])


def ring(nodes: Sequence[int]) -> list[Link]:
    """Each node is connected with its two neighbours only."""
    size = len(nodes)
    return [
        (nodes[a], nodes[b])
        for a in range(size)
        for b in range(size)
        if a != b and (a - b) % size not in (1, size - 1)
    ]
