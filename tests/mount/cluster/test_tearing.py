"""The instrument itself: what it calls unsynced is what was written behind the last finished sync."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.tearing import Range, environment, tear, unsynced

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
