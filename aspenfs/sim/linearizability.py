"""Is there an order of these calls, true to real time, that one object on one host could have answered so?

The search is Wing and Gong's with Lowe's memo ("Testing for linearizability", 2017; WGL), as in Porcupine:
walk the calls in time; try each that overlaps the first return still open; go back when a return is
reached whose call was not placed; never look twice at the same set of placed calls with the same state.
Calls on different objects are searched apart (linearizability is local), calls that name several objects
join them.

Belongs here: the search and what it found. The objects are `models.py`'s. The verdict 'unknown' means that
the search was too long: it is not a pass, and callers must not take it for one.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any, Final, Literal, NamedTuple

from aspenfs.sim.history import Operation
from aspenfs.sim.models import UNKNOWN, Model

STEPS_MAX: Final = (
    2_000_000  # tries a partition; some ten seconds. In steps, so that a seed says the same everywhere
)

Outcome = Literal["linearizable", "violation", "unknown"]
_SHOWN = 12  # calls of an explanation on either side of where the search got stuck


class Verdict(NamedTuple):
    """`longest` is the longest order found; of `stuck` one call had to come next, and none could."""

    outcome: Outcome
    keys: tuple[Hashable, ...] = ()  # the objects of the partition that failed
    longest: Sequence[Operation] = ()
    stuck: Sequence[Operation] = ()
    state: Any = None  # after `longest`
    operations: int = 0  # checked, in all partitions
    steps: int = 0

    def explain(self) -> str:
        """What a person needs: the end of the longest order, the state after it, what did not fit."""
        if self.outcome == "linearizable":
            return f"linearizable: {self.operations} operations"
        lines = [f"{self.outcome} at {', '.join(sorted(map(repr, self.keys)))}"]
        lines.append(f"the longest order has {len(self.longest)} operations; its end:")
        lines += [f"  {operation}" for operation in self.longest[-_SHOWN:]]
        lines.append(f"after it the state is {self.state!r}, and none of these can be next:")
        lines += [f"  {operation}" for operation in self.stuck[:_SHOWN]]
        return "\n".join(lines)


def check(operations: Sequence[Operation], model: Model, *, steps_max: int = STEPS_MAX) -> Verdict:
    """The first violation of any partition; else 'unknown' if any was too long; else 'linearizable'."""
    undecided: Verdict | None = None
    steps = 0
    groups = partition(operations, model)
    for keys, group in groups:
        verdict = _Search(group, model).run(steps_max)
        steps += verdict.steps
        if verdict.outcome == "violation":
            return verdict._replace(keys=keys, operations=len(operations), steps=steps)
        if verdict.outcome == "unknown" and undecided is None:
            undecided = verdict._replace(keys=keys, operations=len(operations))
    if undecided is not None:
        return undecided._replace(steps=steps)
    return Verdict("linearizable", operations=len(operations), steps=steps)


def partition(
    operations: Sequence[Operation], model: Model
) -> list[tuple[tuple[Hashable, ...], list[Operation]]]:
    """Groups of calls that share no object, each with its objects, in the order of their first calls."""
    parent: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for operation in operations:
        first, *others = model.keys(operation)
        home = root(first)
        for other in others:
            parent[root(other)] = home
    groups: dict[Hashable, list[Operation]] = {}
    for operation in operations:
        groups.setdefault(root(model.keys(operation)[0]), []).append(operation)
    keys: dict[Hashable, list[Hashable]] = {}
    for key in parent:
        keys.setdefault(root(key), []).append(key)
    return [(tuple(keys[home]), group) for home, group in groups.items()]


class _Timeline:
    """The events of calls that returned, as a doubly linked list of places; 0 is its head and its end."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        # At one time calls come before returns: what touches overlaps.
        events = [(one.called, 0, number) for number, one in enumerate(operations)]
        events += [(one.returned, 1, number) for number, one in enumerate(operations)]
        events.sort()
        size = len(events)
        self.operation = [-1] + [number for _, _, number in events]
        self.is_call = [False] + [not kind for _, kind, _ in events]
        self.next: list[int] = [*range(1, size + 1), 0]
        self.previous: list[int] = [size, *range(size)]
        self.return_of = [0] * len(operations)
        for place, (_, kind, number) in enumerate(events, 1):
            if kind:
                self.return_of[number] = place

    def lift(self, place: int) -> None:
        """Take out a call and its return."""
        following, previous = self.next, self.previous
        for one in (place, self.return_of[self.operation[place]]):
            before, after = previous[one], following[one]
            following[before], previous[after] = after, before

    def unlift(self, place: int) -> None:
        following, previous = self.next, self.previous
        for one in (self.return_of[self.operation[place]], place):
            following[previous[one]] = previous[following[one]] = one


class _Frame(NamedTuple):
    """A choice that can be taken back: the call placed at `place`, and all as it was before."""

    place: int
    state: Any
    placed: int
    used: int
    chain: tuple[int, ...]  # calls of unknown outcome that were placed just before it
    waiting: "deque[_Loose]"


class _Loose(NamedTuple):
    """What calls of unknown outcome (`chain`) can make of a frame's state; `used`: all used up so far."""

    state: Any
    used: int
    chain: tuple[int, ...]


class _Search:
    """One partition. A configuration is: the calls placed that returned, the state, and which of the calls
    of unknown outcome (`loose`) were used up for it. Those are tried last, fewest first, and only where they
    change the state, for they may never have taken place."""

    def __init__(self, operations: Sequence[Operation], model: Model) -> None:
        self.model = model = model.within(operations)
        self.known = [one for one in operations if one.known]
        loose = [one for one in operations if not one.known and model.changes(one)]
        self.loose = sorted(loose, key=lambda one: one.called)
        self.line = _Timeline(self.known)
        self.steps = 0
        self.state: Any = model.initial()
        self.placed = self.used = 0  # bit sets, by number in `known` and in `loose`
        self.chain: tuple[int, ...] = ()
        self.waiting: deque[_Loose] = deque()
        self.stack: list[_Frame] = []
        # By placed calls and state: the sets of loose calls with which that was seen. A configuration that
        # has used up more of them can do nothing that the one with fewer cannot.
        self.seen: dict[tuple[int, Hashable], list[int]] = {}
        self.longest: list[Operation] = []
        self.longest_state: Any = self.state

    def run(self, steps_max: int) -> Verdict:
        line, known, model = self.line, self.known, self.model
        following, is_call, operation_at = line.next, line.is_call, line.operation
        place = following[0]
        while following[0]:
            if self.steps > steps_max:
                return self._told("unknown")
            if is_call[place]:
                one = known[number := operation_at[place]]
                self.steps += 1
                fits, after = model.step(self.state, one, one.result)
                if fits and self._is_new(placed := self.placed | 1 << number, after, self.used):
                    self._push(place)
                    self.state, self.placed = after, placed
                    place = following[0]
                else:
                    place = following[place]
                continue
            # A return whose call is not placed: what was placed last was wrong, or came too early, or a
            # call of unknown outcome took place here.
            if len(self.stack) >= len(self.longest):
                self.longest, self.longest_state = self._order(), self.state
            self._expand(known[operation_at[place]].returned)
            if self.waiting:
                self.state, self.used, self.chain = self.waiting.popleft()
                place = following[0]
            elif self.stack:
                place = following[self._pop()]
            else:
                return self._told("violation")
        return Verdict("linearizable", steps=self.steps)

    def _push(self, place: int) -> None:
        self.stack.append(_Frame(place, self.state, self.placed, self.used, self.chain, self.waiting))
        self.chain, self.waiting = (), deque()
        self.line.lift(place)

    def _pop(self) -> int:
        place, self.state, self.placed, self.used, self.chain, self.waiting = self.stack.pop()
        self.line.unlift(place)
        return place

    def _expand(self, before: float) -> None:
        """Adds to `waiting` what one more loose call, made by time `before`, makes of the state."""
        for number, one in enumerate(self.loose):
            if one.called > before:
                return
            if self.used >> number & 1:
                continue
            self.steps += 1
            fits, after = self.model.step(self.state, one, UNKNOWN)
            used = self.used | 1 << number
            if fits and after != self.state and self._is_new(self.placed, after, used):
                self.waiting.append(_Loose(after, used, (*self.chain, number)))

    def _is_new(self, placed: int, state: Hashable, used: int) -> bool:
        sets = self.seen.setdefault((placed, state), [])
        if any(fewer & used == fewer for fewer in sets):
            return False
        sets.append(used)
        return True

    def _order(self) -> list[Operation]:
        order = []
        for frame in self.stack:
            order += [self.loose[number] for number in frame.chain]
            order.append(self.known[self.line.operation[frame.place]])
        return order + [self.loose[number] for number in self.chain]

    def _told(self, outcome: Outcome) -> Verdict:
        placed = {id(one) for one in self.longest}
        left = [one for one in (*self.known, *self.loose) if id(one) not in placed]
        first_return = min(one.returned for one in left)
        stuck = sorted((one for one in left if one.called <= first_return), key=lambda one: one.called)
        return Verdict(outcome, (), self.longest, stuck, self.longest_state, 0, self.steps)
