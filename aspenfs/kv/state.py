"""What evaluation reads and what it gives: the port `State` and the noun `Outcome`."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from aspenfs.errors import AspenError
from aspenfs.kv.types import NO_ATTRIBUTES, Event, Record, TxnResult

Effect = tuple[bytes, Record | None]  # None: the key goes


class State(Protocol):
    """An ordered map of keys to records, user keys and internal ones alike."""

    def get(self, key: bytes) -> Record | None: ...

    def items(self, start: bytes, end: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, Record]]:
        """Keys in [start, end) in byte order, descending with `reverse`; `end` b'' = no end.

        The iterator may show the state of the moment when it was made; it need not follow changes.
        """


class Outcome(NamedTuple):
    """What a command does: its result, at most one effect per key, and the events of user keys.

    An error as `result` is raised to the proposer; there are no effects then. Effects on user keys come
    first, in the order of their events; behind them are those on internal keys.
    """

    result: TxnResult | int | AspenError | None
    effects: Sequence[Effect]
    events: Sequence[Event]


def internal(index: int, value: bytes) -> Record:
    """The record of an internal key written by the entry `index`."""
    return Record(value, index, index, 1, 0, 0, NO_ATTRIBUTES)


def first(state: State, start: bytes, end: bytes, *, reverse: bool = False) -> tuple[bytes, Record] | None:
    """The first item in [start, end), or the last one."""
    return next(state.items(start, end, reverse=reverse), None)


def nothing_changed(result: Any) -> Outcome:
    return Outcome(result, (), ())
