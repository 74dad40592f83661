"""The components below a prefix, in their own order, without walking what is below them.

Keys are ordered as whole byte strings, and "/" is not the least byte: "a", "a-b", "a/x". A listing that
followed that order would meet the directory `a` behind `a-b`, and could show it twice or never when
it turns into a file meanwhile. So components are given in the order of components, and what is
below one is skipped by a seek. Not here: names, nodes, attributes.
"""

import re
from collections.abc import Iterator
from typing import Final

from aspenfs.kv.store import Store
from aspenfs.kv.types import Record, prefix_end

SKIP_STEPS: Final = 8  # items read past before a seek: cheaper for a directory of few keys
_BELOW_SLASH = re.compile(rb"[\x00-\x2e]")

Component = tuple[bytes, Record | None, bool]


def components(store: Store, base: bytes, after: bytes | None) -> Iterator[Component]:
    """(component, record of the key that ends with it, whether anything is below it), each once.

    `base` is a prefix in the store; components behind `after` (None: all) come in byte order. A key equal
    to `base` is an empty component with a record: among markers, the directory's own marker.
    """
    end = prefix_end(base)
    size = len(base)
    # Before this position there is only `after` itself and components before it.
    scan = store.scan(base if after is None else base + after + b"\0", end)
    item = next(scan, None)
    while item is not None:
        key, record = item
        slash = key.find(b"/", size)
        component = key[size:] if slash < 0 else key[size:slash]
        if after is not None and component <= after:
            scan, item = _skip(store, scan, base + component + b"0", end)
            continue
        following = next(scan, None)
        for low in _BELOW_SLASH.finditer(component):
            # Directories that are ordered before this key as components, behind it as keys.
            shorter = component[:low.start()]
            if (after is None or shorter > after) and _is_below(store, base + shorter, following):
                yield shorter, None, True
                after = shorter
        after = component
        if slash < 0:
            yield component, record, _is_below(store, key, following)
        else:
            yield component, None, True
        item = following


def _is_below(store: Store, key: bytes, following: tuple[bytes, Record] | None) -> bool:
    """Whether a key begins with `key` + b"/", when `following` is a key before which there is none."""
    if following is None or following[0] >= (end := key + b"0"):
        return False
    start = key + b"/"
    if following[0] >= start:
        return True
    return bool(store.range(start, end, limit=1, keys_only=True))


def _skip(store: Store, scan: Iterator[tuple[bytes, Record]], target: bytes,
          end: bytes) -> tuple[Iterator[tuple[bytes, Record]], tuple[bytes, Record] | None]:
    """The first item at or behind `target`, and the scan that goes on there."""
    for _ in range(SKIP_STEPS):
        item = next(scan, None)
        if item is None or item[0] >= target:
            return scan, item
    if target >= end:
        return scan, None
    scan = store.scan(target, end)
    return scan, next(scan, None)
