"""Nodes that are started again at other addresses, while one that knows only the old ones is away."""

import itertools
import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.mount.clusters import Cluster, Node
from tests.mount.networks import PORT, Network

pytestmark = pytest.mark.mount


class Ports(Network):
    """All on this machine, each at a port of its own, which may change. They are at an address that is this
    process's alone: nobody takes one while its node is away."""

    def __init__(self, nodes: int) -> None:
        self.host = socket.inet_ntoa((127 << 24 | 1 << 23 | os.getpid()).to_bytes(4, "big"))
        self.ports: dict[int, int] = {}
        self.free = itertools.count(PORT)
        for node in range(1, nodes + 1):
            self.move(node)

    def move(self, node: int) -> None:
        self.ports[node] = next(self.free)

    def listen(self, node: int) -> str:
        return f"{self.host}:{self.ports[node]}"

    def advertise(self, node: int) -> str:
        return self.listen(node)

    def place(self, node: int) -> list[str]:
        return []

    def cut(self, source: int, *targets: int) -> None:
        raise NotImplementedError("ways within a machine are not cut here")

    def mend(self) -> None: ...

    def started(self, node: int, pid: int) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def network() -> Ports:
    return Ports(3)


@pytest.fixture
def cluster(network: Ports) -> Iterator[Cluster]:
    with Cluster(3, network=network) as cluster:
        yield cluster.start()


def start_elsewhere(node: Node, network: Ports) -> None:
    node.stop()
    network.move(node.number)
    address = network.listen(node.number)
    node.start(f"listen={address},advertise={address}")


def members(node: Node) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads(node.aspen("member", "list", "--json"))}


def test_who_was_away_while_all_others_moved_finds_them_again(cluster: Cluster, network: Ports) -> None:
    first, second, third = cluster
    third.stop()
    before = dict(network.ports)
    start_elsewhere(first, network)  # it finds the second one, and so its new row gets a majority
    first.sh("echo one > files/moved")
    start_elsewhere(second, network)
    second.sh("echo two >> files/moved")
    assert before[1] != network.ports[1]
    assert before[2] != network.ports[2]
    known = members(first)
    # The third one has never heard of these addresses; it is where it was, and the others come to it.
    third.start()
    assert third.sh("cat files/moved") == "one\ntwo\n"
    cluster.wait_healthy()
    for node in cluster:
        told = members(node)
        for number in (1, 2):
            assert told[f"n{number}"]["addresses"] == [network.advertise(number)]
            assert told[f"n{number}"]["topology"] == known[f"n{number}"]["topology"] > 1
        assert told["n3"]["addresses"] == [network.advertise(3)]
    lines = third.sh("cat cluster/members").splitlines()
    assert "topology" in lines[0].split()
    assert any(network.advertise(1) in line for line in lines)
    third.sh("echo three >> files/moved")
    assert first.sh("cat files/moved") == "one\ntwo\nthree\n"
