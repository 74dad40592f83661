"""The same random calls on ext4 and in files/ have the same outcomes and leave the same trees.

Longer runs: `tools/posix_long --seconds N --seed S`.
"""

import os
from pathlib import Path

import pytest

from tests.mount.differential import Difference, Differential
from tests.mount.mounting import Mount


@pytest.mark.parametrize("users", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_random_calls_have_the_outcomes_of_ext4(mount: Mount, ext4: Path, seed: int, users: bool) -> None:
    before = os.umask(0o022)
    try:
        right, tried = (above / f"random-{seed}-{users}" for above in (ext4, mount.mountpoint / "files"))
        right.mkdir()
        tried.mkdir()
        Differential(right, tried, seed, users=users).run(1200)
    finally:
        os.umask(before)


def test_a_difference_is_found(ext4: Path) -> None:
    """The comparison itself: one byte more on one side, and the run fails."""
    right, tried = ext4 / "difference-right", ext4 / "difference-tried"
    for path in (right, tried):
        path.mkdir()
        (path / "a").write_bytes(b"same")
    (tried / "a").write_bytes(b"samE")
    with pytest.raises(Difference, match=r"b'a': content"):
        Differential(right, tried, 1).compare_trees()
