"""The cases of tests/mount/posix on a mount that is one of three: commits take a round trip."""

import os
import subprocess
import sys
from typing import Final

import pytest

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
