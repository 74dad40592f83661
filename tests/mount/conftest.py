"""Fixtures of the tests on real mounts. Without /dev/fuse they fail: these tests are never skipped."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.mount.clusters import Cluster
from tests.mount.mounting import Mount
from tests.mount.places import Place, ext4_directory

_numbers: Final = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("mount")


@pytest.fixture(scope="session")
def shared_mount() -> Iterator[Mount]:
    """One mount for all tests that do not end it; with ASPEN_TEST_NODES=3 that of a follower of three."""
    assert os.path.exists("/dev/fuse"), "no /dev/fuse: load the fuse module, or run `tools/test --fast`"
    nodes = int(os.environ.get("ASPEN_TEST_NODES", "1"))
    if nodes > 1:
        with Cluster(nodes) as cluster:
            cluster.start().rest()
            yield cluster[nodes]
        return
    mount = Mount()
    try:
        yield mount.start()
    finally:
        mount.close()


def deadline_s(request: pytest.FixtureRequest) -> float | None:
    """Of the mount of a test that may take longer than others; None: the usual one."""
    marker = request.node.get_closest_marker("timeout")
    return None if marker is None else marker.args[0] - 10.0


@pytest.fixture
def mount(shared_mount: Mount, request: pytest.FixtureRequest) -> Iterator[Mount]:
    """The shared mount, with a deadline for this test, and healthy after it."""
    shared_mount.extend(deadline_s(request))
    shared_mount.new_log()
    yield shared_mount
    shared_mount.rest()
    shared_mount.assert_healthy()


@pytest.fixture
def own_mount() -> Iterator[Mount]:
    """A mount of the test's own, started; it may be killed, stopped and started again."""
    mount = Mount()
    try:
        yield mount.start()
    finally:
        mount.close()


@pytest.fixture(scope="session")
def ext4() -> Iterator[Path]:
    """A directory on a plain ext4, which tells whether an expectation is right."""
    with ext4_directory() as path:
        yield path


@pytest.fixture(params=["aspen", "ext4"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """An empty directory in files/, and in a second run of the test one on ext4; the umask is 022."""
    before = os.umask(0o022)
    try:
        is_aspen = request.param == "aspen"
        if is_aspen:
            above = request.getfixturevalue("mount").mountpoint / "files"
        else:
            above = request.getfixturevalue("ext4")
        path = above / f"{next(_numbers)}"
        path.mkdir()
        yield Place(path, is_aspen)
    finally:
        os.umask(before)


@pytest.fixture
def here(place: Place) -> Path:
    """The directory of `place`, for tests that expect the same everywhere."""
    return place.path
