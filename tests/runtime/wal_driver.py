"""A write-ahead log driven at random beside a model of what it must hold after a crash.

The model keeps the state of the log after every single step that was issued. What is found after
a crash must be one of them: at or after the last synced step, and after a mere end of the process
at or after the last step that returned.
"""

import random
from typing import NamedTuple

from aspenfs.runtime.wal import Kind, Wal
from aspenfs.sim.disk import SimDisk

CLUSTER = bytes(range(16))
SEGMENT_BYTES = 8 * 1024


class State(NamedTuple):
    first: int  # lowest index that a trim has not been asked to drop
    base: int  # index after which the log begins (reset)
    entries: tuple[tuple[int, bytes], ...]  # (term, payload) of base+1, base+2, ...
    hard_state: tuple[int, bytes] | None

    @property
    def last(self) -> int:
        return self.base + len(self.entries)

    def append(self, term: int, payload: bytes) -> "State":
        return self._replace(entries=(*self.entries, (term, payload)))

    def truncate(self, index: int) -> "State":
        return self._replace(entries=self.entries[: index - self.base])


EMPTY = State(1, 0, (), None)


def open_wal(disk: SimDisk, *, background: bool = False, segment_bytes: int = SEGMENT_BYTES) -> Wal:
    return Wal.open(disk, "wal", CLUSTER, segment_bytes=segment_bytes, background=background)


class Driver:
    """Random work on the log of `disk`; raises what the log raises."""

    def __init__(self, disk: SimDisk, rng: random.Random) -> None:
        self.disk, self.rng = disk, rng
        self.steps = [EMPTY]
        self.synced = 0  # steps[synced] is known to be durable
        self.done = 0  # steps[done] had been returned from
        self.trimmed = 1
        self.term = 1
        self.serial = 0
        self.wal: Wal | None = None

    def open(self) -> None:
        self.wal = open_wal(self.disk)

    def work(self, actions: int) -> None:
        wal = self.wal
        assert wal is not None
        choices = (
            self._append,
            self._append_many,
            self._sync,
            self._vote,
            self._truncate,
            self._trim,
            self._reset,
        )
        for _ in range(actions):
            (action,) = self.rng.choices(choices, (40, 10, 20, 4, 6, 6, 1))
            action(wal)

    def check_found(self, *, killed: bool) -> None:
        """Reopen after a restart; the state found becomes the only step."""
        self.wal = wal = open_wal(self.disk)
        found = found_state(wal)
        lowest = self.done if killed else self.synced
        trimmed = self.trimmed
        fits = [
            step
            for step in self.steps[lowest:]
            if step.hard_state == found.hard_state
            and step.last == found.last
            and step.base <= found.base <= max(step.base, trimmed - 1)
            and step.entries[found.base - step.base :] == found.entries
        ]
        assert fits, (
            f"found {found.base}..{found.last}, synced {self.steps[self.synced].last}, "
            f"done {self.steps[self.done].last}, issued {self.steps[-1].last}"
        )
        assert wal.synced_index == wal.last_index
        self.steps = [fits[0]]
        self.synced = self.done = 0

    # --- the actions ---

    def _payload(self) -> bytes:
        self.serial += 1
        size = self.rng.choice((0, 1, 7, 8, 40, 300, 600, 1500))
        return (b"%d:" % self.serial).ljust(size, b"x")

    def _issue(self, *steps: State) -> None:
        self.steps.extend(steps)

    def _append(self, wal: Wal) -> None:
        state, payload = self.steps[-1], self._payload()
        self._issue(state.append(self.term, payload))
        wal.append(Kind.ENTRY, self.term, state.last + 1, payload)
        self.done = len(self.steps) - 1

    def _append_many(self, wal: Wal) -> None:
        state = self.steps[-1]
        frames: list[tuple[int, int, int, bytes]] = []
        if self.rng.random() < 0.5:
            self.term += 1
            state = state._replace(hard_state=(self.term, b"n1"))
            self._issue(state)
            frames.append((Kind.HARD_STATE, self.term, 0, b"n1"))
        for _ in range(self.rng.randint(1, 4)):
            payload = self._payload()
            frames.append((Kind.ENTRY, self.term, state.last + 1, payload))
            state = state.append(self.term, payload)
            self._issue(state)
        wal.append_many(frames)
        self.done = len(self.steps) - 1

    def _sync(self, wal: Wal) -> None:
        step = len(self.steps) - 1
        assert wal.sync() == self.steps[step].last
        self.synced = step

    def _vote(self, wal: Wal) -> None:
        self.term += 1
        self._issue(self.steps[-1]._replace(hard_state=(self.term, b"n2")))
        wal.save_hard_state(self.term, b"n2")
        self.done = len(self.steps) - 1

    def _truncate(self, wal: Wal) -> None:
        state = self.steps[-1]
        index = self.rng.randint(max(state.base, self.trimmed - 1, state.last - 6), state.last)
        self._issue(state.truncate(index))
        wal.truncate_after(index)
        self.done = len(self.steps) - 1

    def _trim(self, wal: Wal) -> None:
        # As the host does: below what is applied, which is at most what is synced.
        durable = min(wal.synced_index, self.steps[-1].last)
        before = self.rng.randint(min(self.trimmed, durable + 1), durable + 1)
        self.trimmed = max(self.trimmed, before)
        wal.trim(before)

    def _reset(self, wal: Wal) -> None:
        state = self.steps[-1]
        index = state.last + self.rng.randint(1, 50)
        self._issue(State(1, index, (), state.hard_state))
        wal.reset(index)
        self.done = len(self.steps) - 1


def found_state(wal: Wal) -> State:
    """What the log holds, read back through `replay`."""
    frames = list(wal.replay(wal.first_index))
    assert [frame.index for frame in frames] == list(range(wal.first_index, wal.last_index + 1))
    base = wal.first_index - 1
    return State(1, base, tuple((frame.term, frame.payload) for frame in frames), wal.hard_state)
