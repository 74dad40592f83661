"""A backup written in format 1 is read for ever: `tests/golden/backup-v1.aspen`."""

import io
from pathlib import Path

from aspenfs.blobs.format import digest_of
from aspenfs.kv.rows import Row
from aspenfs.kv.types import NO_ATTRIBUTES, Record
from aspenfs.runtime import identity
from aspenfs.runtime.backup.format import End, Header
from aspenfs.runtime.backup.reading import Progress, read
from aspenfs.runtime.backup.restoring import restore
from aspenfs.runtime.statedb import StateDb
from aspenfs.runtime.system import SystemEntropy
from tests.kv.subject import FakeClock

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "backup-v1.aspen"
INDEX, ROWS = 14, 27
STATE_DIGEST = "08db004854bae29b56ee18c5245cfa32f593a410c9925c5f3215060bd781b749"
CHUNK, LOST = b"a chunk of a file, " * 1500, b"another one, lost. " * 1500


class Kept:
    def __init__(self) -> None:
        self.found: list[Row] = []
        self.chunks: dict[bytes, bytes] = {}

    def header(self, header: Header) -> None: ...

    def rows(self, block: list[Row]) -> None:
        self.found += block

    def blob(self, digest: bytes, data: bytes) -> None:
        self.chunks[digest] = data


def test_a_backup_of_format_1_is_read() -> None:
    contents, seen = Kept(), list[Progress]()
    with GOLDEN.open("rb") as file:
        header, end = read(file, "golden", contents, seen.append)
    assert header == Header((1).to_bytes(16, "little"), "aspen", 1, INDEX, 1, FakeClock().time_ns(), "test",
                            header.rows, header.row_bytes)  # fmt: skip
    assert end == End(ROWS, end.row_bytes, bytes.fromhex(STATE_DIGEST), 1, len(CHUNK), 1)
    assert contents.chunks == {digest_of(CHUNK): CHUNK}
    assert seen[-1].lost == ((digest_of(LOST), "it could be read on no node that answered"),)
    assert len(contents.found) == ROWS


def test_a_backup_of_format_1_is_restored(tmp_path: Path) -> None:
    made = restore(io.BytesIO(GOLDEN.read_bytes()), "golden", tmp_path, name=None, clock=FakeClock(),
                   entropy=SystemEntropy(), segment_bytes=1 << 16)  # fmt: skip
    assert identity.read(tmp_path) == made.node
    state = StateDb(tmp_path / "state")
    record = state.get(b"k/app")
    assert record is not None
    assert record == Record(b"2", record.create_revision, record.create_revision + 2, 3, 0, 0, NO_ATTRIBUTES)
    assert state.get(b"k/long" + b"x" * 900) is not None
    assert state.applied_index == made.index > INDEX
    state.close()
