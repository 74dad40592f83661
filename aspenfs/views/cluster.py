"""The tree `cluster/`: what the cluster says of itself, as text, read like /proc.

Every file is made of one call of `status`, when it is opened: two reads of one open file agree, two opens
may not. Files report size 0 and are read past the page cache. Not here: how the status comes about.

`status` gives a mapping of plain values (str, int, float, bool, None, lists and mappings of them). Keys
that the files know, all of which may be missing:

    health      {"ok": bool, "cause": str, "advice": str}
    leader      name of the leading node
    members     list of {"name", "address", "state", …}
    events      list of {"time", "text"}, oldest first
    revision    newest revision applied here
    metrics     {name: number, or {"help": str, "type": str, "value": number}}
"""

import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from aspenfs import errors
from aspenfs.vfs.tree import Attr, Caller, OpenFile, Tree

Status = Mapping[str, Any]
ROOT: Final = 1


def as_json(status: Status) -> str:
    return json.dumps(status, indent=2, sort_keys=True, default=str) + "\n"


def as_text(status: Status) -> str:
    """For people: one `name: value` a line, lists and mappings indented below their name."""
    return "".join(line + "\n" for name, value in status.items() if name not in ("events", "metrics")
                   for line in _lines(name, value, ""))


def _lines(name: str, value: object, indent: str) -> list[str]:
    if isinstance(value, Mapping) and value:
        below = [line for key, item in value.items() for line in _lines(str(key), item, indent + "  ")]
        return [f"{indent}{name}:", *below]
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        lines = [f"{indent}{name}:"]
        for item in value:
            row = ", ".join(f"{key} {_word(cell)}" for key, cell in item.items()) \
                if isinstance(item, Mapping) else _word(item)
            lines.append(f"{indent}  {row}")
        return lines
    return [f"{indent}{name}: {_word(value)}"]


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value in ("", [], {}):
        return "-"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def members(status: Status) -> str:
    """One member a line, columns aligned under their names."""
    rows: Sequence[Mapping[str, Any]] = status.get("members") or []
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = [names, *([_word(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(names))]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
                   + "\n" for cells in table)


def health(status: Status) -> str:
    """First line `ok` or `not ok`; then why, and what to do."""
    told: Mapping[str, Any] = status.get("health") or {}
    if told.get("ok"):
        return "ok\n"
    lines = ["not ok" if told else "unknown"]
    lines += [f"{name}: {told[name]}" for name in ("cause", "advice") if told.get(name)]
    return "\n".join(lines) + "\n"


def leader(status: Status) -> str:
    return f"{_word(status.get('leader'))}\n"


def revision(status: Status) -> str:
    return f"{status.get('revision', 0)}\n"


def metrics(status: Status) -> str:
    """Prometheus text exposition format, version 0.0.4."""
    lines = []
    for name, metric in (status.get("metrics") or {}).items():
        if isinstance(metric, Mapping):
            if metric.get("help"):
                text = str(metric["help"]).replace("\\", "\\\\").replace("\n", "\\n")
                lines.append(f"# HELP {name} {text}")
            lines.append(f"# TYPE {name} {metric.get('type', 'untyped')}")
            metric = metric["value"]
        lines.append(f"{name} {float(metric) if isinstance(metric, bool) else metric}")
    return "".join(line + "\n" for line in lines)


def events(status: Status) -> str:
    """One event a line, the newest last: when, what."""
    return "".join(f"{event['time']}  {event['text']}\n" for event in status.get("events") or [])


FILES: Final[Mapping[bytes, Callable[[Status], str]]] = {
    b"events": events,
    b"health": health,
    b"leader": leader,
    b"members": members,
    b"metrics": metrics,
    b"revision": revision,
    b"status": as_text,
    b"status.json": as_json,
}
_NAMES: Final = tuple(FILES)


class ClusterTree(Tree):
    """Read-only. Node ids: 1 the root, then the files in the order of their names."""

    name = "cluster"
    root = ROOT
    # Neither names nor attributes ever change; contents are never cached.
    entry_timeout_s = attr_timeout_s = 3600.0
    shared = False  # it answers without a quorum too: it says so

    def __init__(self, status: Callable[[], Status], now_ns: int, uid: int = 0, gid: int = 0) -> None:
        self.status = status
        times = (now_ns, now_ns, now_ns)
        self.attrs = {ROOT: Attr(ROOT, stat.S_IFDIR | 0o555, 2, uid, gid, 0, 0, 0, *times)}
        for node, _ in enumerate(_NAMES, ROOT + 1):
            self.attrs[node] = Attr(node, stat.S_IFREG | 0o444, 1, uid, gid, 0, 0, 0, *times)

    async def lookup(self, parent: int, name: bytes) -> Attr:
        if parent != ROOT:
            raise errors.NotADirectory(parent)
        if name not in FILES:
            raise errors.NotFound(name)
        return self.attrs[ROOT + 1 + _NAMES.index(name)]

    async def getattr(self, node: int) -> Attr:
        attr = self.attrs.get(node)
        if attr is None:
            raise errors.Stale(node)
        return attr

    async def open(self, node: int, flags: int, caller: Caller) -> OpenFile:
        if node == ROOT:
            raise errors.IsADirectory(node)
        await self.getattr(node)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise errors.ReadOnly("read-only tree")  # for root, whom modes do not stop
        return ClusterFile(FILES[_NAMES[node - ROOT - 1]](self.status()).encode())

    def list_names(self, node: int, behind: Any, limit: int) -> tuple[Sequence[bytes], Any]:
        if node != ROOT:
            raise errors.NotADirectory(node)
        return _NAMES, None

    def listing_version(self, node: int) -> int | None:
        return 0


class ClusterFile(OpenFile):
    direct_io = True  # the kernel would read no further than the size, 0
    keep_cache = False

    def __init__(self, content: bytes) -> None:
        self.content = content

    async def read(self, offset: int, size: int) -> bytes:
        return self.content[offset:offset + size]
