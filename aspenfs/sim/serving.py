"""What a node does for its clients: transactions and linearizable reads, as `runtime/host.py` does them.

Each is a call into a process (`Process.do`), and gives its answer to a callback; never, if the process ends.
"""

from collections.abc import Callable
from typing import Any, Final

from aspenfs.cluster.types import Entry, EntryKind
from aspenfs.errors import AspenError, NoSpace
from aspenfs.kv import commands
from aspenfs.kv.commands import Command
from aspenfs.kv.engine import Engine
from aspenfs.kv.types import TxnResult
from aspenfs.sim.process import Process
from aspenfs.sim.scheduler import MS

_BEGIN: Final = 0.3  # of the transactions that are not to be repeated
_ASK_HELD: Final = 0.5  # of those

Done = Callable[[object], object]
Look = Callable[[Engine], Any]


def submit(process: Process, command: Command, done: Done) -> None:
    """`done` gets the result once it is committed and applied here, or an AspenError."""
    encoded = commands.encode(command)
    if process.replica.alone:
        _accept(process, command, encoded, done)
    elif command.dedup is not None or not _begin(process, command, encoded, done):
        process.replica.propose(encoded, (command, None), done, repeatable=command.dedup is not None)
        process.replica.pump()


def _begin(process: Process, command: Command, encoded: bytes, done: Done) -> bool:
    """As a new file is made: it has its place now, and is carried out a little later."""
    replica, rng, invariants = process.replica, process.machine.rng, process.invariants
    if rng.random() >= _BEGIN or command.kind != commands.TXN:
        return False
    # What this node itself has under way may change what the compares find.
    quiet = not replica.proposed_bytes
    foreseen = process.engine.prepare(command)[1].result if quiet else None
    succeeds = foreseen.succeeded if isinstance(foreseen, TxnResult) else None
    number = invariants.begins(process.node, process.raft.term, succeeds)

    def ended(result: object) -> None:
        if isinstance(result, TxnResult):
            term = process.term_at(result.revision)
            invariants.begun_applied(number, result.revision, term, result.succeeded)
        else:
            invariants.begun_lost(number)
        done(result)

    term = process.raft.term

    def held(index: object) -> None:
        assert isinstance(index, int)
        invariants.held(index, term, process.raft.configuration)

    if not replica.begin(encoded, (command, None), ended):
        invariants.begun_lost(number)
        return False
    if rng.random() < _ASK_HELD:
        replica.when_held(held)
    process.scheduler.after(rng.randrange(5 * MS), lambda: process.do(replica.pump), "begun")
    return True


def _accept(process: Process, command: Command, encoded: bytes, done: Done) -> None:
    """On a node that is alone: evaluated, logged, visible; then durable, and only then answered."""
    index, outcome = process.engine.prepare(command)
    if isinstance(outcome.result, AspenError):
        done(outcome.result)
        return
    term, kind = process.raft.term, int(EntryKind.NORMAL)
    entry = Entry(term, index, kind, encoded)
    try:
        process.wal.append(kind, term, index, encoded)
    except NoSpace as error:
        done(error)
        return
    process.invariants.wrote(process.node, [entry], None, process.raft.role)
    process.note_term(index, term)
    process.engine.accept(index, outcome)
    process.replica.accept(kind, encoded)
    process.evaluated.add(index, outcome.effects)
    process.report(entry, accepted=True)
    process.request()
    process.when_committed(index, lambda: done(outcome.result))


def read(
    process: Process, look: Look, done: Callable[[Any, int], object], failed: Callable[[], object]
) -> None:
    """`look` at a state that has all that was committed before the call; `done` gets what it saw and the
    revision of it, `failed` nothing, when there is no quorum."""
    at_call, begun = process.invariants.acknowledged, process.invariants.reads()
    replica, engine, rng = process.replica, process.engine, process.machine.rng

    def answer(how: str, seen: Any, revision: int) -> None:
        process.invariants.may_read(process.node, revision, at_call, how, begun)
        process.when_committed(revision, lambda: done(seen, revision))

    def indexed(result: object) -> None:
        if isinstance(result, AspenError):
            failed()
        else:
            answer("a read", look(engine), engine.revision)

    def again(seen: Any, revision: int) -> None:
        # The process may have stood still since: the lease must hold after the state was read.
        if replica.read_now():
            answer("a read under lease", seen, revision)
        else:
            ask()

    def ask() -> None:
        replica.read(indexed)
        replica.pump()

    if replica.read_now():
        seen, revision = look(engine), engine.revision
        delay = rng.choice((0, 0, rng.randrange(5 * MS)))
        process.scheduler.after(delay, lambda: process.do(again, seen, revision), "read")
    else:
        ask()
