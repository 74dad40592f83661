"""Is there an order of these calls, true to real time, that one object on one host could have answered so?

The search is Wing and Gong's with Lowe's memo ("Testing for linearizability", 2017; WGL), as in Porcupine:
walk the calls in time; try each that overlaps the first return still open; go back when a return is
reached whose call was not placed; never look twice at the same set of placed calls with the same state.
Calls on different objects are searched apart (linearizability is local), calls that name several objects
join them.

Belongs here: the search and what it found. The objects are `models.py`'s. The verdict 'unknown' means that
the search was too long: it is not a pass, and callers must not take it for one.
"""

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


class _Search:
    """One partition. A configuration is: the calls placed that returned, those placed that never did
    (`loose`), and the state. A loose call is tried last and only if it changes the state, for it may
    never have taken place."""

    def __init__(self, operations: Sequence[Operation], model: Model) -> None:
        self.model = model
        self.known = [one for one in operations if one.known]
        loose = [one for one in operations if not one.known and model.changes(one)]
        self.loose = sorted(loose, key=lambda one: one.called)
        self.line = _Timeline(self.known)
        self.steps = 0
        self.state: Any = model.initial()
        self.placed = 0  # bit sets, by number in `known` and in `loose`
        self.placed_loose = 0
        # (place or -1 - number of a loose call, state, placed, placed_loose before it)
        self.stack: list[tuple[int, Any, int, int]] = []
        # By placed calls and state: the sets of loose calls with which that was seen. A configuration that
        # has used up more of them can do nothing that the one with fewer cannot.
        self.seen: dict[tuple[int, Hashable], list[int]] = {}
        self.longest: list[Operation] = []
        self.longest_state: Any = self.state

    def run(self, steps_max: int) -> Verdict:
        line, known, model = self.line, self.known, self.model
        following, is_call, operation_at = line.next, line.is_call, line.operation
        place = following[0]
        loose = 0  # the next loose call to try, once `place` is a return
        while following[0]:
            if self.steps > steps_max:
                return self._told("unknown")
            if is_call[place]:
                one = known[number := operation_at[place]]
                self.steps += 1
                fits, after = model.step(self.state, one, one.result)
                if fits and self._is_new(placed := self.placed | 1 << number, after, self.placed_loose):
                    self.stack.append((place, self.state, self.placed, self.placed_loose))
                    self.state, self.placed = after, placed
                    line.lift(place)
                    place, loose = following[0], 0
                else:
                    place = following[place]
                continue
            if self._place_loose(loose, known[operation_at[place]].returned):
                place = following[0]
                loose = 0
                continue
            # A return whose call is not placed: what was placed last was wrong, or came too early.
            if len(self.stack) >= len(self.longest):
                self.longest = [self._operation(mark) for mark, *_ in self.stack]
                self.longest_state = self.state
            if not self.stack:
                return self._told("violation")
            mark, self.state, self.placed, self.placed_loose = self.stack.pop()
            if mark > 0:
                line.unlift(mark)
                place, loose = following[mark], 0
            else:
                place, loose = self._first_return(), -mark
        return Verdict("linearizable", steps=self.steps)

    def _place_loose(self, start: int, before: float) -> bool:
        """Places the next loose call from number `start` on that was made by time `before`."""
        for number in range(start, len(self.loose)):
            one = self.loose[number]
            if one.called > before:
                return False
            if self.placed_loose >> number & 1:
                continue
            self.steps += 1
            fits, after = self.model.step(self.state, one, UNKNOWN)
            used = self.placed_loose | 1 << number
            if fits and after != self.state and self._is_new(self.placed, after, used):
                self.stack.append((-1 - number, self.state, self.placed, self.placed_loose))
                self.state, self.placed_loose = after, used
                return True
        return False

    def _is_new(self, placed: int, state: Hashable, used: int) -> bool:
        sets = self.seen.setdefault((placed, state), [])
        if any(fewer & used == fewer for fewer in sets):
            return False
        sets.append(used)
        return True

    def _first_return(self) -> int:
        place = self.line.next[0]
        while self.line.is_call[place]:
            place = self.line.next[place]
        return place

    def _operation(self, mark: int) -> Operation:
        return self.known[self.line.operation[mark]] if mark > 0 else self.loose[-1 - mark]

    def _told(self, outcome: Outcome) -> Verdict:
        placed = {id(one) for one in self.longest}
        left = [one for one in (*self.known, *self.loose) if id(one) not in placed]
        first_return = min(one.returned for one in left)
        stuck = sorted((one for one in left if one.called <= first_return), key=lambda one: one.called)
        return Verdict(outcome, (), self.longest, stuck, self.longest_state, 0, self.steps)
