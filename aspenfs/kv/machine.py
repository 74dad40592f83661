"""The replicated state machine: what a command does to a state. Pure and deterministic.

`evaluate` reads nothing but the state and the command: no clock, no randomness, no order of a set. All
nodes, and any replay, give the same effects for the same log. Belongs here: the dispatch by kind and
the lease commands. Not here: transactions (`txn.py`), history, apply-once, durability.
"""

from blake3 import blake3

from aspenfs import errors
from aspenfs.kv import commands, history, leases, once, records, rows, txn
from aspenfs.kv.commands import TXN, Command
from aspenfs.kv.leases import Lease
from aspenfs.kv.state import Effect as Effect
from aspenfs.kv.state import Outcome as Outcome
from aspenfs.kv.state import State as State
from aspenfs.kv.state import nothing_changed
from aspenfs.kv.types import TxnResult

_NS_PER_MS = 1_000_000


def evaluate(state: State, index: int, command: Command) -> Outcome:
    """What `command` does as log entry `index` on `state`, which holds all entries before it.

    The command must have been checked (`commands.check_size` or `decode`). An error of the store is the
    outcome's result; StorageError from the state itself is raised, for it is not the command's doing.
    """
    kind, time_ns, dedup, body = command
    try:
        if kind == TXN:
            compares, then, else_ = body
            if dedup is None:
                return txn.run(state, index, compares, then, else_)
            return _run_once(state, index, command, *dedup)
        if kind == commands.LEASE_GRANT:
            return _grant(state, index, time_ns, *body)
        if kind == commands.LEASE_KEEPALIVE:
            return _keepalive(state, index, time_ns, *body)
        if kind == commands.LEASE_REVOKE:
            lease = leases.require(state, *body)
            _, effects = leases.advanced(state, index, time_ns)
            return _end(state, index, [lease], effects)
        if kind == commands.LEASE_EXPIRE:
            return _expire(state, index, time_ns, body)
        if kind == commands.COMPACT:
            more, effects = history.compaction(state, index, *body)
            return Outcome(more, effects, ())
    except errors.StorageError:
        raise
    except errors.AspenError as error:
        return nothing_changed(error)
    if kind == commands.CHECKPOINT:
        return nothing_changed(index)  # what is to be compared is the state behind this entry
    assert kind == commands.NOOP, f"unchecked command of kind {kind}"
    return nothing_changed(None)


def _run_once(state: State, index: int, command: Command, client: bytes, sequence: int) -> Outcome:
    earlier = once.first_result(state, index, client, sequence)
    if earlier is not None:
        return nothing_changed(earlier)
    outcome = txn.run(state, index, *command.body)
    assert isinstance(outcome.result, TxnResult)
    remembered = once.remembered(state, index, client, sequence, outcome.result)
    return Outcome(outcome.result, [*outcome.effects, *remembered], outcome.events)


def _grant(state: State, index: int, time_ns: int, lease: int, ttl_ms: int) -> Outcome:
    if leases.find(state, lease) is not None:
        raise errors.AlreadyExists(f"lease {lease}")
    now, effects = leases.advanced(state, index, time_ns)
    effects.append(leases.written(index, Lease(lease, ttl_ms, now + ttl_ms * _NS_PER_MS)))
    return Outcome(lease, effects, ())


def _keepalive(state: State, index: int, time_ns: int, lease: int) -> Outcome:
    held = leases.require(state, lease)
    now, effects = leases.advanced(state, index, time_ns)
    effects.append(leases.written(index, held._replace(deadline_ns=now + held.ttl_ms * _NS_PER_MS)))
    return Outcome(held.ttl_ms, effects, ())


def _expire(state: State, index: int, time_ns: int, candidates: tuple[int, ...]) -> Outcome:
    """Ends those of `candidates` whose deadline has passed on log time; the result is their number.

    The others were kept alive between the proposal and this entry: they live on.
    """
    now, effects = leases.advanced(state, index, time_ns)
    found = [leases.find(state, lease) for lease in dict.fromkeys(candidates)]
    due = [lease for lease in found if lease is not None and lease.deadline_ns <= now]
    return _end(state, index, due, effects)._replace(result=len(due))


def _end(state: State, index: int, ended: list[Lease], effects: list[Effect]) -> Outcome:
    """Removes the leases and every key that hangs on them."""
    doomed = [key for lease in ended for key in leases.attached(state, lease.lease)]
    removed = txn.removal(state, index, doomed, None)
    gone: list[Effect] = [(leases.written(index, lease)[0], None) for lease in ended]
    return Outcome(None, [*removed.effects, *gone, *effects], removed.events)


def state_hash(state: State) -> bytes:
    """The digest of all rows (`rows.py`): equal on all nodes that applied the same log. Walks everything."""
    digest = blake3()
    for key, record in state.items(b"", b""):
        digest.update(rows.pack(key, records.pack(record)))
    return digest.digest()
