"""New contents for parts of a state directory, all at once: a snapshot, a restored backup, a new cluster.

What is to come is made beside what is there, under names that end in `.new`, and made durable. Then
`commit` writes down what shall happen: from there on it happens, whoever is killed in between.

    swap.json   {"format": 1, "replace": names, "remove": names, "log_index": number or null}

 1. nothing but `.new` names: `recover` removes them, the directory is as it was
 2. swap.json is durable: for each name of `replace` that has a NAME.new, NAME goes and NAME.new -> NAME;
    each name of `remove` goes; the directory is synced
 3. with a `log_index` the owner of the log resets it to that index and syncs it
 4. `finish`: swap.json goes, durably

Each step may be done again from its beginning. Belongs here: these steps. Not here: what the parts are
and how they are made. All of it blocks, and needs the lock on the state directory.
"""

import contextlib
import json
from typing import Any, Final, NamedTuple, Protocol

from aspenfs.errors import Corrupt
from aspenfs.seams import Disk

FORMAT: Final = 1
MARKER: Final = "swap.json"
PARTS: Final = ("cluster.json", "wal", "state", "blobs")  # what can be replaced
NEW: Final = ".new"

_ADVICE = "restore it: it says which of the parts ending in .new, if any, shall take their places"


class Swap(NamedTuple):
    """What shall happen. Names are those of files and directories in the state directory."""

    replace: tuple[str, ...]  # of PARTS; each has its NAME.new, durable with all that is in it
    remove: tuple[str, ...] = ()
    log_index: int | None = None  # the index after which the log, emptied, goes on; None: it stays as it is


class SwapDisk(Disk, Protocol):
    """A disk on which whole directories can be removed."""

    def remove_directory(self, path: str) -> None:
        """An empty one."""


def commit(disk: SwapDisk, swap: Swap) -> None:
    """From now on `swap` happens: `carry_out`, here or at the next start. No other may be under way."""
    names = set(disk.list(""))
    assert MARKER not in names, "a swap is under way"
    assert all(name in PARTS and name + NEW in names for name in swap.replace), (swap, names)
    disk.sync_directory("")  # the `.new` names
    content = json.dumps({"format": FORMAT, **swap._asdict()}).encode() + b"\n"
    draft = disk.open(MARKER + NEW, create=True)
    try:
        draft.pwrite(content, 0)
        draft.truncate(len(content))
        draft.datasync()
    finally:
        draft.close()
    disk.rename(MARKER + NEW, MARKER)
    disk.sync_directory("")


def carry_out(disk: SwapDisk) -> int | None:
    """Does what was committed, durably; the index to which the log must be reset before `finish`.

    None: nothing has to be done to the log.
    """
    swap = _read(disk)
    assert swap is not None, "no swap was committed"
    for name in swap.replace:
        if name + NEW in disk.list(""):  # else it was done before
            remove_tree(disk, name)
            disk.rename(name + NEW, name)
    for name in swap.remove:
        remove_tree(disk, name)
    disk.sync_directory("")
    return swap.log_index


def finish(disk: SwapDisk) -> None:
    """The swap is over. Idempotent."""
    with contextlib.suppress(FileNotFoundError):
        disk.unlink(MARKER)
    disk.sync_directory("")


def pending(disk: Disk) -> bool:
    """Whether a swap was committed and is not over."""
    return MARKER in disk.list("")


def recover(disk: SwapDisk) -> int | None:
    """Before anything else is opened: goes on with a swap that was committed, or forgets one that was not.

    An index: the log must be reset to it and synced, and then `finish` must be called, before anything
    is appended. None: all is done. Corrupt: swap.json cannot be understood.
    """
    if _read(disk) is None:
        for name in (*PARTS, MARKER):
            remove_tree(disk, name + NEW)
        return None
    log_index = carry_out(disk)
    if log_index is None:
        finish(disk)
    return log_index


def remove_tree(disk: SwapDisk, path: str) -> None:
    """A file, or a directory with all that is in it; no error if there is none."""
    try:
        names = disk.list(path)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        disk.unlink(path)
        return
    for name in names:
        remove_tree(disk, f"{path}/{name}")
    disk.remove_directory(path)


def sync_tree(disk: Disk, path: str) -> None:
    """Makes a file, or a directory with all that is in it, durable; not the name `path` itself."""
    try:
        names = disk.list(path)
    except NotADirectoryError:
        file = disk.open(path)
        try:
            file.datasync()
        finally:
            file.close()
        return
    for name in names:
        sync_tree(disk, f"{path}/{name}")
    disk.sync_directory(path)


def _read(disk: Disk) -> Swap | None:
    try:
        file = disk.open(MARKER)
    except FileNotFoundError:
        return None
    try:
        content = file.pread(file.size(), 0)
    finally:
        file.close()
    try:
        fields: Any = json.loads(content)
        if fields["format"] != FORMAT:
            raise Corrupt(MARKER, 0, f"format {fields['format']!r}", "use the version that wrote it")
        swap = Swap(tuple(fields["replace"]), tuple(fields["remove"]), fields["log_index"])
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(MARKER, 0, f"not a swap: {error!r}", _ADVICE) from error
    named = all(type(name) is str and name and "/" not in name for name in swap.replace + swap.remove)
    if not named or not {*swap.replace} <= {*PARTS}:
        raise Corrupt(MARKER, 0, "the names in it are not those of parts of a state directory", _ADVICE)
    if swap.log_index is not None and (type(swap.log_index) is not int or swap.log_index < 0):
        raise Corrupt(MARKER, 0, f"log index {swap.log_index!r}", _ADVICE)
    return swap
