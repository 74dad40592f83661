"""What a loss of power does to a log, done to that of a killed daemon: unsynced sectors are lost or garbage.

Belongs here: reading the notes of `torn/sitecustomize.py`, spoiling what they call unsynced, and nothing
else. Sectors of 512 bytes go whole; the synced part of a sector stays, as it would (docs/design/wal.md).
"""

import os
import random
from pathlib import Path
from typing import NamedTuple

from tests.mount.torn.sitecustomize import HEAD, RECORD, SLOTS

SECTOR = 512


class Range(NamedTuple):
    inode: int
    offset: int
    length: int


def environment(trace: Path) -> dict[str, str]:
    """What a daemon needs to be traced."""
    here = Path(__file__).parent / "torn"
    return {"ASPEN_TORN_TRACE": str(trace), "PYTHONPATH": f"{here}:{Path(__file__).parents[2]}"}


def unsynced(trace: Path) -> list[Range]:
    """Writes that no finished sync of their file has covered, in order."""
    data = trace.read_bytes()
    last = int.from_bytes(data[:8], "little")
    covered: dict[int, int] = {}
    found: list[tuple[int, Range]] = []
    # The note after the last one may have been under way, in the place of the oldest.
    for number in range(max(1, last - SLOTS + 2), last + 1):
        noted, inode, value, length = RECORD.unpack_from(data, HEAD + number % SLOTS * RECORD.size)
        assert noted == number, "a note is missing"
        if length:
            found.append((number, Range(inode, value, length)))
        else:
            covered[inode] = max(covered.get(inode, 0), value)
    return [one for number, one in found if number > covered.get(one.inode, 0)]


def tear(log: Path, trace: Path, rng: random.Random) -> int:
    """Spoils some of what is unsynced in the segments of `log`; the bytes that are gone."""
    segments = {path.stat().st_ino: path for path in log.iterdir() if path.suffix == ".wal"}
    spoiled = 0
    for inode, offset, length in unsynced(trace):
        path = segments.get(inode)
        if path is None:
            continue
        descriptor = os.open(path, os.O_RDWR)
        try:
            at = offset
            while at < offset + length:
                end = min(offset + length, (at // SECTOR + 1) * SECTOR)
                draw = rng.random()
                if draw < 0.6:
                    lost = bytes(end - at) if draw < 0.3 else rng.randbytes(end - at)
                    spoiled += os.pwrite(descriptor, lost, at)
                at = end
        finally:
            os.close(descriptor)
    return spoiled
