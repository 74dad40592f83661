"""Virtual time: what happens next, and where chance comes from. One seed, one course of events.

Belongs here: the heap of events, and streams of random numbers. Times are ns since the simulation began. Two
events at one time happen in the order in which they were planned. Nothing here, and nothing that it calls,
may look at a real clock, at the order of a set, or at a hash of a string.
"""

import random
from collections.abc import Callable
from heapq import heappop, heappush

Action = Callable[[], object]

MS = 1_000_000
SECOND = 1_000 * MS


class Event:
    """Something to come. `cancel` makes it not come."""

    __slots__ = ("action", "label", "time_ns")

    def __init__(self, time_ns: int, action: Action | None, label: str) -> None:
        self.time_ns, self.action, self.label = time_ns, action, label

    def cancel(self) -> None:
        self.action = None

    @property
    def pending(self) -> bool:
        return self.action is not None


class Scheduler:
    """Runs events in order of time."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.events = 0  # that have happened
        self._planned = 0
        self._heap: list[tuple[int, int, Event]] = []

    def at(self, time_ns: int, action: Action, label: str = "") -> Event:
        event = Event(max(time_ns, self.now_ns), action, label)
        self._planned += 1
        heappush(self._heap, (event.time_ns, self._planned, event))
        return event

    def after(self, delay_ns: int, action: Action, label: str = "") -> Event:
        return self.at(self.now_ns + delay_ns, action, label)

    def step(self) -> Event | None:
        """The next event happens; None when there is none."""
        while self._heap:
            time_ns, _, event = heappop(self._heap)
            action, event.action = event.action, None
            if action is not None:
                self.now_ns = time_ns
                self.events += 1
                action()
                return event
        return None


class Streams:
    """Sources of chance, one a purpose: that one of them is used more often changes no other."""

    def __init__(self, seed: int | str) -> None:
        self._seed = seed

    def stream(self, label: str) -> random.Random:
        # A str seeds through SHA-512, so it is the same in every interpreter.
        return random.Random(f"{self._seed}/{label}")

    def fork(self, label: str) -> "Streams":
        return Streams(f"{self._seed}/{label}")


def log_uniform(rng: random.Random, low: float, high: float) -> float:
    """Between `low` and `high`, every order of magnitude equally likely."""
    return float(low * (high / low) ** rng.random())
