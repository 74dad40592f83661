"""A real control server over a real store in a thread of its own, for tests that speak to it by socket."""

import socket
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import trio

from aspenfs.kv.local import LocalStore
from aspenfs.runtime import control_protocol as protocol
from aspenfs.runtime.control import ControlServer
from aspenfs.runtime.control_command import Handler
from aspenfs.runtime.system import SystemClock, SystemEntropy

DEADLINE_SECONDS = 20
CLIENT = b"test-client-0001"


class Daemon:
    """Serves one LocalStore at `path`; it can be stopped and started again over the same store."""

    def __init__(
        self,
        path: Path,
        status: Callable[[], Mapping[str, Any]] = dict,
        extra: Mapping[str, Handler] | None = None,
        store: type[LocalStore] = LocalStore,
    ) -> None:
        self.path, self._status, self._extra = path, status, extra
        self.store = store(SystemClock(), SystemEntropy(), trio.Event)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Daemon":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main, started))
        self._thread.start()
        assert started.wait(DEADLINE_SECONDS)

    def stop(self) -> None:
        if self._thread is not None:
            trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
            self._thread.join(DEADLINE_SECONDS)
            assert not self._thread.is_alive()
            self._thread = None

    async def _main(self, started: threading.Event) -> None:
        self._token, self._scope = trio.lowlevel.current_trio_token(), trio.CancelScope()
        with self._scope:
            self.server = ControlServer(self.store, self._status, self._extra, clock=SystemClock())
            async with trio.open_nursery() as nursery:
                await nursery.start(self.server.serve, str(self.path))
                started.set()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs an async function in the daemon's loop; its result."""
        return trio.from_thread.run(function, *arguments, trio_token=self._token)


class Raw:
    """A client that sends what it is told, frame by frame."""

    def __init__(self, path: Path, *, hello: bool = True, client: bytes = CLIENT) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(DEADLINE_SECONDS)
        self.socket.connect(str(path))
        if hello:
            self.send(protocol.hello(client))
            self.greeting = self.receive()

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *messages: Mapping[str, Any]) -> None:
        self.socket.sendall(b"".join(protocol.encode(message) for message in messages))

    def receive(self) -> dict[str, Any] | None:
        """The next message; None once the daemon has closed the connection."""
        header = self._read(protocol.HEADER_BYTES)
        return protocol.decode(self._read(protocol.payload_size(header))) if header else None

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                received = self.socket.recv(size - len(data))
            except ConnectionResetError:  # closed with unread bytes of ours
                received = b""
            if not received:
                assert not data, "half a frame"
                return b""
            data += received
        return data

    def ask(self, method: str, number: int = 1, **params: Any) -> dict[str, Any]:
        """The last message about one request; the items before it are under "items"."""
        self.send({"id": number, "method": method, "params": params})
        items: list[Any] = []
        while True:
            message = self.receive()
            assert message is not None
            assert message["id"] == number
            if "item" not in message:
                return message | {"items": items}
            items.append(message["item"])


@contextmanager
def short_directory() -> Generator[Path, None, None]:
    """A directory that others may enter and whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="aspen-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path
