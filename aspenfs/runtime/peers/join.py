"""Becoming a member: what a new node does with a ticket, until its state directory is that of a member.

Belongs here: the joiner's side of `admission.py`. Not here: what `aspen join` prints, starting the node.

Each step may be the last before a crash; the same call goes on, with the same key and birth mark, and the
cluster knows it again.

1. `node.key` and `wal/born` are made here, if they are not there yet.
2. An address of the ticket is asked for its CAs, over TLS that proves nothing yet. One of them must have the
   fingerprint of the ticket; else somebody else answers there. Nothing secret was said.
3. A second connection trusts that CA alone. Only now the secret is sent, with a signing request.
4. The answer is checked, and put down: `ca.crt`, `node.crt`, at last `cluster.json`: with it, this is a node.
"""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import trio
from cryptography import x509

from aspenfs import errors
from aspenfs.errors import AspenError, InvalidArgument, PeerRefused, PeerUnreachable, ProtocolError
from aspenfs.limits import (
    PEER_FRAME_BYTES_MAX,
    PEER_GREETING_BYTES_MAX,
    PEER_HANDSHAKE_S,
    PROPOSAL_TIMEOUT_MS,
)
from aspenfs.runtime import identity
from aspenfs.runtime.identity import Identity
from aspenfs.runtime.peers import addresses, ca, credentials, frames
from aspenfs.runtime.peers.addresses import Address
from aspenfs.runtime.peers.admission import check_node_name
from aspenfs.runtime.peers.ca import NodeName
from aspenfs.runtime.peers.frames import Admitted, Join, Type
from aspenfs.runtime.peers.stream import Broken, TlsStream
from aspenfs.runtime.peers.tickets import Ticket
from aspenfs.seams import Clock, Entropy

T = TypeVar("T")

_NS_PER_S = 1_000_000_000
# These come from one that answers for the whole cluster: another address would say the same.
_FINAL = (errors.TicketExpired, errors.TicketUsed, errors.TicketUnknown, InvalidArgument, errors.NotSupported)


class Contact(NamedTuple):
    """A member to talk to before the table has come in; fits `network.Member`."""

    addresses: tuple[str, ...]
    born: bytes
    state: str = "member"

    @property
    def topology(self) -> int:
        """Whatever the member says itself is newer."""
        return 0


class Joined(NamedTuple):
    identity: Identity
    members: dict[int, Contact]  # as the cluster had them, this node among them


async def join(ticket: Ticket, directory: Path, name: str, own_addresses: Sequence[str], clock: Clock,
               entropy: Entropy, *, promote: bool = True) -> Joined:  # fmt: skip
    """Makes `directory` that of a member, a learner at first; a voter when it has caught up, if `promote`.

    The caller holds the directory's lock. AlreadyExists: it is a node already. TicketExpired, TicketUsed,
    TicketUnknown, ForeignCluster; PeerUnreachable names each address and why it did not answer.
    """
    check_node_name(name)
    addresses.parse_all(own_addresses)
    if ticket.expires_s * _NS_PER_S <= clock.time_ns():
        raise errors.TicketExpired("the ticket is over (or the clock of this host is wrong): make a new one "
                                   "with `aspen ticket create`")  # fmt: skip
    born, key = await trio.to_thread.run_sync(_prepare, directory, entropy)
    request = ca.request(key, name)
    wish = Join(ticket.cluster_id, ticket.secret, request, born, name, tuple(own_addresses), promote)
    admitted, bundle = await _ask_each(ticket, wish)
    return await trio.to_thread.run_sync(_put_down, directory, ticket, admitted, born, bundle)


def _prepare(directory: Path, entropy: Entropy) -> tuple[bytes, bytes]:
    """Birth mark and key (PEM) of the node that is to be; those that are there, at a second try."""
    if identity.read(directory) is not None or (directory / "state").exists():
        raise errors.AlreadyExists(f"{directory} belongs to a node already: choose another state directory")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    born = identity.give_birth(directory, entropy)
    return born, ca.keys_pem([credentials.make_node_key(directory)])


async def _ask_each(ticket: Ticket, wish: Join) -> tuple[Admitted, list[x509.Certificate]]:
    """The answer of the first member that gives one, and its CAs."""
    failures: list[AspenError] = []
    for text in ticket.addresses:
        address = addresses.parse(text)
        try:
            authority = await _authority_at(address, ticket)
            admitted = await _admission_at(address, ticket, authority, wish)
            return admitted, ca.load_certificates(admitted.bundle)
        except _FINAL:
            raise
        except AspenError as error:
            failures.append(error)
    # What somebody answered is worth more than that nobody did.
    for failure in failures:
        if not isinstance(failure, PeerUnreachable) or len(failures) == 1:
            raise failure
    causes = "; ".join(str(error) for error in failures)
    raise PeerUnreachable(f"no address of the ticket let this node in: {causes}")


async def _authority_at(address: Address, ticket: Ticket) -> x509.Certificate:
    """The CA of the ticket, as whoever listens there has it. ForeignCluster if it has another one."""

    async def ask(stream: TlsStream) -> tuple[bytes, tuple[bytes, ...]]:
        payload = await _answer(stream, frames.encode_question(), Type.AUTHORITIES, PEER_GREETING_BYTES_MAX)
        return frames.decode_authorities(payload)

    _, bundle = await _over(address, [], ask, PEER_HANDSHAKE_S)
    for certificate in ca.load_certificates(bundle):
        if ca.fingerprint(certificate) == ticket.fingerprint:
            return certificate
    raise errors.ForeignCluster(f"{address}: what answers there does not have the CA of the ticket: it is "
                                f"another cluster than {ticket.cluster_name!r}, or its CA was changed since; "
                                "make a new ticket with `aspen ticket create`")  # fmt: skip


async def _admission_at(address: Address, ticket: Ticket, authority: x509.Certificate,
                        wish: Join) -> Admitted:  # fmt: skip
    async def ask(stream: TlsStream) -> Admitted:
        certificate = stream.peer_certificate()
        name = ca.name_of(certificate) if certificate is not None else None
        if name is None or name.cluster_id != ticket.cluster_id:
            raise errors.ForeignCluster(f"{address}: what answers there is no node of the ticket's cluster")
        payload = await _answer(stream, frames.encode_join(wish), Type.ADMITTED, PEER_FRAME_BYTES_MAX)
        return frames.decode_admitted(payload)

    return await _over(address, [authority], ask, PEER_HANDSHAKE_S + 2 * PROPOSAL_TIMEOUT_MS / 1000)


async def _over(address: Address, bundle: Sequence[x509.Certificate],
                ask: Callable[[TlsStream], Awaitable[T]], timeout_s: float) -> T:  # fmt: skip
    """What `ask` makes of a TLS connection; with an empty bundle, to whomever it may be."""
    sock = await addresses.connect(address)
    stream = TlsStream(sock, credentials.client_context(bundle), server=False)
    try:
        with trio.move_on_after(timeout_s):
            await stream.handshake()
            return await ask(stream)
    except Broken as error:
        raise PeerUnreachable(f"{address}: {error}") from None
    finally:
        stream.close()
    raise PeerUnreachable(f"{address}: no answer in {timeout_s:g} s")


async def _answer(stream: TlsStream, frame: bytes, wanted: Type, bytes_max: int) -> memoryview:
    await stream.send([frame])
    kind, payload = frames.split((await stream.receive(bytes_max))[0])
    if kind == Type.REFUSED:
        refusal = frames.decode_refusal(payload)
        if isinstance(refusal, errors.ClusterError | InvalidArgument | errors.NotSupported):
            raise refusal
        raise PeerRefused(str(refusal))
    if kind != wanted:
        raise ProtocolError(f"a frame of type {kind} was not expected")
    return payload


def _put_down(directory: Path, ticket: Ticket, admitted: Admitted, born: bytes,
              bundle: Sequence[x509.Certificate]) -> Joined:  # fmt: skip
    (certificate,) = ca.load_certificates([admitted.certificate])
    if ca.name_of(certificate) != NodeName(ticket.cluster_id, admitted.node, born):
        raise ProtocolError("the certificate that came is not for this node")
    credentials.install(directory, certificate, bundle)
    here = Identity(ticket.cluster_id, admitted.cluster_name, admitted.node)
    identity.write(directory, here)
    contacts = {node: Contact(places, mark) for node, places, mark in admitted.members}
    return Joined(here, contacts)
