"""Random transactions: the store does what a plain dict does, now, at old revisions and to a watcher."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from aspenfs import errors
from aspenfs.kv import keys as internal
from aspenfs.kv.local import LocalStore
from aspenfs.kv.types import Record
from tests.kv.subject import FakeClock, FakeEntropy
from tests.properties.kv_commands import KEYS, transactions
from tests.properties.kv_model import Model, Refused, Rows

LEASES = (1, 2)  # 3 is asked for and unknown


def _plain(response: Any) -> Any:
    if isinstance(response, list):
        return [(key, _plain(record)) for key, record in response]
    return (*response[:6], dict(response.attributes)) if isinstance(response, Record) else response


def _shown(store: LocalStore, start: bytes = b"", end: bytes = b"", **options: Any) -> Rows:
    return {key: list(_plain(record)) for key, record in store.range(start, end, **options)}


async def _run(store: LocalStore, model: Model, transaction: Any) -> None:
    compares, then, else_ = transaction
    index = store.revision + 1
    try:
        held, responses = model.txn(index, compares, then, else_)
    except Refused:
        with pytest.raises((errors.LeaseNotFound, errors.OutOfRange)):
            await store.txn(compares, then, else_)
        return
    result = await store.txn(compares, then, else_)
    assert (result.revision, result.succeeded) == (index, held)
    assert [_plain(response) for response in result.responses] == responses


@settings(max_examples=250, deadline=None)
@given(st.lists(transactions, max_size=12), st.data())
def test_transactions_do_what_a_dict_does(script: Sequence[Any], data: st.DataObject) -> None:
    async def main() -> None:
        store = LocalStore(FakeClock(), FakeEntropy(), trio.Event)
        for lease in LEASES:
            await store.lease_grant(1_000, lease)
        model = Model(LEASES)
        past: dict[int, Rows] = {store.revision: {}}
        for transaction in script:
            await _run(store, model, transaction)
            assert _shown(store) == model.rows
            assert list(_shown(store, reverse=True)) == sorted(model.rows, reverse=True)
            assert all((store.get(key) is not None) == (key in model.rows) for key in KEYS)
            past[store.revision] = deepcopy(model.rows)
        mark = 0
        if data.draw(st.booleans(), "compact") and store.revision:
            mark = data.draw(st.integers(0, store.revision), "mark")
            await store.compact(mark)
        await _check_history(store, past, mark)
        _check_attachments(store, model)

    trio.run(main)


async def _check_history(store: LocalStore, past: dict[int, Rows], mark: int) -> None:
    """Old reads and a resumed watch show the snapshots, from `mark` on."""
    first, newest = min(past), max(past)
    rows: Rows = {}
    for revision in range(first, newest + 1):
        rows = {key: row for key, row in past.get(revision, rows).items() if key.startswith(b"k/")}
        past[revision] = rows
        if revision < mark:
            with pytest.raises(errors.Compacted):
                store.range(b"k/", b"k0", revision=revision)
            continue
        assert _shown(store, b"k/", b"k0", revision=revision) == rows
        backwards = [key for key, _ in store.range(b"k/", b"k0", revision=revision, reverse=True)]
        assert backwards == sorted(rows, reverse=True)
        for key in KEYS:
            if key.startswith(b"k/"):
                found = store.get(key, revision=revision)
                assert (found and list(_plain(found))) == rows.get(key)
    changed = [
        revision
        for revision in range(max(mark, first + 1), newest + 1)
        if past[revision] != past[revision - 1]
    ]
    batches = store.watch(b"k/", b"k0", from_revision=max(mark, first))
    for revision in changed:
        batch = await anext(batches)
        assert batch.revision == revision
        before = dict(past[revision - 1])
        for key, record, previous in batch.events:
            assert (previous and list(_plain(previous))) == before.get(key)
            assert record is None or record.mod_revision == revision
            if record is None:
                del before[key]
            else:
                before[key] = list(_plain(record))
        assert before == past[revision]


def _check_attachments(store: LocalStore, model: Model) -> None:
    """The lease table names exactly the keys that hang on leases."""
    attached = {key[2:] for key, _ in store.state.items(internal.ATTACHED, b"\x00b")}
    expected = {row[4].to_bytes(8, "big") + key for key, row in model.rows.items() if row[4]}
    assert attached == expected
