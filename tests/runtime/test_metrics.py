"""The metrics address: what a scraper gets, and what others get."""

import errno
import http.client
import re
import socket
from collections.abc import Callable
from functools import partial

import pytest
import trio

from aspenfs.errors import Busy, InvalidArgument
from aspenfs.limits import METRICS_CONNECTIONS_MAX
from aspenfs.runtime import metrics

TEXT = "# TYPE aspen_revision counter\naspen_revision 42\n"


def with_server(ask: Callable[[int], None]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            port = await nursery.start(partial(metrics.serve, "127.0.0.1:0", lambda: TEXT))
            with trio.fail_after(60):
                await trio.to_thread.run_sync(ask, port)
            nursery.cancel_scope.cancel()

    trio.run(main)


def raw(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        answer = b""
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(4096):
                answer += part
        except OSError as error:  # it closed with some of the request unread, maybe while that was being sent
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
                raise
        return answer


def test_a_scraper_gets_the_text_again_and_again_on_one_connection() -> None:
    def ask(port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        for _ in range(3):
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            assert answer.status == 200
            assert answer.headers["content-type"] == metrics.CONTENT_TYPE.decode()
            assert answer.read().decode() == TEXT
            connection.close()
        connection.request("HEAD", "/metrics")
        assert connection.getresponse().read() == b""
        connection.close()

    with_server(ask)


def test_other_paths_methods_and_noise_are_refused_and_the_server_goes_on() -> None:
    def ask(port: int) -> None:
        assert raw(port, b"GET /etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 404")
        assert raw(port, b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").startswith(
            b"HTTP/1.1 405"
        )
        assert raw(port, b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert TEXT.encode() not in raw(port, b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n")
        assert raw(port, b"") == b""
        assert TEXT.encode() in raw(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")

    with_server(ask)


def test_silent_connections_do_not_pile_up_beyond_their_bound() -> None:
    def ask(port: int) -> None:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(METRICS_CONNECTIONS_MAX - 1)]
        assert TEXT.encode() in raw(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        for connection in silent:
            connection.close()

    with_server(ask)


@pytest.mark.parametrize("where", ["0.0.0.0:9420", "*:9420", "192.0.2.1:9420", "example.net:9420"])
def test_only_loopback_addresses_are_served(where: str) -> None:
    with pytest.raises(InvalidArgument, match="loopback"):
        metrics.check(where)


def test_loopback_addresses_are_taken_as_they_are() -> None:
    assert re.fullmatch(r"127\.0\.0\.1:9420", metrics.check("127.0.0.1:9420"))
    assert metrics.check("[::1]:9420") == "[::1]:9420"


def test_a_port_in_use_is_named() -> None:
    async def main(port: int) -> None:
        with pytest.raises(Busy, match=f"127.0.0.1:{port}"):
            await metrics.serve(f"127.0.0.1:{port}", lambda: TEXT)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        trio.run(main, taken.getsockname()[1])
