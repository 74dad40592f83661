"""A TCP proxy on loopback that can hold, delay, throttle and cut what goes through it, each way by itself.

For faults between real processes where network namespaces are not to be had: a node is told the proxy's
address instead of its peer's. What TCP cannot do (lose bytes in the middle, change their order) it does not
do either: `hold` is what a partition looks like to two hosts whose connection outlives it.

In a trio test: `await nursery.start(proxy.run)`. In others: `with running_proxy(host, port) as proxy`, then
`proxy.call(proxy.cut)`.
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio

T = TypeVar("T")

_CHUNK = 64 * 1024
_CHUNKS_MAX = 64  # read ahead of a slow way; then the sender feels it
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST


class Way:
    """One direction, of all connections, those to come too."""

    def __init__(self) -> None:
        self.delay_s = 0.0  # each byte comes that much later
        self.bytes_per_s = 0.0  # 0: as fast as it goes
        self.bytes = 0  # that went through
        self._open = trio.Event()
        self._open.set()

    @property
    def held(self) -> bool:
        return not self._open.is_set()

    def hold(self) -> None:
        """Nothing more goes through; nobody is told."""
        if self._open.is_set():
            self._open = trio.Event()

    def release(self) -> None:
        """What was held goes through, in order."""
        self._open.set()

    async def let_through(self, due: float, size: int) -> None:
        await trio.sleep_until(due)
        if self.bytes_per_s:
            await trio.sleep(size / self.bytes_per_s)
        while not self._open.is_set():
            await self._open.wait()
        self.bytes += size


class FaultProxy:
    """Between who connects to `port` and (host, port) of the target. All methods belong to its loop."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.port = 0  # listened on, once `run` has started
        self.there, self.back = Way(), Way()
        self.refusing = False  # new connections are reset at once
        self.connections = 0  # made so far
        self._open: set[trio.CancelScope] = set()
        self._token: trio.lowlevel.TrioToken | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    # --- faults ---

    def cut(self) -> None:
        """A partition: both ways held."""
        self.there.hold()
        self.back.hold()

    def heal(self) -> None:
        self.there.release()
        self.back.release()
        self.refusing = False

    def reset(self) -> None:
        """Every connection ends with a reset."""
        for scope in self._open:
            scope.cancel()

    # --- running ---

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._token = trio.lowlevel.current_trio_token()
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener, trio.open_nursery() as nursery:
            self.port = listener.socket.getsockname()[1]
            task_status.started()
            await trio.serve_listeners(self._carry, [listener], handler_nursery=nursery)

    async def _carry(self, near: trio.SocketStream) -> None:
        self.connections += 1
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        if self.refusing:
            near.socket.close()
            return
        with contextlib.suppress(OSError):
            far = await trio.open_tcp_stream(*self.target)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            with trio.CancelScope() as scope:
                self._open.add(scope)
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._pump, near, far, self.there, scope)
                        nursery.start_soon(self._pump, far, near, self.back, scope)
                finally:
                    self._open.discard(scope)
                    far.socket.close()
        near.socket.close()

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream, way: Way,
                    connection: trio.CancelScope) -> None:  # fmt: skip
        sender, receiver = trio.open_memory_channel[tuple[float, bytes]](_CHUNKS_MAX)

        async def read() -> None:
            async with sender:
                with contextlib.suppress(trio.BrokenResourceError):
                    while data := await source.receive_some(_CHUNK):
                        await sender.send((trio.current_time() + way.delay_s, data))

        async def write() -> None:
            async with receiver:
                async for due, data in receiver:
                    await way.let_through(due, len(data))
                    await sink.send_all(data)
                await way.let_through(trio.current_time() + way.delay_s, 0)
                await sink.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            try:
                await write()
            except trio.BrokenResourceError:
                connection.cancel()

    # --- from other threads ---

    def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Runs `function` in the proxy's loop."""
        assert self._token is not None
        return trio.from_thread.run_sync(function, *arguments, trio_token=self._token)


@contextmanager
def running_proxy(host: str, port: int) -> Iterator[FaultProxy]:
    """A proxy in a thread of its own."""
    started, scope = threading.Event(), trio.CancelScope()
    made: list[FaultProxy] = []

    async def main() -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                made.append(FaultProxy(host, port))
                await nursery.start(made[0].run)
                started.set()

    thread = threading.Thread(target=trio.run, args=(main,), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield made[0]
    finally:
        made[0].call(scope.cancel)
        thread.join(10)
        assert not thread.is_alive()
