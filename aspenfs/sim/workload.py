"""Clients of a simulated cluster: what they ask for, what they are told, and whether that can be true.

Belongs here: calls on registers, lists, directory entries and leases, retries, watches that move from node
to node; their histories and the checks of them at the end. Not here: the checks themselves
(`linearizability.py`, `revisions.py`), how a node serves (`serving.py`).

A client talks to one node, as a program talks to its mount, and goes to another when that one dies or fails
it. A transaction with a sequence number is tried again until its outcome is known; any other is not, for a
second try might be a second write.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aspenfs import errors
from aspenfs.kv import commands, types
from aspenfs.kv.commands import Command
from aspenfs.kv.engine import Engine
from aspenfs.kv.types import Compare, Operation, TxnResult
from aspenfs.sim import linearizability, serving
from aspenfs.sim.cluster import Cluster
from aspenfs.sim.history import Call, History
from aspenfs.sim.invariants import Violation
from aspenfs.sim.models import AppendList, Entries, Model, Register
from aspenfs.sim.process import Process
from aspenfs.sim.revisions import Answer, Change, Watched, check_answers, check_resumed
from aspenfs.sim.scheduler import MS, Streams
from aspenfs.sim.threads import Task

_TRIES_MAX: Final = 6
_TOKEN_BYTES: Final = 6  # of an item in a list
_MOVE_NS: Final = 50 * MS  # from a node that is gone to another one


@dataclass(frozen=True, slots=True)
class Mix:
    """How much of what; the weights of calls are relative."""

    clients: int = 4
    readers: int = 2  # watches
    registers: int = 3
    lists: int = 2
    names: int = 4
    think_ns: int = 20 * MS
    dedup: float = 0.5  # of changes
    read: int = 40
    write: int = 20
    cas: int = 10
    delete: int = 5
    append: int = 10
    create: int = 6
    unlink: int = 4
    rename: int = 6
    lease: int = 3
    compact: int = 1


class Workload:
    """All clients and readers. `stop`, then `check` once all is quiet."""

    def __init__(self, cluster: Cluster, streams: Streams, mix: Mix) -> None:
        self.cluster, self.mix = cluster, mix
        self.histories: list[tuple[History, Model]] = [
            (History(), Register()), (History(), AppendList()), (History(), Entries()),
        ]  # fmt: skip
        self.answers: list[Answer] = []
        self.unknown: list[tuple[Call, object]] = []  # calls, and the writes that they asked for
        self.stopped = False
        self._ticks = 0
        self._values = 0
        self.clients = [Client(self, number, streams) for number in range(1, mix.clients + 1)]
        self.readers = [Reader(self, number, streams) for number in range(1, mix.readers + 1)]

    def start(self) -> None:
        for client in self.clients:
            client.start()
        for reader in self.readers:
            reader.start()

    def stop(self) -> None:
        """Clients finish what they have begun, and begin nothing more."""
        self.stopped = True

    @property
    def busy(self) -> list["Client"]:
        return [client for client in self.clients if client.call is not None]

    def instant(self) -> int:
        """The number of an event: exact for who sees them in order."""
        self._ticks += 1
        return self._ticks

    def value(self) -> bytes:
        """One that was never written before."""
        self._values += 1
        return b"%0*d" % (_TOKEN_BYTES, self._values)

    # --- at the end ---

    def check(self) -> None:
        """Violation, unless everything that clients were told can be true."""
        log = [change for index, change in sorted(self.cluster.log.items())]
        self._settle_unknown({change.write for change in log})
        if "answers" not in self.cluster.settings.ignored_checks:
            for wrong in check_answers(self.answers, log)[:1]:
                raise Violation("answers", wrong)
        for history, model in self.histories:
            verdict = linearizability.check(history.operations(), model)
            if verdict.outcome != "linearizable":
                raise Violation(verdict.outcome, f"{type(model).__name__}: {verdict.explain()}")
        for reader in self.readers:
            reader.check({change.revision: change for change in log})

    def _settle_unknown(self, applied: set[object]) -> None:
        """The log is at rest: what it does not have, never took place. Few calls stay unknown then."""
        for call, write in self.unknown:
            if write not in applied:
                next(history for history, _ in self.histories if history.has(call)).refused(call)

    def operations(self) -> int:
        return sum(len(history) for history, _ in self.histories)


class Client:
    """One program: one call at a time."""

    def __init__(self, workload: Workload, number: int, streams: Streams) -> None:
        self.workload, self.cluster, self.number = workload, workload.cluster, number
        self.rng = streams.stream(f"client {number}")
        self.identity = b"client%010d" % number
        self.sequence = 0
        self.process: Process | None = None
        self.call: Call | None = None  # under way
        self._try = 0  # counts attempts; what comes late for an earlier one is ignored
        self._waits: tuple[Process, Callable[[], object]] | None = None  # whose death to be told of
        self._hears_of: set[tuple[int, int]] = set()  # (node, life) that tell of their deaths
        self._known: dict[bytes, Any] = {}  # what this client saw last
        self._lease = 0

    def start(self) -> None:
        self._later()

    def _later(self) -> None:
        self.call = None
        delay = int(self.rng.expovariate(1.0) * self.workload.mix.think_ns)
        self.cluster.scheduler.after(delay, self._begin, "client")

    def _begin(self) -> None:
        if self.workload.stopped:
            return
        if self._at_node() is None:
            self._later()
            return
        mix = self.workload.mix
        kinds: list[tuple[Callable[[], None], int]] = [
            (self._read, mix.read), (self._write, mix.write), (self._cas, mix.cas),
            (self._delete, mix.delete), (self._append, mix.append), (self._create, mix.create),
            (self._unlink, mix.unlink), (self._rename, mix.rename), (self._leases, mix.lease),
            (self._compact, mix.compact),
        ]  # fmt: skip
        (act,) = self.rng.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
        act()

    def _at_node(self) -> Process | None:
        """The process of the node where this client is; it moves if that is gone."""
        if self.process is None or not self.process.alive or self.rng.random() < 0.02:
            # Mostly a member; else perhaps one that joins, or was removed and does not know.
            others = self.rng.random() < 0.05 and not self.workload.stopped
            up = self.cluster.processes() if others else self.cluster.members()
            self.process = self.rng.choice(up) if up else None
        return self.process

    # --- calls ---

    def _register(self) -> bytes:
        return b"k/r%d" % self.rng.randrange(self.workload.mix.registers)

    def _list(self) -> bytes:
        return b"k/l%d" % self.rng.randrange(self.workload.mix.lists)

    def _names(self, count: int) -> list[bytes]:
        return [b"k/d/%d" % n for n in sorted(self.rng.sample(range(self.workload.mix.names), count))]

    def _read(self) -> None:
        what = self.rng.randrange(4)
        if what == 0:
            key = self._list()
            self._look(1, "read", (key,), lambda engine: _items(_value(engine, key)))
        elif what == 1:
            paths = self._names(2)
            self._look(2, "list", tuple(paths), lambda engine: tuple(p for p in paths if engine.get(p)))
        elif what == 2:
            (path,) = self._names(1)
            self._look(2, "lookup", (path,), lambda engine: _value(engine, path))
        else:
            key = self._register()
            self._look(0, "read", (key,), lambda engine: _value(engine, key))

    def _write(self) -> None:
        key, value = self._register(), self.workload.value()
        self._known[key] = value
        self._change(0, "write", (key, value), value, [], [types.put(key, value)], lambda result: None)

    def _cas(self) -> None:
        key, value = self._register(), self.workload.value()
        old = self._known.get(key)
        holds = types.absent(key) if old is None else types.compare_value(key, types.EQUAL, old)
        self._change(0, "cas", (key, old, value), value, [holds], [types.put(key, value)],
                     lambda result: result.succeeded)  # fmt: skip

    def _delete(self) -> None:
        key = self._register()
        self._change(0, "delete", (key,), self.workload.value(), [], [types.delete(key)],
                     lambda result: result.responses[0] > 0)  # fmt: skip

    def _append(self) -> None:
        key, value = self._list(), self.workload.value()
        then = [types.merge(key, types.append(value))]
        self._change(1, "append", (key, value), value, [], then, lambda result: None)

    def _create(self) -> None:
        (path,), inode = self._names(1), self.workload.value()
        self._change(2, "create", (path, inode), inode, [types.absent(path)], [types.put(path, inode)],
                     lambda result: result.succeeded)  # fmt: skip

    def _unlink(self) -> None:
        (path,) = self._names(1)
        self._change(2, "unlink", (path,), self.workload.value(), [], [types.delete(path)],
                     lambda result: result.responses[0] > 0)  # fmt: skip

    def _rename(self) -> None:
        old, new = self._names(2)
        if self.rng.random() < 0.5:
            old, new = new, old
        assert self.process is not None
        inode = _value(self.process.engine, old)
        if inode is None:
            self._change(2, "rename", (old, new), self.workload.value(), [types.absent(old)], [],
                         lambda result: False, doubtful=True)  # fmt: skip
        else:
            holds = types.compare_value(old, types.EQUAL, inode)
            self._change(2, "rename", (old, new), self.workload.value(), [holds],
                         [types.delete(old), types.put(new, inode)],
                         lambda result: True, doubtful=True)  # fmt: skip

    def _leases(self) -> None:
        """Grants, keeps, revokes, and hangs keys on leases: for the log and the state alone."""
        assert self.process is not None
        engine = self.process.engine
        if not self._lease or self.rng.random() < 0.3:
            self._lease = self.rng.randrange(1, 1 << 40)
            command = engine.grant_command(self.rng.randrange(200, 5_000), self._lease)
        elif self.rng.random() < 0.5:
            command = engine.keepalive_command(self._lease)
        elif self.rng.random() < 0.5:
            key = b"k/lease%d" % self.number
            command, _ = engine.txn_command([], [types.put(key, self.workload.value(), self._lease)])
        else:
            command = engine.revoke_command(self._lease)
        self._send_untold(command)

    def _compact(self) -> None:
        assert self.process is not None
        engine = self.process.engine
        revision = engine.committed_revision - self.rng.randrange(300)
        if self.rng.random() < 0.3:
            self._send_untold(engine.checkpoint_command())
        elif revision > 0:
            self._send_untold(engine.compact_command(revision))
        else:
            self._later()

    # --- how a call goes ---

    def _look(self, of: int, name: str, arguments: tuple[Any, ...], look: Callable[[Engine], Any]) -> None:
        process = self.process
        assert process is not None
        history = self.workload.histories[of][0]
        call = self.call = history.call(self.number, name, *arguments)
        called = self.workload.instant()
        key = arguments[0]

        def answered(seen: Any, revision: int) -> None:
            if self.call is not call:
                return
            history.returns(call, seen[0])
            self.cluster.invariants.answered(revision)
            self.workload.answers.append(
                Answer(called, self.workload.instant(), revision, None, key, seen[1]))  # fmt: skip
            self._known[key] = seen[1]
            self._later()

        def failed() -> None:
            if self.call is call:
                history.refused(call)
                self.process = None
                self._later()

        self._died(process, failed)

        def both(engine: Engine) -> tuple[Any, bytes | None]:
            return look(engine), _value(engine, key)

        process.do(serving.read, process, both, answered, failed)

    def _change(self, of: int, name: str, arguments: tuple[Any, ...], write: object,
                compares: Sequence[Compare], then: Sequence[Operation],
                told: Callable[[TxnResult], Any], *, doubtful: bool = False) -> None:  # fmt: skip
        """`doubtful`: if the compares do not hold, the call did nothing and is as if it was not made."""
        history = self.workload.histories[of][0]
        call = self.call = history.call(self.number, name, *arguments)
        called = self.workload.instant()
        dedup = None
        if self.rng.random() < self.workload.mix.dedup:
            self.sequence += 1
            dedup = (self.identity, self.sequence)

        def ended(result: object) -> None:
            if isinstance(result, TxnResult) and doubtful and not result.succeeded:
                history.refused(call)
            elif isinstance(result, TxnResult):
                history.returns(call, told(result))
                self.cluster.invariants.answered(result.revision)
                if result.succeeded and then:
                    self._wrote(called, result, write, then)
            elif isinstance(result, _REFUSALS):
                history.refused(call)
            else:
                self.workload.unknown.append((call, write))
            self._later()

        self._attempt(1, call, compares, then, dedup, write, ended)

    def _wrote(self, called: int, result: TxnResult, write: object, then: Sequence[Operation]) -> None:
        """For the check against the log: a transaction whose deletions found nothing is not in it."""
        if any(op[0] != types.DELETE or found for op, found in zip(then, result.responses, strict=True)):
            self.workload.answers.append(
                Answer(called, self.workload.instant(), result.revision, write))  # fmt: skip

    def _attempt(self, number: int, call: Call, compares: Sequence[Compare], then: Sequence[Operation],
                 dedup: tuple[bytes, int] | None, write: object,
                 ended: Callable[[object], object]) -> None:  # fmt: skip
        process = self._at_node()
        self._try += 1
        attempt = self._try

        def unknown() -> None:
            again(None)

        def again(result: object) -> None:
            """Whatever it was, it is not known whether it took place."""
            if self.call is not call or self._try != attempt:
                return
            if isinstance(result, (TxnResult, *_REFUSALS)):
                ended(result)
                return
            self._try += 1
            self.process = None
            if dedup is None or number >= _TRIES_MAX:
                ended(None)
                return
            self.cluster.scheduler.after(_MOVE_NS, lambda: self._attempt(
                number + 1, call, compares, then, dedup, write, ended), "client")  # fmt: skip

        if process is None:
            again(None)
            return
        command, encoded = process.engine.txn_command(compares, then, (), dedup)
        self.cluster.write_of[encoded] = write
        self._died(process, unknown)
        process.do(serving.submit, process, command, again)

    def _send_untold(self, command: Command) -> None:
        """A command of which no history tells; all that counts is that it does the same everywhere."""
        process = self.process
        assert process is not None
        self.call = call = Call(self.number, "command", (), 0, 0)
        self.cluster.write_of[commands.encode(command)] = None

        def ended(result: object = None) -> None:
            if self.call is call:
                self._later()

        self._died(process, ended)
        process.do(serving.submit, process, command, ended)

    def _died(self, process: Process, tell: Callable[[], object]) -> None:
        """`tell`, a little later, when `process` ends: its client sees the connection break."""
        self._waits = (process, tell)
        life = (process.node, process.machine.incarnation)
        if life not in self._hears_of:
            self._hears_of.add(life)
            process.deaths.append(lambda: self._dead(process))

    def _dead(self, process: Process) -> None:
        if self._waits is not None and self._waits[0] is process:
            self.cluster.scheduler.after(MS, self._waits[1], "client")


# What a transaction may be answered with that changed nothing and never will.
_REFUSALS: Final = (errors.Overloaded, errors.InvalidArgument, errors.NotFound, errors.Compacted,
                    errors.FutureRevision, errors.LeaseNotFound, errors.AlreadyExists)  # fmt: skip


def _value(engine: Engine, key: bytes) -> bytes | None:
    record = engine.get(key)
    return None if record is None else record.value


def _items(value: bytes | None) -> tuple[bytes, ...]:
    value = value or b""
    return tuple(value[at : at + _TOKEN_BYTES] for at in range(0, len(value), _TOKEN_BYTES))


class Reader:
    """Follows all user keys from revision 1 on, from node to node, and notes what it is given."""

    def __init__(self, workload: Workload, number: int, streams: Streams) -> None:
        self.workload, self.cluster, self.number = workload, workload.cluster, number
        self.rng = streams.stream(f"reader {number}")
        # Each item is a run of watches without a gap; a new one begins where history had been compacted.
        self.runs: list[list[Watched]] = [[]]
        self.next = 1
        self.process: Process | None = None
        self._task: Task | None = None
        self._watching = 0  # counts watches

    def start(self) -> None:
        self.cluster.scheduler.after(int(self.rng.expovariate(1.0) * 100 * MS), self._go, "reader")

    def _go(self) -> None:
        up = self.cluster.processes()
        if not up:
            self.start()
            return
        self.process = process = self.rng.choice(up)
        self._watching += 1
        process.do(self._fence, process, self._watching)
        process.deaths.append(lambda: self._moves(process, None))
        self.cluster.scheduler.after(self.rng.randrange(200, 5_000) * MS,
                                     lambda: self._moves(process, None), "reader")  # fmt: skip

    def _fence(self, process: Process, watching: int) -> None:
        """What was seen elsewhere must be here before it is watched here, or it would seem to be to come."""

        def begin() -> None:
            if self._watching == watching:
                self._watch(process)

        process.when_committed(self.next - 1, begin)

    def _watch(self, process: Process) -> None:
        batches: list[Change] = []
        first = self.next
        try:
            watcher = process.engine.watch(b"k/", b"k0", from_revision=first)
        except errors.Compacted as error:
            self._compacted(error)
            self._moves(process, None)
            return
        self.runs[-1].append(Watched(b"k/", b"k0", first, batches))

        async def follow() -> None:
            async for batch in watcher:
                events = [(one.key, one.record.value if one.record else None) for one in batch.events]
                batches.append(Change(batch.revision, events))
                self.next = batch.revision + 1

        def soon(step: Callable[[], object]) -> None:
            self.cluster.scheduler.after(0, lambda: process.do(step), "watch")

        self._task = Task(follow(), soon, lambda error: self._moves(process, error))
        process.tasks.append(self._task)

    def _moves(self, process: Process, error: Exception | None) -> None:
        """On to another node, or this one again, from where it is."""
        if isinstance(error, errors.Compacted):
            self._compacted(error)
        elif error is not None and not isinstance(error, errors.Lagged):
            raise error
        if self.process is process:
            self.process = None
            self._watching += 1
            if self._task is not None:
                self._task.cancel()
                self._task = None
            self.start()

    def _compacted(self, error: errors.Compacted) -> None:
        self.next = max(self.next, error.oldest)
        self.runs.append([])

    def check(self, log: dict[int, Change]) -> None:
        for run in self.runs:
            for wrong in check_resumed(run, log)[:1]:
                raise Violation("watch", f"reader {self.number}: {wrong}")
