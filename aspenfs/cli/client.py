"""The client's end of the control socket: blocking, small, quick to import.

Belongs here: connecting, asking again after the daemon was restarted, resuming listings and watches.
Not here: printing (`output.py`), arguments (`kv.py`). No click, trio or lmdb: `aspen kv get` must
start in a tenth of a second.

A write carries this client's id and a sequence number, so that one whose answer was lost can be sent
again: the store applies it once and gives the first answer.
"""

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

from aspenfs import errors
from aspenfs.runtime import control_protocol as protocol

TIMEOUT_SECONDS = 30.0
_PAUSE_SECONDS_MIN, _PAUSE_SECONDS_MAX = 0.05, 1.0


class Record(NamedTuple):
    """A key and what it holds. `value` is None where it was not asked for, `size` then too if unknown."""

    key: bytes
    value: bytes | None
    size: int | None
    create_revision: int
    mod_revision: int
    version: int
    lease: int
    attributes: dict[str, Any]

    @property
    def mtime_ns(self) -> int | None:
        """When the key was last written, ns since the epoch, if the writer said so."""
        mtime = self.attributes.get("mtime")
        return mtime if isinstance(mtime, int) else None


class Event(NamedTuple):
    key: bytes
    record: Record | None  # None: deleted


class Answer(NamedTuple):
    result: Any
    items: list[Any]


class _Lost(Exception):
    """The connection ended before the answer did."""


def record(fields: list[Any]) -> Record:
    """A record from its wire form; later daemons may send more fields."""
    return Record(*fields[:8])


class Client:
    """One connection to the daemon, opened at the first call and opened again when it was lost.

    Unreachable: no daemon, or none that answers within `timeout_s`. Any other error is the daemon's.
    """

    def __init__(self, path: str, *, timeout_s: float = TIMEOUT_SECONDS,
                 on_lost: Callable[[], None] = lambda: None) -> None:
        self.path, self.timeout_s, self._on_lost = path, timeout_s, on_lost
        self.repeated = False  # whether a request had to be sent again
        self._id = os.urandom(protocol.CLIENT_ID_BYTES)
        self._numbers, self._sequences = itertools.count(1), itertools.count(1)
        self._socket: socket.socket | None = None
        self.greeting: protocol.Message = {}

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # --- requests ---

    def call(self, method: str, **params: Any) -> Answer:
        """The result and the items before it; sent again while the daemon restarts."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            items: list[Any] = []
            try:
                exchange = self._exchange(method, params)
                while True:
                    items.append(next(exchange))
            except StopIteration as stop:
                return Answer(stop.value, items)
            except _Lost:
                self._reconnect(deadline)

    def follow(self, method: str, item: Callable[[Any], object], **params: Any) -> Any:
        """The result; `item` gets what comes before it, as it comes. Sent once: Unreachable if it is lost."""
        exchange = self._exchange(method, params)
        try:
            while True:
                item(next(exchange))
        except StopIteration as stop:
            return stop.value
        except _Lost:
            raise errors.Unreachable("the daemon went away before it answered: ask again") from None

    def write(self, method: str, **params: Any) -> Answer:
        """As `call`, for what changes keys: however often it is sent, it is applied once."""
        return self.call(method, sequence=next(self._sequences), **params)

    def txn(self, compares: list[dict[str, Any]], then: list[dict[str, Any]],
            else_: list[dict[str, Any]] | None = None) -> Answer:
        return self.write("kv.txn", compares=compares, then=then, **{"else": else_ or []})

    def get(self, key: bytes, *, revision: int = 0) -> Record | None:
        found = list(self.range(key, key + b"\0", revision=revision))
        return found[0] if found else None

    def range(self, start: bytes, end: bytes, *, limit: int = 0, revision: int = 0, keys_only: bool = False,
              sizes_only: bool = False) -> Generator[Record, None, dict[str, Any]]:
        """Every record in [start, end), page by page; returns the daemon's result (`more`, `snapshot`).

        An empty `end` is the end of all keys, `limit` 0 is all. After a lost connection it goes on
        behind the last key, at the same revision.
        """
        left = limit
        while True:
            try:
                exchange = self._exchange("kv.range", {
                    "start": start, "end": end, "limit": left, "revision": revision, "keys_only": keys_only,
                    "sizes_only": sizes_only})
                while True:
                    item = next(exchange)
                    for fields in item["records"]:
                        found = record(fields)
                        yield found
                        start = found.key + b"\0"
                    revision = item["revision"]
                    if limit:
                        left -= len(item["records"])
            except StopIteration as stop:
                result: dict[str, Any] = stop.value
                return result
            except _Lost:
                self._reconnect(time.monotonic() + self.timeout_s)
                if limit and not left:
                    return {"revision": revision, "more": True, "snapshot": True}

    def watch(self, start: bytes, end: bytes, *, from_revision: int = 0) -> Iterator[tuple[int, list[Event]]]:
        """(revision, its events), for ever; the first has none and tells where the watch begins.

        Survives restarts of the daemon and never skips a revision: Compacted if it would have to.
        """
        following, begun = from_revision, False
        while True:
            events: list[Event] = []
            params = {"start": start, "end": end, "from_revision": following}
            try:
                for item in self._exchange("kv.watch", params, patient=True):
                    events += [Event(fields[0], record(fields) if len(fields) > 1 else None)
                               for fields in item["events"]]
                    if not item["last"]:
                        continue
                    following = item["revision"] + 1
                    if events or not begun:
                        begun = True
                        yield item["revision"], events
                        events = []
            except errors.Lagged:
                continue  # read again from the history
            except (_Lost, errors.Closed):
                self._on_lost()
                self._reconnect(None)

    # --- connection ---

    def _exchange(self, method: str, params: dict[str, Any], *,
                  patient: bool = False) -> Generator[Any, None, Any]:
        """Yields the items of one request, returns its result. `patient` waits without a time limit."""
        number = next(self._numbers)
        complete = False
        try:
            connection = self._connected()
            connection.settimeout(self.timeout_s)
            self._send(connection, {"id": number, "method": method, "params": params})
            if patient:
                connection.settimeout(None)
            while True:
                message = self._receive(connection)
                if message.get("id") != number:
                    raise errors.ProtocolError("the daemon answered what was not asked")
                if "item" in message:
                    yield message["item"]
                    continue
                complete = True
                if "error" in message:
                    raise protocol.decode_error(message["error"])
                return message.get("result")
        finally:
            if not complete:  # what is left of the answer must not be taken for the next one
                self.close()

    def _connected(self) -> socket.socket:
        if self._socket is None:
            self._socket = self._connect()
        return self._socket

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(self.timeout_s)
            try:
                connection.connect(self.path)
            except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
                raise errors.Unreachable(f"no daemon answers at {self.path}") from None
            except PermissionError:
                raise errors.AccessDenied(
                    f"{self.path}: only root and the user who runs the daemon may use it") from None
            except TimeoutError:
                raise self._silent() from None
            except OSError as error:
                raise errors.Unreachable(f"{self.path}: {error.strerror or error}") from None
            with contextlib.suppress(_Lost):  # a daemon that refuses says so and closes, without reading
                self._send(connection, protocol.hello(self._id))
            self.greeting = self._receive(connection)
            if "error" in self.greeting:
                raise protocol.decode_error(self.greeting["error"])
            if self.greeting.get("hello") != protocol.GREETING:
                raise errors.ProtocolError(f"what listens at {self.path} is not an aspen daemon")
        except BaseException:
            connection.close()
            raise
        return connection

    def _reconnect(self, deadline: float | None) -> None:
        """Tries until `deadline` (None: for ever), with pauses that grow; Unreachable when it has passed."""
        self.close()
        self.repeated = True
        pause = _PAUSE_SECONDS_MIN
        while True:
            try:
                self._socket = self._connect()
                return
            except (errors.Unreachable, _Lost):
                if deadline is not None and time.monotonic() + pause > deadline:
                    raise errors.Unreachable("the daemon went away before it answered; what was asked for "
                                             "may or may not have been done") from None
            time.sleep(pause)
            pause = min(pause * 2, _PAUSE_SECONDS_MAX)

    def _silent(self) -> errors.Unreachable:
        return errors.Unreachable(f"the daemon at {self.path} did not answer within {self.timeout_s:g} s; "
                                  "a change that was asked for may still take effect")

    def _send(self, connection: socket.socket, message: protocol.Message) -> None:
        frame = protocol.encode(message)
        try:
            connection.sendall(frame, socket.MSG_NOSIGNAL)  # the command lets SIGPIPE end it, for its stdout
        except TimeoutError:
            raise self._silent() from None
        except OSError as error:
            raise _Lost from error

    def _receive(self, connection: socket.socket) -> protocol.Message:
        try:
            size = protocol.payload_size(_exactly(connection, protocol.HEADER_BYTES))
            return protocol.decode(_exactly(connection, size))
        except TimeoutError:
            raise self._silent() from None
        except OSError as error:
            raise _Lost from error


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size:
        count = connection.recv_into(view[filled:])
        if not count:
            raise ConnectionResetError("the daemon closed the connection")
        filled += count
    return bytes(data)
