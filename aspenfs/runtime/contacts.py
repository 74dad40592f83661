"""Whom a new node may talk to before the members' rows have reached it: `contacts.json` of a state directory.

    {"format": 1, "members": [{"node": 1, "addresses": ["192.0.2.7:7420"], "born": 32 hex digits}]}

Written once, by `aspen join`; of no account once this node's own row is in its state.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from aspenfs.errors import Corrupt
from aspenfs.runtime import identity
from aspenfs.runtime.peers.join import Contact

FILE_NAME: Final = "contacts.json"
FORMAT: Final = 1

_ADVICE = "remove it if this node has been running before; else join again with a new ticket"


def write(directory: Path, members: Mapping[int, Contact]) -> None:
    """Durable on return."""
    rows = [{"node": node, "addresses": list(each.addresses), "born": each.born.hex()}
            for node, each in members.items()]  # fmt: skip
    body = json.dumps({"format": FORMAT, "members": rows})
    identity.write_file(directory / FILE_NAME, body.encode() + b"\n")


def read(directory: Path) -> dict[int, Contact]:
    """Empty if there is no such file. Corrupt."""
    path = directory / FILE_NAME
    try:
        fields: Any = json.loads(path.read_bytes())
        if fields["format"] != FORMAT:
            raise Corrupt(str(path), 0, f"format {fields['format']!r}", "use the version that wrote it")
        return {int(row["node"]): Contact(tuple(map(str, row["addresses"])), bytes.fromhex(row["born"]))
                for row in fields["members"]}  # fmt: skip
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(str(path), 0, f"not a list of members: {error!r}", _ADVICE) from error
