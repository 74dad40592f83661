"""Where this node listens, where the others find it, and what it is called: `peer.json` of a state directory.

    {"format": 1, "name": "db1", "listen": "*:7420", "advertise": ["192.0.2.7:7420"]}

Written by `aspen init` and `aspen join`, or when a node without a network makes its first ticket; by hand
if an address changes, or from the mount options `listen=` and `advertise=`, which override it. A node
without this file has no network. What is advertised gets into the member's row when the node starts.

Belongs here: this file, and guessing what nobody said. Not here: sockets, the form of addresses (`peers/`).
"""

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from aspenfs.errors import Corrupt, InvalidArgument
from aspenfs.limits import NODE_NAME_BYTES_MAX, PEER_PORT
from aspenfs.runtime import identity
from aspenfs.runtime.peers import addresses
from aspenfs.runtime.peers.addresses import Address

FILE_NAME: Final = "peer.json"
FORMAT: Final = 1
LISTEN: Final = f"*:{PEER_PORT}"  # every interface: who has no certificate gets no further than the greeting

# Addresses that no one has (RFC 5737, RFC 3849): which of ours would the kernel use to send to them?
_ELSEWHERE: Final = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


class PeerSettings(NamedTuple):
    """As people write addresses: HOST:PORT. `advertise` is not empty, the best one first."""

    name: str
    listen: str
    advertise: tuple[str, ...]


def decide(name: str = "", listen: str = "", advertise: Sequence[str] = ()) -> PeerSettings:
    """Settings from what was said, and from this machine what was not. InvalidArgument."""
    where = addresses.parse(listen or LISTEN, listen=True)
    if advertise:
        shown = tuple(map(str, addresses.parse_all(advertise)))
    elif where.port == 0:
        raise InvalidArgument(f"--listen {listen}: whoever chooses that port must name it with --advertise")
    else:
        shown = tuple(map(str, _reachable(where)))
    return PeerSettings(check_name(name or host_name()), str(where), shown)


def _reachable(where: Address) -> list[Address]:
    """Addresses at which others may reach who listens there."""
    if where.host not in ("", "0.0.0.0", "::"):
        return [where]
    found = [address for family, elsewhere in _ELSEWHERE if (address := _source_for(family, elsewhere))]
    if where.host == "0.0.0.0":
        found = [address for address in found if ":" not in address]
    # With no way to anywhere there may still be other nodes on this very machine.
    return [Address(host, where.port) for host in found or ["127.0.0.1"]]


def _source_for(family: socket.AddressFamily, elsewhere: str) -> str:
    """This machine's address on the way there; "" if there is none. Nothing is sent."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def host_name() -> str:
    name = socket.gethostname().partition(".")[0]
    return f"node{name}" if not name or name.isdigit() else name


def check_name(name: str) -> str:
    """InvalidArgument for what cannot be a node's name. Digits alone would be taken for an id."""
    if not 1 <= len(name.encode()) <= NODE_NAME_BYTES_MAX or not name.isprintable() or {*"/ ,"} & {*name}:
        raise InvalidArgument(f"node name {name!r}: 1 to {NODE_NAME_BYTES_MAX} bytes without / , or space")
    if name.isdigit():
        raise InvalidArgument(f"node name {name!r}: a name of digits alone looks like an id")
    return name


# --- the file ---


def read(directory: Path) -> PeerSettings | None:
    """None if there is no such file. Corrupt."""
    path = directory / FILE_NAME
    try:
        fields: Any = json.loads(path.read_bytes())
        if fields["format"] != FORMAT:
            raise Corrupt(str(path), 0, f"format {fields['format']!r}", "use the version that wrote it")
        settings = PeerSettings(fields["name"], fields["listen"], tuple(fields["advertise"]))
        check_name(settings.name)
        addresses.parse(settings.listen, listen=True)
        addresses.parse_all(settings.advertise)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, InvalidArgument) as error:
        advice = 'write it anew: {"format": 1, "name": …, "listen": "*:7420", "advertise": ["HOST:7420"]}'
        raise Corrupt(str(path), 0, str(error), advice) from error
    return settings


def write(directory: Path, settings: PeerSettings) -> None:
    """Durable on return."""
    body = json.dumps({"format": FORMAT, **settings._asdict()})
    identity.write_file(directory / FILE_NAME, body.encode() + b"\n")


def effective(directory: Path, listen: str | None, advertise: Sequence[str]) -> PeerSettings | None:
    """What the file says, where mount options do not say otherwise; None: this node has no network."""
    settings = read(directory)
    if settings is None:
        return decide("", listen or "", advertise) if listen or advertise else None
    if listen and not advertise and listen != settings.listen:
        advertise = decide(settings.name, listen).advertise
    return PeerSettings(settings.name, listen or settings.listen, tuple(advertise) or settings.advertise)
