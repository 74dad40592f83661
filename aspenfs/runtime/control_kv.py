"""What the control socket does with keys and leases: requests checked, turned into Store calls, answered.

Belongs here: the wire form of compares, operations and records (`docs/design/control-socket.md`).
Not here: connections (`control.py`).

Clients see user keys only; in the store they lie under `k/`. Every write waits for *committed*, every
read for a barrier. What is long is sent in pages, each small enough for a frame; between two pages
others get their turn.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from itertools import chain
from typing import Any, TypeVar

from aspenfs import errors
from aspenfs.kv import types
from aspenfs.kv.store import Dedup, Store
from aspenfs.kv.types import Compare, Operation, Record
from aspenfs.limits import (
    CONTROL_DELETE_KEYS,
    CONTROL_PAGE_BYTES,
    CONTROL_PAGE_KEYS,
    KEY_BYTES_MAX,
    TXN_OPS_MAX,
)
from aspenfs.runtime.control_command import Call, Command
from aspenfs.seams import Clock
from aspenfs.views.kv_attributes import stamp

KEYSPACE = b"k/"
KEYSPACE_END = types.prefix_end(KEYSPACE)
_PREFIX_BYTES = len(KEYSPACE)
_NUMBER_MAX = (1 << 63) - 1
_OPERATORS = {"=": types.EQUAL, "!=": types.NOT_EQUAL, "<": types.LESS, ">": types.GREATER}
_NUMBER_TARGETS = {"create": types.compare_create_revision, "mod": types.compare_mod_revision,
                   "version": types.compare_version}

T = TypeVar("T")
Found = tuple[bytes, Record | None]
WireRecord = list[Any]


def kv_commands(store: Store, clock: Clock) -> dict[str, Command]:
    keys, leases = _Keys(store, clock), _Leases(store)
    return {
        "kv.range": Command(keys.range),
        "kv.txn": Command(keys.txn, ordered=True),
        "kv.delete_range": Command(keys.delete_range, ordered=True),
        "kv.watch": Command(keys.watch),
        "lease.grant": Command(leases.grant, ordered=True),
        "lease.keepalive": Command(leases.keepalive, ordered=True),
        "lease.revoke": Command(leases.revoke, ordered=True),
        "lease.list": Command(leases.list),
    }


# --- parameters: what comes in is checked here, once ---


def _param(params: Mapping[str, Any], name: str, kind: type[T], default: T | None = None) -> T:
    value = params.get(name, default)
    if type(value) is not kind:
        raise errors.InvalidArgument(f"{name} must be {kind.__name__}, not {type(value).__name__}")
    return value


def _number(params: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = _param(params, name, int, default)
    if not 0 <= value <= _NUMBER_MAX:
        raise errors.InvalidArgument(f"{name} must be 0 to {_NUMBER_MAX}, not {value}")
    return value


def _key(params: Mapping[str, Any]) -> bytes:
    """The store refuses an empty key; it would count the keyspace's name to the length of a long one."""
    key = _param(params, "key", bytes)
    if len(key) > KEY_BYTES_MAX:
        raise errors.InvalidArgument(f"a key of {len(key)} bytes; the most is {KEY_BYTES_MAX}")
    return KEYSPACE + key


def _range(params: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """[start, end) in the store; an empty `end` is the end of the user keys."""
    start, end = _param(params, "start", bytes, b""), _param(params, "end", bytes, b"")
    return KEYSPACE + start, KEYSPACE + end if end else KEYSPACE_END


def _compare(body: Any) -> Compare:
    if not isinstance(body, dict):
        raise errors.InvalidArgument("a compare must be a map")
    target = _param(body, "target", str)
    if target == "exists":
        return types.exists(_key(body))
    if target == "absent":
        return types.absent(_key(body))
    if target == "empty":
        return types.range_empty(*_range(body))
    operator = _OPERATORS.get(_param(body, "operator", str))
    if operator is None:
        raise errors.InvalidArgument(f"operator must be one of {' '.join(_OPERATORS)}")
    if target == "value":
        return types.compare_value(_key(body), operator, _param(body, "operand", bytes))
    if target not in _NUMBER_TARGETS:
        raise errors.InvalidArgument(f"target {target!r}: it is exists absent empty value create mod version")
    return _NUMBER_TARGETS[target](_key(body), operator, _number(body, "operand"))


def _operation(body: Any) -> Operation:
    if not isinstance(body, dict):
        raise errors.InvalidArgument("an operation must be a map")
    match _param(body, "op", str):
        case "put":
            return types.put(_key(body), _param(body, "value", bytes), _number(body, "lease", 0))
        case "append":
            return types.merge(_key(body), types.append(_param(body, "value", bytes)))
        case "delete":
            return types.delete(_key(body))
        case "delete_range":
            return types.delete_range(*_range(body))
        case "get":
            return types.get(_key(body))
        case "range":
            return types.range_(*_range(body), _number(body, "limit", 0))
        case other:
            raise errors.InvalidArgument(f"op {other!r}; known: put append delete delete_range get range")


def _several(params: Mapping[str, Any], name: str, read: Callable[[Any], T]) -> list[T]:
    bodies = params.get(name, [])
    if not isinstance(bodies, list):
        raise errors.InvalidArgument(f"{name} must be a list")
    if len(bodies) > TXN_OPS_MAX:
        raise errors.TxnTooLarge(f"{len(bodies)} in {name!r}; a transaction may have {TXN_OPS_MAX}")
    return [read(body) for body in bodies]


def _dedup(call: Call) -> Dedup | None:
    sequence = _number(call.params, "sequence", 0)
    return (call.client, sequence) if sequence else None


# --- answers ---


def _wire(key: bytes, record: Record | None, *, keys_only: bool = False) -> WireRecord:
    """[key] for a key that is not there, else

    [key, value or nil, size or nil, create revision, mod revision, version, lease, attributes].
    More fields may follow in later versions.
    """
    user_key = key[_PREFIX_BYTES:]
    if record is None:
        return [user_key]
    value = None if keys_only else record.value
    size = None if keys_only else len(record.value)
    return [user_key, value, size, record.create_revision, record.mod_revision, record.version, record.lease,
            dict(record.attributes)]


def _pages(found: Iterable[Found], *, keys_only: bool = False) -> Iterator[list[WireRecord]]:
    """Cuts records into lists that fit a frame. Lazy: reads no further than the page it gives."""
    page: list[WireRecord] = []
    size = 0
    for key, record in found:
        page.append(_wire(key, record, keys_only=keys_only))
        size += len(key) + (0 if record is None or keys_only else len(record.value))
        if len(page) == CONTROL_PAGE_KEYS or size >= CONTROL_PAGE_BYTES:
            yield page
            page, size = [], 0
    if page:
        yield page


class _Keys:
    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock

    async def range(self, call: Call) -> Any:
        """Items {revision, records}; result {revision, count, more, snapshot}.

        All of it is of one revision, unless history older than a long listing is compacted meanwhile:
        then it goes on with what is newest, and `snapshot` is false.
        """
        params = call.params
        start, end = _range(params)
        limit, asked = _number(params, "limit", 0), _number(params, "revision", 0)
        keys_only = _param(params, "keys_only", bool, False)
        sizes_only = _param(params, "sizes_only", bool, False)
        revision = await self._store.barrier()
        if asked > revision:
            raise errors.FutureRevision(f"revision {asked} is not there yet; the newest is {revision}")
        revision, snapshot, count = asked or revision, True, 0
        while True:
            room = min(limit - count, CONTROL_PAGE_KEYS) if limit else CONTROL_PAGE_KEYS
            if not room:
                more = bool(self._store.range(start, end, limit=1, keys_only=True))
                break
            try:
                found = self._first(start, end, room, revision if snapshot else None, keys_only)
                page = next(_pages(found, keys_only=keys_only), None)
            except errors.Compacted:
                if asked or not count:
                    raise
                snapshot = False
                continue
            if page is None:
                more = False
                break
            count += len(page)
            start = KEYSPACE + page[-1][0] + b"\0"
            if sizes_only:
                for record in page:
                    record[1] = None
            await call.item({"revision": revision, "records": page})
        return {"revision": revision, "count": count, "more": more, "snapshot": snapshot}

    def _first(self, start: bytes, end: bytes, room: int, revision: int | None,
               keys_only: bool) -> Iterable[Found]:
        """The first `room` records, lazily: values are read only as far as a page has room for them."""
        store = self._store
        if keys_only:
            at = None if revision == store.revision else revision
            return store.range(start, end, limit=room, revision=at, keys_only=True)
        if revision is None or revision == store.revision:
            return _take(store.scan(start, end), room)
        keys = store.range(start, end, limit=room, revision=revision, keys_only=True)
        return ((key, store.get(key, revision=revision)) for key, _ in keys)

    async def txn(self, call: Call) -> Any:
        """Items {response, records} for what GET and RANGE found; result {revision, succeeded, responses}.

        A response is {count} of records found or keys deleted, or nil.
        """
        params = call.params
        compares = _several(params, "compares", _compare)
        then, else_ = _several(params, "then", _operation), _several(params, "else", _operation)
        # What only reads is not remembered: it may be repeated, and its result may be large.
        writes = any(operation[0] not in (types.GET, types.RANGE) for operation in chain(then, else_))
        result = await self._store.txn(compares, self._stamped(then), self._stamped(else_),
                                       dedup=_dedup(call) if writes else None)
        call.accepted()
        await self._store.committed(result.revision)
        responses = []
        ran = then if result.succeeded else else_
        for number, (operation, response) in enumerate(zip(ran, result.responses, strict=True)):
            found = _found(operation, response)
            for page in _pages(found):
                await call.item({"response": number, "records": page})
            responses.append(_summary(operation, response, found))
        return {"revision": result.revision, "succeeded": result.succeeded, "responses": responses}

    def _stamped(self, operations: Sequence[Operation]) -> list[Operation]:
        """The operations, with the time of the change for who looks at the keys as files.

        The mode and owner that a key has in a mount stay, so a `put` becomes an `update`.
        """
        changes = stamp(self._clock.time_ns())
        stamped: list[Operation] = []
        for operation in operations:
            if operation[0] == types.PUT:
                _, key, value, lease, _ = operation
                operation = types.update(key, value, lease, changes)
            elif operation[0] == types.MERGE:
                operation = types.merge(operation[1], *operation[2], types.set_attributes(changes))
            stamped.append(operation)
        return stamped

    async def delete_range(self, call: Call) -> Any:
        """Deletes the first keys of the range, in one transaction: {revision, deleted, more}.

        The caller repeats it until `more` is false. So no transaction grows with the number of keys,
        and a repetition after a lost answer can skip nothing.
        """
        start, end = _range(call.params)
        await self._store.barrier()
        keys = self._store.range(start, end, limit=CONTROL_DELETE_KEYS, keys_only=True)
        stop = keys[-1][0] + b"\0" if keys else start
        result = await self._store.txn([], [types.delete_range(start, stop)], dedup=_dedup(call))
        call.accepted()
        await self._store.committed(result.revision)
        more = bool(self._store.range(start, end, limit=1, keys_only=True))
        return {"revision": result.revision, "deleted": result.responses[0], "more": more}

    async def watch(self, call: Call) -> Any:
        """Items {revision, events, last}: the records as they became, a bare key for a deletion.

        The first item has no events: it says after which revision the watch begins. A revision with
        many events comes in several items; `last` is true in its last one. Ends with Lagged, with
        Compacted, or by being cancelled.
        """
        start, end = _range(call.params)
        begin = _number(call.params, "from_revision", 0)
        if not begin:
            begin = await self._store.committed() + 1
        await call.item({"revision": begin - 1, "events": [], "last": True})
        stream: AsyncIterator[types.Batch] = self._store.watch(start, end, from_revision=begin)
        async with aclosing(stream) as batches:  # type: ignore[type-var]
            async for batch in batches:
                pages = _pages((event.key, event.record) for event in batch.events)
                page = next(pages, None)
                while page is not None:
                    following = next(pages, None)
                    await call.item({"revision": batch.revision, "events": page, "last": following is None})
                    page = following
        raise errors.Closed("the store ended the watch")


def _take(found: Iterator[Found], count: int) -> Iterator[Found]:
    for item in found:
        yield item
        count -= 1
        if not count:
            return


def _found(operation: Operation, response: Any) -> list[Found]:
    if operation[0] == types.GET:
        return [] if response is None else [(operation[1], response)]
    return list(response) if operation[0] == types.RANGE else []


def _summary(operation: Operation, response: Any, found: Sequence[Found]) -> dict[str, int] | None:
    match operation[0]:
        case types.GET | types.RANGE:
            return {"count": len(found)}
        case types.DELETE | types.DELETE_RANGE:
            return {"count": int(response)}
        case _:
            return None


class _Leases:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def grant(self, call: Call) -> Any:
        """{lease, ttl_ms}. The client chooses the id, so that it can ask again after a lost answer."""
        ttl_ms = _number(call.params, "ttl_ms")
        lease = await self._store.lease_grant(ttl_ms, _number(call.params, "lease", 0))
        call.accepted()
        await self._store.committed()
        return {"lease": lease, "ttl_ms": ttl_ms}

    async def keepalive(self, call: Call) -> Any:
        ttl_ms = await self._store.lease_keepalive(_number(call.params, "lease"))
        call.accepted()
        await self._store.committed()
        return {"ttl_ms": ttl_ms}

    async def revoke(self, call: Call) -> Any:
        await self._store.lease_revoke(_number(call.params, "lease"))
        call.accepted()
        await self._store.committed()
        return {}

    async def list(self, call: Call) -> Any:
        """Items of [lease, ttl_ms, remaining_ms]; result {count}."""
        await self._store.barrier()
        leases = sorted(self._store.leases())
        for first in range(0, len(leases), CONTROL_PAGE_KEYS):
            await call.item(leases[first:first + CONTROL_PAGE_KEYS])
        return {"count": len(leases)}
