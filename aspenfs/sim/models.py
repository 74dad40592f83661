"""What single objects do when one call comes after another: what histories are held against.

A model says what state an object starts in, what a call does to it, and which objects a call touches. States
are hashable and compared by value. A call of unknown outcome has no result: `step` gets UNKNOWN for it and
says what the state would be. All are pure; the search for an order is `linearizability.py`'s.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from aspenfs.sim.history import Operation

UNKNOWN: Any = object()  # the result of a call that never returned

_IMPOSSIBLE: tuple[bool, Any] = (False, None)


class Model(Protocol):
    def initial(self) -> Hashable: ...

    def keys(self, operation: Operation) -> Sequence[Hashable]:
        """The objects that the call touches; calls that share none are checked apart."""

    def step(self, state: Any, operation: Operation, result: Any) -> tuple[bool, Any]:
        """Whether the call may answer `result` in `state` (UNKNOWN fits always), and the state after it."""

    def changes(self, operation: Operation) -> bool:
        """Whether it can change anything: a call of unknown outcome that cannot is left out."""

    def within(self, operations: Sequence[Operation]) -> "Model":
        """The model for these calls of one partition: it may refuse states that lead to none of their
        results, and say of calls of unknown outcome that they change nothing that anybody saw."""


class Register:
    """A key that holds a value or nothing (None). Calls, all with the key first:

    read(key) -> value; write(key, value) -> None; cas(key, old, new) -> bool; delete(key) -> bool, was there.
    """

    def initial(self) -> Hashable:
        return None

    def keys(self, operation: Operation) -> Sequence[Hashable]:
        return (operation.arguments[0],)

    def changes(self, operation: Operation) -> bool:
        return operation.name != "read"

    def step(self, state: Any, operation: Operation, result: Any) -> tuple[bool, Any]:
        name, arguments = operation.name, operation.arguments
        if name == "read":
            return result is UNKNOWN or result == state, state
        if name == "write":
            return True, arguments[1]
        if name == "cas":
            holds = state == arguments[1]
            return result is UNKNOWN or result == holds, arguments[2] if holds else state
        assert name == "delete", name
        return result is UNKNOWN or result == (state is not None), None

    def within(self, operations: Sequence[Operation]) -> Model:
        return self


class AppendList:
    """A list that only grows. append(key, item) -> None; read(key) -> tuple of items.

    The longest answer tells what every state must have been: its beginning, or it with more behind it.
    """

    def __init__(self, longest: tuple[Any, ...] | None = None) -> None:
        self._longest = longest

    def initial(self) -> Hashable:
        return ()

    def within(self, operations: Sequence[Operation]) -> Model:
        answers = [one.result for one in operations if one.name == "read" and one.known]
        return AppendList(max(answers, key=len, default=()))

    def keys(self, operation: Operation) -> Sequence[Hashable]:
        return (operation.arguments[0],)

    def changes(self, operation: Operation) -> bool:
        if operation.name != "append":
            return False
        return self._longest is None or operation.arguments[1] in self._longest

    def step(self, state: Any, operation: Operation, result: Any) -> tuple[bool, Any]:
        if operation.name == "append":
            item, longest, size = operation.arguments[1], self._longest, len(state)
            if longest is not None and size < len(longest) and longest[size] != item:
                return _IMPOSSIBLE
            return True, (*state, item)
        assert operation.name == "read", operation.name
        return result is UNKNOWN or result == state, state


class Entries:
    """Directory entries: a path names an inode or nothing.

    create(path, inode) -> bool: O_EXCL, False is EEXIST; unlink(path) -> bool, False is ENOENT;
    lookup(path) -> inode or None; rename(old, new) -> bool, False is ENOENT, replaces what `new` names;
    link(old, new) -> bool, False if there is no `old` or there is a `new`; list(*paths) -> those that are
    there, sorted, at one instant. Paths that a rename, link or list names together are one object.
    """

    def initial(self) -> Hashable:
        return frozenset()

    def keys(self, operation: Operation) -> Sequence[Hashable]:
        return operation.arguments[:1] if operation.name == "create" else operation.arguments

    def changes(self, operation: Operation) -> bool:
        return operation.name not in ("lookup", "list")

    def within(self, operations: Sequence[Operation]) -> Model:
        return self

    def step(self, state: Any, operation: Operation, result: Any) -> tuple[bool, Any]:
        name, arguments = operation.name, operation.arguments
        entries = dict(state)
        if name == "lookup":
            return result is UNKNOWN or result == entries.get(arguments[0]), state
        if name == "list":
            there = tuple(sorted(path for path in arguments if path in entries))
            return result is UNKNOWN or result == there, state
        done = self._change(entries, name, *arguments)
        if result is not UNKNOWN and result != done:
            return _IMPOSSIBLE
        return True, frozenset(entries.items()) if done else state

    def _change(self, entries: dict[Any, Any], name: str, path: Any, other: Any = None) -> bool:
        if name == "create":
            if path in entries:
                return False
            entries[path] = other
        elif name == "unlink":
            return entries.pop(path, None) is not None
        elif path not in entries:
            return False
        elif name == "rename":
            inode = entries[path]
            # rename(2): two names of one inode, then it does nothing and says that it did.
            if entries.get(other) != inode:
                del entries[path]
                entries[other] = inode
        else:
            assert name == "link", name
            if other in entries:
                return False
            entries[other] = entries[path]
        return True


class Inode:
    """A file's bytes, from empty. append(inode, data) -> offset at which it stands, or None if not told;
    write(inode, offset, data) -> None; truncate(inode, size) -> None; size(inode) -> int;
    read(inode) -> bytes.
    """

    def initial(self) -> Hashable:
        return b""

    def keys(self, operation: Operation) -> Sequence[Hashable]:
        return (operation.arguments[0],)

    def changes(self, operation: Operation) -> bool:
        return operation.name not in ("size", "read")

    def within(self, operations: Sequence[Operation]) -> Model:
        return self

    def step(self, state: Any, operation: Operation, result: Any) -> tuple[bool, Any]:
        name, arguments = operation.name, operation.arguments
        if name == "append":
            return result is UNKNOWN or result is None or result == len(state), state + arguments[1]
        if name == "write":
            _, offset, data = arguments
            return True, state[:offset].ljust(offset, b"\0") + data + state[offset + len(data) :]
        if name == "truncate":
            return True, state[: arguments[1]].ljust(arguments[1], b"\0")
        if name == "size":
            return result is UNKNOWN or result == len(state), state
        assert name == "read", name
        return result is UNKNOWN or result == state, state
