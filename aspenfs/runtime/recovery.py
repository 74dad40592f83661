"""Bringing a node up to its log when it starts: entries above the applied index, evaluated again.

Evaluation is deterministic, so the effects are those of the first time. A member of a cluster does
not know which of them are committed: they are handed to its replica. Belongs here: which entries,
and what to do about one that names blobs which are not on this disk. Not here: damage inside the log
(`wal_recovery.py`) or inside the state (`statedb.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

from aspenfs.cluster.types import Entry, EntryKind
from aspenfs.errors import Corrupt, InvalidArgument, NoSpace
from aspenfs.kv import commands
from aspenfs.kv.commands import Command
from aspenfs.kv.engine import Engine
from aspenfs.kv.state import nothing_changed
from aspenfs.limits import OVERLAY_BYTES_MAX
from aspenfs.runtime.applier import Applier
from aspenfs.runtime.statedb import StateDb
from aspenfs.runtime.syncer import Syncer
from aspenfs.runtime.wal import Frame, Wal
from aspenfs.runtime.wal_format import segment_name

VerifyEntry = Callable[[Command], bool]

_APPLY_AT_BYTES = OVERLAY_BYTES_MAX // 4
_HELD_BYTES_MAX = 4 * OVERLAY_BYTES_MAX  # more is not kept in memory for want of disk
_ADVICE = "restore the state directory from another node or a backup; `aspen check` tells more"


class Found(NamedTuple):
    """What the log had above the state."""

    evaluated: int
    tail: list[Entry]  # not evaluated: committed or not, the replica will find out


def replay(wal: Wal, directory: str, state: StateDb, engine: Engine, applier: Applier, syncer: Syncer,
           verify: VerifyEntry | None, *, alone: bool, note_term: Callable[[int, int], object]) -> Found:
    """Evaluates the entries that `state` lacks, as far as this node `alone` decides what is committed.

    That ends with a change of the configuration. `note_term` gets index and term of each entry.
    An entry for which `verify` is false lost its blobs with the power: the log ends before it, as if
    the power had failed a moment earlier. That is right only behind what the log, as it was found,
    calls durable; before that, somebody was promised the entry with its blobs, so it is Corrupt.
    The log must have been opened with claim=False.
    """
    applied = state.applied_index
    if not wal.first_index - 1 <= applied <= wal.last_index:
        cause = f"it has entries {wal.first_index} to {wal.last_index}, the state ends with entry {applied}"
        raise Corrupt(directory, 0, cause, _ADVICE)
    apply_at = _APPLY_AT_BYTES
    tail: list[Entry] = []
    for frame in wal.replay(applied + 1):
        note_term(frame.index, frame.term)
        if tail or not alone or frame.kind != EntryKind.NORMAL:
            tail.append(Entry(frame.term, frame.index, frame.kind, frame.payload))
            continue
        if not frame.payload:  # a leader's first entry
            engine.accept(frame.index, nothing_changed(None))
            applier.add(frame.index, ())
            continue
        command = _decoded(frame)
        if verify is not None and not verify(command):
            if (frame.segment, frame.offset) < wal.claimed_at_open:
                cause = f"entry {frame.index} names blobs that are not here"
                raise Corrupt(segment_name(frame.segment), frame.offset, cause, _ADVICE)
            break
        index, outcome = engine.submit(command)
        assert index == frame.index
        applier.add(index, outcome.effects)
        if engine.overlay.bytes > apply_at:
            syncer.run_hooks()
            _apply(state, engine, applier, index)
            # With a full disk all of it is still there, and trying costs as much each time.
            apply_at = engine.overlay.bytes + _APPLY_AT_BYTES
    if not tail and engine.revision < wal.last_index:
        wal.truncate_after(engine.revision)
    # After the death of a process, what entries name may be in the page cache only, as they were.
    if engine.revision > applied:
        syncer.run_hooks()
    wal.sync()
    engine.committed_to(engine.revision)
    return Found(engine.revision - applied, tail)


def _apply(state: StateDb, engine: Engine, applier: Applier, index: int) -> None:
    engine.committed_to(index)
    try:
        applier.apply_now(index)
    except NoSpace:
        if engine.overlay.bytes > _HELD_BYTES_MAX:
            raise
        return  # serve what there is: deleting is how space comes back
    state.refresh()
    engine.overlay.settle(index)


def _decoded(frame: Frame) -> Command:
    try:
        return commands.decode(frame.payload)
    except InvalidArgument as error:
        cause = f"entry {frame.index} is not a command ({error})"
        raise Corrupt(segment_name(frame.segment), frame.offset, cause, _ADVICE) from error
