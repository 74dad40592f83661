"""Keys of any length in byte order, over LMDB, whose own keys end at 511 bytes.

Belongs here: how one key of the store becomes LMDB keys, and walks in both directions. Not here:
environments, transactions, what a value means (`statedb.py`).

A key is cut every CHUNK bytes. Two LMDB databases hold the result (docs/design/key-layout.md):

    root    a key shorter than CHUNK              -> its value
            the first CHUNK bytes of longer ones  -> the id of a node (8 bytes)
    nodes   id + rest, rest shorter than CHUNK    -> value of the key that ends here
            id + the next CHUNK bytes             -> the id of the next node

So an entry whose local part is exactly CHUNK bytes is always a link, every other one never is, and
an entry sorts where the keys below it sort: order survives. Nearly all keys are short and pay one
comparison of lengths. A node lives as long as it has an entry.

All functions take an open transaction; a walk is over when its transaction is, and a caller that
changes the tree under a walk gets nonsense.
"""

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import lmdb

CHUNK = 500  # a node's id and a chunk must fit in LMDB's 511 bytes
NODE_ID_BYTES = 8

_LAST_NODE = b"last-node"  # in the meta database: the newest node id given out; ids are never reused

Database: TypeAlias = "lmdb._Database"
Transaction: TypeAlias = "lmdb.Transaction[bytes]"
Item = tuple[bytes, bytes]


class Databases(NamedTuple):
    """The LMDB databases of one environment."""

    root: Database
    nodes: Database
    meta: Database


def get(txn: Transaction, databases: Databases, key: bytes) -> bytes | None:
    """The value of a key of CHUNK bytes or more; for shorter ones ask `root` itself."""
    database, prefix, rest = databases.root, b"", key
    while len(rest) >= CHUNK:
        link = txn.get(prefix + rest[:CHUNK], db=database)
        if link is None:
            return None
        database, prefix, rest = databases.nodes, link, rest[CHUNK:]
    return txn.get(prefix + rest, db=database)


def put(txn: Transaction, databases: Databases, key: bytes, value: bytes) -> None:
    """Sets a key of CHUNK bytes or more, with the nodes on its way."""
    database, prefix, rest = databases.root, b"", key
    while len(rest) >= CHUNK:
        at = prefix + rest[:CHUNK]
        link = txn.get(at, db=database)
        if link is None:
            link = _new_node(txn, databases.meta)
            txn.put(at, link, db=database)
        database, prefix, rest = databases.nodes, link, rest[CHUNK:]
    txn.put(prefix + rest, value, db=database)


def delete(txn: Transaction, databases: Databases, key: bytes) -> None:
    """Removes a key of CHUNK bytes or more, and the nodes that are empty without it."""
    database, prefix, rest = databases.root, b"", key
    links: list[tuple[Database, bytes]] = []
    while len(rest) >= CHUNK:
        at = prefix + rest[:CHUNK]
        link = txn.get(at, db=database)
        if link is None:
            return
        links.append((database, at))
        database, prefix, rest = databases.nodes, link, rest[CHUNK:]
    txn.delete(prefix + rest, db=database)
    while links and not _has_entries(txn, databases.nodes, prefix):
        database, at = links.pop()
        txn.delete(at, db=database)
        prefix = at[:NODE_ID_BYTES]  # of the node that held the link; unused for the root


def last_node(txn: Transaction, meta: Database) -> int:
    """The newest node id ever given out; 0 = none."""
    return int.from_bytes(txn.get(_LAST_NODE, b"", db=meta), "big")


def _new_node(txn: Transaction, meta: Database) -> bytes:
    link = (last_node(txn, meta) + 1).to_bytes(NODE_ID_BYTES, "big")
    txn.put(_LAST_NODE, link, db=meta)
    return link


def _has_entries(txn: Transaction, nodes: Database, prefix: bytes) -> bool:
    with txn.cursor(nodes) as cursor:
        return cursor.set_range(prefix) and cursor.key().startswith(prefix)


def forward(txn: Transaction, databases: Databases, start: bytes, end: bytes | None) -> Iterator[Item]:
    """(key, value) of every key in [start, end), ascending; `end` None = no end."""
    with txn.cursor(databases.root) as cursor:
        if not (cursor.set_range(start[:CHUNK]) if start else cursor.first()):
            return
        for key, value in cursor.iternext():
            if end is not None and key >= end:
                return
            if len(key) < CHUNK:
                yield key, value
            else:
                below = start[CHUNK:] if start.startswith(key) else b""
                yield from _node_forward(txn, databases.nodes, value, key, below, _end_below(key, end))


def _node_forward(txn: Transaction, nodes: Database, node: bytes, above: bytes,
                  start: bytes, end: bytes | None) -> Iterator[Item]:
    """As `forward` within one node; `above` is what stands before the local parts, bounds are local."""
    with txn.cursor(nodes) as cursor:
        if not cursor.set_range(node + start[:CHUNK]):
            return
        for key, value in cursor.iternext():
            local = key[NODE_ID_BYTES:]
            if not key.startswith(node) or (end is not None and local >= end):
                return
            if len(local) < CHUNK:
                yield above + local, value
            else:
                below = start[CHUNK:] if start.startswith(local) else b""
                yield from _node_forward(txn, nodes, value, above + local, below, _end_below(local, end))


def backward(txn: Transaction, databases: Databases, start: bytes, end: bytes | None) -> Iterator[Item]:
    """(key, value) of every key in [start, end), descending; `end` None = no end."""
    with txn.cursor(databases.root) as cursor:
        if not _seek_before(cursor, b"", end):
            return
        for key, value in cursor.iterprev():
            if len(key) < CHUNK:
                if key < start:
                    return
                yield key, value
            elif key >= start or start.startswith(key):
                below = start[CHUNK:] if start.startswith(key) else b""
                yield from _node_backward(txn, databases.nodes, value, key, below, _end_below(key, end))
            else:
                return


def _node_backward(txn: Transaction, nodes: Database, node: bytes, above: bytes,
                   start: bytes, end: bytes | None) -> Iterator[Item]:
    with txn.cursor(nodes) as cursor:
        if not _seek_before(cursor, node, end):
            return
        for key, value in cursor.iterprev():
            local = key[NODE_ID_BYTES:]
            if not key.startswith(node):
                return
            if len(local) < CHUNK:
                if local < start:
                    return
                yield above + local, value
            elif local >= start or start.startswith(local):
                below = start[CHUNK:] if start.startswith(local) else b""
                yield from _node_backward(txn, nodes, value, above + local, below, _end_below(local, end))
            else:
                return


def _end_below(chunk: bytes, end: bytes | None) -> bytes | None:
    """The bound for the node linked at `chunk`: what is left of `end` if it runs through that node."""
    return end[CHUNK:] if end is not None and end.startswith(chunk) else None


def _seek_before(cursor: "lmdb.Cursor[bytes]", node: bytes, end: bytes | None) -> bool:
    """Puts the cursor on the last entry that holds anything below `end` (a local bound)."""
    if end is None:
        after = (int.from_bytes(node, "big") + 1).to_bytes(NODE_ID_BYTES, "big") if node else b""
        found = cursor.set_range(after) if after else False
    else:
        at = node + end[:CHUNK]
        found = cursor.set_range(at) if at else cursor.first()
        if found and len(end) > CHUNK and cursor.key() == at:
            return True  # the link that `end` runs through
    return cursor.prev() if found else cursor.last()
