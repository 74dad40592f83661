"""What clients did and what they were told: the raw material of every check of consistency.

Belongs here: recording calls and returns, writing them down, reading them back, and making values that
occur once. What a history may look like is `models.py`'s and `linearizability.py`'s; what a log says about
it, `revisions.py`'s.

A call ends in one of three ways. `returned`: it took place between call and return. `refused`: it is known
that it did not and never will take place. Neither (`lost`, or the end of the history): nobody knows; it may
have taken place at any time since the call, may do so later, or never.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TextIO

NEVER = float("inf")


class Operation(NamedTuple):
    """One call. `returned` is NEVER when the outcome is unknown, and `result` means nothing then."""

    process: int
    name: str
    arguments: tuple[Any, ...]
    result: Any
    called: float
    returned: float

    @property
    def known(self) -> bool:
        return self.returned != NEVER

    def __str__(self) -> str:
        arguments = ", ".join(map(_shown, self.arguments))
        ended = f"-> {_shown(self.result)} at {self.returned}" if self.known else "-> unknown"
        return f"[{self.called}] client {self.process}: {self.name}({arguments}) {ended}"


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:40]}…{shown[-15:]}"


class Call:
    """A call under way, as `History.call` made it."""

    __slots__ = ("arguments", "called", "name", "position", "process", "result", "returned", "taken_back")

    def __init__(
        self, process: int, name: str, arguments: tuple[Any, ...], called: float, position: int
    ) -> None:
        self.process, self.name, self.arguments, self.called = process, name, arguments, called
        self.position = position
        self.result: Any = None
        self.returned = NEVER
        self.taken_back = False


class History:
    """Calls in the order in which they were made.

    `clock` gives the time of an event, and must never go back. Without it events are numbered, which is
    exact for whoever sees them in order. Two events with one time count as overlapping.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._calls: list[Call] = []
        self._events = 0
        self._clock = clock

    def _now(self) -> float:
        self._events += 1
        return self._events if self._clock is None else self._clock()

    def __len__(self) -> int:
        return len(self._calls)

    def call(self, process: int, name: str, *arguments: Any) -> Call:
        call = Call(process, name, arguments, self._now(), len(self._calls))
        self._calls.append(call)
        return call

    def returns(self, call: Call, result: Any = None) -> None:
        assert not call.taken_back, "a call that was refused returned"
        assert call.returned == NEVER, "a call returned twice"
        call.returned, call.result = self._now(), result

    def refused(self, call: Call) -> None:
        """It did not take place and never will: it is as if it had not been called."""
        assert call.returned == NEVER, "a call that returned was refused"
        call.taken_back = True

    def has(self, call: Call) -> bool:
        return call.position < len(self._calls) and self._calls[call.position] is call

    def operations(self) -> list[Operation]:
        """All that may have taken place, in the order of the calls."""
        return [
            Operation(call.process, call.name, call.arguments, call.result, call.called, call.returned)
            for call in self._calls
            if not call.taken_back
        ]

    def open_calls(self) -> list[Operation]:
        """Those that have neither returned nor been refused."""
        return [operation for operation in self.operations() if not operation.known]


class Unique:
    """Values that no two writes share, so that a read tells which write it saw."""

    def __init__(self, prefix: bytes = b"v") -> None:
        self._prefix, self._made = prefix, 0

    def __call__(self) -> bytes:
        self._made += 1
        return b"%b%d" % (self._prefix, self._made)


# --- files: one JSON array a line, bytes as {"b": latin-1 text} and tuples as arrays ---


def save(operations: Iterable[Operation], file: TextIO) -> None:
    """So that histories of real mounts, recorded in several processes, can be merged and checked."""
    for one in operations:
        returned = one.returned if one.known else None
        row = (one.process, one.name, one.arguments, one.result, one.called, returned)
        file.write(json.dumps(_to_json(row)) + "\n")


def load(lines: Iterable[str]) -> Iterator[Operation]:
    for line in lines:
        process, name, arguments, result, called, returned = _from_json(json.loads(line))
        yield Operation(process, name, arguments, result, called, NEVER if returned is None else returned)


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"b": value.decode("latin-1")}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    assert value is None or isinstance(value, str | int | float), value
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return value["b"].encode("latin-1")
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    return value
