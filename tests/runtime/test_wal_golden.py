"""Logs of every format version that was ever released can be read; `tests/golden/wal-v*` are kept for ever.

`golden_log` writes what version 1 was made from. Never make those files anew: when the format
changes, add a directory for the new version and move the writer's test to it.
"""

import json
import shutil
from pathlib import Path

import pytest

from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.wal import Kind, Wal, verify

GOLDEN = Path(__file__).parent.parent / "golden"
CLUSTER = bytes.fromhex("00112233445566778899aabbccddeeff")
VERSIONS = sorted(path.name for path in GOLDEN.glob("wal-v*"))


def golden_log(directory: Path) -> None:
    """Every kind of frame, a trimmed and recycled segment, a second run, an end that was never synced."""
    wal = Wal.open(RealDisk(directory), "wal", CLUSTER, segment_bytes=4096, background=False)
    wal.save_hard_state(1, b"node-a")
    for index in range(1, 41):
        wal.append(Kind.ENTRY, 1, index, b"entry %d " % index * (index % 17))
    wal.reset(100)
    wal.sync()
    wal.trim(31)
    wal.append(Kind.CONFIGURATION, 1, 101, b"members: a b c")
    for index in range(102, 131):
        wal.append(Kind.ENTRY, 1, index, b"entry %d " % index * (index % 17))
    wal.close()
    wal = Wal.open(RealDisk(directory), "wal", CLUSTER, segment_bytes=4096, background=False)
    wal.truncate_after(120)
    wal.append_many(
        [(Kind.HARD_STATE, 2, 0, b""), (Kind.ENTRY, 2, 121, b"other"), (Kind.ENTRY, 2, 122, bytes(900))]
    )
    wal.sync()
    wal.append(Kind.ENTRY, 2, 123, b"not synced")


def found(directory: Path) -> dict[str, object]:
    report = verify(RealDisk(directory), "wal", CLUSTER)
    wal = Wal.open(RealDisk(directory), "wal", CLUSTER, segment_bytes=4096, background=False)
    frames = [[*frame[:3], frame.payload.hex(), *frame[4:]] for frame in wal.replay(wal.first_index)]
    assert wal.hard_state is not None
    hard_state = [wal.hard_state[0], wal.hard_state[1].hex()]
    wal.close()
    return {
        "problem": report.problem,
        "segments": [list(segment) for segment in report.segments],
        "unsynced_bytes": report.unsynced_bytes,
        "first_index": wal.first_index,
        "last_index": wal.last_index,
        "hard_state": hard_state,
        "frames": frames,
    }


def test_there_is_a_golden_log_of_every_version() -> None:
    assert VERSIONS == ["wal-v1"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_golden_log_reads_as_it_always_did(version: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / version / "wal", tmp_path / "wal")
    assert found(tmp_path) == json.loads((GOLDEN / version / "expected.json").read_text())


def frames_of(directory: Path) -> dict[str, bytes]:
    """Each segment up to the end of its frames. What lies behind is no part of the format: zeros, or
    what a recycled segment held before."""
    report = verify(RealDisk(directory), "wal", CLUSTER)
    return {name: (directory / "wal" / name).read_bytes()[:end] for name, _, _, _, end, _ in report.segments}


def test_todays_writer_makes_version_1_byte_for_byte(tmp_path: Path) -> None:
    golden_log(tmp_path)
    assert frames_of(tmp_path) == frames_of(GOLDEN / "wal-v1")
    assert len(frames_of(tmp_path)) == 3
