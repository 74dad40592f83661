"""The instrument itself: what it calls unsynced is what was written behind the last finished sync."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.tearing import Range, environment, tear, unsynced
from tests.mount.torn.sitecustomize import HEAD, RECORD, SLOTS

SYNCS = {
    "fdatasync": "os.fdatasync(log)",
    "the kernel's workers": """
from aspenfs.runtime.disk import RealFile
from aspenfs.runtime.kernel_sync import KernelSync
kernel = KernelSync.open(os.path.dirname(sys.argv[1]))
kernel.start([RealFile(log)], lambda error: None)
kernel.wait()
""",
}
SCRIPT = """
import os, sys
log = os.open(sys.argv[1], os.O_RDWR)
os.pwrite(log, b"a" * 700, 0)
{sync}
os.pwrite(log, b"b" * 700, 700)
os.pwrite(log, b"c" * 700, 1400)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("sync", SYNCS.values(), ids=SYNCS)
def test_what_was_synced_stays_and_what_was_not_may_be_lost(sync: str, tmp_path: Path) -> None:
    log, trace = tmp_path / "wal", tmp_path / "trace"
    log.mkdir()
    segment = log / "1.wal"
    segment.touch()
    inode = segment.stat().st_ino
    environ = {**os.environ, **environment(trace)}
    script = SCRIPT.format(sync=sync)
    subprocess.run([sys.executable, "-c", script, str(segment)], env=environ, check=False)
    assert unsynced(trace) == [Range(inode, 700, 700), Range(inode, 1400, 700)]
    before = segment.read_bytes()
    assert before == b"a" * 700 + b"b" * 700 + b"c" * 700
    assert any(tear(log, trace, random.Random(seed)) for seed in range(3))
    assert segment.read_bytes()[:700] == before[:700]
    assert segment.read_bytes() != before


@pytest.mark.parametrize("more", [0, 3])
def test_a_note_that_was_under_way_at_the_end_is_none(tmp_path: Path, more: int) -> None:
    """It stands where the oldest one stood, if there have been as many as there is room for."""
    trace, last = tmp_path / "trace", SLOTS + more
    notes = bytearray(HEAD + SLOTS * RECORD.size)
    for number in range(1, last + 2):  # the last of them was not counted any more
        RECORD.pack_into(notes, HEAD + number % SLOTS * RECORD.size, number, 5, 10 * number, 10)
    notes[:8] = last.to_bytes(8, "little")
    trace.write_bytes(notes)
    found = unsynced(trace)
    assert len(found) == SLOTS - 1
    assert found[-1] == Range(5, 10 * last, 10)
