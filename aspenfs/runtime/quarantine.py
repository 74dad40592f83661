"""Quarantine: this node's state is known to differ from what the log made of it elsewhere.

    quarantine.json   {"format": 1, "index": entry at which states were compared, "digest": what the majority
                       has there, "found": what this node has, "sources": [ids of nodes of the majority]}

The file lies in the state directory from when a node learns it until another state has taken the place of
the bad one, in one step with that (`swap.py`): so a node that is killed in between starts in quarantine.

Belongs here: the file, the words, and which part of the Store port is left to the node itself meanwhile. Not
here: finding out (`divergence.py`), getting well (`catching_up.py`), what stops and goes on (`host.py`).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from aspenfs.cluster.types import Configuration
from aspenfs.errors import Corrupt, Diverged
from aspenfs.runtime import identity

FILE_NAME: Final = "quarantine.json"
FORMAT: Final = 1

# The node's own rows, who its members are and which CA signs, are read on: they lead to the others, and
# certificates decide whom it believes.
OWN_ROWS: Final = b"c/"


class Quarantine(NamedTuple):
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    digest: bytes  # of the majority's state there
    found: bytes  # of this node's; empty: it could not be read
    sources: tuple[int, ...]  # nodes whose state was the majority's

    def error(self) -> Diverged:
        return Diverged(
            f"the state of this node differs from that of the majority at entry {self.index}: nothing is "
            "answered from it; another one is being fetched, `aspen status` tells how far that is"
        )


def read(directory: Path) -> Quarantine | None:
    """None if the state there is not known to be bad. Corrupt."""
    path = directory / FILE_NAME
    try:
        fields: Any = json.loads(path.read_bytes())
        if fields["format"] != FORMAT:
            raise Corrupt(str(path), 0, f"format {fields['format']!r}", "use the version that wrote it")
        return Quarantine(int(fields["index"]), bytes.fromhex(fields["digest"]),
                          bytes.fromhex(fields["found"]), tuple(map(int, fields["sources"])))  # fmt: skip
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        advice = "the state beside it is bad: empty the state directory and join again with a new ticket"
        raise Corrupt(str(path), 0, f"not a quarantine: {error!r}", advice) from error


def write(directory: Path, quarantine: Quarantine) -> None:
    """Durable on return."""
    fields = {"format": FORMAT, "index": quarantine.index, "digest": quarantine.digest.hex(),
              "found": quarantine.found.hex(), "sources": list(quarantine.sources)}  # fmt: skip
    identity.write_file(directory / FILE_NAME, json.dumps(fields).encode() + b"\n")


def check_others(marker: Quarantine, configuration: Configuration, node: int) -> None:
    """At a start. Corrupt for a node that is alone: there is nobody whose state it could fetch."""
    if configuration == Configuration((node,)):
        cause = f"the state was found to be bad at entry {marker.index}, and no other member is left"
        raise Corrupt(FILE_NAME, 0, cause, "restore a backup")


Read = Callable[..., Any]


def narrowed(read: Read, quarantine: Quarantine) -> Read:
    """`read(first key, ...)` of the Store port, for a node in quarantine."""

    def own_rows(start: bytes = b"", *arguments: Any, **named: Any) -> Any:
        if start[:2] != OWN_ROWS:
            raise quarantine.error()
        return read(start, *arguments, **named)

    return own_rows
