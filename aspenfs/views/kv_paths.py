"""Keys as paths: which names below `kv/` a key has, and back. Pure; the page is docs/design/kv-paths.md.

A key is cut at "/" into components; each component is a name, escaped where a name cannot hold it.
A directory is known by its *prefix*, the bytes that all keys below it begin with: b"" for the root,
b"a/b/" for a/b, and, for the continuation of a component that is too long for one name, the bytes
so far, without a slash (b"a/xxxx…").

    component                   name
    "%", NUL inside             %25, %00
    "", ".", ".."               %empty, %2E, %2E%2E
    longer than 255 (escaped)   <251 to 253 bytes>%+ / <the rest>, again if the rest is too long
    a key that is a directory   %value inside that directory

No other name that contains "%" stands for anything. Not here: what exists (`kv_space.py`).
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aspenfs import errors
from aspenfs.limits import KEY_BYTES_MAX, NAME_BYTES_MAX

VALUE_NAME = b"%value"
EMPTY_NAME = b"%empty"
CONTINUED = b"%+"
# A piece is the shortest beginning of a component whose escaped form has this many bytes. It must
# depend on nothing that follows, or two keys with the same beginning could disagree about the name
# of the directory that they share; an escape of three bytes may carry it two bytes further.
PIECE_BYTES = NAME_BYTES_MAX - len(CONTINUED) - 2
PIECE_RAW_BYTES_MIN = -(-PIECE_BYTES // 3)  # shorter components are never near the limit

_WHOLE = {b"": EMPTY_NAME, b".": b"%2E", b"..": b"%2E%2E"}
_WHOLE_NAMES = {name: component for component, name in _WHOLE.items()}
_ESCAPED = re.compile(rb"(?:[^%/\x00]|%25|%00)+", re.DOTALL)


class Child(NamedTuple):
    """What a name in a directory can stand for: a key, a directory, or either."""

    key: bytes | None
    directory: bytes | None  # its prefix


class Level(NamedTuple):
    """One step of a path: `name` in the directory `parent`, which is the directory `directory`."""

    parent: bytes
    name: bytes
    directory: bytes


def escape(component: bytes) -> bytes:
    """The name of a whole component, however long."""
    if b"%" in component or b"\0" in component:
        return component.replace(b"%", b"%25").replace(b"\0", b"%00")
    return _WHOLE.get(component, component)


def unescape(name: bytes) -> bytes | None:
    """The component that has this name; None if no component has."""
    if b"%" in name:
        component = _WHOLE_NAMES.get(name)
        if component is not None:
            return component
        if _ESCAPED.fullmatch(name) is None:
            return None
        return name.replace(b"%00", b"\0").replace(b"%25", b"%")
    return None if name in _WHOLE or b"\0" in name or b"/" in name else name


def escaped_bytes(raw: bytes) -> int:
    """Length of `raw` escaped byte by byte (the names for "", "." and ".." do not count here)."""
    return len(raw) + 2 * (raw.count(b"%") + raw.count(b"\0"))


def first_piece(component: bytes) -> bytes:
    """The shortest beginning that fills a continuation name; all of it if that is shorter."""
    room = PIECE_BYTES
    for length, byte in enumerate(component, 1):
        room -= 3 if byte == 0x25 or byte == 0 else 1
        if room <= 0:
            return component[:length]
    return component


def is_continuation(prefix: bytes) -> bool:
    return prefix != b"" and not prefix.endswith(b"/")


def name_bytes_min(prefix: bytes) -> int:
    """How long, escaped, names in a directory are at least.

    0 but in a continuation: what is shorter would have fitted into one name, and is found there.
    """
    if not is_continuation(prefix):
        return 0
    piece = rest = prefix[prefix.rfind(b"/") + 1:]
    while rest:
        piece = first_piece(rest)
        rest = rest[len(piece):]
    return NAME_BYTES_MAX + 1 - escaped_bytes(piece)


def child(prefix: bytes, name: bytes) -> Child | None:
    """What `name` in the directory `prefix` stands for; None: never anything. NameTooLong."""
    if len(name) > NAME_BYTES_MAX:
        raise errors.NameTooLong(name)
    if b"%" in name:
        if name == VALUE_NAME:
            # The root has no key, and a continuation is not a whole component.
            own = prefix[:-1]
            return Child(own, None) if own and prefix.endswith(b"/") else None
        if name.endswith(CONTINUED):
            return _continuation(prefix, name)
    raw = unescape(name)
    if raw is None or len(name) < name_bytes_min(prefix):
        return None
    key = prefix + raw
    size = len(key)
    if size > KEY_BYTES_MAX:
        raise errors.NameTooLong(key)
    # A directory with a prefix of the longest key holds at most the key that ends in its slash.
    return Child(key if key else None, key + b"/" if size < KEY_BYTES_MAX else None)


def _continuation(prefix: bytes, name: bytes) -> Child | None:
    raw = unescape(name[: -len(CONTINUED)])
    if raw is None or first_piece(raw) != raw or escaped_bytes(raw) < PIECE_BYTES:
        return None
    directory = prefix + raw
    if len(directory) >= KEY_BYTES_MAX:
        raise errors.NameTooLong(directory)
    return Child(None, directory)


def component_names(component: bytes) -> list[bytes]:
    """The names of one component: one, or continuation directories and the rest."""
    names = []
    while len(name := escape(component)) > NAME_BYTES_MAX:
        piece = first_piece(component)
        names.append(escape(piece) + CONTINUED)
        component = component[len(piece):]
    names.append(name)
    return names


def levels(prefix: bytes) -> Iterator[Level]:
    """The directories that lead to the directory `prefix`, and it, from the top."""
    start, parent = 0, b""
    while start < len(prefix):
        slash = prefix.find(b"/", start)
        component = prefix[start:] if slash < 0 else prefix[start:slash]
        at = start
        while slash < 0 or len(escape(prefix[at:slash])) > NAME_BYTES_MAX:
            piece = first_piece(component)
            if not piece:
                return
            at += len(piece)
            component = component[len(piece):]
            yield Level(parent, escape(piece) + CONTINUED, prefix[:at])
            parent = prefix[:at]
        start = slash + 1
        yield Level(parent, escape(component), prefix[:start])
        parent = prefix[:start]


def place_of(key: bytes) -> tuple[bytes, bytes]:
    """The directory (its prefix) and the name that a key has while it is not a directory itself."""
    start = key.rfind(b"/") + 1
    component = key[start:]
    while len(name := escape(component)) > NAME_BYTES_MAX:
        piece = first_piece(component)
        start += len(piece)
        component = component[len(piece):]
    return key[:start], name


def path_of(key: bytes, *, is_directory: bool = False) -> list[bytes]:
    """The names that lead to a key; `is_directory`: whether something is below `key + b"/"`."""
    parent, name = place_of(key)
    names = [level.name for level in levels(parent)]
    names.append(name)
    if is_directory:
        names.append(VALUE_NAME)
    return names


def key_of(names: Sequence[bytes]) -> bytes | None:
    """The key that a path of names leads to; None if it can lead to none."""
    prefix = b""
    for name in names[:-1]:
        found = child(prefix, name)
        if found is None or found.directory is None:
            return None
        prefix = found.directory
    found = child(prefix, names[-1]) if names else None
    return found.key if found is not None else None
