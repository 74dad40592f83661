"""What passes for a backup: a whole one, every byte of it as it was written, and nothing else."""

import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aspenfs.blobs.format import digest_of
from aspenfs.errors import Corrupt
from aspenfs.kv import records, rows
from aspenfs.kv.types import NO_ATTRIBUTES, Record
from aspenfs.limits import BACKUP_FRAME_BYTES_MAX
from aspenfs.runtime.backup import format as fmt
from aspenfs.runtime.backup.format import End, Frame, Header, Kind, Reader, Writer
from aspenfs.runtime.backup.reading import Checker, read
from tests.runtime.backed_up import FILES, a_backup


@pytest.fixture(scope="module")
def backup(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return a_backup(tmp_path_factory.mktemp("node"))


def verify(data: bytes) -> tuple[Header, End]:
    return read(io.BytesIO(data), "a.aspen")


def frames(data: bytes) -> list[Frame]:
    return list(Reader("a.aspen").feed(data))


def test_a_backup_is_whole(backup: bytes) -> None:
    header, end = verify(backup)
    assert (header.cluster, header.node, header.release) == ("aspen", 1, "test")
    assert (end.blobs, end.blob_bytes, end.lost) == (4, 400_000, 0)
    assert FILES[b"one"][:1000] in backup
    kinds = [frame.kind for frame in frames(backup)]
    assert kinds == sorted(kinds)
    assert set(kinds) == {Kind.HEADER, Kind.ROWS, Kind.BLOB, Kind.END}


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_it_is_read_in_pieces_of_any_size(backup: bytes, size: int) -> None:
    data = backup if size > 7 else backup[: 30_000]
    checker = Checker("a.aspen")
    for at in range(0, len(data), size):
        checker.feed(data[at : at + size])
    if size > 7:
        assert checker.finish() == verify(backup)
    else:
        with pytest.raises(Corrupt, match="cut off"):
            checker.finish()


def test_a_flipped_bit_anywhere_is_found_where_it_is(backup: bytes) -> None:
    draw = random.Random(1)
    bounds = [frame.offset for frame in frames(backup)] + [len(backup)]
    heads = [offset + at for offset in bounds[:-1] for at in range(0, fmt.FRAME_HEAD_BYTES, 3)]
    for at in [*range(fmt.FILE_HEAD.size), *heads, *(draw.randrange(len(backup)) for _ in range(100))]:
        damaged = bytearray(backup)
        damaged[at] ^= 1 << draw.randrange(8)
        with pytest.raises(Corrupt) as caught:
            verify(bytes(damaged))
        assert caught.value.file == "a.aspen"
        around = max((offset for offset in bounds if offset <= at), default=0)
        assert caught.value.offset in (around, 8) or at < fmt.FILE_HEAD.size, at


def test_a_file_that_is_cut_off_is_found(backup: bytes) -> None:
    draw = random.Random(2)
    bounds = [frame.offset for frame in frames(backup)]
    sizes = [0, 1, 15, 16, 17, *bounds, *(draw.randrange(len(backup)) for _ in range(50)), len(backup) - 1]
    for size in sizes:
        with pytest.raises(Corrupt, match=r"cut off|empty") as caught:
            verify(backup[:size])
        assert caught.value.offset <= size


@pytest.mark.parametrize("more", [b"x", b"x" * 1000, bytes(fmt.FRAME_HEAD_BYTES)])
def test_what_follows_the_end_is_no_part_of_a_backup(backup: bytes, more: bytes) -> None:
    with pytest.raises(Corrupt):
        verify(backup + more)


def test_another_file_is_no_backup() -> None:
    for data in (b"PK\x03\x04" * 100, bytes(5000), b"text\n" * 50):
        with pytest.raises(Corrupt, match="no backup of aspenfs"):
            verify(data)


def test_a_newer_format_says_so(backup: bytes) -> None:
    with pytest.raises(Corrupt, match="format 2, this program reads format 1; use the version"):
        verify(fmt.FILE_HEAD.pack(fmt.MAGIC, 2, 0) + backup[16:])


Edit = Callable[[list[Frame]], Iterator[tuple[int, bytes]]]


def rewritten(backup: bytes, edit: Edit) -> bytes:
    """A file whose frames are in order, but not those of the backup: as a bug would write it."""
    writer = Writer()
    return fmt.file_head() + b"".join(writer.frame(Kind(kind), data) for kind, data in edit(frames(backup)))


def all_but(position: Callable[[Frame], bool]) -> Edit:
    return lambda found: ((frame.kind, frame.payload) for frame in found if not position(frame))


def _twice(kind: Kind) -> Edit:
    def edit(found: list[Frame]) -> Iterator[tuple[int, bytes]]:
        for frame in found:
            yield from [(frame.kind, frame.payload)] * (1 + (frame.kind == kind))

    return edit


def _swapped(found: list[Frame]) -> Iterator[tuple[int, bytes]]:
    blobs = [frame for frame in found if frame.kind == Kind.BLOB]
    order = [*found[: found.index(blobs[0])], *reversed(blobs), *found[found.index(blobs[-1]) + 1 :]]
    return ((frame.kind, frame.payload) for frame in order)


def _rows_last(found: list[Frame]) -> Iterator[tuple[int, bytes]]:
    order = sorted(found, key=lambda frame: (frame.kind == Kind.END, frame.kind == Kind.ROWS))
    return ((frame.kind, frame.payload) for frame in order)


def _another_row(found: list[Frame]) -> Iterator[tuple[int, bytes]]:
    record = records.pack(Record(b"", 1, 1, 1, 0, 0, NO_ATTRIBUTES))
    for frame in found:
        yield frame.kind, frame.payload + (rows.pack(b"z", record) if frame.kind == Kind.ROWS else b"")


def _unknown(found: list[Frame]) -> Iterator[tuple[int, bytes]]:
    for frame in found:
        yield frame.kind, frame.payload
        if frame.kind == Kind.ROWS:
            yield Kind.LOST, b"short"


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (all_but(lambda frame: frame.kind == Kind.HEADER), "the first frame is not the header"),
        (all_but(lambda frame: frame.kind == Kind.END), "cut off"),
        (all_but(lambda frame: frame.kind == Kind.ROWS), "should have held"),
        (all_but(lambda frame: frame.kind == Kind.BLOB and len(frame.payload) > 90_000), "should have held"),
        (_twice(Kind.HEADER), "has no place here"),
        (_twice(Kind.ROWS), "does not come behind"),
        (_twice(Kind.BLOB), "out of order"),
        (_twice(Kind.END), "behind the end"),
        (_swapped, "out of order"),
        (_rows_last, "has no place here"),
        (_another_row, "should have held"),
        (_unknown, "has no place here"),
    ],
)
def test_frames_that_make_no_backup_are_refused(backup: bytes, edit: Edit, cause: str) -> None:
    assert verify(rewritten(backup, all_but(lambda frame: False))) == verify(backup)
    with pytest.raises(Corrupt, match=cause):
        verify(rewritten(backup, edit))


def test_a_chunk_that_no_row_names_and_one_that_is_not_there_are_noticed(backup: bytes) -> None:
    """The counts are right, and so is every digest: but it is not what the rows need."""

    def edit(found: list[Frame]) -> Iterator[tuple[int, bytes]]:
        blobs = [frame.payload for frame in found if frame.kind == Kind.BLOB]
        blobs[0] = bytes(100_000)
        blobs.sort(key=digest_of)
        for frame in found:
            yield frame.kind, blobs.pop(0) if frame.kind == Kind.BLOB else frame.payload

    with pytest.raises(Corrupt, match="not those that its rows name"):
        verify(rewritten(backup, edit))


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x80", b"\x81\xa4rows\xa3abc", b"\x93\x01\x02\x03"])
@pytest.mark.parametrize("kind", [Kind.HEADER, Kind.END])
def test_a_header_or_an_end_without_sense_is_refused(backup: bytes, kind: Kind, payload: bytes) -> None:
    def edit(found: list[Frame]) -> Iterator[tuple[int, bytes]]:
        for frame in found:
            yield frame.kind, payload if frame.kind == kind else frame.payload

    with pytest.raises(Corrupt, match=r"lacks what it should have|not msgpack"):
        verify(rewritten(backup, edit))


def test_a_frame_too_large_is_refused_before_it_is_held_in_memory() -> None:
    length = (BACKUP_FRAME_BYTES_MAX + 1).to_bytes(4, "little")
    with pytest.raises(Corrupt, match="a frame of"):
        verify(fmt.file_head() + length + bytes(fmt.FRAME_HEAD_BYTES))


def test_rows_that_do_not_decode_are_refused(tmp_path: Path, backup: bytes) -> None:
    def edit(found: list[Frame]) -> Iterator[tuple[int, bytes]]:
        for frame in found:
            yield frame.kind, frame.payload[:-1] if frame.kind == Kind.ROWS else frame.payload

    with pytest.raises(Corrupt, match="half a row"):
        verify(rewritten(backup, edit))
