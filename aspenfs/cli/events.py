"""What has happened in the cluster lately, as this node saw it: `cluster/events`.

Belongs here: noticing changes of leader, members, connections and health, and keeping the last of them. It
looks now and then, so what comes and goes between two looks is not told; the log has everything.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import trio

from aspenfs.cli.output import utc
from aspenfs.limits import EVENTS_MAX

_LOOK_S: Final = 0.5


class Event(NamedTuple):
    time_ns: int  # wall clock
    text: str


class View(NamedTuple):
    """What is compared from one look to the next."""

    leader: str
    term: int
    roles: Mapping[str, str]  # by name
    states: Mapping[str, str]
    problems: frozenset[str]


class Events:
    """The last EVENTS_MAX, oldest first."""

    def __init__(self, status: Callable[[], Mapping[str, Any]], time_ns: Callable[[], int]) -> None:
        """`status` gives leader, term, members and problems as the daemon's own status has them."""
        self._status, self._time_ns = status, time_ns
        self._last: View | None = None
        self.kept: deque[Event] = deque(maxlen=EVENTS_MAX)

    def told(self) -> list[dict[str, str]]:
        """As the status has them."""
        return [{"time": utc(event.time_ns), "text": event.text} for event in self.kept]

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.look()
            await trio.sleep(_LOOK_S)

    def look(self) -> None:
        """Notes what is not as it was at the last look."""
        now = _view(self._status())
        if self._last is not None:
            for text in differences(self._last, now):
                self.kept.append(Event(self._time_ns(), text))
        self._last = now


def _view(status: Mapping[str, Any]) -> View:
    members = [member for member in status.get("members", ()) if member["role"] != "none"]
    roles = {str(member["name"]): str(member["role"]).replace("leader", "voter") for member in members}
    states = {str(member["name"]): str(member["state"]) for member in members}
    problems = frozenset(str(problem["cause"]) for problem in status.get("problems", ()))
    return View(str(status.get("leader") or ""), int(status.get("term") or 0), roles, states, problems)


def differences(before: View, now: View) -> Iterator[str]:
    """In the order in which a person would ask."""
    if (before.leader, before.term) != (now.leader, now.term) and now.leader:
        yield f"{now.leader} leads, term {now.term}"
    elif before.leader and not now.leader:
        yield f"no leader, term {now.term}"
    for name in sorted(before.roles.keys() | now.roles.keys()):
        old, new = before.roles.get(name), now.roles.get(name)
        if old is None:
            yield f"{name} joined as a {new}"
        elif new is None:
            yield f"{name} is no member any more"
        elif old != new:
            yield f"{name} is a {new} now"
        elif before.states[name] != now.states[name]:
            yield f"{name}: {now.states[name]}"
    for problem in sorted(now.problems - before.problems):
        yield f"problem: {problem}"
    for problem in sorted(before.problems - now.problems):
        yield f"over: {problem}"
