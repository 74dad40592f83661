"""The networks of the cluster tests do what they say: ways are open, cut in one direction, mended."""

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.mount.networks import HostNetwork, Network, ProxyNetwork

pytestmark = pytest.mark.mount

SERVER = """
import socket, sys
host, port = sys.argv[1].rsplit(":", 1)
server = socket.create_server((host, int(port)))
print("listening", flush=True)
while True:
    connection, _ = server.accept()
    while data := connection.recv(100):
        print("heard", flush=True)
        connection.sendall(b"echo " + data)
"""
CLIENT = """
import socket, sys
host, port = sys.argv[1].rsplit(":", 1)
connection = socket.create_connection((host, int(port)), timeout=60)
for line in sys.stdin:
    connection.settimeout(float(line))
    try:
        connection.sendall(b"x")
        print(connection.recv(100).decode(), flush=True)
    except TimeoutError:
        print("silence", flush=True)
"""


@pytest.fixture(params=["hosts", "proxy"])
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    network = HostNetwork(3) if request.param == "hosts" else ProxyNetwork(3)
    try:
        yield network
    finally:
        network.close()


class Talk:
    """A server at node 2, and a client at node 1 that is connected to it."""

    def __init__(self, network: Network) -> None:
        self.server = self._start(network, 2, SERVER, network.listen(2))
        assert self._line(self.server) == "listening"
        self.client = self._start(network, 1, CLIENT, network.advertise(2))
        assert self.ask() == "echo x"
        assert self.heard()

    def _start(self, network: Network, node: int, script: str, address: str) -> "subprocess.Popen[str]":
        command = [*network.place(node), sys.executable, "-c", script, address]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        network.started(node, process.pid)
        return process

    @staticmethod
    def _line(process: "subprocess.Popen[str]") -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    def ask(self, patience_s: float = 60) -> str:
        assert self.client.stdin is not None
        self.client.stdin.write(f"{patience_s}\n")
        self.client.stdin.flush()
        return self._line(self.client)

    def heard(self) -> bool:
        """Waits until the server has heard once more."""
        return self._line(self.server) == "heard"

    def close(self) -> None:
        for process in (self.client, self.server):
            process.kill()
            process.communicate()


@pytest.fixture
def talk(network: Network) -> Iterator[Talk]:
    talk = Talk(network)
    try:
        yield talk
    finally:
        talk.close()


@pytest.mark.parametrize("way", [(1, 2), (2, 1)])
def test_a_way_that_is_cut_swallows_what_is_sent_until_it_is_mended(
    network: Network, talk: Talk, way: tuple[int, int]
) -> None:
    network.cut(*way)
    assert talk.ask(0.3) == "silence"
    network.mend()
    assert talk.ask().startswith("echo x")


def test_other_ways_stay_open(network: Network, talk: Talk) -> None:
    for way in [(1, 3), (3, 1), (2, 3), (3, 2)]:
        network.cut(*way)
    assert talk.ask() == "echo x"


def test_in_one_direction_the_other_end_still_hears(network: Network, talk: Talk) -> None:
    network.cut(2, 1)
    assert talk.ask(0.3) == "silence"
    assert talk.heard()
    network.mend()
    assert talk.ask().startswith("echo x")


def test_hosts_see_their_own_network_alone() -> None:
    network = HostNetwork(2)
    try:
        script = "import socket; print([name for _, name in socket.if_nameindex()])"
        shown = subprocess.run(
            [*network.place(1), sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert "eth0" in shown.stdout
        assert "port" not in shown.stdout
        assert not {name for _, name in socket.if_nameindex()} & {"bridge", "port1", "port2"}
    finally:
        network.close()
