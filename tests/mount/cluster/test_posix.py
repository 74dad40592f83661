"""The cases of tests/mount/posix on a mount that is one of three: commits take a round trip."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.mount.clusters import Cluster
from tests.mount.differential import Differential
from tests.mount.mounting import ROOT

pytestmark = [pytest.mark.mount, pytest.mark.timeout(900)]

# What would take minutes here, and what is true a second later only: an orphan counts until all let go of it.
LEFT_OUT: Final = ("ext4", "100000", "emptied_while", "inodes_are_counted")


def test_a_mount_of_several_answers_as_one_alone_does() -> None:
    chosen = " and ".join(f"not {part}" for part in LEFT_OUT)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", chosen, "-p", "no:cacheprovider", "tests/mount/posix"],
        cwd=ROOT,
        env={**os.environ, "ASPEN_TEST_NODES": "3"},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def test_random_calls_on_three_strict_mounts_have_the_outcomes_of_ext4(ext4: Path) -> None:
    """Longer: `tools/posix_long --nodes 3`."""
    before = os.umask(0o022)
    try:
        with Cluster(3, options="consistency=strict", deadline_s=300) as cluster:
            cluster.start()
            right = ext4 / "random-several"
            first, *others = (node.mountpoint / "files" / "random" for node in cluster)
            for place in (right, first):
                place.mkdir()
            Differential(right, first, 1, others, users=True).run(1200)
            assert len(set(cluster.digests().values())) == 1
    finally:
        os.umask(before)
