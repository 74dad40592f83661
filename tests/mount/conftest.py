"""Fixtures of the tests on real mounts. Without /dev/fuse they fail: these tests are never skipped."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.mounting import Mount


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("mount")


@pytest.fixture(scope="session")
def shared_mount() -> Iterator[Mount]:
    """One mount for all tests that do not end it."""
    assert os.path.exists("/dev/fuse"), "no /dev/fuse: load the fuse module, or run `tools/test --fast`"
    mount = Mount()
    try:
        yield mount.start()
    finally:
        mount.close()


@pytest.fixture
def mount(shared_mount: Mount) -> Iterator[Mount]:
    """The shared mount, with a deadline for this test, and healthy after it."""
    shared_mount.extend()
    shared_mount.new_log()
    yield shared_mount
    shared_mount.assert_healthy()


@pytest.fixture
def own_mount() -> Iterator[Mount]:
    """A mount of the test's own, started; it may be killed, stopped and started again."""
    mount = Mount()
    try:
        yield mount.start()
    finally:
        mount.close()
