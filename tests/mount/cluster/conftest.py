"""Real nodes for the tests in this directory: one cluster of three for all, healthy and empty before and
after each.

Two more places in its network are free, for nodes that are not members (yet).
"""

from collections.abc import Iterator

import pytest

from tests.mount.clusters import Cluster, Node
from tests.mount.networks import Network, usable_network

NODES = 3
PLACES = 5


@pytest.fixture(scope="package")
def network() -> Iterator[Network]:
    network = usable_network(PLACES)
    yield network
    network.close()


@pytest.fixture(scope="package")
def shared_cluster(network: Network) -> Iterator[Cluster]:
    with Cluster(NODES, network=network) as cluster:
        yield cluster.start()


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster, with a deadline for this test; afterwards it is mended and emptied, and its nodes
    are alike."""
    shared_cluster.extend()
    yield shared_cluster
    shared_cluster.extend()
    shared_cluster.revive()
    shared_cluster.wait_healthy()
    shared_cluster[1].sh("find files kv -mindepth 1 -delete")
    assert len(set(shared_cluster.digests().values())) == 1
    shared_cluster.rest()


@pytest.fixture
def stranger(network: Network) -> Iterator[Node]:
    """A node with nothing on its disk, at a place in the network of the cluster. It is for the test to end
    its membership, if it gets one."""
    node = Node(NODES + 1, network, deadline_s=100)
    try:
        yield node
    finally:
        node.close()


@pytest.fixture
def another(network: Network) -> Iterator[Node]:
    node = Node(NODES + 2, network, deadline_s=100)
    try:
        yield node
    finally:
        node.close()


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """Nodes of which none has been made yet."""
    with Cluster(3) as cluster:
        yield cluster
