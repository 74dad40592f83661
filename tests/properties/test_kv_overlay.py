"""The overlay shows base plus staged effects, under any order of staging, settling and discarding."""

from collections.abc import Iterator

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aspenfs.kv.memory import MemoryState
from aspenfs.kv.overlay import Overlay
from aspenfs.kv.state import Effect
from aspenfs.kv.types import NO_ATTRIBUTES, Record

keys = st.binary(max_size=2).map(lambda key: b"k" + key.translate(bytes(n % 3 for n in range(256))))
bounds = st.one_of(keys, st.just(b""))


def _record(number: int) -> Record:
    return Record(b"%d" % number, number, number, 1, 0, 0, NO_ATTRIBUTES)


class OverlayMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.base = MemoryState()
        self.overlay = Overlay(self.base)
        self.applied: dict[bytes, Record] = {}
        self.entries: list[tuple[int, list[Effect]]] = []
        self.last = 0
        self.walk: Iterator[tuple[bytes, Record]] = iter(())
        self.must: set[bytes] = set()  # there since the walk began, so it must give them
        self.backwards = False
        self.ends: list[bytes] = []

    def shown(self, upto: int | None = None) -> dict[bytes, Record]:
        rows = dict(self.applied)
        for index, effects in self.entries:
            if upto is not None and index > upto:
                break
            for key, record in effects:
                if record is None:
                    rows.pop(key, None)
                else:
                    rows[key] = record
        return dict(sorted(rows.items()))

    @rule(effects=st.dictionaries(keys, st.booleans(), max_size=5))
    def stage(self, effects: dict[bytes, bool]) -> None:
        self.last += 1
        staged = [(key, _record(self.last) if kept else None) for key, kept in effects.items()]
        self.overlay.stage(self.last, staged)
        self.entries.append((self.last, staged))
        self.must -= {key for key, kept in effects.items() if not kept}

    @precondition(lambda self: bool(self.entries))
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from([index for index, _ in self.entries]))
        pending = self.overlay.pending(index)
        assert [key for key, _ in pending] == sorted({key for _, _, key in self._staged_upto(index)})
        self.base.apply(pending)
        self.applied = self.shown(index)
        assert dict(self.base.items(b"", b"")) == self.applied
        for step in sorted({data.draw(st.integers(0, index)), index}):  # the base is ahead of the first one
            self.entries = [entry for entry in self.entries if entry[0] > step]
            self.overlay.settle(step)
            self.gets_agree()

    def _staged_upto(self, upto: int) -> list[tuple[int, Record | None, bytes]]:
        return [
            (index, record, key)
            for index, effects in self.entries
            if index <= upto
            for key, record in effects
        ]

    @precondition(lambda self: bool(self.entries))
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(self.entries[0][0] - 1, self.last))
        lost = {key: record for at, effects in self.entries if at > index for key, record in effects}
        assert dict(self.overlay.discard_after(index)) == lost
        self.entries = [entry for entry in self.entries if entry[0] <= index]
        self.last = index
        self.must &= set(self.shown())

    @rule(start=bounds, end=bounds, reverse=st.booleans())
    def begin_walk(self, start: bytes, end: bytes, reverse: bool) -> None:
        self.walk = self.overlay.items(start, end, reverse=reverse)
        self.must = {key for key in self.shown() if key >= start and (not end or key < end)}
        self.backwards, self.ends = reverse, []

    @rule(steps=st.integers(1, 5))
    def step_walk(self, steps: int) -> None:
        for _ in range(steps):
            item = next(self.walk, None)
            if item is None:
                assert self.must <= set(self.ends), "what was there throughout was given"
                self.must = set()
                return
            if self.ends:
                assert (item[0] < self.ends[-1]) == self.backwards
                assert item[0] != self.ends[-1]
            self.ends.append(item[0])

    @rule(start=bounds, end=bounds)
    def read_range(self, start: bytes, end: bytes) -> None:
        expected = [item for item in self.shown().items() if item[0] >= start and (not end or item[0] < end)]
        assert list(self.overlay.items(start, end)) == expected
        assert list(self.overlay.items(start, end, reverse=True)) == expected[::-1]

    @invariant()
    def gets_agree(self) -> None:
        shown = self.shown()
        touched = {key for _, effects in self.entries for key, _ in effects} | set(self.applied)
        assert all(self.overlay.get(key) == shown.get(key) for key in touched)
        assert (self.overlay.bytes == 0) == (not any(effects for _, effects in self.entries))


TestOverlay = OverlayMachine.TestCase
TestOverlay.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
