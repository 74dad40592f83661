"""Three real nodes for the tests in this directory: one cluster for all that leave it as it was."""

from collections.abc import Iterator

import pytest

from tests.mount.clusters import Cluster


@pytest.fixture(scope="package")
def shared_cluster() -> Iterator[Cluster]:
    with Cluster(3) as cluster:
        yield cluster.start()


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster, healthy, with a deadline for this test; healthy again after it, nodes alike."""
    shared_cluster.extend()
    yield shared_cluster
    shared_cluster.extend()
    shared_cluster.revive()
    shared_cluster.wait_healthy()
    assert len(set(shared_cluster.digests().values())) == 1
    shared_cluster.rest()


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """Three nodes of the test's own, none of which has been made yet."""
    with Cluster(3) as cluster:
        yield cluster
