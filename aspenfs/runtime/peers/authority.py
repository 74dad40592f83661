"""Keeper: what a running node does about certificates: renewing its own, signing for others, rotating CAs.

Belongs here: the requests `ca.*`, the row `c/authority`, the steps of a rotation. Not here: the files
(`credentials.py`), letting new nodes in (`admission.py`).

The row says which CAs the cluster trusts and which one signs; it holds nothing secret. The keys are on the
voters only, so that every leader can sign; a new voter asks another one for them, over its TLS link.
Everything is one loop that compares what is here with what the row says, and brings it nearer: it may be
cut off anywhere.

    c/authority  ->  msgpack map {certificates: [DER, …], signing: SHA-256 of a public key}
"""

import contextlib
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import msgpack
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from aspenfs import errors
from aspenfs.errors import AccessDenied, AspenError, InvalidArgument, NotSupported
from aspenfs.kv.store import Store
from aspenfs.kv.types import EQUAL, absent, compare_mod_revision, put
from aspenfs.limits import CA_CHECK_S, PROPOSAL_TIMEOUT_MS
from aspenfs.runtime import identity
from aspenfs.runtime.peers import ca, credentials
from aspenfs.runtime.peers.ca import Authority, NodeName
from aspenfs.runtime.peers.credentials import Credentials
from aspenfs.runtime.peers.network import Member, PeerNetwork
from aspenfs.seams import Clock

log = logging.getLogger(__name__)

ROW_KEY: Final = b"c/authority"
RENEW, KEYS, STATE = "ca.renew", "ca.keys", "ca.state"

T = TypeVar("T")

_chance = random.Random()  # own: nobody else's seed makes nodes act in step

_RETRY_S = 0.5  # at first, then twice as long each time
_LOST_S = 5  # a key that no voter has by then was lost with the node that made it
_ANOTHER = "another rotation is under way: wait for it, or try again"
_ASK_S = PROPOSAL_TIMEOUT_MS / 1000


class Cluster(Protocol):
    """What the keeper needs of the node; its host implements it."""

    def table(self) -> Mapping[int, Member]: ...

    def is_voter(self, node: int) -> bool: ...


class Row(NamedTuple):
    certificates: tuple[x509.Certificate, ...]
    signing: bytes  # fingerprint of the one that signs

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb({"certificates": [ca.der(each) for each in self.certificates],
                                       "signing": self.signing})  # fmt: skip
        return packed

    @property
    def fingerprints(self) -> set[bytes]:
        return {ca.fingerprint(each) for each in self.certificates}


def read_row(store: Store) -> tuple[Row, int] | None:
    """The row and its mod revision."""
    record = store.get(ROW_KEY)
    if record is None:
        return None
    fields = msgpack.unpackb(record.value)
    return Row(tuple(ca.load_certificates(fields["certificates"])), fields["signing"]), record.mod_revision


class State(NamedTuple):
    """How far a node has come with a rotation: fingerprints of CAs."""

    trusted: tuple[bytes, ...]
    issuer: bytes  # of its certificate
    keys: tuple[bytes, ...]


class Keeper:
    """Made once a node has credentials. `run` as long as the node runs."""

    def __init__(self, network: PeerNetwork, store: Store, cluster: Cluster, clock: Clock) -> None:
        self._network, self._store, self._cluster, self._clock = network, store, cluster, clock
        self._directory = network.credentials.directory
        self._authorities = credentials.authorities(self._directory)
        self._stirred = trio.Event()
        self._lock = trio.Lock()  # one at a time brings nearer
        network.handle(RENEW, self._renew_for)
        network.handle(KEYS, self._hand_out_keys)
        network.handle(STATE, self._tell_state)

    @property
    def bundle(self) -> Sequence[x509.Certificate]:
        return self._network.credentials.bundle

    @property
    def signing_fingerprint(self) -> bytes:
        """Of the CA that signs, as the cluster has it: what a ticket names."""
        found = read_row(self._store)
        return found[0].signing if found is not None else ca.fingerprint(self.bundle[0])

    @property
    def expires_ns(self) -> int:
        """When this node's certificate does, wall clock."""
        return ca.expires_ns(self._network.credentials.certificate)

    # --- signing ---

    def check_signs(self) -> None:
        """NotSupported on a node that does not hold the key of the CA that signs."""
        self._signing()

    def sign(self, public_key: ec.EllipticCurvePublicKey, name: NodeName) -> x509.Certificate:
        """As `check_signs`."""
        return ca.sign(self._signing(), public_key, name, self._clock.time_ns())

    def _signing(self) -> Authority:
        authority = self._signing_here()
        if authority is None:
            raise NotSupported(f"node {self._network.node_id} cannot sign certificates: it does not hold the "
                               "key of the CA (yet)")  # fmt: skip
        return authority

    def _signing_here(self) -> Authority | None:
        found = read_row(self._store)
        by_fingerprint = {each.fingerprint: each for each in self._authorities}
        if found is None:
            return self._authorities[0] if self._authorities else None
        return by_fingerprint.get(found[0].signing)

    async def establish(self) -> None:
        """Tells the cluster about the CA that `credentials.establish` made; on its first node."""
        if read_row(self._store) is None:
            row = Row(tuple(self.bundle), ca.fingerprint(self.bundle[0]))
            done = await self._store.txn([absent(ROW_KEY)], [put(ROW_KEY, row.pack())])
            await self._store.committed(done.revision)

    # --- requests of other nodes ---

    async def _renew_for(self, peer: int, body: Any) -> bytes:
        """`ca.renew`: a signing request, DER. The certificate, DER, for who asks and nobody else."""
        if type(body) is not bytes:
            raise InvalidArgument("a certificate signing request was expected")
        member = self._cluster.table().get(peer)
        if member is None or member.state == "removed" or not member.born:
            raise AccessDenied(f"node {peer} is no member that could have a certificate")
        name = NodeName(self._network.credentials.name.cluster_id, peer, member.born)
        certificate = self.sign(ca.check_request(body), name)
        log.info("ca: node=%d certificate renewed", peer)
        return ca.der(certificate)

    async def _hand_out_keys(self, peer: int, body: Any) -> bytes:
        """`ca.keys`: all keys, PEM; to voters only."""
        if not self._cluster.is_voter(peer):
            raise AccessDenied(f"node {peer} is not a voter: the keys of the CA are for voters")
        if not self._authorities:
            raise NotSupported(f"node {self._network.node_id} has no {identity.CA_KEY_FILE} itself")
        return ca.keys_pem(each.key for each in self._authorities)

    async def _tell_state(self, peer: int, body: Any) -> State:
        return self.state()

    def state(self) -> State:
        shown = self._network.credentials
        issuer = ca.issued_by(shown.certificate, shown.bundle)
        return State(tuple(map(ca.fingerprint, shown.bundle)), ca.fingerprint(issuer) if issuer else b"",
                     tuple(each.fingerprint for each in self._authorities))  # fmt: skip

    # --- the loop ---

    def stir(self) -> None:
        """The configuration has changed: look at once."""
        self._stirred.set()

    async def run(self) -> None:
        """Until cancelled. What does not work out is tried again; the log says why it did not."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_row)
            complaint, pause_s = "", float(CA_CHECK_S)
            while True:
                self._stirred = trio.Event()
                try:
                    await self._bring_nearer()
                    complaint, pause_s = "", float(CA_CHECK_S)
                except (AspenError, OSError) as error:
                    pause_s = min(2 * pause_s, CA_CHECK_S) if complaint else _RETRY_S
                    if str(error) != complaint:
                        complaint = str(error)
                        log.info("ca: not up to date yet: %s", complaint)
                with trio.move_on_after(pause_s * _chance.uniform(0.5, 1.0)):
                    await self._stirred.wait()

    async def _watch_row(self) -> None:
        """Only a hint when to look: what counts is the row as it is then."""
        while True:
            try:
                async for _ in self._store.watch(ROW_KEY, ROW_KEY + b"\0"):
                    self.stir()
            except (errors.Lagged, errors.Compacted):
                self.stir()

    async def _bring_nearer(self) -> None:
        async with self._lock:
            await self._compare()

    async def _compare(self) -> None:
        found = read_row(self._store)
        if found is None:
            return  # not established yet, or this node has not caught up
        row = found[0]
        shown = self._network.credentials
        if not row.fingerprints <= set(map(ca.fingerprint, shown.bundle)):
            await self._install(shown.certificate, _united(shown.bundle, row.certificates))
        if self._cluster.is_voter(self._network.node_id):
            await self._obtain_keys(row)
        elif self._authorities:
            await self._give_up_keys(row)
        await self._renew(row)
        await self._drop(row)

    async def _obtain_keys(self, row: Row) -> None:
        """A voter holds the keys of all CAs, so that it can sign when it leads. Takes what each voter has."""
        missing = row.fingerprints - self._held()
        for peer in self._voters() if missing else ():
            with contextlib.suppress(AspenError):
                pem = await self._network.request(peer, KEYS, None, timeout_s=_ASK_S)
                keys = ca.load_keys(pem) if type(pem) is bytes else []
                await self._add_keys(key for key in keys if ca.key_fingerprint(key.public_key()) in missing)
            missing = row.fingerprints - self._held()
            if not missing:
                log.info("ca: keys received")
        if missing:
            raise NotSupported("no voter that is connected has all keys of the CA")

    def _held(self) -> set[bytes]:
        return {each.fingerprint for each in self._authorities}

    async def _give_up_keys(self, row: Row) -> None:
        """Who is no voter needs none. Not before a voter has said that it holds them: a key is never
        lost to a configuration that this node misunderstands for a while."""

        def held(answer: Any) -> None:
            if not row.fingerprints <= set(_state(answer).keys):
                raise NotSupported("no voter that answered has all keys of the CA")

        await self._ask_voters(STATE, None, held)
        await self._keep_keys(set())
        log.info("ca: keys removed, this node is no voter")

    async def _add_keys(self, keys: Iterable[ec.EllipticCurvePrivateKey]) -> None:
        """To those in the file: a key counts from when its certificate is in ca.crt too."""
        await trio.to_thread.run_sync(credentials.add_authority_keys, self._directory, list(keys))
        self._authorities = credentials.authorities(self._directory)

    async def _keep_keys(self, fingerprints: set[bytes]) -> None:
        """These and no others."""
        await trio.to_thread.run_sync(credentials.keep_authority_keys, self._directory, fingerprints)
        self._authorities = credentials.authorities(self._directory)

    async def _renew(self, row: Row) -> None:
        """A new certificate when two thirds of the old one's time are over, or another CA signs."""
        shown = self._network.credentials
        issuer = ca.issued_by(shown.certificate, shown.bundle)
        fresh = self._clock.time_ns() < ca.renew_at_ns(shown.certificate)
        if fresh and issuer is not None and ca.fingerprint(issuer) == row.signing:
            return
        key = credentials.node_key(self._directory)
        assert key is not None
        if self._signing_here() is not None:
            certificate = self.sign(key.public_key(), shown.name)
        else:
            request = ca.request(ca.keys_pem([key]), f"node {shown.name.node_id}")
            certificate = await self._ask_voters(RENEW, request, lambda der: ca.load_certificates([der])[0])
        if ca.name_of(certificate) != shown.name:
            raise InvalidArgument("the certificate that came names another node")
        await self._install(certificate, shown.bundle)
        log.info("ca: certificate renewed")

    async def _drop(self, row: Row) -> None:
        """CAs that the cluster trusts no more, once this node does not live by them."""
        shown = self._network.credentials
        if set(map(ca.fingerprint, shown.bundle)) == row.fingerprints:
            return
        await self._install(shown.certificate, row.certificates)
        if self._authorities:
            await self._keep_keys(row.fingerprints)

    async def _install(self, certificate: x509.Certificate, bundle: Sequence[x509.Certificate]) -> None:
        made: Credentials = await trio.to_thread.run_sync(credentials.install, self._directory, certificate,
                                                          bundle)  # fmt: skip
        self._authorities = credentials.authorities(self._directory)
        self._network.set_credentials(made)

    async def _ask_voters(self, kind: str, body: Any, read: Callable[[Any], T]) -> T:
        """What `read` makes of the answer of the first voter that gives one for which it raises nothing."""
        failure: AspenError = errors.PeerUnreachable("no voter is connected")
        for peer in self._voters():
            try:
                return read(await self._network.request(peer, kind, body, timeout_s=_ASK_S))
            except AspenError as error:
                failure = error
        raise failure

    def _voters(self) -> list[int]:
        """Those that can be asked, in no order."""
        voters = [peer for peer in self._network.connected() if self._cluster.is_voter(peer)]
        return _chance.sample(voters, len(voters))

    # --- rotation ---

    async def rotate(self, progress: Callable[[str], object]) -> None:
        """Another CA takes over, without a moment in which two members do not trust each other.

        On a voter, best the leader; it may be cut off, and called again anywhere: the row says how far
        it has come. It waits for every member (remove those that will not come back). The steps:

        1. make a key, keep it; the row names both CAs, the old one signs
        2. every member trusts both, every voter has both keys
        3. the row says that the new one signs; members have their certificates renewed
        4. every member shows a certificate of the new one
        5. the row names only the new one; members trust the old one no more, its key is deleted
        """
        row, revision = await self._begun(progress)
        new = row.certificates[-1]
        fingerprint = ca.fingerprint(new)
        if row.signing != fingerprint:
            await self._until_all(revision, _has_both(row.fingerprints), "to trust the new CA", progress)
            row = row._replace(signing=fingerprint)
            revision = await self._write_row(row, revision)
        await self._until_all(revision, lambda state, voter: state.issuer == fingerprint,
                              "to renew its certificate", progress)  # fmt: skip
        revision = await self._write_row(Row((new,), fingerprint), revision)
        await self._until_all(revision, lambda state, voter: state.trusted == (fingerprint,),
                              "to forget the old CA", progress)  # fmt: skip

    async def _begun(self, progress: Callable[[str], object]) -> tuple[Row, int]:
        """The row with two CAs, the newer one last, and its mod revision. NotSupported without the keys."""
        row, revision = self._known_row()
        self.check_signs()
        signing = next(each for each in row.certificates if ca.fingerprint(each) == row.signing)
        if len(row.certificates) > 1:
            if row.signing == ca.fingerprint(row.certificates[-1]):
                return row, revision
            if await self._get_hold_of_keys(row):
                return row, revision
            progress("the new CA was lost with the node that made it: making another one")
        else:
            progress("making a new CA")
        async with self._lock:
            made = ca.new_authority(self._name(), self._clock.time_ns())
            await self._add_keys([made.key])  # before anybody hears of it
            row = Row((signing, made.certificate), row.signing)
            return row, await self._write_row(row, revision)

    async def _get_hold_of_keys(self, row: Row) -> bool:
        """Whether this node has all keys of a rotation that was begun, if need be from another voter."""
        with trio.move_on_after(_LOST_S):
            while not row.fingerprints <= self._held():
                with contextlib.suppress(AspenError):
                    await self._bring_nearer()
                await trio.sleep(_RETRY_S / 2)
            return True
        return False

    def _name(self) -> str:
        here = identity.read(self._directory)
        assert here is not None
        return here.name

    def _known_row(self) -> tuple[Row, int]:
        found = read_row(self._store)
        if found is None:
            raise NotSupported("this cluster has no CA yet: `aspen ticket create` makes it")
        return found

    async def _write_row(self, row: Row, revision: int) -> int:
        """Its new mod revision. Conflict."""
        unchanged = compare_mod_revision(ROW_KEY, EQUAL, revision)
        done = await self._store.txn([unchanged], [put(ROW_KEY, row.pack())])
        if not done.succeeded:
            raise errors.Conflict(_ANOTHER)
        await self._store.committed(done.revision)
        self.stir()
        return done.revision

    async def _until_all(self, revision: int, condition: Callable[[State, bool], bool], what: str,
                         progress: Callable[[str], object]) -> None:  # fmt: skip
        """Conflict if the row changes meanwhile: somebody else goes on with the rotation."""
        told = ""
        while True:
            if self._known_row()[1] != revision:
                raise errors.Conflict(_ANOTHER)
            missing = []
            for node, member in sorted(self._cluster.table().items()):
                if member.state != "removed" and not await self._fulfils(node, condition):
                    missing.append(str(node))
            if not missing:
                return
            line = f"waiting for node {', '.join(missing)} {what}"
            if line != told:
                progress(line)
                told = line
            await trio.sleep(_RETRY_S)

    async def _fulfils(self, node: int, condition: Callable[[State, bool], bool]) -> bool:
        if node == self._network.node_id:
            return condition(self.state(), self._cluster.is_voter(node))
        try:
            state = _state(await self._network.request(node, STATE, None, timeout_s=_ASK_S))
        except AspenError:
            return False
        return condition(state, self._cluster.is_voter(node))


def _state(answer: Any) -> State:
    match answer:
        case (tuple() as trusted, bytes() as issuer, tuple() as keys):
            if all(type(each) is bytes for each in (*trusted, *keys)):
                return State(trusted, issuer, keys)
    raise InvalidArgument("not an answer to ca.state")


def _has_both(fingerprints: set[bytes]) -> Callable[[State, bool], bool]:
    def condition(state: State, voter: bool) -> bool:
        return fingerprints <= set(state.trusted) and (not voter or fingerprints <= set(state.keys))

    return condition


def _united(first: Sequence[x509.Certificate], second: Sequence[x509.Certificate]) -> list[x509.Certificate]:
    known = set(map(ca.fingerprint, first))
    return [*first, *(each for each in second if ca.fingerprint(each) not in known)]
