"""TLS 1.3 over a socket, for trio: few system calls and few wake-ups, whole frames in and out.

Belongs here: bytes into records, records into bytes, waiting for the socket. Not here: who may be at
the other end (`network.py`), what a frame means (`frames.py`).

Why not trio.SSLStream: it hands out one record of at most 16 KiB per call, with several checkpoints
each; while other tasks run that is 57 MiB/s and 17 ms of CPU a MiB. Threads with blocking sockets fare
no better, since each record gives the interpreter lock away and must get it back (28-330 MiB/s). This
one works on large buffers between two waits: 1,200 MiB/s, 0.8 ms a MiB at each end (`tools/bench_peers`).

One task may receive while another sends; no two may do the same. What the state is between awaits:
`_outgoing` is empty, or the one sender is about to write it.
"""

import contextlib
import errno
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import trio
from cryptography import x509

from aspenfs.errors import ProtocolError
from aspenfs.runtime.peers.credentials import ALPN

_PIECE: Final = 256 * 1024  # encrypted, or taken from the socket, at a time
_BUFFER: Final = 64 * 1024  # of decrypted bytes; a longer frame gets a buffer of its own
_HEADER: Final = 4


class Broken(Exception):
    """The connection is of no use any more; the text says why, for people."""


class TlsStream:
    """Owns the socket; frames are a big-endian u32 length and that many bytes."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server: bool) -> None:
        sock.setblocking(False)
        self.socket = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self._received = memoryview(bytearray(_PIECE))
        self._plain = memoryview(bytearray(_BUFFER))
        self._start = self._end = 0  # what of `_plain` has not been handed out
        self._closed = False
        self._broken: Broken | None = None  # how what comes in ended
        self.flushing = False  # a record may have been sent in part; for ever, if a sender was cancelled
        self._left = b""  # of what `send_now` began to send
        self.bytes_sent = self.bytes_received = 0  # encrypted
        self.received_at = trio.current_time()  # when bytes last came in

    # --- the handshake ---

    async def handshake(self) -> None:
        """Broken says what was wrong with the other end, or what it said was wrong with this one."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLError as error:
                self._send_alert()
                raise Broken(_cause(error)) from None
            else:
                break
        await self._flush()
        if self._tls.selected_alpn_protocol() != ALPN:
            raise Broken(f"it does not speak {ALPN}")

    def peer_certificate(self) -> x509.Certificate | None:
        """What the other end showed: checked, if the context checks it, for its signature and its time."""
        der = self._tls.getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(der) if der else None

    # --- sending ---

    async def send(self, parts: Iterable[bytes]) -> None:
        """All of them, in order. When cancelled, the stream is good for `close` only."""
        write = self._tls.write
        waiting = 0
        for part in parts:
            view = memoryview(part)
            size = len(view)
            offset = 0
            while offset < size:
                try:
                    written = write(view[offset:offset + _PIECE])
                except ssl.SSLError as error:
                    raise Broken(_cause(error)) from None
                offset += written
                waiting += written
                if waiting >= _PIECE:
                    await self._flush()
                    waiting = 0
        await self._flush()

    def send_now(self, data: bytes) -> bool:
        """Encrypts and sends as much as the socket takes without waiting, while nobody is in `send`. False if
        something is left: the next `send`, even of nothing, goes on with it. Broken."""
        try:
            self._tls.write(data)
            encrypted = self._left + self._outgoing.read()
            self.bytes_sent += len(encrypted) - len(self._left)
            sent = self.socket.send(encrypted)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise Broken(_cause(error)) from None
        self._left = encrypted[sent:]
        self.flushing = bool(self._left)
        return not self._left

    async def _flush(self) -> None:
        left, self._left = self._left, b""
        data = self._outgoing.read()
        self.bytes_sent += len(data)
        view = memoryview(left + data if left else data)
        if not view:
            return
        self.flushing = True
        while view:
            try:
                view = view[self.socket.send(view):]
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_writable)
            except OSError as error:
                raise Broken(_cause(error)) from None
        self.flushing = False

    def _send_alert(self) -> None:
        """What OpenSSL wants to tell the other end before this one leaves; it may get lost."""
        if not self.flushing:
            with contextlib.suppress(OSError):
                self.socket.send(self._outgoing.read())

    # --- receiving ---

    async def receive(self, frame_bytes_max: int) -> list[memoryview]:
        """Whole frames without their lengths, at least one: all that have come in, up to a buffer full.

        They are valid until the next call, except that one larger than the buffer is the caller's.
        ProtocolError for a length of 0 or above the bound; Broken at the end of the connection.
        """
        while True:
            frames, wanted = self._cut(frame_bytes_max)
            if frames:
                return frames
            if wanted > _BUFFER:
                return [await self._receive_large(wanted)]
            if not self._decrypt():
                await self._fill()

    def _cut(self, frame_bytes_max: int) -> tuple[list[memoryview], int]:
        """The whole frames in the buffer, and how many bytes the one that is not whole has in all."""
        frames: list[memoryview] = []
        plain, start, end = self._plain, self._start, self._end
        wanted = 0
        while end - start >= _HEADER:
            size = int.from_bytes(plain[start:start + _HEADER], "big")
            if not 0 < size <= frame_bytes_max:
                if frames:  # what came before it is good
                    break
                raise ProtocolError(f"a frame of {size} bytes; 1 to {frame_bytes_max} are allowed")
            wanted = _HEADER + size
            if end - start < wanted:
                break
            frames.append(plain[start + _HEADER:start + wanted])
            start += wanted
            wanted = 0
        self._start = start
        return frames, wanted

    def _decrypt(self) -> int:
        """Decrypts what has come in, up to the end of the buffer; how many bytes that were."""
        plain = self._plain
        if self._start:
            kept = bytes(plain[self._start:self._end])  # shorter than a frame
            plain[:len(kept)] = kept
            self._start, self._end = 0, len(kept)
        before = self._end
        try:
            while self._end < _BUFFER and (read := self._read_some(plain[self._end:])):
                self._end += read
        except Broken as error:
            if self._end == before:
                raise
            self._broken = error  # after what came before it has been handed out
        return self._end - before

    async def _receive_large(self, wanted: int) -> memoryview:
        """A frame that does not fit the buffer, decrypted in place."""
        frame = memoryview(bytearray(wanted))
        filled = self._end - self._start
        frame[:filled] = self._plain[self._start:self._end]
        self._start = self._end = 0
        while filled < wanted:
            read = self._read_some(frame[filled:])
            if read:
                filled += read
            else:
                await self._fill()
        return frame[_HEADER:]

    def _read_some(self, target: memoryview) -> int:
        """Bytes of one record, or the rest of one; 0 if more must come in first."""
        if self._broken is not None:
            raise self._broken
        try:
            read: int = self._tls.read(len(target), target)  # type: ignore[assignment]  # as documented
        except ssl.SSLWantReadError:
            return 0
        except ssl.SSLError as error:
            self._send_alert()
            raise Broken(_cause(error)) from None
        if not read:
            raise Broken("it closed the connection")
        return read

    async def _fill(self) -> None:
        """Takes what the socket has, at least one byte."""
        while True:
            await self._wait(trio.lowlevel.wait_readable)
            try:
                size = self.socket.recv_into(self._received)
            except BlockingIOError:
                continue
            except OSError as error:
                raise Broken(_cause(error)) from None
            if not size:
                raise Broken("it closed the connection")
            self.bytes_received += size
            self.received_at = trio.current_time()
            self._incoming.write(self._received[:size])
            return

    async def _wait(self, condition: Callable[[socket.socket], Awaitable[None]]) -> None:
        if self._closed:
            raise Broken("closed")
        try:
            await condition(self.socket)
        except trio.ClosedResourceError:
            raise Broken("closed") from None

    # --- the end ---

    def close(self) -> None:
        """At once; tells the other end if that is possible without waiting. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(ssl.SSLError, OSError, ValueError):
            self._tls.unwrap()
        self._send_alert()
        trio.lowlevel.notify_closing(self.socket)
        self.socket.close()


def _cause(error: OSError) -> str:
    """In people's words: ssl.SSLError is an OSError."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).replace("_", " ").lower()
        if "alert" in reason:
            return f"it refuses this node: {reason.partition('alert ')[2] or reason}"
        return f"no TLS as it is spoken here: {reason}"
    if error.errno in (errno.ECONNRESET, errno.EPIPE):
        return "it closed the connection"
    return error.strerror or str(error)
