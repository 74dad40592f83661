"""GET /metrics on a loopback port: the file `cluster/metrics` for a Prometheus that cannot read files.

Belongs here: HTTP enough for a scraper. Not here: the text (`views/cluster.py`), the figures
(`cli/telemetry.py`).

Only loopback addresses are listened on, for who may connect learns names and sizes, and nobody is asked
who he is. A scraper on another host reads through whatever its site uses for that, with TLS and all.
"""

import ipaddress
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import h11
import trio

from aspenfs.errors import Busy, InvalidArgument
from aspenfs.limits import METRICS_CONNECTIONS_MAX, METRICS_IDLE_S_MAX
from aspenfs.runtime.peers import addresses

logger = logging.getLogger(__name__)

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
_READ_BYTES: Final = 4096


def check(text: str) -> str:
    """HOST:PORT with a loopback address as HOST, in its normal form. InvalidArgument."""
    where = addresses.parse(text, listen=True)
    try:
        loopback = where.host == "localhost" or ipaddress.ip_address(where.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise InvalidArgument(f"{text!r}: metrics are served on a loopback address, such as 127.0.0.1:9420")
    return str(where)


async def serve(where: str, text: Callable[[], str], *,
                task_status: Any = trio.TASK_STATUS_IGNORED) -> None:  # fmt: skip
    """Until cancelled. `text` is called for each request, and is what it is answered with. Busy."""
    address = addresses.parse(where, listen=True)
    try:
        listeners = await trio.open_tcp_listeners(address.port, host=address.host)
    except OSError as error:
        raise Busy(f"cannot serve metrics on {where}: {error.strerror or error}") from error
    slots = trio.CapacityLimiter(METRICS_CONNECTIONS_MAX)
    task_status.started(listeners[0].socket.getsockname()[1])
    await trio.serve_listeners(partial(_serve, text, slots), listeners)


async def _serve(text: Callable[[], str], slots: trio.CapacityLimiter, stream: trio.SocketStream) -> None:
    try:
        async with slots:
            while await _answer_one(text, stream, h11.Connection(h11.SERVER)):
                pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # it went away
    except Exception:
        logger.exception("a request for metrics failed")
    finally:
        await trio.aclose_forcefully(stream)


async def _answer_one(text: Callable[[], str], stream: trio.SocketStream, peer: h11.Connection) -> bool:
    """Whether another request may follow on the connection."""
    with trio.move_on_after(METRICS_IDLE_S_MAX):
        try:
            request = await _request(stream, peer)
        except h11.RemoteProtocolError as error:
            await _send(stream, peer, error.error_status_hint, b"not understood\n", last=True)
            return False
        if request is None:
            return False
        if request.method not in (b"GET", b"HEAD"):
            await _send(stream, peer, 405, b"GET it\n", last=True)
            return False
        if request.target.split(b"?")[0] not in (b"/metrics", b"/"):
            await _send(stream, peer, 404, b"look at /metrics\n", head=request.method == b"HEAD")
        else:
            await _send(stream, peer, 200, text().encode(), head=request.method == b"HEAD")
        return peer.our_state is h11.DONE and peer.their_state is h11.DONE and peer.trailing_data[0] == b""
    return False


async def _request(stream: trio.SocketStream, peer: h11.Connection) -> h11.Request | None:
    """The next request, its body read and dropped; None when there is none."""
    request = None
    while True:
        event = peer.next_event()
        if event is h11.NEED_DATA:
            peer.receive_data(await stream.receive_some(_READ_BYTES))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.EndOfMessage):
            return request
        elif isinstance(event, h11.ConnectionClosed):
            return None


async def _send(stream: trio.SocketStream, peer: h11.Connection, status: int, body: bytes, *,
                head: bool = False, last: bool = False) -> None:  # fmt: skip
    headers = [(b"content-type", CONTENT_TYPE), (b"content-length", b"%d" % len(body))]
    if last:
        headers.append((b"connection", b"close"))
    out = peer.send(h11.Response(status_code=status, headers=headers)) or b""
    if not head:
        out += peer.send(h11.Data(data=body)) or b""
    out += peer.send(h11.EndOfMessage()) or b""
    await stream.send_all(out)
