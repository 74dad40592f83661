"""Where a node listens: host and port as people write them, and sockets that connect there.

    node1.example:7420    192.0.2.7    [2001:db8::7]:7420    2001:db8::7    *:7421 (to listen only)
"""

import ipaddress
import os
import re
import socket
from collections.abc import Iterable
from typing import NamedTuple

import trio

from aspenfs.errors import InvalidArgument, PeerUnreachable
from aspenfs.limits import PEER_ADDRESS_BYTES_MAX, PEER_ADDRESSES_MAX, PEER_CONNECT_S, PEER_PORT

_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?", re.ASCII)
_SCOPED = re.compile(r"[0-9A-Fa-f:.]+%[A-Za-z0-9_.-]{1,15}", re.ASCII)


class Address(NamedTuple):
    host: str  # a name or a numeric address without brackets; "" is every interface
    port: int  # 0: any free one, to listen only

    def __str__(self) -> str:
        host = self.host or "*"
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


def parse(text: str, *, listen: bool = False) -> Address:
    """InvalidArgument. `listen`: port 0 and the host `*` are good too."""
    host, port = text, ""
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or port[:1] not in ("", ":") or ":" not in host:
            raise InvalidArgument(f"address {text!r}: an IPv6 address with a port is written [address]:port")
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
        port = f":{port}"
    number = PEER_PORT
    if port:
        if not re.fullmatch(r":[0-9]{1,5}", port, re.ASCII) or not int(not listen) <= int(port[1:]) <= 65_535:
            raise InvalidArgument(f"address {text!r}: a port is a number from 1 to 65535")
        number = int(port[1:])
    if listen and host == "*":
        return Address("", number)
    if len(text) > PEER_ADDRESS_BYTES_MAX or not _is_host(host):
        raise InvalidArgument(f"address {text!r}: neither a host name nor an IP address")
    return Address(host, number)


def _is_host(host: str) -> bool:
    if ":" in host:
        if "%" in host and not _SCOPED.fullmatch(host):
            return False
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            return False
        return True
    if re.fullmatch(r"[0-9.]+", host):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            return False
        return True
    return len(host) <= 253 and _NAME.fullmatch(host) is not None


def parse_all(texts: Iterable[str]) -> tuple[Address, ...]:
    """The addresses of one node: 1 to PEER_ADDRESSES_MAX. InvalidArgument."""
    found = tuple(dict.fromkeys(parse(text) for text in texts))
    if not 1 <= len(found) <= PEER_ADDRESSES_MAX:
        raise InvalidArgument(f"{len(found)} addresses; a node has 1 to {PEER_ADDRESSES_MAX}")
    return found


async def connect(address: Address) -> socket.socket:
    """A connected, non-blocking socket, which is the caller's. PeerUnreachable."""
    try:
        with trio.move_on_after(PEER_CONNECT_S):
            stream = await trio.open_tcp_stream(address.host, address.port)
            return taken(stream.socket)
    except OSError as error:
        raise PeerUnreachable(f"{address}: {_reason(error)}") from None
    raise PeerUnreachable(f"{address}: no answer in {PEER_CONNECT_S} s")


def taken(sock: trio.socket.SocketType) -> socket.socket:
    """The socket out of trio's hands."""
    plain = socket.socket(fileno=sock.detach())
    plain.setblocking(False)
    return plain


def _reason(error: BaseException) -> str:
    """trio tries all addresses of a name at once and hides what each of them said."""
    inner = error.__cause__
    if isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    if isinstance(inner, OSError):
        return _reason(inner)
    if isinstance(error, OSError) and error.errno and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error)


def tune(sock: socket.socket, *, unsent_bytes: int, silence_ms: int) -> None:
    """No waiting for more to send; little that is stale in the kernel's queue; death noticed in time.

    `unsent_bytes`: more than that is not taken by the kernel before it can be sent. `silence_ms`: what
    is not acknowledged for so long ends the connection (tcp(7), TCP_USER_TIMEOUT); an idle one is probed.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, unsent_bytes)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silence_ms)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
