"""What the kernel is told of open files: by a real mount, and where pyfuse3 is not what was expected."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import pytest

from aspenfs.fuse import opened
from tests.fuse.toydaemon import ToyDaemon


@pytest.fixture(autouse=True)
def looked_anew() -> Iterator[None]:
    opened._table.cache_clear()
    yield
    opened._table.cache_clear()


def filled(info: pyfuse3.FileInfo) -> bytes:
    """struct fuse_file_info, as pyfuse3 has it filled in."""
    table = ctypes.c_void_p.from_address(id(info) + object.__basicsize__).value
    assert table
    function = ctypes.c_void_p.from_address(table).value
    assert function
    out = ctypes.create_string_buffer(b"\xee" * 4 + bytes(60), 64)
    opened._Fill(function)(info, ctypes.addressof(out))
    return out.raw


@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize("keep_cache", [False, True])
@pytest.mark.parametrize("fh", [1, 2**64 - 1])
def test_a_reader_has_what_pyfuse3_would_fill_in_and_one_bit_more(
    fh: int, direct_io: bool, keep_cache: bool
) -> None:
    plain = pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fh), direct_io=direct_io, keep_cache=keep_cache)
    expected = bytearray(filled(plain))
    expected[4] |= 1 << 7  # fuse_common.h: noflush is the eighth bit
    assert filled(opened.read_only(fh, direct_io=direct_io, keep_cache=keep_cache)) == expected
    assert filled(pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fh), keep_cache=True))[4] == 1 << 2


def test_of_a_layout_that_is_not_known_nothing_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    expected = filled(pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(7)))
    for name, value in (("_LIBFUSE", range(1)), ("_NONSEEKABLE", 1 << 3), ("_TABLE_AT", 24)):
        with monkeypatch.context() as other:
            other.setattr(opened, name, value)
            opened._table.cache_clear()
            assert filled(opened.read_only(7, direct_io=False, keep_cache=True)) == expected
    assert caplog.text.count("the kernel asks at each close also of readers: cause=") == 3


def test_one_that_is_compiled_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        """No table."""

    monkeypatch.setattr(opened, "_COMPILED", Other)
    assert opened._table() == 0


@pytest.mark.mount
def test_the_kernel_does_not_ask_when_a_reader_closes_and_asks_writers(tmp_path: Path) -> None:
    with ToyDaemon(tmp_path / "mount") as toy:
        toy.run_in_mount(
            "for name in ('file', 'direct'):\n"
            "    with open(f'{m}/{name}', 'w') as file: file.write('data')"
        )
        asked = toy.ask("cpu")["flushes"]
        assert asked == 2
        reading = "for name in ('file', 'direct') * 20: assert open(f'{m}/{name}').read() == 'data'"
        toy.run_in_mount(reading)
        assert toy.ask("cpu")["flushes"] == asked
        toy.run_in_mount("for mode in ('r+', 'a', 'w'): open(f'{m}/file', mode).close()")
        assert toy.ask("cpu")["flushes"] == asked + 3
