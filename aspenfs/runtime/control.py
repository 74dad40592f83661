"""The control socket's server: who may come in, frames in, requests run, frames out.

Belongs here: the unix socket, the peer's credentials, the life of a connection. Not here: the
frames (`control_protocol.py`) and what the requests for keys do (`control_kv.py`).

What a connection sends can end that connection and nothing else. Requests of one connection run at
the same time, but those marked `ordered` are accepted in the order in which they were sent: a
client's sequence numbers only mean something in order.
"""

import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Mapping
from typing import Any

import trio

from aspenfs import errors
from aspenfs.kv.store import Store
from aspenfs.limits import CONTROL_CONNECTIONS_MAX, CONTROL_HELLO_SECONDS_MAX, CONTROL_REQUESTS_MAX
from aspenfs.runtime import control_protocol as protocol
from aspenfs.runtime.control_command import Call, Command, Handler
from aspenfs.runtime.control_kv import kv_commands
from aspenfs.seams import Clock

log = logging.getLogger(__name__)

_RECEIVE_BYTES = 64 * 1024
_OUTBOX_FRAMES = 4  # written ahead of a client that reads slowly; then its requests wait
_FAREWELL_SECONDS = 1


class ControlServer:
    """Serves the store, the status and whatever the daemon adds on one unix socket."""

    def __init__(self, store: Store, status: Callable[[], Mapping[str, Any]],
                 extra: Mapping[str, Handler] | None = None, *, clock: Clock, release: str = "") -> None:
        async def answer_status(call: Call) -> Mapping[str, Any]:
            return status()

        self.commands: dict[str, Command] = {"status": Command(answer_status), **kv_commands(store, clock)}
        for method, handler in (extra or {}).items():
            if method in self.commands:
                raise ValueError(f"the control method {method!r} is taken")
            self.commands[method] = Command(handler)
        self.release, self._store = release, store
        self._connections = 0

    async def serve(
        self, path: str, *,
        task_status: Any = trio.TASK_STATUS_IGNORED,  # TaskStatus[None], which mypy misses in trio 0.35
    ) -> None:
        """Listens on `path` until cancelled, then removes it.

        InvalidArgument: the path is longer than a socket's may be. Busy: another process serves it.
        """
        listening, inode = _listen(path)
        try:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
            async with listener:
                task_status.started()
                await trio.serve_listeners(self._serve_connection, [listener])
        finally:
            _remove(path, inode)

    async def _serve_connection(self, stream: trio.SocketStream) -> None:
        self._connections += 1
        try:
            async with stream:
                await self._greet(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # the client went away
        except Exception:
            log.exception("control: a connection failed")
        finally:
            self._connections -= 1

    async def _greet(self, stream: trio.SocketStream) -> None:
        frames = _Frames(stream)
        try:
            uid = _peer_uid(stream)
            if self._connections > CONTROL_CONNECTIONS_MAX:
                raise errors.Overloaded(f"{CONTROL_CONNECTIONS_MAX} clients are connected, more may not be")
            with trio.move_on_after(CONTROL_HELLO_SECONDS_MAX) as waiting:
                first = await frames.receive()
            if waiting.cancelled_caught or first is None:
                return
            hello = protocol.read_hello(first)
            await stream.send_all(protocol.encode({
                "hello": protocol.GREETING, "version": hello.version, "release": self.release,
                "pid": os.getpid()}))
            await _Connection(stream, frames, self.commands, hello.client, uid, self._store).run()
        except errors.AspenError as error:
            with trio.move_on_after(_FAREWELL_SECONDS):
                await stream.send_all(protocol.encode({"error": protocol.encode_error(error)}))


class _Frames:
    """Messages out of a byte stream."""

    __slots__ = ("_buffer", "_stream")

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream, self._buffer = stream, bytearray()

    async def receive(self) -> protocol.Message | None:
        """The next message, None at the end; a cancelled call loses nothing that came in."""
        buffer, source = self._buffer, self._stream.socket
        needed = protocol.HEADER_BYTES
        while True:
            if len(buffer) >= needed:
                needed = protocol.HEADER_BYTES + protocol.payload_size(bytes(buffer[:protocol.HEADER_BYTES]))
                if len(buffer) >= needed:
                    payload = bytes(buffer[protocol.HEADER_BYTES:needed])
                    del buffer[:needed]
                    return protocol.decode(payload)
            await trio.lowlevel.wait_readable(source)
            try:
                received = os.read(source.fileno(), _RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError from error
            if not received:
                return None
            buffer += received


class _Connection:
    """A client that was let in. One task reads and starts requests, one writes; each request is a task."""

    def __init__(self, stream: trio.SocketStream, frames: _Frames, commands: Mapping[str, Command],
                 client: bytes, uid: int, store: Store) -> None:
        self.client, self.uid = client, uid
        self._store = store
        self._stream, self._frames, self._commands = stream, frames, commands
        self._running: dict[int, trio.CancelScope] = {}
        # A queue, so that a request cancelled while it sends never leaves half a frame behind. Only what the
        # socket does not take at once goes there.
        self._outbox, self._outgoing = trio.open_memory_channel[bytes](_OUTBOX_FRAMES)
        self._waiting = 0  # frames that are there, or on their way there or from there

    async def send(self, message: Mapping[str, Any]) -> None:
        frame = protocol.encode(message)
        if not self._waiting:
            try:
                sent = os.write(self._stream.socket.fileno(), frame)
            except BlockingIOError:
                sent = 0
            except OSError:
                return  # the client went away: the task that reads finds that out
            if sent < len(frame):
                self._waiting = 1
                self._outbox.send_nowait(frame[sent:])
            return
        self._waiting += 1
        try:
            await self._outbox.send(frame)
        except BaseException:
            self._waiting -= 1
            raise

    async def run(self) -> None:
        """Until the client leaves or breaks the protocol (ProtocolError); what still ran is cancelled."""
        broken: errors.ProtocolError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, nursery.cancel_scope)
            try:
                await self._read(nursery)
            except errors.ProtocolError as error:
                broken = error
            except trio.BrokenResourceError:
                pass
            nursery.cancel_scope.cancel()
        if broken is not None:
            raise broken

    async def _write(self, connection: trio.CancelScope) -> None:
        try:
            async for frame in self._outgoing:
                await self._stream.send_all(frame)
                self._waiting -= 1
        except trio.BrokenResourceError:
            connection.cancel()

    async def _read(self, nursery: trio.Nursery) -> None:
        while (message := await self._frames.receive()) is not None:
            if type(number := message.get("cancel")) is int:
                if scope := self._running.get(number):
                    scope.cancel()
                continue
            request = protocol.read_request(message)
            if request.id in self._running:
                raise errors.ProtocolError(f"request {request.id} is still under way")
            if len(self._running) >= CONTROL_REQUESTS_MAX:
                overloaded = errors.Overloaded(f"{CONTROL_REQUESTS_MAX} requests are under way here")
                await self.send({"id": request.id, "error": protocol.encode_error(overloaded)})
                continue
            command = self._commands.get(request.method)
            if command is not None and command.ordered and not self._store.alone:
                # Among others its place is certain when it is committed: nothing is left to do beside it,
                # and nobody can cancel it, because what comes behind it is not read yet.
                await self._answer(request, *await self._outcome(request, command, _nothing))
                continue
            accepted = trio.Event()
            nursery.start_soon(self._run, request, command, accepted.set)
            await accepted.wait()

    async def _run(self, request: protocol.Request, command: Command | None,
                   accepted: Callable[[], None]) -> None:
        result: Any = None
        error: errors.AspenError | None = None
        with trio.CancelScope() as scope:
            self._running[request.id] = scope
            try:
                if command is None or not command.ordered:
                    accepted()
                result, error = await self._outcome(request, command, accepted)
            finally:
                del self._running[request.id]
                accepted()
        if scope.cancelled_caught:
            error = errors.Closed("cancelled")
        await self._answer(request, result, error)

    async def _outcome(self, request: protocol.Request, command: Command | None,
                       accepted: Callable[[], None]) -> tuple[Any, errors.AspenError | None]:
        """The result, or the error that the client is told."""
        async def send_item(value: Any) -> None:
            await self.send({"id": request.id, "item": value})
            await trio.lowlevel.checkpoint()  # others get their turn between two pages

        try:
            if command is None:
                raise errors.NotSupported(f"this daemon has no control method {request.method!r}")
            call = Call(request.params, self.client, self.uid, send_item, accepted)
            return await command.handler(call), None
        except errors.AspenError as error:
            return None, error
        except Exception:
            log.exception("control: method=%s failed", request.method)
            return None, errors.RemoteFailure(f"the daemon failed at {request.method}; its log has the cause")

    async def _answer(self, request: protocol.Request, result: Any, error: errors.AspenError | None) -> None:
        if error is None:
            try:
                await self.send({"id": request.id, "result": result})
                return
            except (errors.TooLarge, errors.InvalidArgument):  # the answer fits no frame
                log.exception("control: the result of method=%s cannot be sent", request.method)
                error = errors.RemoteFailure(f"the result of {request.method} cannot be sent; see its log")
        await self.send({"id": request.id, "error": protocol.encode_error(error)})


def _nothing() -> None:
    """For who does not wait to hear that a request is accepted."""


def _peer_uid(stream: trio.SocketStream) -> int:
    """The uid of the process that connected (the kernel vouches for it); AccessDenied for strangers."""
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    if uid not in (0, os.geteuid()):
        raise errors.AccessDenied(f"only root and uid {os.geteuid()}, which runs the daemon, may control it; "
                                  f"you are uid {uid}")
    return int(uid)


def _listen(path: str) -> tuple[socket.socket, int]:
    """A listening socket at `path`, mode 0600 from its first moment, and its inode number.

    It is made under another name and renamed: what a killed daemon left there is replaced in one step.
    """
    if (size := len(os.fsencode(path))) > protocol.SOCKET_PATH_BYTES_MAX:
        raise errors.InvalidArgument(
            f"{path}: a socket's path may have {protocol.SOCKET_PATH_BYTES_MAX} bytes, this one has {size}: "
            "choose a shorter state directory (ASPEN_STATE_DIR)")
    _refuse_if_served(path)
    fresh = path[:-1] + "~"  # as long as `path`, so it fits too
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(fresh)
        os.chmod(fresh, 0o600)  # nobody can connect before listen()
        listening.listen(64)
        os.rename(fresh, path)
        return listening, os.stat(path).st_ino
    except BaseException:
        listening.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        raise


def _refuse_if_served(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            if error.errno == errno.ECONNREFUSED and os.path.exists(path):
                if not stat.S_ISSOCK(os.stat(path).st_mode):
                    raise errors.AlreadyExists(f"{path} is not a socket; move it away") from None
                return
            if error.errno != errno.EAGAIN:  # EAGAIN: alive, its queue is full
                raise
        raise errors.Busy(f"{path} is served by another process")


def _remove(path: str, inode: int) -> None:
    """Takes the socket away, unless somebody else's is there by now."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)
